"""The rows of a ranking by the names of their components: `L0H5` is a head, `L0.mlp` an MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memcircuits.base.heads import Head

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.evidence.ranking import Ranking


def named_rows(ranking: Ranking) -> pd.DataFrame:
    """The rows of `Ranking.to_frame`, best first, with a column `component`, their names."""
    frame = ranking.to_frame()
    frame.insert(0, "component", [str(part) for part in ranking.top_components(len(frame))])
    return frame


def best_heads(ranking: Ranking, limit: int) -> list[Head]:
    """The heads of a ranking, best first; none if no head was ranked."""
    return ranking.top(limit) if "head" in ranking.units else []
