"""`CutPrefix`: how much is recited after prefixes that are cut at any byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, one_of
from memcircuits.base.statistics import bootstrap_interval, group_means
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.display.pages import Block

Way = Literal["naive", "aligned", "marginal"]
"""How a cut prefix is continued, see `memcircuits.evidence.prefix_cuts.cuts.cut_prefix`."""

WAYS: tuple[Way, ...] = get_args(Way)

PLACES = ("between words", "between tokens", "inside a token")
"""Where a cut lies: before white space, between two tokens of a word, inside a token."""


@dataclass(frozen=True)
class CutPrefix(Result, kind="cut-prefix"):
    """Characters recited after prefixes that are cut at any byte.

    Attributes:
        cuts: bytes from the end of the prefix to each cut; negative ones lie inside the prefix.
        recited: way of continuing -> characters recited, [paragraph, cut]; of `marginal` the mean
            over covering sequences. NaN where a way cannot continue.
        in_full: way -> probability that all characters up to the end of the paragraph are recited,
            0 or 1 but for `marginal`, [paragraph, cut].
        n_characters: characters from the cut to the end of the paragraph, [paragraph, cut].
        place: where each cut lies, an index of `PLACES`, [paragraph, cut].
        names: one per paragraph.
        provenance: where the numbers come from.
        notes: what the reader must know.
        groups: number of each paragraph's independent group, [paragraph]; None: each is its own.
    """

    cuts: tuple[int, ...]
    recited: Mapping[str, Float[Tensor, "paragraph cut"]]
    in_full: Mapping[str, Float[Tensor, "paragraph cut"]]
    n_characters: Int[Tensor, "paragraph cut"]
    place: Int[Tensor, "paragraph cut"]
    names: tuple[str, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    groups: Int[Tensor, " paragraph"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = (len(self.names), len(self.cuts))
        for name, values in {**self.recited, **self.in_full, "place": self.place}.items():
            if tuple(values.shape) != shape:
                raise InputError(name, tuple(values.shape), f"give [paragraph, cut], {shape}")

    def share(self, way: Way) -> Float[Tensor, "paragraph cut"]:
        """Share of the characters after the cut that are recited, in [0, 1]."""
        one_of("way", way, WAYS)
        return self.recited[way] / self.n_characters

    def by_place(self) -> pd.DataFrame:
        """What is recited, by the place of the cut, and by how much the naive way under-reports.

        Means over the cuts of a paragraph, then over independent groups of paragraphs, with 95 %
        intervals over groups.

        Returns:
            Columns `place, measure, n, cuts`, and `naive, aligned, marginal, missed` with their
            bounds (`naive_low, naive_high`, ...). The measures are `share` (of the characters
            recited) and `in full` (share of paragraphs); `missed` is aligned minus naive, paired;
            `n` counts paragraphs.
        """
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for place, place_name in enumerate((*PLACES, "all")):
            here = self.place == place if place < len(PLACES) else torch.ones_like(self.place) > 0
            defined = here & torch.stack(list(self.recited.values())).isfinite().all(0)
            for measure in ("share", "in full"):
                values: dict[str, Tensor] = {
                    way: self.share(way) if measure == "share" else self.in_full[way]
                    for way in WAYS
                }
                values["missed"] = values["aligned"] - values["naive"]
                row: dict[str, Any] = {"place": place_name, "measure": measure}
                row |= {"n": int(defined.any(1).sum()), "cuts": int(defined.sum())}
                for name, value in values.items():
                    row |= _mean_with_interval(name, value, defined, self.groups)
                rows.append(row)
        return pd.DataFrame(rows)

    def to_frame(self) -> pd.DataFrame:
        """One row per paragraph and cut.

        Columns `id, cut, place, characters`, then for every way the characters recited (`naive`,
        ...) and the probability that all are (`naive_in_full`, ...).
        """
        import pandas as pd

        n, n_cuts = self.place.shape
        data: dict[str, Any] = {
            "id": [name for name in self.names for _ in range(n_cuts)],
            "cut": list(self.cuts) * n,
            "place": [PLACES[place] for place in self.place.flatten().tolist()],
            "characters": self.n_characters.flatten().numpy(),
        }
        for way in WAYS:
            data[way] = self.recited[way].flatten().double().numpy()
        for way in WAYS:
            data[f"{way}_in_full"] = self.in_full[way].flatten().double().numpy()
        return pd.DataFrame(data)

    def curves(self) -> pd.DataFrame:
        """Means over paragraphs at every cut: columns `cut, set, share, in_full` and intervals.

        `set` is the way of continuing.
        """
        import pandas as pd

        rows = []
        for way in WAYS:
            measures = {"share": self.share(way), "in_full": self.in_full[way]}
            for i, cut in enumerate(self.cuts):
                row: dict[str, Any] = {"cut": cut, "set": way}
                for name, values in measures.items():
                    column = values[:, [i]]
                    row |= _mean_with_interval(name, column, column.isfinite(), self.groups)
                rows.append(row)
        return pd.DataFrame(rows)

    def figure(self) -> Any:
        """Share recited against the place of the cut, for every way of continuing (plotly)."""
        from memcircuits.display import figures

        return figures.curves(
            self.curves(),
            "cut",
            {"share": "share of characters recited", "in_full": "share recited in full"},
            title=str(self),
            x_label="bytes between the end of the prefix and the cut",
        )

    def block(self) -> Block:
        """The same as a block of a page."""
        from memcircuits.display.pages import Lines

        return Lines(
            self.curves(),
            x="cut",
            y="share",
            by="set",
            low="share_low",
            high="share_high",
            x_label="bytes between the end of the prefix and the cut",
            y_label="share of characters recited",
            title="Prefixes cut at any byte",
            note="Naive: the text before the cut is encoded as it is. Aligned: the last tokens are "
            "taken back and chosen anew among those that agree with the text. Marginal: the mean "
            "over all tokens that agree with it.",
        )

    def __str__(self) -> str:
        in_token = (self.place == PLACES.index("inside a token")).nonzero(as_tuple=True)
        means = ", ".join(
            f"{way} {float(self.in_full[way][in_token].nanmean()):.0%}" for way in WAYS
        )
        return (
            f"{len(self.names)} paragraphs cut at {len(self.cuts)} bytes: recited in full after "
            f"cuts inside a token: {means}"
        )


def _mean_with_interval(
    name: str,
    values: Float[Tensor, "paragraph cut"],
    defined: Tensor,
    groups: Int[Tensor, " paragraph"] | None,
) -> dict[str, float]:
    """Mean over the defined cuts of each paragraph, then over groups, and its interval."""
    rows = defined.any(1)
    if not rows.any():
        return {name: torch.nan, f"{name}_low": torch.nan, f"{name}_high": torch.nan}
    sums = torch.where(defined, values, torch.zeros_like(values)).sum(1)[rows]
    means = group_means(sums / defined.sum(1)[rows], None if groups is None else groups[rows])
    low, high = bootstrap_interval(means).tolist()
    return {name: float(means.mean()), f"{name}_low": low, f"{name}_high": high}
