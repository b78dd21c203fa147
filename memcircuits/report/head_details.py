"""What components do on the measured paragraphs: where heads attend, and what each one writes.

The page cannot hold all attention: of each query it keeps the `N_KEYS` keys with most of it, of the
best heads all paragraphs, and of the other heads as many paragraphs as fit (`BUDGET`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.components import Component
from memcircuits.base.errors import UnsupportedModel
from memcircuits.base.heads import Head
from memcircuits.base.progress import bar
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.display.pages import HeadOnParagraph
from memcircuits.evidence.direct_writes import Writes, writes
from memcircuits.measure.continuation import run_to_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import hook_name

N_KEYS = 5
"""Keys kept of each query."""

N_TOKENS = 8
"""Tokens kept of what each component writes."""

MAX_PARAGRAPHS = 100
"""Maximum number of paragraphs whose attention is on the page."""

BUDGET = 500_000
"""Bytes for the attention of the heads that are not among the best."""


@dataclass(frozen=True)
class Details:
    """What components do on the measured paragraphs.

    Attributes:
        paragraphs: those that attention is shown on.
        on_paragraphs: name of a head -> what it does on the first of them.
        top_tokens: name of a component -> tokens that it writes most, with the mean logit added to
            each; empty if the model allows no direct logit attribution.
        note: why there is none.
    """

    paragraphs: Paragraphs
    on_paragraphs: Mapping[str, Sequence[HeadOnParagraph]]
    top_tokens: Mapping[str, Sequence[tuple[str, float]]]
    note: str = ""


def details_of(
    adapter: Adapter,
    paragraphs: Paragraphs,
    names: Sequence[str],
    best: Sequence[Head],
    *,
    progress: bool,
) -> Details:
    """Run the paragraphs, and keep what the page shows.

    Args:
        adapter: the model.
        paragraphs: the memorized paragraphs.
        names: the components; heads and MLPs are looked at.
        best: the heads that are shown on all paragraphs.
        progress: show bars on stderr.
    """
    paragraphs = paragraphs[list(range(min(len(paragraphs), MAX_PARAGRAPHS)))]
    parts = [name for name in names if Component.of(name).unit in ("head", "mlp")]
    written, note = _written(adapter, paragraphs, parts, progress)
    n_shown = {
        name: n
        for name, n in _n_paragraphs(adapter, paragraphs, best).items()
        if name in set(names)
    }
    on_paragraphs: dict[str, list[HeadOnParagraph]] = {name: [] for name in n_shown}
    rows = {} if written is None else {name: i for i, name in enumerate(written.components)}
    with (
        adapter.preserving_state(),
        bar(len(paragraphs), "attention", unit="paragraph", progress=progress) as progress_bar,
    ):
        for index in range(max(n_shown.values(), default=0)):
            top = _most_attended(adapter, paragraphs, index)
            for name, n in n_shown.items():
                if index < n:
                    head = Head.of(name)
                    keys, weights = (values[head.head] for values in top[head.layer])
                    logits = () if written is None else written.contribution[rows[name], index]
                    on_paragraphs[name].append(HeadOnParagraph(keys, weights, logits))
            progress_bar.update()
    return Details(paragraphs, on_paragraphs, {} if written is None else _top_tokens(written), note)


def _written(
    adapter: Adapter, paragraphs: Paragraphs, parts: Sequence[str], progress: bool
) -> tuple[Writes | None, str]:
    """What components write; None and the reason where that cannot be told."""
    if not parts:
        return None, ""
    try:
        return writes(adapter.model, paragraphs, parts, k=N_TOKENS, progress=progress), ""
    except UnsupportedModel as error:
        return None, f"There is no direct logit attribution: {error}."


def _top_tokens(written: Writes) -> dict[str, list[tuple[str, float]]]:
    """The tokens that each component promotes most, as text."""
    entries = zip(written.components, written.promoted, written.promotion, strict=True)
    return {
        name: [
            (written.texts[str(token)], logit)
            for token, logit in zip(tokens.tolist(), logits.tolist(), strict=True)
        ]
        for name, tokens, logits in entries
    }


def _n_paragraphs(adapter: Adapter, paragraphs: Paragraphs, best: Sequence[Head]) -> dict[str, int]:
    """How many paragraphs of each head the page holds."""
    bytes_of_key = 3 if paragraphs.inputs.shape[1] > 256 else 2  # with its weight
    size = 4 / 3 * paragraphs.n_continuation * (bytes_of_key * N_KEYS + 1)  # as base64
    n_others = max(1, adapter.n_layers * adapter.n_heads - len(best))
    n_fitting = min(len(paragraphs), int(BUDGET / size / n_others))
    return {str(head): len(paragraphs) if head in best else n_fitting for head in adapter.heads()}


def _most_attended(
    adapter: Adapter, paragraphs: Paragraphs, index: int
) -> list[tuple[Int[Tensor, "head query place"], Float[Tensor, "head query place"]]]:
    """Of each layer: the keys that predicting positions attend to most, and how much."""
    names = [hook_name("pattern", layer) for layer in range(adapter.n_layers)]
    row = slice(index, index + 1)
    cache = run_to_continuation(adapter, paragraphs, row, read=names).cache
    tops = []
    for name in names:
        pattern = cache[name][0, :, -paragraphs.n_continuation :].float()
        weights, keys = pattern.topk(min(N_KEYS, pattern.shape[-1]))
        tops.append((keys.cpu(), weights.clamp(0, 1).cpu()))
    return tops
