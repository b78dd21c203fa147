"""The section on trigger tokens: which tokens of the prefix set a recitation off?

Every prefix token is replaced in turn (`memcircuits.evidence.triggers.perturbation`); a token
triggers the recitation to the extent that the model then recites fewer tokens of the continuation.
Each paragraph is shown with its tokens coloured by that loss, and a table lists the largest ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memcircuits.display.pages import Block, Strip, Table, Tokens
from memcircuits.display.text import number, visible
from memcircuits.evidence.triggers.perturbation import Perturbation

if TYPE_CHECKING:
    import pandas as pd

TOKENS_LOST = "tokens lost when replaced"
MAX_TOKENS = 5  # of each paragraph in the table


def trigger_blocks(perturbation: Perturbation, texts: Sequence[Sequence[str]]) -> list[Block]:
    """The paragraphs with coloured tokens, then the table.

    Args:
        perturbation: of the paragraphs to show.
        texts: text of the tokens of each paragraph.
    """
    paragraphs = [
        Tokens(
            tokens,
            tokens_lost(perturbation, index),
            TOKENS_LOST,
            perturbation.n_prefix,
            title="Trigger tokens" if index == 0 else "",
            note=(_introduction(perturbation) if index == 0 else "")
            + _worst_tokens(perturbation, index, tokens),
        )
        for index, tokens in enumerate(texts)
    ]
    table = Table(
        trigger_frame(perturbation, texts),
        labels={"lost": "tokens lost", "nll": "ΔNLL"},
        help={
            "lost": "recited tokens lost when this one is replaced, mean over draws",
            "nll": "rise of the loss of the continuation, nats/token",
        },
        note="The tokens of each paragraph that matter, at most five.",
        page_size=15,
    )
    return [*paragraphs, table]


def tokens_lost(perturbation: Perturbation, index: int, *, n_front: int = 0) -> Strip:
    """EM lost by replacing each token; what is not replaced stays uncoloured.

    Args:
        perturbation: what was measured.
        index: of the paragraph.
        n_front: number of tokens in front of the paragraph that are shown too.
    """
    n_continuation = perturbation.ids.shape[1] - perturbation.n_prefix
    lost = perturbation.em_drop[index].clamp_min(0).tolist()
    nan = float("nan")
    return Strip([*[nan] * n_front, *lost, *[nan] * n_continuation], "tokens")


def trigger_frame(perturbation: Perturbation, texts: Sequence[Sequence[str]]) -> pd.DataFrame:
    """The tokens of each paragraph whose replacement loses most, largest loss first."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for index, tokens in enumerate(texts):
        drops = perturbation.em_drop[index]
        rise = perturbation.nll[index].mean(-1) - perturbation.baseline_nll[index]
        rows += [
            {
                "paragraph": perturbation.names[index],
                "token": _shown(tokens[i]),
                "position": i,
                "lost": float(drops[i]),
                "nll": float(rise[i]),
            }
            for i in _by_loss(perturbation, index)[:MAX_TOKENS]
            if drops[i] > 0
        ]
    return pd.DataFrame(rows, columns=["paragraph", "token", "position", "lost", "nll"])


def _introduction(perturbation: Perturbation) -> str:
    return (
        "Which tokens of the prefix trigger the recitation? Each was replaced by a random other "
        f"token ({perturbation.em.shape[2]} draws), one at a time; the nearer a "
        "token is to the upper end of the scale, the more of the continuation is lost. Tokens "
        "count as lost from the first that differs: a small rise of the loss can cost many. "
    )


def _worst_tokens(perturbation: Perturbation, index: int, tokens: Sequence[str]) -> str:
    """The tokens whose replacement loses most, all of them where some lose as much."""
    drops = perturbation.em_drop[index]
    order = _by_loss(perturbation, index)
    worst = [i for i in order if drops[i] == drops[order[0]]]
    lost = number(float(drops[order[0]]))
    n_continuation = perturbation.ids.shape[1] - perturbation.n_prefix
    named = [f"“{_shown(tokens[i])}” (token {i})" for i in worst[:MAX_TOKENS]]
    if len(worst) > MAX_TOKENS:
        named.append(f"{len(worst) - MAX_TOKENS} more")
    places = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} or {named[-1]}"
    return (
        f"{perturbation.names[index]}: with another token in the place of {places} "
        f"{lost} of {n_continuation} tokens are lost."
    )


def _by_loss(perturbation: Perturbation, index: int) -> list[int]:
    """Positions of the prefix by what replacing them loses: tokens, then loss; most first."""
    rise = perturbation.nll[index].mean(-1) - perturbation.baseline_nll[index]
    drops = perturbation.em_drop[index].tolist()
    return sorted(range(len(drops)), key=lambda i: (-drops[i], -float(rise[i])))


def _shown(token: str) -> str:
    return visible(token, 24, tell=False)
