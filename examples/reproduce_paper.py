"""The paper's experiments on any model: its numbers beside yours, on one page and in one JSON.

    python examples/reproduce_paper.py
    python examples/reproduce_paper.py --model EleutherAI/gpt-neo-125m --paragraphs 50_50_preds.pt \
        --controls controls.jsonl

Stoehr, Gordon, Zhang, Lewis 2024, "Localizing Paragraph Memorization in Language Models", arXiv
2403.19851. Without `--model` it runs on six paragraphs of each kind of the shipped organism, in two
minutes or so. The paper's numbers are those of GPT-Neo 125M and of nothing else: on another model
they say what is measured, not what should come out.

Each experiment's result is saved as it ends, under a key made of the weights, the paragraphs and
all options; the same command goes on where it was stopped. A row that cannot be had stays in the
table and says why.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor

import memcircuits as mc
from memcircuits import pages
from memcircuits.core.io import write_atomically
from memcircuits.core.statistics import bootstrap_means
from memcircuits.editing.noise import weight_noise
from memcircuits.editing.recipe import STOEHR_2024
from memcircuits.evidence.ablation import Ablation
from memcircuits.evidence.gradients.parameters import ParameterGradients
from memcircuits.evidence.patching.sweeps import patch_layers
from memcircuits.evidence.rare_tokens import RareTokenAttention
from memcircuits.evidence.triggers.pairs import CleanCorrupted
from memcircuits.evidence.triggers.perturbation import Perturbation
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.measure.scanning import Scan
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import HEAD_SITES, hook_name
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance, versions
from memcircuits.results.result import Result

SCHEMA = "memcircuits.reproduction/1"
PAPER = "https://arxiv.org/abs/2403.19851"
PAPERS_MODEL = "gpt-neo-125m"
SMALL, USUAL = 6, 50  # paragraphs of each kind: on the organism, on other models
EDITS = 2  # the slowest part on a processor: give more where there is a GPU
RESAMPLES = 2000
FOLDS = 5  # of the jackknife
CHECKED = 4  # heads that attribution patching measures exactly
SEEN, UNSEEN = 13, 10  # controls that an edit is given (it sees 11), and that judge it
Kind = TypeVar("Kind", bound=Result)


@dataclass(frozen=True)
class Finding:
    """One row: what was measured, the paper's number and ours.

    Attributes:
        measure: what.
        paper: the paper's number as it prints it; empty where it shows a figure only.
        ours: ours; None where it could not be had, and `note` says why.
        low: lower end of the 95 % interval, None where there is none.
        high: upper end.
        n: paragraphs (or pairs, or edits) it was measured on.
        units: of both numbers.
        note: what the reader must know.
    """

    measure: str
    paper: str = ""
    ours: float | str | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    units: str = ""
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What an experiment gives: rows, and charts as block name -> settings, in plain data."""

    findings: Sequence[Finding]
    charts: Sequence[tuple[str, dict[str, Any]]] = ()


@dataclass(frozen=True)
class Study:
    """A model, its paragraphs and all options, with what several experiments share.

    Attributes:
        given: the paragraphs to be sorted into memorized ones and others.
        controls: more paragraphs, not memorized; None if there are none but those of `given`.
        as_given: take `given` for the memorized and `controls` for the others whatever a scan says.
        limit: paragraphs of each kind at most.
        edits: paragraphs that are edited, one at a time.
        folder: where results are kept.
    """

    model: Any
    given: mc.Paragraphs
    controls: mc.Paragraphs | None
    unigrams: mc.UnigramTable | None
    as_given: bool
    limit: int
    edits: int
    patching: str
    seed: int
    memory_budget: int | None
    folder: Path

    @property
    def adapter(self) -> Adapter:
        return adapt(self.model)

    @property
    def options(self) -> dict[str, Any]:
        """For the calls of the library."""
        return {"memory_budget": self.memory_budget, "progress": sys.stderr.isatty()}

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides a number."""
        sets = {"paragraphs": self.given, "controls": self.controls}
        provenance = Provenance.of(
            self.adapter,
            sets,
            as_given=self.as_given,
            limit=self.limit,
            edits=self.edits,
            patching=self.patching,
            seed=self.seed,
            unigrams=None if self.unigrams is None else self.unigrams.source,
        )
        script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
        return {**dataclasses.asdict(provenance), "script": script}

    @cached_property
    def parts(self) -> Path:
        """The folder of this very study's results."""
        text = json.dumps(self.settings, sort_keys=True, default=str)
        return self.folder / "parts" / hashlib.sha256(text.encode()).hexdigest()[:16]

    def kept(self, kind: type[Kind], name: str, measure: Callable[[], Kind]) -> Kind:
        """A result that several experiments need: read where it is saved, else measured."""
        path = self.parts / f"{name}.safetensors"
        if not path.exists():
            measure().save(path)
        return kind.load(path)

    # -- the sets ---------------------------------------------------------------------------------

    @cached_property
    def everything(self) -> mc.Paragraphs:
        return self.given if self.controls is None else self.given + self.controls

    @cached_property
    def scan(self) -> Scan:
        return self.kept(Scan, "scan", lambda: mc.scan(self.model, self.everything, **self.options))

    @cached_property
    def buckets(self) -> dict[str, mc.Paragraphs]:
        """The paper's four sets by EM, of 50 tokens: all that there are, in the order given."""
        names = self.scan.buckets
        if self.as_given:
            names = ["50"] * len(self.given) + ["0-10"] * (len(names) - len(self.given))
        fine = self.scan.finite.tolist()
        found = {}
        for name in ("0-10", "11-29", "30-49", "50"):
            rows = [i for i, bucket in enumerate(names) if bucket == name and fine[i]]
            if rows:
                found[name] = self.everything[rows]
        return found

    def draw(self, paragraphs: mc.Paragraphs, limit: int | None = None) -> mc.Paragraphs:
        """At most `limit` of them, at random by the seed."""
        return paragraphs.sample(limit or self.limit, torch.Generator().manual_seed(self.seed))

    @cached_property
    def memorized(self) -> mc.Paragraphs:
        if "50" not in self.buckets:
            em = int(self.scan.em.max())
            raise CannotRun(f"no paragraph is memorized (largest EM {em})")
        return self.draw(self.buckets["50"])

    @cached_property
    def control(self) -> mc.Paragraphs:
        if "0-10" not in self.buckets:
            raise CannotRun("no paragraph has an EM of 10 or less: give --controls")
        return self.draw(self.buckets["0-10"])

    @cached_property
    def own(self) -> mc.Paragraphs:
        """The controls with the model's own greedy continuation: the paper's targets for them."""
        return greedy_continuations(self.model, self.control, **self.options)

    @cached_property
    def perturbed(self) -> Perturbation:
        return self.kept(
            Perturbation,
            "perturbed",
            lambda: mc.perturb_prefix(self.model, self.memorized, seed=self.seed, **self.options),
        )

    @cached_property
    def pairs(self) -> CleanCorrupted:
        """The memorized and their perturbed twins (the paper's PMP)."""
        return self.perturbed.pairs(model=self.model)

    @cached_property
    def contrast(self) -> ParameterGradients:
        return self.kept(
            ParameterGradients,
            "contrast",
            lambda: mc.contrastive_gradients(
                self.model,
                self.memorized,
                self.control,
                curvature=False,
                seed=self.seed,
                **self.options,
            ),
        )

    @cached_property
    def rare(self) -> RareTokenAttention:
        return self.kept(
            RareTokenAttention,
            "rare",
            lambda: mc.rare_token_attention(
                self.model,
                self.memorized + self.control,
                self.unigrams,
                seed=self.seed,
                progress=self.options["progress"],
            ),
        )


class CannotRun(Exception):
    """An experiment lacks something; the message says what."""


@dataclass(frozen=True)
class Experiment:
    title: str
    source: str
    run: Callable[[Study], Outcome]


EXPERIMENTS: dict[str, Experiment] = {}


def experiment(title: str, source: str) -> Callable[..., Callable[[Study], Outcome]]:
    def register(run: Callable[[Study], Outcome]) -> Callable[[Study], Outcome]:
        EXPERIMENTS[run.__name__.replace("_", "-")] = Experiment(title, source, run)
        return run

    return register


# -- the experiments ------------------------------------------------------------------------------


@experiment("Sets of paragraphs", "section 3")
def sets(study: Study) -> Outcome:
    paper = {"50": "442", "30-49": "141", "11-29": "436", "0-10": "12,422"}
    note = "counts of the files given" + (", taken as given" if study.as_given else "")
    n = len(study.everything)
    found = []
    for bucket, printed in paper.items():
        count = len(study.buckets.get(bucket, ()))
        found.append(row(f"paragraphs with EM {bucket}", printed, count, n, "paragraphs", note))
    return Outcome(found)


@experiment("Duplication", "figure 2")
def duplication(study: Study) -> Outcome:
    try:
        table = study.scan.by_repetitions()
    except mc.InputError as error:
        raise CannotRun(f"{error} (the authors' mem_strings.csv has a column count)") from None
    frame = study.scan.to_frame()
    times = frame[next(key for key in ("repetitions", "count", "duplicates") if key in frame)]
    found = []
    for measure in ("em", "nll"):
        known = torch.tensor([times.to_list(), frame[measure].to_list()], dtype=torch.float64).T
        what = f"rank correlation of {measure.upper()} with the times seen in training"
        found.append(row(what, "", resampled(known, rank_correlation), len(known)))
    chart = {
        "frame": table[table["repetitions"] > 0].to_dict("records"),
        "title": "EM against the times seen in training",
        "x": "repetitions",
        "y": "em",
        "x_label": "times seen in training",
        "y_label": "EM",
        "units": "tokens",
        "log_x": True,
    }
    return Outcome(found, [("Lines", chart)])


@experiment("Prefix perturbation", "figure 3")
def perturbation(study: Study) -> Outcome:
    other = mc.perturb_prefix(study.model, study.own, seed=study.seed, **study.options)
    notes = ("", "against the model's own greedy continuations, as in the paper")
    found, points = [], []
    sets = {"memorized": (study.perturbed, "12.19"), "not memorized": (other, "33.12")}
    for (name, (result, printed)), note in zip(sets.items(), notes, strict=True):
        # The paper's code leaves position 0 as it is: its means are over the other positions.
        value = mean(result.em_drop[:, 1:].mean(1))
        what = f"EM lost by replacing one prefix token, {name}"
        found.append(row(what, printed, value, len(result.em), "tokens", note))
        points += result.curves().assign(set=name).to_dict("records")
    chart = {
        "frame": points,
        "title": "EM left when the token at a position is replaced",
        "x": "position",
        "y": "em",
        "by": "set",
        "y_label": "EM",
        "units": "tokens",
    }
    if "em_low" in points[0]:
        chart |= {"low": "em_low", "high": "em_high"}
    return Outcome(found, [("Lines", chart)])


@experiment("Parameter gradients", "figures 4 and 9")
def gradients(study: Study) -> Outcome:
    paper = {
        "0-10": ("53.01", "29"),
        "11-29": ("27.14", "40"),
        "30-49": ("14.30", "54"),
        "50": ("9.71", "59"),
    }
    note = "the sum grows with the loss; the share does not, and is the number to compare"
    found, points = [], []

    def layers(some: mc.Paragraphs) -> Tensor:
        return mc.parameter_gradients(study.model, some, **study.options).layers

    def both(layers: Tensor) -> list[float]:
        return [float(layers.sum()), lower_half(layers)]

    for bucket, (total, share) in paper.items():
        names = [
            f"sum of the largest |gradient| of all components, EM {bucket}",
            f"share of the lower half of the layers, EM {bucket}",
        ]
        values, n = [None, None], 0
        if bucket in study.buckets:
            paragraphs = study.draw(study.buckets[bucket])
            n = len(paragraphs)
            whole, rest = jackknife(paragraphs, layers)
            values = intervals(both(whole), [both(part) for part in rest])
            shares = 100 * whole / whole.sum()
            points += [
                {"layer": i, "share": float(value), "EM": f"EM {bucket}"}
                for i, value in enumerate(shares)
            ]
        notes = [note, ""] if n else ["no such paragraph"] * 2
        for what, printed, value, units, told in zip(
            names, (total, share), values, ("", "%"), notes, strict=True
        ):
            found.append(row(what, printed, value, n, units, told))
    chart = {
        "frame": points,
        "title": "Gradient by layer",
        "x": "layer",
        "y": "share",
        "by": "EM",
        "y_label": "share of the gradient",
        "units": "%",
    }
    return Outcome(found, [("Bars", chart)])


@experiment("Contrastive gradients", "equation 3")
def contrast(study: Study) -> Outcome:
    result, n_heads = study.contrast, study.adapter.n_heads
    heads = result.per_head(n_heads)
    best = top_head(heads)
    n = len(study.memorized)
    each = [top_head(per_head(result.samples, i, n_heads)) for i in range(n)]
    cosine = torch.cat([values.flatten() for values in result.cosine.values()])
    told = "at the original weights the KL term has no gradient: this is the NLL's alone"
    spread = f"from {cosine.min():.2f} to {cosine.max():.2f} by component"
    what = "cosine of memorized and other gradients, mean over components"
    found = [
        row("head with the largest gradient", "L1H2", str(best), n, note=told),
        row("paragraphs whose own largest is that head", "", agreeing(each, best), n, "%"),
        row(what, "", float(cosine.mean()), n, note=spread),
    ]
    chart = heatmap("Largest |gradient| of each head", heads, "gradient", result.units, best)
    return Outcome(found, [chart])


@experiment("Sparse fine-tuning", "figure 5")
def fine_tuning(study: Study) -> Outcome:
    controls = study.draw(study.buckets.get("0-10", study.control), SEEN + UNSEEN)
    if len(controls) < SEEN + 2:
        raise CannotRun(f"{len(controls)} controls; an edit is given {SEEN}, others judge it")
    seen, unseen = controls[:SEEN], controls[SEEN:]
    unseen = greedy_continuations(study.model, unseen, **study.options)
    clean, twins = study.pairs
    n = min(study.edits, len(clean))
    paper = {
        ("unlearn", "all"): ("26.90", "45.11"),
        ("unlearn", "top"): ("26.75", "45.84"),
        ("unlearn", "random"): ("49.80", "44.86"),
        ("edit", "all"): ("25.65", "37.57"),
        ("edit", "top"): ("33.65", "38.67"),
    }
    note = (
        f"the paper's recipe: {STOEHR_2024.steps} steps of Adam at {STOEHR_2024.learning_rate:g}; "
        "exactly the masked weights change; the controls are others than those of the edit, with "
        "their own continuations (the paper's are those in its KL term)"
    )
    found, points = [], []
    for (job, mask), printed in paper.items():
        em = torch.empty(2, n)
        for i in range(n):
            options: dict[str, Any] = {"mask": mask, "seed": study.seed + i, **study.options}
            options |= {"recipe": STOEHR_2024, "kl_budget": None}
            if job == "unlearn":
                made = mc.unlearn(study.model, clean[i], seen, em_below=0.0, **options)
            else:
                made = mc.edit(study.model, clean[i], twins[i], seen, **options)
            with made.apply(study.model):
                for j, group in enumerate((clean[i], unseen)):
                    em[j, i] = mc.scan(study.model, group, **study.options).em.float().mean()
        arm = f"{job}, " + {"all": "all weights"}.get(mask, f"{mask} 0.1 %")
        for group, values, number in zip(("the target", "controls"), em, printed, strict=True):
            value = mean(values)
            what = f"EM of {group} after {arm}"
            found.append(row(what, number, value, n, "tokens", "" if found else note))
            points.append({"arm": arm, "EM": value[0], "of": f"{group}, here"})
            points.append({"arm": arm, "EM": float(number), "of": f"{group}, paper"})
    chart = {
        "frame": points,
        "title": "EM after fine-tuning, of 50 tokens",
        "x": "arm",
        "y": "EM",
        "by": "of",
        "units": "tokens",
    }
    return Outcome(found, [("Bars", chart)])


@experiment("Activation gradients", "figures 6 and 10")
def activation_gradients(study: Study) -> Outcome:
    found, charts = [], []
    for name, paragraphs in {"memorized": study.memorized, "controls": study.control}.items():
        folds = [
            (len(fold), mc.activation_gradients(study.model, fold, **study.options).values)
            for fold in split(paragraphs)
        ]
        for site in folds[0][1]:
            parts = torch.stack([n * values[site].sum((1, 2)) for n, values in folds])
            rest = [[lower_half(parts.sum(0) - part)] for part in parts]
            (value,) = intervals([lower_half(parts.sum(0))], rest if len(rest) > 1 else [])
            what = f"share of the lower half of the layers in |dL/d{site}|, {name}"
            found.append(row(what, "", value, len(paragraphs), "%"))
    clean, corrupted = study.pairs
    at_token: dict[str, list[Tensor]] = {}
    for i, pair in enumerate(clean):
        position, token = (corrupted.metadata[key][i] for key in ("position", "first_impacted"))
        result = mc.activation_gradients(
            study.model, pair, sites=HEAD_SITES, token=token, **study.options
        )
        for site, values in result.values.items():
            at_token.setdefault(site, []).append(values[:, :, position])
    for site, each in at_token.items():
        heads = torch.stack(each).mean(0)
        best = top_head(heads)
        share, low, high = agreeing([top_head(values) for values in each], best)
        note = f"the largest in {share:.0f} % of the pairs"
        note += "" if low is None else f" ({low:.0f} to {high:.0f})"
        what = f"head with the largest |dL/d{site}| at the perturbed token"
        found.append(row(what, "", str(best), len(each), note=f"{note}; L of the first wrong one"))
        title = f"|dL/d{site}| at the perturbed token"
        charts.append(heatmap(title, heads, "gradient", "nats per unit", best))
    return Outcome(found, charts)


@experiment("Activation patching", "appendix")
def patching(study: Study) -> Outcome:
    clean, corrupted = study.pairs
    found, charts = [], []
    for direction in ("noising", "denoising"):
        for site in HEAD_SITES:
            result = mc.patch_heads(
                study.model,
                clean,
                corrupted,
                site=site,
                positions="changed",
                metric="first_impacted",
                direction=direction,
                method=study.patching,
                check=CHECKED,
                seed=study.seed,
                **study.options,
            )
            # Attribution: the best of the heads that were measured exactly, as far as it is known.
            best = top_head(result.exact.abs() if result.exact.numel() else result.values.abs())
            note = f"{100 * float(result.share[best]):.0f} % of the difference between the runs"
            if result.exact.numel():
                note += (
                    f"; estimated to first order, exactly {float(result.exact[best]):.3g}, "
                    f"correlation {result.agreement['all']:.2f}"
                )
            value = mean(result.samples["first_impacted"][:, best.layer, best.head])
            what = f"{direction}, {site} at the perturbed token: best head {best}"
            found.append(row(what, "", value, len(clean), "nats", note))
            if site == "v":  # what others read from the perturbed token
                title = f"{direction.capitalize()} v of each head at the perturbed token"
                charts.append(heatmap(title, result.values, "effect", "nats"))
    return Outcome(found, charts)


@experiment("Patching of layers", "appendix")
def layer_patching(study: Study) -> Outcome:
    few = slice(0, 4)
    clean, corrupted = study.pairs.clean[few], study.pairs.corrupted[few]
    result = patch_layers(study.model, clean, corrupted, metric="first_impacted", **study.options)
    effects = result.samples["first_impacted"]  # [pair, layer, pos]
    at_token = effects[torch.arange(len(clean)), :, torch.tensor(corrupted.metadata["position"])]
    below = ((at_token / at_token[:, :1]).mean(0) < 0.5).nonzero()
    layer = f"layer {int(below[0])}" if len(below) else "none"
    what = "layer at which the residual stream of the perturbed token carries less than half"
    note = "of what it carries below the first layer, on the first wrong token; noising"
    title = f"Residual stream by layer and position: {clean.names[0]}"
    kind, chart = heatmap(title, effects[0], "effect", "nats")
    found = [row(what, "", layer, len(clean), note=note)]
    return Outcome(found, [(kind, chart | {"col_label": "position"})])


@experiment("Attention to rare tokens", "figures 6 and 7")
def rare_tokens(study: Study) -> Outcome:
    result = study.rare
    best = top_head(-result.values)
    n, papers = len(result.attention), is_papers(study)
    found = []
    for head in sorted({best} | ({mc.Head(1, 2)} if papers else set())):
        ours, null = aggregated(result, head, study.seed)
        what = f"correlation of frequency rank and attention summed per rank, {head}"
        note = (
            f"as the paper aggregates; with counts permuted within paragraphs {null:.2f}: high "
            "ranks are often empty"
        )
        printed = "-0.97" if papers and head == (1, 2) else "-0.97 (L1H2)"
        found.append(row(what, printed, ours, n, note=note))
    value = mean(result.samples["tau"][:, best.layer, best.head])
    what = f"attention and count within a paragraph, {best}, the most negative head"
    note = f"p = {float(result.p_value[best]):.2g} against counts permuted within paragraphs"
    note = "; ".join((note, *result.notes))
    found.append(row(what, "", value, n, "tau-b", note))
    note = f"mean over all heads {float(result.entropy.mean()):.2f}"
    what = f"entropy of the attention of {best} to the prefix"
    found.append(row(what, "", float(result.entropy[best]), n, "nats", note))
    title = "Attention to common (+) or rare (-) tokens"
    return Outcome(found, [heatmap(title, result.values, "tau-b", "", best)])


@experiment("Noise on weights", "authors' notebook")
def noise(study: Study) -> Outcome:
    sizes = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
    tried = f"sizes tried: {', '.join(f'{size:g}' for size in sizes)}"
    found, points = [], []
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
            found.append(row(what, "", value, n, units, note))
    chart = {
        "frame": points,
        "title": "EM against the size of the noise",
        "x": "size",
        "y": "em",
        "by": "set",
        "y_label": "EM",
        "units": "tokens",
    }
    return Outcome(found, [("Lines", chart)])


@experiment("Description", "authors' notebooks")
def description(study: Study) -> Outcome:
    found = []
    for name, paragraphs in {"memorized": study.memorized, "controls": study.control}.items():
        scan, n = mc.scan(study.model, paragraphs, **study.options), len(paragraphs)
        least = "mean log p of the least likely fifth of the tokens"
        margin = mean(scan.token_margin.mean(1))
        found += [
            row(f"NLL of the continuation, {name}", "", mean(scan.nll), n, "nats/token"),
            row(f"distance of the two largest logits, {name}", "", margin, n, "logits"),
            row(f"{least}, {name}", "", mean(scan.min_k()), n, "nats"),
        ]
    cosine = activation_cosine(study)
    what = "cosine of mean z, memorized and controls, mean over heads"
    note = f"smallest {float(cosine.min()):.2f} in {top_head(-cosine)}"
    found.append(row(what, "", float(cosine.mean()), len(study.memorized), note=note))
    some = study.draw(study.memorized, 20)
    second = mc.perturb_prefix(
        study.model, some, replacement="second", seed=study.seed, **study.options
    )
    what = "EM lost by putting in the model's second choice of a prefix token, memorized"
    found.append(row(what, "", mean(second.em_drop[:, 1:].mean(1)), len(some), "tokens"))
    return Outcome(found)


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
    found = []
    for why, head in heads.items():
        for name, (paragraphs, note) in sets.items():
            effect = Ablation(study.model, paragraphs, mode="zero").effects([head], **study.options)
            what = f"EM lost without {head} ({why}), {name}"
            value = mean(-effect[:, 0, 1])
            found.append(row(what, "", value, len(paragraphs), "tokens", note))
    return Outcome(found)


# -- rows and charts ------------------------------------------------------------------------------

Value = tuple[float, float | None, float | None]


def row(
    measure: str,
    paper: str,
    value: Value | float | str | None,
    n: int,
    units: str = "",
    note: str = "",
) -> Finding:
    ours, low, high = value if isinstance(value, tuple) else (value, None, None)
    return Finding(measure, paper, ours, low, high, n, units, note)


def heatmap(
    title: str, values: Tensor, name: str, units: str, best: mc.Head | None = None
) -> tuple[str, dict[str, Any]]:
    chart = {"title": title, "values": values.tolist(), "name": name, "units": units}
    if best is not None:
        chart |= {"marks": [list(best)], "marks_mean": "the head in the table"}
    return "Heatmap", chart


# -- statistics -----------------------------------------------------------------------------------


def mean(samples: Tensor) -> Value:
    """Mean over paragraphs with its bootstrap interval; none from a single one."""
    samples = samples.float()[samples.isfinite()]
    if len(samples) < 2:
        return float(samples.mean()), None, None
    draws = bootstrap_means(samples, RESAMPLES, torch.Generator().manual_seed(0))
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975])).tolist()
    return float(samples.mean()), low, high


def agreeing(each: Sequence[mc.Head], best: mc.Head) -> Value:
    """How many paragraphs have `best` for their own best head, per cent."""
    return mean(torch.tensor([100.0 * (head == best) for head in each]))


def resampled(rows: Tensor, statistic: Callable[[Tensor], float]) -> Value:
    """A statistic of rows with its bootstrap interval, for what is no mean."""
    generator, n = torch.Generator().manual_seed(0), len(rows)
    chosen = torch.randint(n, (200, n), generator=generator)
    draws = torch.tensor([statistic(rows[draw]) for draw in chosen])
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975])).tolist()
    return statistic(rows), low, high


def rank_correlation(rows: Tensor) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(rows[:, 0].numpy(), rows[:, 1].numpy()).statistic)


def split(paragraphs: mc.Paragraphs) -> list[mc.Paragraphs]:
    """At most `FOLDS` parts of about the same size."""
    folds = min(FOLDS, len(paragraphs))
    return [paragraphs[list(range(i, len(paragraphs), folds))] for i in range(folds)]


def jackknife(
    paragraphs: mc.Paragraphs, measure: Callable[[mc.Paragraphs], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """What is measured on all paragraphs, and without a fifth of them at a time.

    For what is no mean over paragraphs, such as the largest gradient of a batch.
    """
    folds = min(FOLDS, len(paragraphs))
    rest = [[j for j in range(len(paragraphs)) if j % folds != i] for i in range(folds)]
    without = [measure(paragraphs[rows]) for rows in rest] if folds > 1 else []
    return measure(paragraphs), without


def intervals(whole: Sequence[float], rest: Sequence[Sequence[float]]) -> list[Value]:
    """Numbers with Student's intervals from their values without each part (grouped jackknife)."""
    from scipy.stats import t

    k = len(rest)
    if k < 2:
        return [(value, None, None) for value in whole]
    parts = torch.tensor(rest, dtype=torch.float64)
    errors = ((k - 1) / k * (parts - parts.mean(0)).square().sum(0)).sqrt()
    widths = (float(t.ppf(0.975, k - 1)) * errors).tolist()
    return [
        (value, value - width, value + width) for value, width in zip(whole, widths, strict=True)
    ]


def lower_half(layers: Tensor) -> float:
    """Share of the lower half of the layers, per cent."""
    return 100 * float(layers[: len(layers) // 2].sum() / layers.sum())


def top_head(values: Tensor) -> mc.Head:
    """The head with the largest value; NaN is no candidate."""
    flat = values.nan_to_num(nan=-torch.inf).flatten()
    layer, head = divmod(int(flat.argmax()), values.shape[1])
    return mc.Head(layer, head)


def per_head(samples: Any, row: int, n_heads: int) -> Tensor:
    """Largest value of one paragraph over a head's four matrices, [layer, head]."""
    parts = [samples[name][row] for name in ("W_Q", "W_K", "W_V", "W_O")]
    return torch.stack([v.repeat_interleave(n_heads // v.shape[1], 1) for v in parts]).amax(0)


def aggregated(result: RareTokenAttention, head: mc.Head, seed: int) -> tuple[float, float]:
    """The paper's way: attention summed per dense rank over all paragraphs, and its correlation.

    Returns:
        Pearson's correlation with the rank, and its mean with counts permuted in each paragraph.
    """
    attention = result.attention[:, head.layer, head.head]
    ranks = torch.stack([row.unique(return_inverse=True)[1] for row in result.counts])

    def correlation(attention: Tensor) -> float:
        sums = torch.zeros(int(ranks.max()) + 1).scatter_add_(
            0, ranks.flatten(), attention.flatten()
        )
        pair = torch.stack([torch.arange(len(sums), dtype=torch.float32), sums])
        return float(torch.corrcoef(pair)[0, 1])

    generator = torch.Generator().manual_seed(seed)
    orders = [torch.rand(attention.shape, generator=generator).argsort(-1) for _ in range(100)]
    null = [correlation(attention.gather(1, order)) for order in orders]
    return correlation(attention), math.fsum(null) / len(null)


def activation_cosine(study: Study) -> Tensor:
    """Cosine of the mean z of memorized and control paragraphs, [layer, head]."""
    adapter = study.adapter
    names = [hook_name("z", layer) for layer in range(adapter.n_layers)]
    means = []
    with adapter.preserving_state():
        for paragraphs in (study.memorized, study.control):
            total: Tensor | float = 0.0
            for paragraph in paragraphs:
                run = adapter.run(paragraph.ids[:, :-1], positions=slice(-1, None), read=names)
                total = total + torch.stack([run.cache[name][0].float().cpu() for name in names])
            means.append(torch.as_tensor(total).transpose(1, 2).flatten(2))  # [layer, head, rest]
    return torch.nn.functional.cosine_similarity(*means, dim=-1)


def is_papers(study: Study) -> bool:
    """Whether the model is the paper's, going by its name."""
    return study.adapter.label.lower().endswith(PAPERS_MODEL)


# -- running, saving, showing ---------------------------------------------------------------------


def run(study: Study, names: Iterable[str]) -> list[dict[str, Any]]:
    """Run experiments, or read what they gave before; each is saved as it ends."""
    done = []
    for name in names:
        path = study.parts / f"{name}.json"
        if path.exists():
            done.append(json.loads(path.read_text(encoding="utf-8")))
            say(f"{name}: read from {path.parent.name}")
            continue
        chosen, started, busy = EXPERIMENTS[name], time.perf_counter(), time.process_time()
        say(f"{name} ...")
        try:
            outcome = chosen.run(study)
        except (CannotRun, mc.InputError) as error:
            outcome = Outcome([Finding("not run", note=str(error))])
        seconds = time.perf_counter() - started
        say(f"{name}: {seconds:.1f} s")
        found = {
            "name": name,
            "title": chosen.title,
            "source": chosen.source,
            "findings": [dataclasses.asdict(finding) for finding in outcome.findings],
            "charts": [list(chart) for chart in outcome.charts],
            "seconds": round(seconds, 1),
            "processor_seconds": round(time.process_time() - busy, 1),
        }
        found = json.loads(json.dumps(plain(found), allow_nan=False))
        write_atomically(path, json.dumps(found))
        done.append(found)
    return done


def plain(value: Any) -> Any:
    """NaN becomes null: JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def table(done: Sequence[dict[str, Any]], command: str, seed: int) -> list[dict[str, Any]]:
    """One row per number."""
    return [
        {
            "experiment": part["title"],
            "source": part["source"],
            **finding,
            "seed": seed,
            "command": f"{command} --only {part['name']}",
        }
        for part in done
        for finding in part["findings"]
    ]


def page(
    study: Study, done: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> pages.Page:
    """The page: what was run, one table per experiment, its charts, what could not be had."""
    name, missing = study.adapter.label, [row for row in rows if row["ours"] is None]
    blocks: list[pages.Block] = [pages.Prose([told(study)], title="How to read it")]
    for part in done:
        frame = pd.DataFrame(part["findings"])
        frame["95 %"] = [span(row) for row in part["findings"]]
        frame["ours"] = [shown(row["ours"]) for row in part["findings"]]
        frame = frame[["measure", "paper", "ours", "95 %", "units", "n", "note"]]
        blocks.append(
            pages.Table(
                frame.loc[:, (frame != "").any()],
                title=part["title"],
                note=f"The paper's {part['source']}. {part['seconds']:.0f} s."
                if part["source"] != "not in the paper"
                else f"Not in the paper. {part['seconds']:.0f} s.",
            )
        )
        blocks += [block(kind, settings) for kind, settings in part["charts"]]
    if missing:
        frame = pd.DataFrame(missing)[["experiment", "measure", "paper", "note"]]
        blocks.append(pages.Table(frame, title="What could not be had, and why"))
    facts = {
        "model": name,
        "weights": study.adapter.fingerprint(),
        **{k: f"{len(v)} paragraphs, {v.hash}" for k, v in groups(study).items()},
        "seed": study.seed,
        **versions(),
    }
    command = rows[0]["command"].rpartition(" --only ")[0]
    blocks.append(pages.Facts(facts, commands=[command], title="What was run"))
    return pages.Page(
        title=f"Localizing paragraph memorization, on {name}",
        lead="The experiments of Stoehr et al. 2024 (arXiv 2403.19851): the paper's numbers, which "
        "are GPT-Neo 125M's, beside those measured here.",
        blocks=blocks,
        footer="Made by memcircuits.",
    )


def groups(study: Study) -> dict[str, mc.Paragraphs]:
    sets = {"paragraphs given": study.given, "controls given": study.controls}
    return {name: group for name, group in sets.items() if group is not None}


def told(study: Study) -> list[Any]:
    same = is_papers(study)
    return [
        "Intervals are 95 %, from resampling paragraphs, or from leaving out a fifth of them at a "
        "time where a number is no mean. An empty cell in the paper's column: it shows a figure "
        "without a number. ",
        pages.strong(
            "This is the paper's model. Rows may still differ from the paper: weights are not "
            "folded here, and edits are measured on held-out controls."
            if same
            else "This is not the paper's model: its numbers need GPT-Neo 125M's weights and "
            "paragraphs, and stand here to say what is measured."
        ),
        " ",
        pages.link("The paper", PAPER),
    ]


def block(kind: str, settings: dict[str, Any]) -> pages.Block:
    settings = dict(settings)
    if "frame" in settings:
        settings["frame"] = pd.DataFrame(settings["frame"])
    if "values" in settings:
        settings["values"] = [
            [math.nan if value is None else value for value in row] for row in settings["values"]
        ]
    if "marks" in settings:
        settings["marks"] = [tuple(mark) for mark in settings["marks"]]
    found: pages.Block = getattr(pages, kind)(**settings)
    return found


def shown(value: Any) -> str:
    if value is None:
        return "not had"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def span(row: dict[str, Any]) -> str:
    return "" if row["low"] is None else f"{row['low']:.3g} to {row['high']:.3g}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", default="organism", help="name on the hub, folder or .gguf file")
    add("--paragraphs", help="file of paragraphs; those with EM 50 are the memorized ones")
    add("--controls", help="file of paragraphs that are not memorized")
    add("--as-given", action="store_true", help="--paragraphs are memorized, --controls are not")
    add("--unigrams", help="table of token counts (memcircuits unigrams); else counted here")
    add("--max-paragraphs", type=int, help=f"of each kind; {USUAL}, {SMALL} on the organism")
    add("--edits", type=int, default=EDITS, help="paragraphs edited, one at a time")
    add("--patching", choices=("attribution", "exact"), default="attribution")
    add("--n-prefix", type=int, default=50, help="tokens")
    add("--n-continuation", type=int, default=50, help="tokens")
    add("--only", nargs="+", choices=EXPERIMENTS, metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    add("--device", default="auto")
    add("--dtype", default="float32")
    add("--seed", type=int, default=0)
    add("--memory-budget", type=int, help="bytes that one batch may take")
    add("--out", type=Path, default=Path("reproduction"), help="folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Path:
    given = arguments(argv)
    shipped = given.model in ("organism", "organism-planted")
    if given.paragraphs is None and not shipped:
        raise mc.InputError("--paragraphs", "not given", "the shipped ones are the organism's")
    if given.as_given and (given.paragraphs is None or given.controls is None):
        raise mc.InputError("--as-given", "set", "it needs --paragraphs and --controls")
    model = mc.load_model(given.model, device=given.device, dtype=given.dtype)

    def read(path: str | None) -> mc.Paragraphs | None:
        lengths = {"n_prefix": given.n_prefix, "n_continuation": given.n_continuation}
        return None if path is None else mc.Paragraphs.read(path, model, **lengths)

    table_of = mc.UnigramTable.read(given.unigrams) if given.unigrams else None
    study = Study(
        model=model,
        given=read(given.paragraphs) or mc.Paragraphs.shipped(),
        controls=read(given.controls),
        unigrams=table_of or (mc.UnigramTable.shipped() if shipped else None),
        as_given=given.as_given,
        limit=given.max_paragraphs or (SMALL if shipped else USUAL),
        edits=given.edits,
        patching=given.patching,
        seed=given.seed,
        memory_budget=given.memory_budget,
        folder=given.out,
    )
    command = " ".join(["python examples/reproduce_paper.py", *asked(given)])
    return write(study, given.only or EXPERIMENTS, command)


def asked(given: argparse.Namespace) -> list[str]:
    """The options that were given, without the folders of this machine."""
    words = []
    for name, value in vars(given).items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value not in (None, False) and name not in ("only", "out"):
            words += [flag, Path(value).name if Path(str(value)).exists() else str(value)]
    return words


def write(study: Study, names: Iterable[str], command: str) -> Path:
    """Run, write `reproduction.html` and `reproduction.json`, print the table."""
    done = run(study, names)
    rows = table(done, command, study.seed)
    data = {
        "schema": SCHEMA,
        "papers_model": is_papers(study),
        "rows": rows,
        "not_had": [
            f"{row['experiment']}: {row['measure']}: {row['note']}"
            for row in rows
            if row["ours"] is None
        ],
        "seconds": {part["name"]: part["seconds"] for part in done},
        "processor_seconds": {part["name"]: part["processor_seconds"] for part in done},
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "settings": study.settings,
    }
    path = study.folder / "reproduction.json"
    write_atomically(path, json.dumps(plain(data), indent=1, allow_nan=False) + "\n")
    page(study, done, rows).save(study.folder / "reproduction.html")
    frame = pd.DataFrame(rows)
    frame["ours"] = [shown(value) for value in frame["ours"]]
    frame["95 %"] = [span(row) for row in rows]
    print(frame[["measure", "paper", "ours", "95 %", "n"]].to_string(index=False))
    print(f"\n{sum(data['seconds'].values()):.0f} s, {len(data['not_had'])} rows not had")
    print(f"wrote {path} and reproduction.html beside it")
    return path


if __name__ == "__main__":
    try:
        main()
    except (mc.InputError, OSError, MemoryError) as error:
        sys.exit(f"reproduce_paper: {error}")
