"""Write docs/unlearning.md from runs on the shipped organism: python docs/make_unlearning.py.

Every run leaves a small file in --work and is not done again. docs/unlearning.json keeps what the
runs found: with --page the page is written from that alone. With --only some are run, and sections
that need others stay as they are. Everything takes two hours of one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import memcircuits as mc
from memcircuits.core.statistics import bootstrap_means
from memcircuits.editing.curvature import Curvature
from memcircuits.editing.edit import Edit
from memcircuits.editing.evaluation import extraction_probability, random_prefixes
from memcircuits.editing.noise import weight_noise
from memcircuits.editing.recipe import NATURAL_GRADIENT, STOEHR_2024, Recipe
from memcircuits.editing.relearning import recovery_curve
from memcircuits.editing.unlearning import control_curvature
from memcircuits.measure.continuation import read_continuation
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.measure.gradients import mean_gradient
from memcircuits.models.registry import adapt
from memcircuits.organism import DATA
from memcircuits.results.provenance import versions

SEED = 1
DEVELOPMENT = 44  # memorized paragraphs that the recipe was tuned on; the others are reported
FRONT, ABLATION = 44, 12  # of them
UNSEEN, HELDOUT, ATTACKS = 32, 16, 10
BUDGET = 0.002  # nats/token
RATES = {
    "all": (1e-5, 3e-5, 1e-4),
    "top": (3e-4, 1e-3, 3e-3),
    "random": (1e-3, 1e-2, 3e-2),
    "random-per-tensor": (1e-3, 1e-2, 3e-2),
}
TABLE = {"all": 3e-5, "top": 1e-3, "random": 1e-3, "random-per-tensor": 1e-3}
AS_MANY = 0.033  # of the weights: what ours changes for all paragraphs together
AS_MANY_RATES = (3e-4, 1e-3, 3e-3)
FURTHER = {"all": (1e-4, 3e-4), "top": (3e-3, 1e-2)}  # of all paragraphs together
ARMS = {
    "all": "all weights",
    "top": "top 0.1 %",
    "random": "random 0.1 %",
    "random-per-tensor": "random 0.1 % per matrix",
}
Runs = dict[str, dict[str, Any]]  # name -> what was found
VARIANTS: dict[str, tuple[str, Recipe]] = {
    "natural": ("`NATURAL_GRADIENT`, the default", NATURAL_GRADIENT),
    "margin": (
        "objective: margin of all tokens",
        dataclasses.replace(NATURAL_GRADIENT, objective="margin"),
    ),
    "nll": ("objective: log-likelihood", dataclasses.replace(NATURAL_GRADIENT, objective="nll")),
    "diagonal": (
        "curvature: diagonal only",
        dataclasses.replace(NATURAL_GRADIENT, curvature="diagonal"),
    ),
    "plain-mask": (
        "mask: by plain gradient",
        dataclasses.replace(NATURAL_GRADIENT, curved_mask=False),
    ),
    "no-shrink": ("no shrinking", dataclasses.replace(NATURAL_GRADIENT, shrink=False)),
    "adam": (
        "Adam and a KL term instead of curvature (lr 1e-3)",
        dataclasses.replace(NATURAL_GRADIENT, curvature="none", learning_rate=1e-3),
    ),
}
AT_ONCE = dataclasses.replace(NATURAL_GRADIENT, one_by_one=False, step_kl=3e-4)
BESIDES: dict[str, dict[str, Any]] = {
    "natural": {"arm": "top", "variant": "natural"},
    "guarded": {"arm": "top", "variant": "natural", "guarded": True},
    "all": {"arm": "all", "rate": 1e-4},
    "top": {"arm": "top", "rate": 3e-3},
}
BUCKETS = {"0-10": (0, 10), "11-29": (11, 29), "30-49": (30, 49), "50": (50, 50)}
PAPER_SHARE = {"0-10": 29, "11-29": 40, "30-49": 54, "50": 59}


class Setting:
    """Model, splits and what is measured before any edit; one per process."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = mc.load_model()
        self.adapter = adapt(self.model)
        self.fingerprint = self.adapter.fingerprint()
        generator = torch.Generator().manual_seed(SEED)
        control = mc.Paragraphs.shipped("control")
        planted = mc.Paragraphs.shipped("planted")
        memorized = mc.scan(self.model, planted, progress=False).memorized
        assert memorized is not None
        memorized = memorized[torch.randperm(len(memorized), generator=generator)]
        control = control[torch.randperm(len(control), generator=generator)]
        self.targets, self.tuned_on = memorized[DEVELOPMENT:], memorized[:DEVELOPMENT]
        self.control = control[:80]  # 64 for the optimisation, 16 for its budget
        self.guarded = self.tuned_on + control[: 80 - DEVELOPMENT]
        self.few = control[:13]  # 11 and 2, as the paper's 10
        self.unseen = control[-UNSEEN:]
        self.heldout = mc.Paragraphs.read(DATA / "heldout.jsonl", n_prefix=1, n_continuation=127)
        self.heldout = self.heldout[:HELDOUT]
        # What an edit is compared with: taken here, where no edit can be in force.
        self.own = greedy_continuations(self.model, self.unseen, progress=False)
        self.original = self.logits(self.own).log_softmax(-1)

    @cached_property
    def curvature(self) -> Curvature:
        return control_curvature(self.model, self.control)

    @cached_property
    def guarded_curvature(self) -> Curvature:
        return control_curvature(self.model, self.guarded)

    def logits(self, paragraphs: mc.Paragraphs) -> torch.Tensor:
        with self.adapter.preserving_state():
            positions = slice(paragraphs.n_prefix - 1, None)
            return self.adapter.run(paragraphs.ids[:, :-1], positions=positions).logits.float()

    def controls(self) -> dict[str, float]:
        """What unseen controls and held-out text are like at the weights as they are."""
        original, logits = self.original, self.logits(self.own)
        kl = (original.exp() * (original - logits.log_softmax(-1))).sum(-1).mean()
        found = read_continuation(logits, self.own.continuation)
        heldout = mc.scan(self.model, self.heldout, progress=False).nll.mean()
        return {
            "kl": float(kl),
            "own": float(found.em.float().mean()),
            "heldout": float(heldout),
        }

    def target(self, paragraphs: mc.Paragraphs) -> dict[str, list[float]]:
        found = mc.scan(self.model, paragraphs, progress=False)
        attacked = random_prefixes(paragraphs, self.adapter.d_vocab, ATTACKS, SEED)
        em = mc.scan(self.model, attacked, progress=False).em.view(len(paragraphs), -1)
        return {
            "em": found.em.tolist(),
            "nll": found.nll.tolist(),
            "bits": found.bits.tolist(),
            "loose": found.loose_match.tolist(),
            "extraction": extraction_probability(found.log_prob, 1000).tolist(),
            "attacked": torch.maximum(em.amax(-1), found.em).tolist(),
        }


@cache
def setting() -> Setting:
    return Setting()


# -- runs -----------------------------------------------------------------------------------------


def one(index: int, arm: str, *, rate: float = 0.0, variant: str = "", all_tokens: bool = False):
    """One paragraph edited by itself; without an arm nothing is done."""
    s = setting()
    target = s.targets[index]
    return edited(target, arm, rate, variant, 0.0 if all_tokens else None)


def besides(index: int, arm: str, *, rate: float = 0.0, variant: str = "", guarded: bool = False):
    """What an edit of one paragraph does to other recitations, which were no controls of it.

    With `guarded`, further recitations are among its controls.
    """
    s = setting()
    target = s.targets[index]
    others = s.targets[[i for i in range(len(s.targets)) if i != index]]
    with make(target, arm, rate, variant, guarded=guarded).apply(s.model):
        return {
            "others": mc.scan(s.model, others, progress=False).em.tolist(),
            "em": mc.scan(s.model, target, progress=False).em.tolist(),
            "kl": s.controls()["kl"],
        }


def unedited() -> dict[str, Any]:
    """The model as it is, and what it runs on."""
    return edited(setting().targets, "", 0, "", None) | {"versions": versions_line()}


def together(arm: str, *, rate: float = 0.0, variant: str = "", fraction: float = 0.001):
    """All paragraphs in one edit."""
    return edited(setting().targets, arm, rate, variant, None, fraction)


@cache
def all_forgotten() -> Edit:
    """All paragraphs by the default recipe."""
    return make(setting().targets, "top", 0.0, "natural")


def edited(
    target: mc.Paragraphs,
    arm: str,
    rate: float,
    variant: str,
    em_below: float | None,
    fraction: float = 0.001,
) -> dict[str, Any]:
    s = setting()
    if not arm:
        return s.controls() | s.target(target)
    start = time.process_time()
    if variant == "natural" and len(target) > 1:
        found = all_forgotten()
    else:
        found = make(target, arm, rate, variant, em_below, fraction)
    seconds = time.process_time() - start
    with found.apply(s.model):
        measured = s.controls() | s.target(target)
    return measured | {
        "edit_seconds": seconds,
        "steps": len(found.history["em"]) - 1,
        "stopped": found.stopped,
        "masked": found.n_masked,
        "candidates": found.n_candidates,
        "norm": found.norm,
    }


def make(
    target: mc.Paragraphs,
    arm: str,
    rate: float,
    variant: str,
    em_below: float | None = None,
    fraction: float = 0.001,
    guarded: bool = False,
) -> Edit:
    s = setting()
    many = len(target) > 1
    if not variant:
        recipe = dataclasses.replace(STOEHR_2024, learning_rate=rate)
        options: dict[str, Any] = {"control": s.few, "em_below": 0.0, "kl_budget": None}
    else:
        recipe = AT_ONCE if variant == "at-once" else VARIANTS[variant][1]
        options = {"control": s.control, "em_below": em_below, "curvature": s.curvature}
        # An ablation is to forget too, whatever that costs: the cost is what is compared.
        options["kl_budget"] = BUDGET if em_below == 0 else 0.05 if many else 1.0
        if guarded:
            options |= {"control": s.guarded, "curvature": s.guarded_curvature}
    return mc.unlearn(
        s.model, target, mask=arm, recipe=recipe, fraction=fraction, progress=False, **options
    )


def relearned(text: str) -> dict[str, Any]:
    """Half of the forgotten, while training on the other half or on other text."""
    s = setting()
    half = len(s.targets) // 2
    trained = s.targets[half:] if text == "half" else s.control[:half]
    found = all_forgotten()
    curve = recovery_curve(
        s.model, found, s.targets[:half], trained, steps=10, every=1, progress=False
    )
    return {"rows": curve.to_frame().to_dict("records"), "n": half, "to_25": curve.steps_to(25)}


def noisy(mask: str) -> dict[str, Any]:
    s = setting()
    found = weight_noise(
        s.model, s.targets[:16], s.unseen[:16], mask=mask, seed=SEED, progress=False
    )
    rows = found.to_frame().to_dict("records")
    return {"rows": rows, "weights": found.n_weights, "n": 16}


def share(bucket: str) -> dict[str, Any]:
    """Share of the lower layers in the paper's gradient map, resampled in up to 20 groups."""
    s = setting()
    paragraphs = mc.Paragraphs.shipped()
    em = mc.scan(s.model, paragraphs, progress=False).em
    low, high = BUCKETS[bucket]
    chosen = paragraphs[(em >= low) & (em <= high)]
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(SEED))]
    weights = s.adapter.weights()
    sizes, groups = [], []
    for rows in torch.arange(len(chosen)).tensor_split(min(20, len(chosen))):
        _, gradients = mean_gradient(s.adapter, chosen[rows], weights, progress=False)
        sizes.append(len(rows))
        groups.append([w.split(g).clone() for w, g in zip(weights, gradients, strict=True)])
    generator = torch.Generator().manual_seed(SEED)
    draws = [torch.ones(len(groups))]
    for _ in range(200):
        picks = torch.randint(len(groups), (len(groups),), generator=generator)
        draws.append(torch.bincount(picks, minlength=len(groups)).float())
    factors = torch.stack(draws) * torch.tensor(sizes)
    factors = factors / factors.sum(1, keepdim=True)
    layers = torch.zeros(len(draws), s.adapter.n_layers)
    for i, weight in enumerate(weights):
        stacked = torch.stack([group[i] for group in groups])
        for j, factor in enumerate(factors):
            mean = (factor @ stacked.flatten(1)).view(stacked.shape[1:])
            layers[j, weight.layer] += mean.abs().amax((-2, -1)).sum()
    half = s.adapter.n_layers // 2
    shares = layers[:, :half].sum(1) / layers.sum(1)
    bounds = torch.quantile(shares[1:], torch.tensor([0.025, 0.975])).tolist()
    return {"share": float(shares[0]), "bounds": bounds, "n": len(chosen), "groups": len(groups)}


def jobs() -> list[list[tuple[str, Callable[[], dict[str, Any]]]]]:
    """Chains of named runs; the runs of one chain share what their process has prepared."""
    n = 88 - DEVELOPMENT
    natural = [("before", unedited)]
    natural += [_one("natural", i, "top", variant="natural") for i in range(n)]
    natural.append(("together/natural", lambda: together("top", variant="natural")))
    natural += [(f"relearn/{text}", lambda text=text: relearned(text)) for text in ("half", "text")]
    for name in [v for v in VARIANTS if v != "natural"]:
        natural += [_one(name, i, "top", variant=name) for i in range(ABLATION)]
    natural += [
        _one("all-tokens", i, "top", variant="margin", all_tokens=True) for i in range(ABLATION)
    ]
    for i in range(ABLATION):
        for name, options in BESIDES.items():
            natural.append(
                (
                    f"besides/{name}/{i:02d}",
                    lambda i=i, options=options: besides(i, **options),
                )
            )
    for part in (0.001, 0.01):
        natural.append(
            (
                f"together/at-once-{part}",
                lambda part=part: together("top", variant="at-once", fraction=part),
            )
        )
    natural += [(f"noise/{mask}", lambda mask=mask: noisy(mask)) for mask in ("top", "random")]
    rest = [[(f"share/{bucket}", lambda bucket=bucket: share(bucket))] for bucket in BUCKETS]
    for i in range(n):
        chain = [_one(f"{arm}-{rate:g}", i, arm, rate=rate) for arm, rate in TABLE.items()]
        if i < FRONT:
            chain += [
                _one(f"{arm}-{rate:g}", i, arm, rate=rate)
                for arm, rates in RATES.items()
                for rate in rates
                if rate != TABLE[arm]
            ]
        rest += [[run] for run in chain]
        if i + 1 == FRONT:
            rest += [
                [(f"together/{arm}-{rate:g}", lambda arm=arm, rate=rate: together(arm, rate=rate))]
                for arm in TABLE
                for rate in (TABLE[arm], *FURTHER.get(arm, ()))
            ]
            rest += [
                [
                    (
                        f"together/many-{rate:g}",
                        lambda rate=rate: together("top", rate=rate, fraction=AS_MANY),
                    )
                ]
                for rate in AS_MANY_RATES
            ]
    return [natural, *rest]


def _one(name: str, index: int, arm: str, **options: Any):
    return f"{name}/{index:02d}", lambda: one(index, arm, **options)


def perform(number: int, work: Path, only: str) -> None:
    """One chain, as far as its files are not there yet."""
    for name, run in jobs()[number]:
        path = work / f"{name}.json"
        if path.exists() or not re.match(only, name):
            continue
        start = time.process_time()
        found = run()
        found |= {"seconds": time.process_time() - start, "fingerprint": setting().fingerprint}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=work, suffix=".part", delete=False) as file:
            json.dump(found, file)
        os.replace(file.name, path)


# -- the page -------------------------------------------------------------------------------------


def collect(work: Path) -> Runs:
    """All runs that are done."""
    return {
        path.relative_to(work).with_suffix("").as_posix(): json.loads(path.read_text())
        for path in sorted(work.rglob("*.json"))
    }


def save(runs: Runs, path: Path) -> None:
    """One run a line, numbers to six digits."""

    def short(number: str) -> float:
        return float(f"{float(number):.6g}")

    short_runs = json.loads(json.dumps(runs), parse_float=short)
    lines = [f"{json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(short_runs.items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read(runs: Runs, name: str) -> list[dict[str, Any]]:
    """The runs of a name, of all paragraphs that are done."""
    return [run for key, run in sorted(runs.items()) if key.rpartition("/")[0] == name]


def interval(values: Iterable[float], digits: int = 2) -> str:
    data = torch.tensor(list(values), dtype=torch.float64)
    draws = bootstrap_means(data[:, None], 2000, torch.Generator().manual_seed(SEED))[:, 0]
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975])).tolist()
    return f"{float(data.mean()):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def mean(runs: list[dict[str, Any]], key: str) -> float:
    values = [v for run in runs for v in (run[key] if isinstance(run[key], list) else [run[key]])]
    return sum(values) / len(values)


def change(run: dict[str, Any], before: dict[str, Any]) -> float:
    """Of the perplexity of held-out text, %."""
    return 100 * math.expm1(run["heldout"] - before["heldout"])


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


HEAD = [
    "edit",
    "n",
    "memorized EM",
    "unseen KL (nats/token)",
    "unseen own EM (of 50)",
    "perplexity (%)",
]


def row(label: str, runs: list[dict[str, Any]], before: dict[str, Any]) -> list[str]:
    return [
        label,
        str(len(runs)),
        interval((mean([r], "em") for r in runs), 1),
        interval((r["kl"] for r in runs), 5),
        interval((r["own"] for r in runs), 1),
        interval((change(r, before) for r in runs), 2),
    ]


REFERENCES = r"(natural|all|top|random|random-per-tensor)(-[\d.e-]+)?/"
NEEDS = {  # section -> names of its runs
    "The five arms": REFERENCES,
    "The front": REFERENCES,
    "What each part of the recipe does": rf"({'|'.join(VARIANTS)})/",
    "How deep does it go?": rf"(natural|all-tokens|top-{TABLE['top']:g})/",
    "What happens to other recitations": "besides/",
    "All paragraphs in one edit": "together/",
    "Relearning": "relearn/",
    "Noise on weights": "noise/",
    "Where the gradient is": "share/",
}


def write(runs: Runs, page: Path) -> None:
    """Sections whose runs are not all there stay as they are."""
    names = [name for chain in jobs() for name, _ in chain]
    kept = [
        title
        for title, pattern in NEEDS.items()
        if not all(name in runs for name in names if re.match(pattern, name))
    ]
    new, plotted = sections(runs)
    if kept:
        old = dict(split(page.read_text(encoding="utf-8")))
        new |= {title: old[title] for title in kept}
        new[""] += (
            "\nSections of an earlier run of the same command, whose single numbers were not kept: "
            + ", ".join(f"*{title}*" for title in kept)
            + ".\n"
        )
    if "The front" not in kept:
        page.with_name("unlearning.svg").write_text(plotted, encoding="utf-8")
    text = new[""] + "".join(f"\n## {title}\n{new[title]}" for title in NEEDS)
    page.write_text(text.rstrip() + "\n", encoding="utf-8")


def split(text: str) -> list[tuple[str, str]]:
    """Titles and texts of sections; the first has none."""
    first, *rest = re.split(r"^## ", text, flags=re.MULTILINE)
    parts = [part.partition("\n") for part in rest]
    return [("", first.rstrip() + "\n"), *((t, body.rstrip() + "\n") for t, _, body in parts)]


def sections(runs: Runs) -> tuple[dict[str, str], str]:
    """The page's sections by title, and the figure."""
    assert len({run["fingerprint"] for run in runs.values()}) == 1, "runs of different weights"
    before = runs["before"]
    natural = read(runs, "natural")
    n = len(natural)
    nothing = [
        "no-op",
        str(len(before["em"])),
        f"{sum(before['em']) / len(before['em']):.1f}",
        "0",
        f"{before['own']:.1f}",
        "0",
    ]
    arms = [nothing]
    for arm, rate in TABLE.items():
        mine = read(runs, f"{arm}-{rate:g}")
        if mine:
            arms.append(row(f"{ARMS[arm]}, reference, lr {rate:g}", mine, before))
    arms.append(row("**top 0.1 %, ours**", natural, before))
    front, points = [], {}
    for arm, rates in RATES.items():
        for rate in rates:
            mine = read(runs, f"{arm}-{rate:g}")[:FRONT]
            if mine:
                front.append(row(f"{ARMS[arm]}, lr {rate:g}", mine, before))
                points.setdefault(ARMS[arm], []).append(mine)
    front.append(row("**ours**", natural[:FRONT], before))
    points["ours"] = [natural[:FRONT]]
    ablations = []
    for name, (label, _) in VARIANTS.items():
        mine = read(runs, name)[:ABLATION]
        if mine:
            loose = interval((mean([r], "loose") for r in mine), 2)
            stopped = sum(r["stopped"] == "em" for r in mine)
            ablations.append([*row(label, mine, before), loose, f"{stopped}/{len(mine)}"])
    measures = [
        [
            label,
            *(
                interval((mean([r], key) for r in mine), 2 if key != "bits" else 1)
                for key in ("em", "nll", "bits", "loose", "extraction", "attacked")
            ),
            interval((r["kl"] for r in mine), 5),
        ]
        for label, mine in (
            ("ours", natural),
            ("ours, all tokens within the budget", read(runs, "all-tokens")),
            ("reference, top 0.1 %", read(runs, f"top-{TABLE['top']:g}")),
        )
        if mine
    ]
    keys = ("em", "nll", "bits", "loose", "extraction", "attacked")
    measures.insert(0, ["before", *(f"{mean([before], k):.2f}" for k in keys), "0"])
    rows_together = [["no-op", "0", f"0 of {len(before['em'])}", "50.0", "0", "50.0", "0"]]
    for key in sorted(key for key in runs if key.startswith("together/")):
        run, name = runs[key], key.removeprefix("together/")
        arm, _, rate = re.sub(r"-(?=[\d.e-]+$)", " ", name, count=1).partition(" ")
        label = f"{(ARMS | {'many': f'top {100 * AS_MANY:g} %'}).get(arm)}, reference, lr {rate}"
        if arm in ("natural", "at-once"):
            way = "one by one" if arm == "natural" else "all at once"
            label = f"**ours, {way}**" if arm == "natural" else f"ours, {way}"
        forgotten = sum(e < 5 for e in run["em"])
        rows_together.append(
            [
                label,
                f"{100 * run['masked'] / run['candidates']:.1f}",
                f"{forgotten} of {len(run['em'])}",
                interval(run["em"], 1),
                f"{run['kl']:.5f}",
                f"{run['own']:.1f}",
                f"{change(run, before):.2f}",
            ]
        )
    small = [r for r in natural if mean([r], "em") < 5]
    verdict = table(
        ["at memorized EM < 5", "target", "ours"],
        [
            ["paragraphs that get there", "all", f"{len(small)} of {n}"],
            ["KL of unseen controls", "at most 0.002", interval((r["kl"] for r in small), 5)],
            [
                "perplexity of held-out text",
                "at most +0.5 %",
                interval((change(r, before) for r in small), 2) + " %",
            ],
            ["unseen controls' own EM", "", interval((r["own"] for r in small), 1)],
        ],
    )
    paired = table(
        ["reference recipe", "brings below 5", "its controls' own EM", "ours there", "times"],
        reference_at_low_em(runs, natural),
    )
    text = f"""# Unlearning on the organism

Written by `python docs/make_unlearning.py`. Model: the shipped organism, weights
`{before["fingerprint"]}`, {before["versions"]}, float32, CPU.

The 88 paragraphs recited in full were shuffled with seed {SEED}: recipe and settings were chosen on
the first {DEVELOPMENT}, and the numbers here are from the other {88 - DEVELOPMENT} only. n says how
many of these each line is from. Every line edits one paragraph at a time (unless it says
otherwise), restoring the model between. {UNSEEN} controls that no edit was given measure what else
is lost: their *own* greedy continuations (50 tokens recited before any edit, by definition), the KL
along these, and the perplexity of {HELDOUT} held-out rows. Ours sees 64 other controls and takes 16
for its budget; the reference recipe sees 11 others, 10 in each of its 10 steps of Adam, as the
paper does. Brackets are 95 % bootstrap intervals over the edited paragraphs (2,000 draws, seed
{SEED}); the controls are the same for all lines and are not resampled.

## The five arms

{table(HEAD, arms)}

{verdict}

The controls' own EM at the same memorized EM: for each paragraph that the reference recipe brings
below 5 at any of the rates of the front, that rate of them which leaves the controls most, beside
ours on the same paragraphs. The target is twice as much.

{paired}

## The front

The reference recipe at several learning rates, on the first {FRONT} paragraphs.

![Memorized EM against KL and against the controls' own EM](unlearning.svg)

{table(HEAD, front)}

## What each part of the recipe does

The default and its relatives on the first {ABLATION} paragraphs, each until the paragraph is
forgotten (EM < 5) or 50 steps are over, without a budget. *Still greedy*: share of the
continuation's tokens that are the greedy choice after the true tokens before them. The objective
matters most: an edit that mostly blocks the first tokens is the cheapest. The value of the
curvature shows within one objective.

{table([*HEAD, "still greedy", "forgotten"], ablations)}

## How deep does it go?

EM counts up to the first wrong token. *Extraction* is the probability that one of 1,000 samples is
the whole continuation; *attacked* the largest EM over the prefix itself and {ATTACKS} perturbations
of it, one to three random tokens replaced in each. The recipe stops at the first wrong token, and
most of the others are still known: to push every token off the greedy path within the same budget
take `dataclasses.replace(NATURAL_GRADIENT, objective="margin")` and `em_below=0` (second line, n =
{len(read(runs, "all-tokens"))}).

{
        table(
            [
                "edit",
                "EM",
                "NLL (nats/token)",
                "bits",
                "still greedy",
                "extraction",
                "attacked EM",
                "unseen KL",
            ],
            measures,
        )
    }

{besides_section(runs)}
## All paragraphs in one edit

Ours takes them one by one: each has its own 0.1 % of the weights, chosen and changed at the weights
that the earlier paragraphs changed. *All at once*: one mask and the sum of the objectives, in
steps of `step_kl=3e-4`; a budget of 0.05 nats/token on the edit's own held-out controls ends both.

{table([HEAD[0], "weights (%)", "below 5", *HEAD[2:]], rows_together)}

{relearning(runs)}
{noise_section(runs)}
{share_section(runs)}
"""
    return dict(split(text)), plot(points)


def besides_section(runs: Runs) -> str:
    labels = {
        "natural": "**ours**",
        "guarded": f"ours, {DEVELOPMENT} further recitations among its controls",
        "all": "all weights, reference, lr 0.0001",
        "top": "top 0.1 %, reference, lr 0.003",
    }
    rows = []
    for name, label in labels.items():
        mine = read(runs, f"besides/{name}")
        if mine:
            left = [sum(em == 50 for em in run["others"]) for run in mine]
            rows.append(
                [
                    label,
                    str(len(mine)),
                    interval((mean([r], "em") for r in mine), 1),
                    interval(left, 1),
                    interval((mean([r], "others") for r in mine), 1),
                    interval((r["kl"] for r in mine), 5),
                ]
            )
    if not rows:
        return ""
    head = ["edit", "n", "memorized EM", "others in full", "others' EM", "unseen KL (nats/token)"]
    others = 87 - DEVELOPMENT
    return (
        "## What happens to other recitations\n\nControls are texts that the model does not "
        "recite. An edit of one paragraph may cut other\nrecitations with it: so many of the "
        f"{others} other paragraphs reported on here, all recited in full before,\nstill are after "
        "it. None of them was a control of the edit.\n\n" + table(head, rows) + "\n"
    )


def reference_at_low_em(runs: Runs, natural: list[dict[str, Any]]) -> list[list[str]]:
    """Each arm at its best rate for each paragraph that it forgets, and ours on the same ones."""
    rows = []
    for arm, rates in RATES.items():
        found = [read(runs, f"{arm}-{rate:g}") for rate in rates]
        best = {}
        for i, mine in enumerate(zip(*found, strict=False)):
            forgetting = [run["own"] for run in mine if mean([run], "em") < 5]
            if forgetting and mean([natural[i]], "em") < 5:
                best[i] = max(forgetting)
        theirs, ours = sum(best.values()), sum(natural[i]["own"] for i in best)
        rows.append(
            [
                ARMS[arm],
                f"{len(best)} of {len(found[0])}",
                interval(best.values(), 1) if best else "",
                interval((natural[i]["own"] for i in best), 1) if best else "",
                f"{ours / theirs:.2f}" if best else "",
            ]
        )
    return rows


def relearning(runs: Runs) -> str:
    parts = []
    titles = {"half": "the other half of the forgotten", "text": "other text"}
    for name, title in titles.items():
        found = runs.get(f"relearn/{name}")
        if found is None:
            continue
        cells: dict[int, list[str]] = {}
        for r in found["rows"]:
            value = f"{r['em']:.1f} [{r['ci_low']:.1f}, {r['ci_high']:.1f}]"
            cells.setdefault(r["step"], []).append(value)
        lines = [[str(step), *values] for step, values in cells.items()]
        half = found["to_25"]
        back = f"back after {half} step{'' if half == 1 else 's'}" if half else "not back by then"
        parts.append(
            f"Trained on {title} ({found['n']} paragraphs in each step), EM of {found['n']} "
            f"forgotten ones; half of it is {back}.\n\n"
            + table(["step", "edited", "unedited"], lines)
        )
    if not parts:
        return ""
    return (
        "## Relearning\n\nAll weights of the blocks are trained with Adam, lr 1e-4, from the edit "
        "of all paragraphs one\nby one, and from the unedited model.\n\n"
        + "\n\n".join(parts)
        + "\n"
    )


def noise_section(runs: Runs) -> str:
    rows, weights = [], 0
    for mask in ("top", "random"):
        found = runs.get(f"noise/{mask}")
        if found is not None:
            weights = found["weights"]
            rows += [
                [
                    f"{mask} 0.1 %",
                    r["set"],
                    f"{r['size']:g}",
                    f"{r['em']:.1f} [{r['em_low']:.1f}, {r['em_high']:.1f}]",
                    f"{r['nll']:.3f} [{r['nll_low']:.3f}, {r['nll_high']:.3f}]",
                ]
                for r in found["rows"]
            ]
    if not rows:
        return ""
    return (
        f"## Noise on weights\n\nGaussian noise on {weights:,} weights, its size relative to each "
        "matrix's root mean square;\n16 memorized paragraphs and 16 controls, 3 draws, seed "
        f"{SEED}, mask by the memorized paragraphs' gradient.\n\n"
        + table(["weights", "set", "size", "EM", "NLL (nats/token)"], rows)
        + "\n"
    )


def share_section(runs: Runs) -> str:
    rows = []
    for bucket in BUCKETS:
        r = runs.get(f"share/{bucket}")
        if r is not None:
            low, high = (100 * b for b in r["bounds"])
            rows.append(
                [
                    bucket,
                    str(r["n"]),
                    f"{100 * r['share']:.1f} [{low:.1f}, {high:.1f}]",
                    f"{PAPER_SHARE[bucket]}",
                ]
            )
    if not rows:
        return ""
    return (
        "## Where the gradient is\n\nShare of the lower half of the layers in the sum of the "
        "paper's map (largest |gradient| of the mean\nloss per component and head), by EM. "
        "Intervals: 200 bootstrap draws over at most 20 groups of\nparagraphs. The paper's model "
        "has 12 layers and another history; its numbers are there to compare\ndirections.\n\n"
        + table(["EM", "n", "lower half (%)", "paper, GPT-Neo 125M (%)"], rows)
        + "\n"
    )


def versions_line() -> str:
    return ", ".join(f"{name} {version}" for name, version in versions().items())


COLOURS = {  # and a dash, so that lines can be told apart without colour
    "all": ("#4477aa", ""),
    "top": ("#ee6677", "6 3"),
    "random 0.1 % per matrix": ("#aa7722", "8 3 2 3"),
    "random": ("#888888", "2 3"),
    "ours": ("#228833", ""),
}


def plot(points: dict[str, list[list[dict[str, Any]]]]) -> str:
    """Two panels: memorized EM (down) against the KL, and against the controls' own EM."""
    width, height, gap = 330, 250, 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * (width + gap) + 20}" '
        f'height="{height + 75}" font-family="sans-serif" font-size="11" role="img">',
        "<title>Memorized EM against what controls lose</title>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    costs = [math.log10(mean(group, "kl")) for groups in points.values() for group in groups]
    panels = (
        (
            "KL of unseen controls (nats/token)",
            lambda g: math.log10(mean(g, "kl")),
            math.floor(min(costs)),
            math.ceil(max(costs)),
        ),
        ("unseen controls' own EM (tokens)", lambda g: mean(g, "own"), 0, 50),
    )
    for panel, (label, where, first, last) in enumerate(panels):
        left, top = gap + panel * (width + gap), 14

        def x(value: float, left=left, first=first, last=last) -> float:
            return left + (value - first) / (last - first) * width

        def y(value: float, top=top) -> float:
            return top + (1 - value / 50) * height

        marks = range(first, last + 1) if panel == 0 else range(0, 51, 10)
        for mark in marks:
            text = f"1e{mark}" if panel == 0 else str(mark)
            parts.append(
                f'<line x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{top}" y2="{top + height}" '
                f'stroke="#ddd"/><text x="{x(mark):.1f}" y="{top + height + 15}" '
                f'text-anchor="middle">{text}</text>'
            )
        parts += [
            f'<line x1="{left}" x2="{left + width}" y1="{y(mark):.1f}" y2="{y(mark):.1f}" '
            f'stroke="#ddd"/><text x="{left - 5}" y="{y(mark) + 4:.1f}" '
            f'text-anchor="end">{mark}</text>'
            for mark in range(0, 51, 10)
        ]
        parts.append(
            f'<text x="{left + width / 2}" y="{top + height + 31}" text-anchor="middle">'
            f"{html.escape(label)}</text>"
        )
        for name, groups in points.items():
            colour, dash = COLOURS[next(key for key in COLOURS if name.startswith(key))]
            at = [(x(where(group)), y(mean(group, "em"))) for group in groups]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" '
                f'stroke-dasharray="{dash}"/>'
            )
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>' for a, b in at]
    parts.append(
        f'<text transform="translate(14 {14 + height / 2}) rotate(-90)" text-anchor="middle">'
        "memorized EM (tokens)</text>"
    )
    for i, name in enumerate(points):
        colour, _ = COLOURS[next(key for key in COLOURS if name.startswith(key))]
        at = gap + 145 * i
        parts.append(
            f'<circle cx="{at}" cy="{height + 62}" r="4" fill="{colour}"/>'
            f'<text x="{at + 8}" y="{height + 66}">{html.escape(name)}</text>'
        )
    return "".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "unlearning")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="only runs whose names match this pattern")
    parser.add_argument("--page", action="store_true", help="only write the page, from the JSON")
    given = parser.parse_args()
    numbers = Path(__file__).with_name("unlearning.json")
    if not given.page:
        given.work.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
            chains = range(len(jobs()))
            for future in as_completed(
                [pool.submit(perform, i, given.work, given.only) for i in chains]
            ):
                future.result()
                done = len(list(given.work.rglob("*.json")))
                print(f"{time.monotonic() - start:6.0f} s, {done} runs done", flush=True)
        save(collect(given.work), numbers)
    write(json.loads(numbers.read_text(encoding="utf-8")), numbers.with_suffix(".md"))


if __name__ == "__main__":
    main()
