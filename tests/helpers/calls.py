"""Every public call that runs a model, small: what faults are put into and what is repeated."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import memcircuits as mc
from memcircuits.data.windows import Windows
from memcircuits.editing.edit import Edit
from memcircuits.editing.evaluation import edit_divergence, evaluate_edit
from memcircuits.editing.noise import weight_noise
from memcircuits.editing.recipe import Recipe
from memcircuits.editing.relearning import recovery_curve
from memcircuits.evidence.patching.sweeps import patch_layers
from memcircuits.evidence.triggers.minimal_sets import minimal_sets
from memcircuits.measure.corpus.scan import scan_to_disk
from memcircuits.measure.decoding import greedy_continuations
from tests import matrix
from tests.helpers.document import words


@functools.cache
def edit_of(model: nn.Module, name: str) -> Edit:
    """An edit of a model, which some calls are given; made once."""
    paragraphs = matrix.paragraphs(name)
    return mc.unlearn(
        model,
        paragraphs[:3],
        paragraphs[3:],
        fraction=0.01,
        recipe=Recipe(steps=1),
        kl_budget=math.inf,
        progress=False,
    )


def scan_of_the_edited_model(model: Any, name: str) -> Any:
    with edit_of(model, name).apply(model):
        return mc.scan(model, matrix.paragraphs(name), progress=False)


def parts_of_a_scan(model: Any, name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"ids": row} for row in matrix.paragraphs(name).ids.tolist()]
        source = Path(folder, "rows.jsonl")
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        windows = Windows(n_prefix=10, n_continuation=12)
        scan_to_disk(model, source, Path(folder, "out"), windows=windows, progress=False)
        parts = sorted(Path(folder, "out").rglob("*.parquet"))
        return b"".join(part.read_bytes() for part in parts)


def report(model: Any, name: str) -> bytes:
    options = {"unigrams": matrix.unigrams(), "draws": 5, "progress": False}
    ranking = mc.find_memorization_heads(model, matrix.paragraphs(name), method="screen", **options)
    ranking = dataclasses.replace(ranking, seconds=None)  # of this run, which the page states
    with tempfile.TemporaryDirectory() as folder:
        return ranking.to_html(Path(folder, "report.html")).read_bytes()


def of_paragraphs(call: Callable[[Any, mc.Paragraphs], Any]) -> Callable[[Any, str], Any]:
    return lambda model, name: call(model, matrix.paragraphs(name))


def public_functions() -> set[str]:
    """The public functions that take a model."""
    return {name for name in mc.__all__ if name.islower()} - {"load_model", "__version__"}


# What runs a model: the analyses of the matrix, and all else.
CALLS: dict[str, Callable[[Any, str], Any]] = {
    **{name: of_paragraphs(line.measure) for name, line in matrix.ANALYSES.items()},
    "find_memorization_heads, screen, and to_html": report,
    "contrastive_gradients, curvature": of_paragraphs(
        lambda m, p: mc.contrastive_gradients(m, p[:3], p[3:], draws=2, progress=False)
    ),
    "patch_layers": of_paragraphs(
        lambda m, p: patch_layers(m, p, matrix.twins(p), positions=[0, 4], progress=False)
    ),
    "perturb_prefix, neighbor": of_paragraphs(
        lambda m, p: mc.perturb_prefix(m, p, replacement="neighbor", progress=False)
    ),
    "perturb_prefix, second": of_paragraphs(
        lambda m, p: mc.perturb_prefix(m, p, replacement="second", progress=False)
    ),
    "greedy_continuations": of_paragraphs(lambda m, p: greedy_continuations(m, p, progress=False)),
    "minimal_sets": of_paragraphs(lambda m, p: minimal_sets(m, p, max_tokens=2, progress=False)),
    "weight_noise": of_paragraphs(
        lambda m, p: weight_noise(m, p[:3], p[3:], sizes=(0.1,), draws=2, progress=False)
    ),
    "attention_view, two": of_paragraphs(
        lambda m, p: mc.attention_view(m, p[0], compare=p[1])._repr_html_()
    ),
    "Edit.apply": scan_of_the_edited_model,
    "evaluate_edit": lambda m, name: evaluate_edit(
        m, edit_of(m, name), *halves(name), attacks=2, progress=False
    ),
    "audit_edit": lambda m, name: mc.audit_edit(
        m, edit_of(m, name), *halves(name), attacks=1, relearning_steps=1, progress=False
    ),
    "edit_divergence": lambda m, name: edit_divergence(m, edit_of(m, name), halves(name)[1]),
    "recovery_curve": lambda m, name: recovery_curve(
        m, edit_of(m, name), *halves(name), steps=2, progress=False
    ),
    "scan_to_disk": parts_of_a_scan,
    "document_map": of_paragraphs(
        lambda m, p: mc.document_map(m, words(p), n_prefix=10, n_continuation=12, progress=False)
    ),
}


def halves(name: str) -> tuple[mc.Paragraphs, mc.Paragraphs]:
    return matrix.paragraphs(name)[:3], matrix.paragraphs(name)[3:]
