"""Two scans side by side: the paragraphs that both have, matched by their token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.statistics import group_notes, left_out
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.corpus.folder import ScanFolder
from memcircuits.measure.scanning import Scan


@dataclass(frozen=True)
class ScoredParagraphs:
    """What a scan, in memory or on disk, says of its paragraphs.

    Attributes:
        paragraphs: the paragraphs.
        em: tokens recited, [paragraph].
        nll: loss of the continuation, nats/token, [paragraph].
        tokenizer: hash of the model's tokenizer; empty where it is not known.
    """

    paragraphs: Paragraphs
    em: Int[Tensor, " paragraph"]
    nll: Float[Tensor, " paragraph"]
    tokenizer: str = ""

    @classmethod
    def of(cls, scan: Scan | ScanFolder, argument: str) -> ScoredParagraphs:
        """The paragraphs of a scan.

        Raises:
            InputError: if the scan is of no paragraph.
        """
        if isinstance(scan, Scan):
            return cls(scan.paragraphs, scan.em, scan.nll)
        paragraphs = scan.paragraphs(min_em=0) if scan.parts else None
        if paragraphs is None:
            raise InputError(argument, scan.folder.name, "the scan has no rows; finish it first")
        # A plain read of the two columns: `to_frame` would compute all measures of every row.
        table = scan.table(columns=["em", "nll"], filters=[("em", ">=", 0)])
        em, nll = (torch.tensor(table[name].to_pylist()) for name in ("em", "nll"))
        return cls(paragraphs, em, nll, scan.manifest["model"]["tokenizer"])


@dataclass(frozen=True)
class Passages:
    """The paragraphs that two scans have in common.

    Attributes:
        paragraphs: the paragraphs, as the first scan has them.
        em: tokens recited by each model, [model, paragraph].
        nll: loss of the continuation, nats/token, [model, paragraph].
        notes: what was left out.
    """

    paragraphs: Paragraphs
    em: Int[Tensor, "model paragraph"]
    nll: Float[Tensor, "model paragraph"]
    notes: tuple[str, ...]


def paired_passages(a: ScoredParagraphs, b: ScoredParagraphs) -> Passages:
    """Match the paragraphs of two scans by their ids, in the order of the first.

    Raises:
        InputError: if the scans have other lengths, tokens in front or tokenizers, or no paragraph
            in common.
    """
    _check_comparable(a, b)
    row_of = {key: row for row, key in enumerate(_keys(b.paragraphs.ids))}
    pairs = [(row, row_of[key]) for row, key in enumerate(_keys(a.paragraphs.ids)) if key in row_of]
    if not pairs:
        raise InputError(
            "b", f"{len(b.em)} paragraphs", "none of them is in a: scan the same paragraphs"
        )
    rows, rows_b = torch.tensor(pairs).T
    em, nll = torch.stack([a.em[rows], b.em[rows_b]]), torch.stack([a.nll[rows], b.nll[rows_b]])
    finite = nll.isfinite().all(0)
    if not finite.any():
        raise InputError("b", "non-finite numbers", "load both models in float32")
    paragraphs = a.paragraphs[rows[finite]]
    notes = (
        *_not_shared(len(a.em) - len(pairs), "a", "b"),
        *_not_shared(len(b.em) - len(pairs), "b", "a"),
        *left_out(finite),
        *group_notes({"given": paragraphs.groups}),
    )
    return Passages(paragraphs, em[:, finite], nll[:, finite], notes)


def _keys(ids: Int[Tensor, "paragraph pos"]) -> list[Hashable]:
    """The ids of each paragraph, and how many equal ones come before it."""
    seen: Counter[bytes] = Counter()
    keys: list[Hashable] = []
    for row in ids.contiguous().numpy():
        content = row.tobytes()
        keys.append((content, seen[content]))
        seen[content] += 1
    return keys


def _check_comparable(a: ScoredParagraphs, b: ScoredParagraphs) -> None:
    sizes = [(s.paragraphs.n_prefix, s.paragraphs.n_continuation) for s in (a, b)]
    if sizes[0] != sizes[1]:
        raise InputError(
            "b",
            f"{sizes[1][0]} + {sizes[1][1]} tokens",
            f"a has {sizes[0][0]} + {sizes[0][1]}: scan both with the same lengths",
        )
    a.paragraphs.check_same_bos(b.paragraphs, "b")
    if a.tokenizer and b.tokenizer and a.tokenizer != b.tokenizer:
        raise InputError(
            "b",
            f"tokenizer {b.tokenizer}",
            f"a has {a.tokenizer}: compare models of the same tokenizer",
        )


def _not_shared(n: int, one: str, other: str) -> tuple[str, ...]:
    return (f"{n} paragraphs of {one} are not in {other} and were left out",) if n else ()
