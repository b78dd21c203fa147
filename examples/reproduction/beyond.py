"""Experiments of the authors' notebooks, and one that is not in the paper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import memcircuits as mc
from memcircuits.editing.noise import weight_noise
from memcircuits.evidence.ablation import Ablation
from reproduction.charts import Chart, lines
from reproduction.statistics import mean, top_head
from reproduction.study import Finding, Outcome, Study, experiment, row

OURS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)  # of a matrix' root mean square
PAPERS = tuple(0.0015 * step for step in range(6))  # of its standard deviation, as in the notebook
ONE_HEAD_SIZE, ONE_HEAD_WEIGHTS = 0.2, (33, 67, 100)  # of root mean squares, and of weights
NOISY = 20  # paragraphs of each kind; each is scanned 22 times
ARMS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "top 0.1 %": ("top", OURS),
    "random 0.1 %": ("random", OURS),
    "top 0.1 % of each component, the notebook's sizes": ("top-per-component", PAPERS),
}


@experiment("Noise on weights", "authors' notebook")
def noise(study: Study) -> Outcome:
    rows: list[Finding] = []
    charts: list[Chart] = []
    sets = noisy_sets(study)
    for arm, (mask, sizes) in ARMS.items():
        curve = weight_noise(
            study.model,
            **sets,
            sizes=sizes,
            mask=mask,
            draws=1,
            seed=study.seed,
            **study.options,
        )
        frame = curve.to_frame()
        for name, part in frame.groupby("set", sort=False):
            lost = part["size"][part["em"] <= part["em"].iloc[0] / 2]
            value: Any = float(lost.iloc[0]) if len(lost) else f"above {sizes[-1]:g}"
            note = f"sizes tried: {', '.join(f'{size:g}' for size in sizes)}"
            if part["em"].iloc[0] == 0:
                value, note = None, "nothing is recited without noise"
            what = f"noise that halves the EM of {name}: {arm}"
            n, units = curve.em[str(name)].shape[-1], "of a matrix' root mean square"
            rows.append(row(what, "", value, n, units, note))
        points = frame.to_dict("records")
        for measure, units in {"em": "tokens", "nll": "nats/token"}.items():
            title = f"{measure.upper()} against noise: {arm}"
            labels = {"by": "set", "y_label": measure.upper(), "units": units}
            charts.append(lines(title, points, "size", measure, **labels))
    head, points = noise_on_one_head(study)
    note = f"The notebook's second experiment: noise of {ONE_HEAD_SIZE:g} root mean squares."
    labels = {"by": "set", "y_label": "EM", "units": "tokens", "note": note}
    title = f"EM against the number of weights in W_V of {head} that get noise"
    charts.append(lines(title, points, "weights", "em", **labels))
    for name in sets:
        most = [point for point in points if point["set"] == name][-1]
        what = f"EM of {name} with noise on {most['weights']} weights in W_V of {head}"
        n = len(sets[name])
        rows.append(row(what, "", most["em"], n, "tokens", "the largest gradients of the matrix"))
    return Outcome(rows, charts)


def noisy_sets(study: Study) -> dict[str, mc.Paragraphs]:
    return {
        "memorized": study.draw(study.memorized, NOISY),
        "control": study.draw(study.own, NOISY),
    }


def noise_on_one_head(study: Study) -> tuple[mc.Head, list[dict[str, Any]]]:
    """EM with noise on more and more top weights in W_V of the head with the largest gradient."""
    head = top_head(study.contrast.per_head(study.adapter.n_heads))
    size = study.adapter.weight(head.layer, "W_V").values[0].numel()
    sets = noisy_sets(study)
    points: list[dict[str, Any]] = []
    for name, paragraphs in sets.items():
        em = mc.scan(study.model, paragraphs, **study.options).em.float().mean()
        points.append({"set": name, "weights": 0, "em": float(em)})
    for n_weights in ONE_HEAD_WEIGHTS:
        curve = weight_noise(
            study.model,
            **sets,
            sizes=(ONE_HEAD_SIZE,),
            fraction=min(1.0, n_weights / size),
            heads=[head],
            components=["W_V"],
            draws=1,
            seed=study.seed,
            **study.options,
        )
        for name, em in curve.em.items():
            points.append({"set": name, "weights": curve.n_weights, "em": float(em.mean())})
    return head, points


@experiment("Description", "authors' notebooks")
def description(study: Study) -> Outcome:
    rows: list[Finding] = []
    points = []
    for name, paragraphs in {"memorized": study.memorized, "controls": study.control}.items():
        scan, n = mc.scan(study.model, paragraphs, **study.options), len(paragraphs)
        least = "mean log p of the least likely fifth of the tokens"
        margin = mean(scan.token_margin.mean(1))
        rows += [
            row(f"NLL of the continuation, {name}", "", mean(scan.nll), n, "nats/token"),
            row(f"distance of the two largest logits, {name}", "", margin, n, "logits"),
            row(f"{least}, {name}", "", mean(scan.min_k()), n, "nats"),
        ]
        for place, logits in zip(("first", "second"), top_two(study, paragraphs), strict=True):
            points += [
                {"position": position, "logit": float(logit), "which": f"{name}, {place}"}
                for position, logit in enumerate(logits, 1)
            ]
    some = study.draw(study.memorized, 20)
    second = mc.perturb_prefix(
        study.model, some, replacement="second", seed=study.seed, **study.options
    )
    what = "EM lost by putting in the model's second choice of a prefix token, memorized"
    rows.append(row(what, "", mean(second.em_drop[:, 1:].mean(1)), len(some), "tokens"))
    note = "Mean over paragraphs; the position is that of the token predicted."
    title = "The two largest logits at each position"
    return Outcome(rows, [lines(title, points, "position", "logit", by="which", note=note)])


def top_two(study: Study, paragraphs: mc.Paragraphs) -> Tensor:
    """The two largest logits that predict each token but the first, mean over paragraphs, [2, pos].

    Text that the model reads behind a BOS has one for the first token too, which is left out.
    """
    total = torch.zeros(2, paragraphs.ids.shape[1] - 1)
    with study.adapter.preserving_state():
        for ids in paragraphs.inputs[:, :-1].split(1):
            logits = study.adapter.run(ids, positions=slice(paragraphs.n_bos, None)).logits
            total += logits[0].float().topk(2, dim=-1).values.T.cpu()
    return total / len(paragraphs)


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
