"""Which paragraphs are taken: the paper's filters of repeated tokens, keywords and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import memcircuits as mc
from memcircuits.data.windows import n_unique

COUNT_COLUMNS = ("repetitions", "count", "duplicates")


@dataclass(frozen=True)
class Filters:
    """The paper's choice of paragraphs.

    Attributes:
        min_unique: at least this share of a paragraph's tokens differ from each other (paper: more
            than a half).
        keywords: paragraphs whose text contains one of these words, in any case, are dropped (the
            paper drops licences).
        per_count: as many paragraphs of each number of occurrences, the first ones; numbers with
            fewer are dropped. None: all.
    """

    min_unique: float = 0.5
    keywords: Sequence[str] = ()
    per_count: int | None = None

    def apply(self, paragraphs: mc.Paragraphs, model: Any) -> mc.Paragraphs:
        """The paragraphs that pass.

        Raises:
            InputError: if none passes, or `per_count` is asked for and no column tells the count.
        """
        share = n_unique(paragraphs.ids) / paragraphs.ids.shape[1]
        keep = share > self.min_unique if self.min_unique else torch.ones_like(share).bool()
        if self.keywords:
            words = [word.casefold() for word in self.keywords]
            texts = [text.casefold() for text in paragraphs.texts(model)]
            keep &= ~torch.tensor([any(word in text for word in words) for text in texts])
        if self.per_count is not None:
            keep &= self._first_of_each_count(paragraphs, keep)
        if not keep.any():
            remedy = "every paragraph is dropped: use --min-unique, --drop-keywords, --per-count"
            raise mc.InputError("filters", f"{len(keep)} paragraphs", remedy)
        return paragraphs[keep.nonzero().flatten().tolist()]

    def _first_of_each_count(self, paragraphs: mc.Paragraphs, keep: Tensor) -> Tensor:
        column = next((name for name in COUNT_COLUMNS if name in paragraphs.metadata), None)
        if column is None:
            remedy = f"the paragraphs have no column {' or '.join(COUNT_COLUMNS)}"
            raise mc.InputError("--per-count", self.per_count, remedy)
        rows_of: dict[Any, list[int]] = {}
        for row, count in enumerate(paragraphs.metadata[column]):
            if keep[row] and count:
                rows_of.setdefault(count, []).append(row)
        chosen = [
            rows[: self.per_count] for rows in rows_of.values() if len(rows) >= self.per_count
        ]
        result = torch.zeros_like(keep)
        result[[row for rows in chosen for row in rows]] = True
        return result
