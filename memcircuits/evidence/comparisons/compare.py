"""Two models, scans or rankings side by side: what is gained, what is lost, which heads changed.

1. Passages (`memcircuits.evidence.comparisons.passages`): the paragraphs that both scans have, with
   the tokens recited and the loss under either model.
2. Heads (`memcircuits.evidence.comparisons.heads`): the change of every head's score, measured on
   the same paragraphs and paired over independent groups.

Two models are scanned on the same paragraphs. Their heads are ablated on the paragraphs that either
of them recites in full, against those that both hardly recite. For a model that does not recite a
paragraph, the effect of a head on it is that on any text, so the change also holds what came with
the recitation itself: the loss that can rise again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch

from memcircuits.base.errors import InputError, at_least
from memcircuits.base.statistics import DRAWS
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.tokens import refuse_other_tokenizer
from memcircuits.evidence.comparisons.heads import (
    HeadChanges,
    changes_of_rankings,
    chosen_rows,
    effects_of_models,
    head_changes,
)
from memcircuits.evidence.comparisons.passages import (
    Passages,
    ScoredParagraphs,
    paired_passages,
)
from memcircuits.evidence.comparisons.result import Comparison, no_heads, no_passages
from memcircuits.evidence.ranking import Ranking
from memcircuits.measure.corpus.folder import ScanFolder
from memcircuits.measure.scanning import Scan, scan
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance, same_basis, versions

Comparable: TypeAlias = Model | Scan | ScanFolder | Ranking
"""What can be compared: two models, two scans (in memory or on disk) or two rankings."""


@plain_torch()
def compare(
    a: Comparable,
    b: Comparable,
    paragraphs: ParagraphsLike | None = None,
    *,
    max_paragraphs: int | None = 100,
    draws: int = DRAWS,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Comparison:
    """Compare two models, two scans or two rankings; every change is b minus a.

    Args:
        a: a model, a scan (`Scan` or `ScanFolder`) or a `Ranking`.
        b: another of the same kind, for instance the model after fine-tuning or an edit.
        paragraphs: what both models are scanned on; only for models.
        max_paragraphs: maximum number of paragraphs recited by either model, and of those hardly
            recited by both, on which heads are ablated, drawn by `seed`. None: all. For models.
        draws: number of bootstrap resamples and of label permutations.
        seed: seed of all draws.
        memory_budget: maximum bytes per batch.
        progress: show bars on stderr.

    Returns:
        A `Comparison`. Two scans have no heads and two rankings no paragraphs; models whose heads
        cannot be matched, or that recite nothing, have no heads, and `notes` says why.

    Raises:
        InputError: if a and b are of different kinds; have other lengths, tokens in front or
            tokenizers, or no paragraph in common; or are rankings of other shapes, bases or modes.

    Example:
        >>> planted = mc.load_model("organism-planted", device="cpu")
        >>> result = mc.compare(model, planted, memorized + control, draws=100, progress=False)
        >>> len(result.to_frame()), len(result.heads_frame())
        (8, 48)
    """
    at_least("draws", draws, 1)
    at_least("seed", seed, 0)
    if max_paragraphs is not None:
        at_least("max_paragraphs", max_paragraphs, 2)
    kinds = [_kind(argument, value) for argument, value in (("a", a), ("b", b))]
    if kinds[0] != kinds[1]:
        raise InputError("b", f"a {kinds[1]}", f"a is a {kinds[0]}: give two of the same kind")
    if kinds[0] != "model" and paragraphs is not None:
        raise InputError("paragraphs", "given", f"a {kinds[0]} has its own: leave them out")
    if isinstance(a, Ranking) and isinstance(b, Ranking):
        return _compare_rankings(a, b, draws, seed)
    if isinstance(a, (Scan, ScanFolder)) and isinstance(b, (Scan, ScanFolder)):
        return _compare_scans(a, b)
    if paragraphs is None:
        raise InputError("paragraphs", "None", "two models need some")
    return _compare_models(
        (adapt(cast(Model, a)), adapt(cast(Model, b))),
        paragraphs,
        max_paragraphs=max_paragraphs,
        draws=draws,
        seed=seed,
        run={"memory_budget": memory_budget, "progress": progress},
    )


def _kind(argument: str, value: Comparable) -> str:
    if isinstance(value, (Scan, ScanFolder)):
        return "scan"
    if isinstance(value, Ranking):
        return "ranking"
    if isinstance(value, (Adapter, torch.nn.Module)):
        return "model"
    raise InputError(argument, type(value).__name__, "give a model, a scan or a ranking")


def _compare_scans(a: Scan | ScanFolder, b: Scan | ScanFolder) -> Comparison:
    passages = paired_passages(ScoredParagraphs.of(a, "a"), ScoredParagraphs.of(b, "b"))
    provenance = [_provenance_of_scan(scan_result) for scan_result in (a, b)]
    return Comparison(
        labels=_labels(provenance),
        **_passage_fields(passages),
        **no_heads(),
        provenance=_of_both(provenance),
        notes=(*_differences(provenance), *passages.notes, *_notes_of(a, b)),
    )


def _compare_rankings(a: Ranking, b: Ranking, draws: int, seed: int) -> Comparison:
    heads = changes_of_rankings(a, b, draws, seed)
    provenance = [a.provenance, b.provenance]
    return Comparison(
        labels=_labels(provenance),
        **no_passages(a.n_prefix, a.memorized_ids.shape[1]),
        **_head_fields(heads),
        provenance=_of_both(provenance, draws=draws, seed=seed),
        notes=(*_differences(provenance), *heads.notes, *_notes_of(a, b)),
    )


def _compare_models(
    adapters: tuple[Adapter, Adapter],
    paragraphs: ParagraphsLike,
    *,
    max_paragraphs: int | None,
    draws: int,
    seed: int,
    run: dict[str, Any],
) -> Comparison:
    a, b = adapters
    refuse_other_tokenizer("b", a.model, b.model)
    same_basis("b", Provenance.of(a, {}), Provenance.of(b, {}))
    given = Paragraphs.of(paragraphs, a)
    scans = [scan(adapter, given, **run) for adapter in adapters]
    passages = paired_passages(*(ScoredParagraphs.of(s, "b") for s in scans))
    generator = torch.Generator().manual_seed(seed)
    sets = {
        name: passages.paragraphs[rows].sample(max_paragraphs, generator)
        for name, rows in chosen_rows(passages.em, given.n_continuation).items()
        if len(rows)
    }
    reason = _no_heads_because(adapters, sets)
    heads = None
    if reason is None:
        heads = head_changes(effects_of_models(adapters, sets, **run), draws, seed)
    provenance = [scan_result.provenance for scan_result in scans]
    return Comparison(
        labels=_labels(provenance),
        **_passage_fields(passages),
        **(no_heads() if heads is None else _head_fields(heads)),
        provenance=_of_both(provenance, max_paragraphs=max_paragraphs, draws=draws, seed=seed),
        notes=(
            *_differences(provenance),
            *passages.notes,
            *(() if reason is None else (f"Heads are not compared: {reason}.",)),
            *_notes_of(*scans),
        ),
        model=a.model,
    )


def _no_heads_because(adapters: tuple[Adapter, Adapter], sets: dict[str, Paragraphs]) -> str | None:
    """Why the heads of two models cannot be compared; None if they can."""
    shapes = [f"{a.n_layers} layers of {a.n_heads} heads" for a in adapters]
    if shapes[0] != shapes[1]:
        return f"a has {shapes[0]}, b has {shapes[1]}"
    if "memorized" not in sets:
        return "neither model recites a paragraph in full"
    if len(sets.get("control", ())) < 2:
        return "fewer than two paragraphs are hardly recited by both models"
    return None


def _passage_fields(passages: Passages) -> dict[str, Any]:
    paragraphs = passages.paragraphs
    return {
        "ids": paragraphs.ids,
        "n_prefix": paragraphs.n_prefix,
        "names": paragraphs.names,
        "groups": paragraphs.groups,
        "em": passages.em,
        "nll": passages.nll.float(),
    }


def _head_fields(heads: HeadChanges) -> dict[str, Any]:
    return {
        "scores": heads.scores,
        "ci": heads.ci,
        "p_value": heads.p_value,
        "n_groups": heads.n_groups,
    }


def _provenance_of_scan(scan_result: Scan | ScanFolder) -> Provenance:
    """That of a scan; a scan to disk names its weights, and is called by its folder."""
    if isinstance(scan_result, Scan):
        return scan_result.provenance
    manifest = scan_result.manifest
    model = {"name": scan_result.folder.name, **manifest["model"]}
    options = {key: manifest[key] for key in ("windows", "bos", "normalize")}
    return Provenance(model, {}, options, {})


def _labels(provenance: Sequence[Provenance]) -> tuple[str, str]:
    """Names of both; where these are equal, with the letter that tells them apart."""
    a, b = (str(each.model["name"]) for each in provenance)
    return (a, b) if a != b else (f"{a} (a)", f"{b} (b)")


def _of_both(provenance: Sequence[Provenance], **options: Any) -> Provenance:
    """Model b and its paragraphs, with model a and its options among the options."""
    a, b = provenance
    parts = {"a": dict(a.model), "a_options": dict(a.options), "b_options": dict(b.options)}
    return Provenance(b.model, b.paragraphs, {**parts, **options}, versions())


def _differences(provenance: Sequence[Provenance]) -> tuple[str, ...]:
    """A note on settings that decide numbers and are not the same for both."""
    a, b = provenance
    pairs = {
        "type": (a.model.get("dtype"), b.model.get("dtype")),
        "device": (a.model.get("device"), b.model.get("device")),
        **{
            key: (a.options.get(key), b.options.get(key))
            for key in ("method", "match_nll", "control", "sampler", "normalize")
        },
        **{package: (a.versions.get(package), b.versions.get(package)) for package in a.versions},
    }
    unequal = [f"{key} ({one} and {other})" for key, (one, other) in pairs.items() if one != other]
    same_weights = a.model.get("fingerprint") == b.model.get("fingerprint")
    notes = ("a and b have the same weights",) if same_weights else ()
    return (*notes, f"a and b differ in {', '.join(unequal)}") if unequal else notes


def _notes_of(a: Any, b: Any) -> tuple[str, ...]:
    """The notes of both, each once, with the letter of the one that has it."""
    shared = [note for note in a.notes if note in b.notes]
    own = [
        f"{letter}: {note}"
        for letter, each in (("a", a), ("b", b))
        for note in each.notes
        if note not in shared
    ]
    return (*shared, *own)
