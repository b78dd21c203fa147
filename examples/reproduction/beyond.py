"""Experiments of the authors' notebooks, and one that is not in the paper."""

from __future__ import annotations

from typing import Any

import memcircuits as mc
from memcircuits.editing.noise import weight_noise
from memcircuits.evidence.ablation import Ablation
from reproduction.activations import activation_cosine
from reproduction.statistics import mean, top_head
from reproduction.study import Outcome, Study, experiment, row


@experiment("Noise on weights", "authors' notebook")
def noise(study: Study) -> Outcome:
    sizes = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
    tried = f"sizes tried: {', '.join(f'{size:g}' for size in sizes)}"
    result, points = [], []
    for mask in ("top", "random"):
        curve = weight_noise(
            study.model,
            study.memorized,
            study.own,
            sizes=sizes,
            mask=mask,
            draws=1,
            seed=study.seed,
            **study.options,
        )
        for name, part in curve.to_frame().groupby("set", sort=False):
            points += part.assign(set=f"{name}, {mask}").to_dict("records")
            lost = part["size"][part["em"] <= part["em"].iloc[0] / 2]
            value: Any = float(lost.iloc[0]) if len(lost) else f"above {sizes[-1]:g}"
            note = tried
            if part["em"].iloc[0] == 0:
                value, note = None, "nothing is recited without noise"
            what = f"noise on the {mask} 0.1 % of weights that halves the EM of {name}"
            n, units = curve.em[str(name)].shape[-1], "of a matrix' root mean square"
            result.append(row(what, "", value, n, units, note))
    chart = {
        "frame": points,
        "title": "EM against the size of the noise",
        "x": "size",
        "y": "em",
        "by": "set",
        "y_label": "EM",
        "units": "tokens",
    }
    return Outcome(result, [("Lines", chart)])


@experiment("Description", "authors' notebooks")
def description(study: Study) -> Outcome:
    rows = []
    for name, paragraphs in {"memorized": study.memorized, "controls": study.control}.items():
        scan, n = mc.scan(study.model, paragraphs, **study.options), len(paragraphs)
        least = "mean log p of the least likely fifth of the tokens"
        margin = mean(scan.token_margin.mean(1))
        rows += [
            row(f"NLL of the continuation, {name}", "", mean(scan.nll), n, "nats/token"),
            row(f"distance of the two largest logits, {name}", "", margin, n, "logits"),
            row(f"{least}, {name}", "", mean(scan.min_k()), n, "nats"),
        ]
    cosine = activation_cosine(study)
    what = "cosine of mean z, memorized and controls, mean over heads"
    note = f"smallest {float(cosine.min()):.2f} in {top_head(-cosine)}"
    rows.append(row(what, "", float(cosine.mean()), len(study.memorized), note=note))
    some = study.draw(study.memorized, 20)
    second = mc.perturb_prefix(
        study.model, some, replacement="second", seed=study.seed, **study.options
    )
    what = "EM lost by putting in the model's second choice of a prefix token, memorized"
    rows.append(row(what, "", mean(second.em_drop[:, 1:].mean(1)), len(some), "tokens"))
    return Outcome(rows)


@experiment("Are these heads needed?", "not in the paper")
def ablation(study: Study) -> Outcome:
    heads = {
        "largest contrastive gradient": top_head(study.contrast.per_head(study.adapter.n_heads)),
        "most attention to rare tokens": top_head(-study.rare.values),
    }
    sets = {
        "memorized": (study.memorized, ""),
        "controls": (study.own, "their own greedy continuations"),
    }
    rows = []
    for why, head in heads.items():
        for name, (paragraphs, note) in sets.items():
            effect = Ablation(study.model, paragraphs, mode="zero").effects([head], **study.options)
            what = f"EM lost without {head} ({why}), {name}"
            value = mean(-effect[:, 0, 1])
            rows.append(row(what, "", value, len(paragraphs), "tokens", note))
    return Outcome(rows)
