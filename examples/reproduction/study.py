"""What all experiments share: the model, its sets of paragraphs, and results kept on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

import memcircuits as mc
from memcircuits.evidence.gradients.parameters import ParameterGradients
from memcircuits.evidence.rare_tokens import RareTokenAttention
from memcircuits.evidence.triggers.pairs import CleanCorrupted
from memcircuits.evidence.triggers.perturbation import Perturbation
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.measure.scanning import Scan
from memcircuits.models.adapter import Adapter
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result
from reproduction.charts import Chart
from reproduction.filters import Filters
from reproduction.pairs import found_pairs, given_pairs
from reproduction.statistics import Value

SCHEMA = "memcircuits.reproduction/2"
PAPER = "https://arxiv.org/abs/2403.19851"
PAPERS_MODEL = "gpt-neo-125m"
SMALL, USUAL = 6, 50  # paragraphs of each kind: on the organism, on other models
EDITS, EDITS_ON_GPU = 2, 20  # they are the slowest part on a processor
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
    charts: Sequence[Chart] = ()


@dataclass(frozen=True)
class Study:
    """A model, its paragraphs and all options, with what several experiments share.

    Attributes:
        given: the paragraphs to be sorted into memorized ones and others.
        perturbed_given: corrupted versions of memorized paragraphs; None: they are searched for.
        filters: what `given` and `controls` have passed.
        n_dropped: paragraphs that did not pass.
        controls: more paragraphs, not memorized; None if there are none but those of `given`.
        as_given: take `given` for the memorized and `controls` for the others whatever a scan says.
        limit: paragraphs of each kind at most.
        edits: paragraphs that are edited, one at a time.
        folder: where results are kept.
        other_model: loads the same model in the other basis, None if it is not to be compared.
    """

    model: Any
    given: mc.Paragraphs
    controls: mc.Paragraphs | None
    perturbed_given: mc.Paragraphs | None
    filters: Filters
    n_dropped: int
    unigrams: mc.UnigramTable | None
    as_given: bool
    limit: int
    edits: int
    patching: str
    seed: int
    memory_budget: int | None
    folder: Path
    other_model: Callable[[], Any] | None = None

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
        sets = {
            "paragraphs": self.given,
            "controls": self.controls,
            "perturbed": self.perturbed_given,
        }
        provenance = Provenance.of(
            self.adapter,
            sets,
            as_given=self.as_given,
            limit=self.limit,
            edits=self.edits,
            patching=self.patching,
            seed=self.seed,
            unigrams=None if self.unigrams is None else self.unigrams.source,
            filters=dataclasses.asdict(self.filters),
        )
        code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
        script = hashlib.sha256(code).hexdigest()[:16]
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
        values = {}
        for name in ("0-10", "11-29", "30-49", "50"):
            rows = [i for i, bucket in enumerate(names) if bucket == name and fine[i]]
            if rows:
                values[name] = self.everything[rows]
        return values

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

    def bucket(self, name: str) -> mc.Paragraphs | None:
        """At most `limit` paragraphs of a range of EM; with `, own continuations` the model's."""
        if ", own" in name:
            return self.own if "0-10" in self.buckets else None
        return self.draw(self.buckets[name]) if name in self.buckets else None

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
        """The memorized and their corrupted versions (the paper's PMP)."""
        if self.perturbed_given is not None:
            return given_pairs(self.memorized, self.perturbed_given)
        return found_pairs(self.model, self.memorized, self.perturbed)

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


def is_papers(study: Study) -> bool:
    """Whether the model is the paper's, going by its name."""
    return study.adapter.label.lower().endswith(PAPERS_MODEL)
