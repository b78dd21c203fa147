"""The model, the paragraphs and the arms of the comparison."""

from __future__ import annotations

import dataclasses
from functools import cache, cached_property
from typing import Any

import torch

import memcircuits as mc
from memcircuits.editing.curvature import Curvature
from memcircuits.editing.evaluation import extraction_probability, random_prefixes
from memcircuits.editing.find_edit import control_curvature
from memcircuits.editing.recipe import NATURAL_GRADIENT, Recipe
from memcircuits.measure.continuation import read_continuation
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.models.registry import adapt
from memcircuits.organism import DATA

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
        result = read_continuation(logits, self.own.continuation)
        heldout = mc.scan(self.model, self.heldout, progress=False).nll.mean()
        return {
            "kl": float(kl),
            "own": float(result.em.float().mean()),
            "heldout": float(heldout),
        }

    def target(self, paragraphs: mc.Paragraphs) -> dict[str, list[float]]:
        scan_result = mc.scan(self.model, paragraphs, progress=False)
        attacked = random_prefixes(paragraphs, self.adapter.d_vocab, ATTACKS, SEED)
        em = mc.scan(self.model, attacked, progress=False).em.view(len(paragraphs), -1)
        return {
            "em": scan_result.em.tolist(),
            "nll": scan_result.nll.tolist(),
            "bits": scan_result.bits.tolist(),
            "loose": scan_result.loose_match.tolist(),
            "extraction": extraction_probability(scan_result.log_prob, 1000).tolist(),
            "attacked": torch.maximum(em.amax(-1), scan_result.em).tolist(),
        }


@cache
def setting() -> Setting:
    return Setting()
