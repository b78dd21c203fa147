"""Which paragraphs are compared? Memorized ones and controls, chosen before heads are measured.

One scan says which of the given paragraphs are memorized (EM of the whole continuation). Controls
are given, or are those of the same paragraphs that the model does not know
(`memcircuits.evidence.controls`). A limited number of both sets is measured, drawn at random.
Controls can instead be those nearest in NLL to the memorized paragraphs: a loss near zero has
further to rise than that of an average control. Or they are the model's own continuations of the
controls' prefixes, of which it is as sure as of what it recites. A note says what the controls are.

Copies, near copies and parts of one document are dependent (`memcircuits.data.groups`). Draws take
one paragraph of every group before a second one, and the notes say how many independent groups
either set has.

Mean and resample ablation replace activations by those of other paragraphs. These are a third set
(`add_reference`), so that neither set is ablated to itself: to its own mean, a set loses less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.statistics import count_groups, group_notes, smallest_p_value
from memcircuits.data.draws import random_order, sample_rows, split_groups
from memcircuits.data.overlap import refuse_overlap
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.evidence.controls import (
    HALF_MEMORIZED,
    ControlChoice,
    composition,
    own_continuations,
    unknown_to_the_model,
)
from memcircuits.measure.scanning import Scan, scan
from memcircuits.models.adapter import Adapter

MIN_CONTROLS = 20
"""Number of controls drawn from the given paragraphs, if there are that many, even for fewer
memorized ones: few labels leave no room for small p-values."""

_DECODED = 4  # prefixes decoded for each control: some repeat themselves, and some match better

_MATCHED = 0.2  # nats/token by which the means of matched sets may differ without a word

_MIN_REFERENCE = 2  # paragraphs whose activations replace those of others

RESOLUTION = 0.001
"""A note says what the smallest possible p-value is if it is larger than this."""


@dataclass(frozen=True)
class Groups:
    """The two sets of paragraphs that are compared.

    Attributes:
        memorized: the memorized paragraphs measured.
        control: the controls measured.
        counts: numbers of paragraphs given, memorized, controls, not finite and measured, and of
            independent groups measured.
        choice_notes: what the reader must know about the choice.
        further: controls of other groups than those measured; None if there are none.
        reference: the third set, whose activations replace those of the other two; None if none is
            needed.
    """

    memorized: Paragraphs
    control: Paragraphs
    counts: Mapping[str, int]
    choice_notes: tuple[str, ...] = ()
    further: Paragraphs | None = None
    reference: Paragraphs | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader must know about the choice and about dependent paragraphs."""
        return self.choice_notes + _dependence_notes(self.memorized, self.control)


@dataclass(frozen=True)
class CandidateParagraphs:
    """The paragraphs of a scan from which one set is chosen.

    Attributes:
        scan_result: the scan.
        rows: indices of the candidates in the scan, ascending.
    """

    scan_result: Scan
    rows: Int[Tensor, " candidate"]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def paragraphs(self) -> Paragraphs:
        """The candidates; there must be one."""
        return self.scan_result.paragraphs[self.rows]

    @property
    def nll(self) -> Float[Tensor, " candidate"]:
        """NLL of their continuations, nats/token."""
        return self.scan_result.nll[self.rows]

    def draw(self, limit: int | None, generator: torch.Generator) -> CandidateParagraphs:
        """A random subset of at most `limit`, from as many groups as possible, in their order."""
        if limit is None or len(self) <= limit:
            return self
        drawn = sample_rows(self.paragraphs.groups, limit, generator)
        return CandidateParagraphs(self.scan_result, self.rows[drawn])

    def nearest(self, nll: Tensor, limit: int | None) -> CandidateParagraphs:
        """The `limit` candidates whose NLL is nearest to `nll`, in the order of the scan."""
        order = (self.nll - nll).abs().argsort(stable=True)
        return CandidateParagraphs(self.scan_result, self.rows[order[:limit].sort().values])

    def apart_from(self, chosen: CandidateParagraphs) -> Paragraphs | None:
        """The candidates of groups that have none of the chosen candidates."""
        groups = self.paragraphs.groups
        is_apart = ~torch.isin(groups, groups[torch.isin(self.rows, chosen.rows)])
        return self.paragraphs[is_apart.nonzero().flatten()] if is_apart.any() else None


def select_groups(
    adapter: Adapter,
    paragraphs: Paragraphs | Scan,
    choice: ControlChoice,
    generator: torch.Generator,
    *,
    max_paragraphs: int | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Groups:
    """Scan the paragraphs and choose the two sets.

    Args:
        adapter: the model.
        paragraphs: those with EM equal to the continuation's length are the memorized set; a scan
            of them by the same model is not repeated.
        choice: which texts are controls.
        generator: draws the memorized paragraphs, then the controls.
        max_paragraphs: maximum number of memorized paragraphs and of given controls; of controls
            among `paragraphs` as many as memorized ones are measured, but at least `MIN_CONTROLS`.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Raises:
        InputError: if no paragraph is memorized, fewer than two controls are usable, or a control
            is in the memorized set.
    """
    # Candidates for both sets.
    if isinstance(paragraphs, Scan):
        scan_result = paragraphs
    else:
        scan_result = scan(adapter, paragraphs, memory_budget=memory_budget, progress=progress)
    memorized = _memorized_candidates(scan_result)
    controls = _control_candidates(
        adapter,
        scan_result,
        choice,
        generator,
        max_paragraphs=max_paragraphs,
        memory_budget=memory_budget,
        progress=progress,
    )
    refuse_overlap(memorized.paragraphs, controls.paragraphs, same="paragraph")
    counts = {
        "given": len(scan_result.names),
        "memorized": len(memorized),
        "control": len(controls),
        "not_finite": int((~scan_result.finite).sum()),
    }

    # The ones that are measured.
    memorized = memorized.draw(max_paragraphs, generator)
    limit = max_paragraphs
    if choice.given is None:
        limit = max(MIN_CONTROLS, min(len(memorized), max_paragraphs or len(memorized)))
    notes: tuple[str, ...] = ()
    candidates = controls
    if choice.match_nll:
        target = memorized.nll.mean()
        controls = controls.nearest(target, limit)
        gap = float(controls.nll.mean() - target)
        notes = (
            f"Controls are those nearest in NLL: {float(controls.nll.mean()):.2f} nats/token on "
            f"average against {float(target):.2f} of the memorized paragraphs"
            + (": the sets still differ in loss." if abs(gap) > _MATCHED else "."),
        )
    else:
        controls = controls.draw(limit, generator)
    counts |= {
        "measured": len(memorized),
        "measured_control": len(controls),
        "groups": count_groups(memorized.paragraphs.groups),
        "groups_control": count_groups(controls.paragraphs.groups),
    }
    notes = (composition(controls.scan_result, controls.rows, choice.text), *notes)
    return Groups(
        memorized.paragraphs,
        controls.paragraphs,
        counts,
        notes,
        further=candidates.apart_from(controls),
    )


def add_reference(groups: Groups, limit: int | None, generator: torch.Generator) -> Groups:
    """Choose the third set: at most `limit` further controls, or half of the controls measured.

    Raises:
        InputError: if there are too few controls.
    """
    control, reference = groups.control, groups.further
    if reference is not None and len(reference) >= _MIN_REFERENCE:
        reference = reference.sample(limit, generator)
        return dataclasses.replace(groups, reference=reference)
    order = random_order(control.groups, generator)
    kept, others = split_groups(control.groups, order, (count_groups(control.groups) + 1) // 2)
    if min(len(kept), len(others)) < _MIN_REFERENCE:
        remedy = "mean and resample ablation need two to measure and two for reference"
        raise InputError("control", f"{len(control)} usable paragraphs", remedy)
    control, reference = control[kept.sort().values], control[others.sort().values]
    counts = {"measured_control": len(control), "groups_control": count_groups(control.groups)}
    note = f"{len(reference)} of the controls are the reference of the ablation, not measured."
    return dataclasses.replace(
        groups,
        control=control,
        counts={**groups.counts, **counts},
        choice_notes=(*groups.choice_notes, note),
        reference=reference,
    )


def _control_candidates(
    adapter: Adapter,
    scan_result: Scan,
    choice: ControlChoice,
    generator: torch.Generator,
    *,
    max_paragraphs: int | None,
    memory_budget: int | None,
    progress: bool,
) -> CandidateParagraphs:
    """The texts that can be controls, scanned."""
    if choice.given is None:
        controls = _own_controls(scan_result)
    else:
        given = Paragraphs.of(choice.given, adapter, "control")
        control_scan = scan(adapter, given, memory_budget=memory_budget, progress=progress)
        controls = _given_controls(control_scan, only_unknown=choice.match_nll)
    if choice.text == "true":
        return controls
    n_decoded = None if max_paragraphs is None else _DECODED * max_paragraphs
    prefixes = controls.draw(n_decoded, generator).paragraphs
    own = own_continuations(adapter, prefixes, memory_budget=memory_budget, progress=progress)
    own_scan = scan(adapter, own, memory_budget=memory_budget, progress=progress)
    return _given_controls(own_scan, only_unknown=False)


def _dependence_notes(memorized: Paragraphs, control: Paragraphs) -> tuple[str, ...]:
    """Notes on the number of independent groups, and on the p-values that it allows."""
    notes = group_notes({"memorized": memorized.groups, "control": control.groups})
    n_groups = count_groups(memorized.groups), count_groups(control.groups)
    smallest = smallest_p_value(*n_groups)
    if smallest > RESOLUTION:
        notes += (
            f"The smallest p-value that {n_groups[0]} against {n_groups[1]} independent groups "
            f"allow is {smallest:.2g}.",
        )
    if memorized.ids.shape == (len(memorized), control.ids.shape[1]):
        together = (memorized + control).groups.tolist()
        n_shared = len({*together[: len(memorized)]} & {*together[len(memorized) :]})
        if n_shared:
            notes += (
                f"{n_shared} groups have paragraphs in both sets: taking the sets as independent "
                "makes intervals and p-values too large, not too small.",
            )
    return notes


def _memorized_candidates(scan_result: Scan) -> CandidateParagraphs:
    if not scan_result.finite.any():
        raise InputError(
            "model", "non-finite logits on every paragraph", "load it in float32, check its weights"
        )
    candidates = CandidateParagraphs(scan_result, scan_result.is_memorized.nonzero().flatten())
    if not len(candidates):
        largest, n = int(scan_result.em.max()), scan_result.token_correct.shape[1]
        raise InputError(
            "paragraphs",
            f"none of {len(scan_result.em)} is memorized (largest EM {largest} of {n})",
            "give paragraphs that the model recites, or a shorter n_continuation",
        )
    return candidates


def _own_controls(scan_result: Scan) -> CandidateParagraphs:
    """Controls among the given paragraphs."""
    chosen = unknown_to_the_model(scan_result)
    candidates = CandidateParagraphs(scan_result, chosen.nonzero().flatten())
    if len(candidates) < 2:
        raise InputError(
            "paragraphs",
            f"{len(candidates)} controls among {len(scan_result.em)} paragraphs",
            "at least two must not be memorized; add some or pass control=",
        )
    return candidates


def _given_controls(scan_result: Scan, only_unknown: bool) -> CandidateParagraphs:
    """Controls that were given: all with finite numbers, or of these the ones hardly known."""
    chosen = scan_result.finite
    unknown = chosen & (scan_result.loose_match < HALF_MEMORIZED)
    if only_unknown and unknown.sum() >= 2:
        chosen = unknown
    candidates = CandidateParagraphs(scan_result, chosen.nonzero().flatten())
    if not len(candidates):
        raise InputError(
            "control", "non-finite logits on every paragraph", "load the model in float32"
        )
    if len(candidates) < 2:
        raise InputError("control", "fewer than two usable paragraphs", "give at least two")
    return candidates
