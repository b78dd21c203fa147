"""What the report measures beyond the ranking: single paragraphs.

Most sections of the page show numbers that the ranking holds. Others need the model: the loss of
each paragraph, attention and direct effects on the memorized paragraphs, the scores of a few heads
under other choices, and the prefix tokens that trigger the surest recitations. `take_measurements`
runs the model for them; the functions that compose the page (`memcircuits.report.ranking_page`) run
none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.heads import Head
from memcircuits.base.statistics import group_means
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.token_text import row_text
from memcircuits.display.pages import AttentionView
from memcircuits.evidence.attention_view import attention_view, front_texts, token_texts
from memcircuits.evidence.ranking import Ranking
from memcircuits.evidence.triggers.perturbation import Perturbation, perturb_prefix
from memcircuits.measure.recitation_statistics import REPETITION_COLUMNS
from memcircuits.measure.scanning import Scan, scan
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt
from memcircuits.report.component_rows import best_heads, named_rows
from memcircuits.report.head_details import Details, details_of
from memcircuits.report.robustness import Choice, other_choices

MAX_LISTED = 200  # paragraphs of each set
REPLACEMENTS = 2  # of each prefix token
CHECKED_HEADS = 5  # whose scores are measured under other choices


@dataclass(frozen=True)
class Measurements:
    """Everything on the page that is not in the ranking.

    Attributes:
        scans: set (`memorized`, `control`) -> scan of its paragraphs.
        texts: set -> prefixes and continuations of the paragraphs that are listed, the first ones.
        view: attention of the best heads on the paragraph recited most surely; None if heads were
            not ranked.
        perturbation: effects of replacing prefix tokens of the paragraphs recited most surely; None
            if not asked for.
        tokens: text of the tokens of those paragraphs.
        losses: set -> loss of each independent group of its paragraphs, nats/token.
        repetitions: set -> how many of its paragraphs were trained on, and the most repetitions of
            one, where that is known.
        details: attention and direct effects of components on the memorized paragraphs.
        token_rows: text of the tokens of these paragraphs, those in front included.
        heads: the best heads, whose scores were measured under other choices.
        choices: these scores.
    """

    scans: Mapping[str, Scan]
    texts: Mapping[str, tuple[list[str], list[str]]]
    view: AttentionView | None
    perturbation: Perturbation | None
    tokens: list[list[str]]
    losses: Mapping[str, list[float]]
    repetitions: Mapping[str, Mapping[str, int]]
    details: Details
    token_rows: list[list[str]]
    heads: list[Head]
    choices: list[Choice]


def take_measurements(
    ranking: Ranking, model: Model, *, heads: int, triggers: int, progress: bool
) -> Measurements:
    """Run the model of a ranking for the sections on single paragraphs.

    Raises:
        InputError: if the model's weights are not those of the ranking.
    """
    adapter = adapt(model)
    _refuse_other_weights(ranking, adapter)

    scans = {
        "memorized": scan(adapter, ranking.memorized, progress=progress),
        "control": scan(adapter, ranking.control, progress=progress),
    }
    # Of the memorized paragraphs listed, those recited most surely.
    recited = scans["memorized"]
    surest = recited.nll[:MAX_LISTED].argsort(stable=True)[: max(1, triggers)]
    examples = recited.paragraphs[surest]

    best = best_heads(ranking, heads)
    view = None
    if best:
        view = attention_view(adapter, examples[0], heads=best, unigrams=ranking.unigrams)
    perturbation = None
    if triggers:
        seed = int(ranking.provenance.options["seed"])
        perturbation = perturb_prefix(
            adapter, examples, draws=REPLACEMENTS, seed=seed, progress=progress
        )
    losses = {name: _group_losses(of_set) for name, of_set in scans.items()}
    checked = best_heads(ranking, CHECKED_HEADS)
    names = named_rows(ranking)["component"].tolist()
    details = details_of(adapter, ranking.memorized, names, best, progress=progress)
    return Measurements(
        scans=scans,
        texts={name: _listed(of_set.paragraphs, adapter) for name, of_set in scans.items()},
        view=view,
        perturbation=perturbation,
        tokens=token_texts(adapter, examples),
        losses={name: loss.tolist() for name, loss in losses.items()},
        repetitions=_repetitions(ranking),
        details=details,
        token_rows=[
            [*front_texts(adapter, details.paragraphs), *texts]
            for texts in token_texts(adapter, details.paragraphs)
        ],
        heads=checked,
        choices=other_choices(ranking, adapter, checked, losses["control"], progress=progress),
    )


def _group_losses(scan_result: Scan) -> Float[Tensor, " group"]:
    return group_means(scan_result.nll, scan_result.paragraphs.groups)


def _repetitions(ranking: Ranking) -> dict[str, dict[str, int]]:
    """How often the shipped paragraphs were trained on; empty where that is not known."""
    shipped = Paragraphs.shipped()
    column = next((name for name in REPETITION_COLUMNS if name in shipped.metadata), None)
    if column is None or ranking.provenance.paragraphs["paragraphs"]["hash"] != shipped.hash:
        return {}
    times = dict(zip(shipped.names, shipped.metadata[column], strict=True))
    known = {
        label: [int(times[name]) for name in ranking.names[key] if times.get(name) is not None]
        for label, key in {"memorized": "memorized", "controls": "control"}.items()
    }
    return {
        label: {"trained on": sum(n > 0 for n in counts), "most repetitions": max(counts)}
        for label, counts in known.items()
        if counts
    }


def _refuse_other_weights(ranking: Ranking, adapter: Adapter) -> None:
    measured, given = ranking.provenance.model["fingerprint"], adapter.fingerprint()
    if measured != given:
        name = ranking.provenance.model["name"]
        raise InputError(
            "model",
            f"weights {given}",
            f"the ranking is of weights {measured} ({name}): give those",
        )


def _listed(paragraphs: Paragraphs, adapter: Adapter) -> tuple[list[str], list[str]]:
    """Prefixes and continuations of the paragraphs that are listed."""
    sides = (paragraphs.prefix, paragraphs.continuation)
    prefixes, continuations = (_texts(ids[:MAX_LISTED], adapter) for ids in sides)
    return prefixes, continuations


def _texts(ids: Int[Tensor, "paragraph pos"], adapter: Adapter) -> list[str]:
    """Rows as text; lists of ids where there is no tokenizer."""
    if adapter.tokenizer is None:
        return [str(row) for row in ids.tolist()]
    return [row_text(row, adapter.tokenizer) for row in ids.tolist()]
