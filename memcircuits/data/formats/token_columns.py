"""Columns that say something about each token: masks, labels, and padding without a mask.

A tokenized data set holds rows of equal length. What fills them up is no text, and must not be
scanned:

- `attention_mask`: tokens where it is 0 are padding, at either end;
- `special_tokens_mask`: tokens where it is 1 are special tokens, which are taken away at the ends;
- `labels`: -100 in front marks a prompt, whose end becomes the end of the prefix, and -100 behind
  marks the end of what was trained on. Labels that are not the ids themselves are metadata;
- without a mask, negative ids at the ends are padding, and so are four or more zeros at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memcircuits.data.formats.records import Record, Unusable, printable

IGNORED = -100  # the label that the loss functions of PyTorch pass over
ABOUT_TOKENS = ("attention_mask", "special_tokens_mask", "token_type_ids", "position_ids")

_MIN_ZEROS = 4  # shorter runs of zeros may be text in some vocabulary


@dataclass(frozen=True)
class Tokens:
    """Token ids without padding.

    Attributes:
        ids: the ids.
        split: tokens of the prefix, where it is known.
        columns: names of the columns that were obeyed.
        changes: what was taken away -> how often.
    """

    ids: list[int]
    split: int | None
    columns: set[str]
    changes: dict[str, int]


def obey_token_columns(ids: list[int], split: int | None, record: Record, column: str) -> Tokens:
    """Take away padding and special tokens, and find the prefix that labels mark.

    Args:
        ids: all ids of the record.
        split: tokens of the prefix, where the record itself separates it.
        record: the record, with its masks and labels.
        column: where the ids stood, for messages.

    Raises:
        Unusable: if a mask does not fit the ids, or negative ids stand among the others.
    """
    masks = {name: _mask(record[name], len(ids), name) for name in ABOUT_TOKENS if name in record}
    first, stop = 0, len(ids)
    if (attended := masks.get("attention_mask")) is not None:
        first, stop = _run(attended)
        if not all(attended[first:stop]):
            raise Unusable("attention_mask leaves out tokens between others; give one row each")
    else:
        first, stop = _without_padding(ids)
    n_padding = len(ids) - (stop - first)
    n_special = 0
    if (special := masks.get("special_tokens_mask")) is not None:
        inner = _run([not value for value in special[first:stop]])
        n_special = stop - first - (inner[1] - inner[0])
        first, stop = first + inner[0], first + inner[1]
    used = {name for name, mask in masks.items() if mask is not None}
    labels = _labels(record.get("labels"), ids)
    if labels is not None:
        used.add("labels")
        start, end = _labelled(labels, first, stop)
        if split is None and start > first:
            split = start
        stop = end
    if ids and first == stop:
        raise Unusable(f"{printable(column)} must be a list of token ids; it holds only padding")
    if any(i < 0 for i in ids[first:stop]):
        raise Unusable(f"{printable(column)} must be a list of token ids; it holds negative ones")
    counts = {"padding tokens": n_padding, "special tokens": n_special}
    return Tokens(
        ids[first:stop],
        None if split is None else split - first,
        used,
        {name: n for name, n in counts.items() if n},
    )


def _mask(value: Any, n: int, name: str) -> list[Any] | None:
    """A mask as a list; None if the column holds something else.

    Raises:
        Unusable: if it is a list of another length.
    """
    mask = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(mask, list):
        return None
    if len(mask) != n:
        raise Unusable(f"{name} has {len(mask)} values for {n} token ids")
    return mask


def _run(wanted: Sequence[Any]) -> tuple[int, int]:
    """Start and end of what lies between the first and the last true value."""
    places = [i for i, value in enumerate(wanted) if value]
    return (places[0], places[-1] + 1) if places else (0, 0)


def _without_padding(ids: list[int]) -> tuple[int, int]:
    """Start and end of the ids between negative ones, and before many zeros at the end."""
    first, stop = _run([i >= 0 for i in ids])
    last = stop
    while last > first and ids[last - 1] == 0:
        last -= 1
    return first, last if stop - last >= _MIN_ZEROS and last > first else stop


def _labels(value: Any, ids: list[int]) -> list[int] | None:
    """Labels that repeat the ids but for -100; None if the column holds something else."""
    labels = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(labels, list) or len(labels) != len(ids):
        return None
    if all(label == IGNORED for label in labels):
        return None
    agree = all(label in (IGNORED, i) for label, i in zip(labels, ids, strict=True))
    return labels if agree else None


def _labelled(labels: list[int], first: int, stop: int) -> tuple[int, int]:
    """Start and end of the first run of labels that count, within a part of the row."""
    counts = [label != IGNORED for label in labels]
    start = next((i for i in range(first, stop) if counts[i]), stop)
    return start, next((i for i in range(start, stop) if not counts[i]), stop)
