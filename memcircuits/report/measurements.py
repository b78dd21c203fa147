"""What the report measures beyond the ranking: single paragraphs.

Most sections of the page show numbers that the ranking holds. Three need the model: the loss of
each memorized paragraph, the attention of the best heads on the paragraph recited most surely, and
the prefix tokens that trigger the surest recitations. `take_measurements` runs the model for them;
the functions that compose the page (`memcircuits.report.ranking_page`) run none.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.data.token_text import row_text
from memcircuits.display.pages import AttentionView
from memcircuits.evidence.attention_view import attention_view, token_texts
from memcircuits.evidence.ranking import Ranking
from memcircuits.evidence.triggers.perturbation import Perturbation, perturb_prefix
from memcircuits.measure.scanning import Scan, scan
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt

MAX_LISTED = 200  # memorized paragraphs
REPLACEMENTS = 2  # of each prefix token


@dataclass(frozen=True)
class Measurements:
    """Everything on the page that is not in the ranking.

    Attributes:
        scan: of the memorized paragraphs that are listed.
        prefixes: text of their prefixes.
        continuations: text of their continuations.
        view: attention of the best heads on the paragraph recited most surely; None if heads were
            not ranked.
        perturbation: effects of replacing prefix tokens of the paragraphs recited most surely; None
            if not asked for.
        tokens: text of the tokens of those paragraphs.
    """

    scan: Scan
    prefixes: list[str]
    continuations: list[str]
    view: AttentionView | None
    perturbation: Perturbation | None
    tokens: list[list[str]]


def take_measurements(
    ranking: Ranking, model: Model, *, heads: int, triggers: int, progress: bool
) -> Measurements:
    """Run the model of a ranking for the sections on single paragraphs.

    Raises:
        InputError: if the model's weights are not those of the ranking.
    """
    adapter = adapt(model)
    _refuse_other_weights(ranking, adapter)

    # The paragraphs listed, and of those the ones recited most surely.
    listed = ranking.memorized[list(range(min(MAX_LISTED, len(ranking.memorized))))]
    scan_result = scan(adapter, listed)
    surest = scan_result.nll.argsort(stable=True)[: max(1, triggers)]
    examples = scan_result.paragraphs[surest]

    view = None
    if "head" in ranking.units:
        best_heads = ranking.top(heads)
        view = attention_view(adapter, examples[0], heads=best_heads, unigrams=ranking.unigrams)
    perturbation = None
    if triggers:
        seed = int(ranking.provenance.options["seed"])
        perturbation = perturb_prefix(
            adapter, examples, draws=REPLACEMENTS, seed=seed, progress=progress
        )
    return Measurements(
        scan=scan_result,
        prefixes=_texts(listed.prefix, adapter),
        continuations=_texts(listed.continuation, adapter),
        view=view,
        perturbation=perturbation,
        tokens=token_texts(adapter, examples),
    )


def _refuse_other_weights(ranking: Ranking, adapter: Adapter) -> None:
    measured, given = ranking.provenance.model["fingerprint"], adapter.fingerprint()
    if measured != given:
        name = ranking.provenance.model["name"]
        raise InputError(
            "model",
            f"weights {given}",
            f"the ranking is of weights {measured} ({name}): give those",
        )


def _texts(ids: Int[Tensor, "paragraph pos"], adapter: Adapter) -> list[str]:
    """Rows as text; lists of ids where there is no tokenizer."""
    if adapter.tokenizer is None:
        return [str(row) for row in ids.tolist()]
    return [row_text(row, adapter.tokenizer) for row in ids.tolist()]
