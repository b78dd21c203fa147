"""Columns: which of a record's columns hold its ids or its text, and which are further columns.

What a column holds decides, not only its name: a number of tokens called `tokens` does not hide the
text beside it. The first of these that a record holds is taken, unless the caller named columns:

1. token ids of prefix and continuation: `prefix_ids` with `suffix_ids` or `continuation_ids`,
   `prompt_ids` with `completion_ids`;
2. token ids: `ids`, `tokens`, `input_ids` or `token_ids`;
3. text: `text`, `paragraph`, `content` or `raw_content`;
4. prefix and continuation: `prefix` with `suffix` or `continuation`; `prompt` with `gt`,
   `ground_truth`, `completion`, `continuation` or `response`; `input` with `gt` or `output`. The
   true text (`gt`) is preferred to what a model may have written (`completion`).

Names are compared without regard to case. `id` or `index` names the paragraph. Columns that say
something about each token (`attention_mask`, `labels` and others, see `token_columns`) are obeyed
and left out. Every other column becomes metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from memcircuits.data.formats.records import (
    LIMIT,
    SAVE_AS_UTF8,
    TOO_LONG,
    Columns,
    NoContent,
    Record,
    Row,
    Source,
    Unusable,
    all_printable,
    decode_utf8,
    printable,
)
from memcircuits.data.formats.token_columns import obey_token_columns

ID_PAIRS = (
    ("prefix_ids", "suffix_ids"),
    ("prefix_ids", "continuation_ids"),
    ("prompt_ids", "completion_ids"),
)
IDS = ("ids", "tokens", "input_ids", "token_ids")
TEXT = ("text", "paragraph", "content", "raw_content")
PAIRS = (
    *(("prefix", name) for name in ("suffix", "continuation")),
    *(("prompt", name) for name in ("gt", "ground_truth", "completion", "continuation")),
    ("prompt", "response"),
    *(("input", name) for name in ("gt", "output")),
)
NAMES = ("id", "index")
CHATS = ("messages", "conversations", "conversation", "chat")

AS_TEXT = {*TEXT, *NAMES, *(name for pair in PAIRS for name in pair)}
"""Columns whose values stay as they are written, where a format knows only text."""


@dataclass(frozen=True)
class _Content:
    """What a record says: token ids, or a text of one or two parts.

    Attributes:
        columns: where it stood.
        ids: token ids.
        text: the text.
        split: tokens of the prefix, where two lists of ids were given.
        prefix: text of the prefix, where two texts were given.
    """

    columns: tuple[str, ...]
    ids: list[int] | None = None
    text: str | None = None
    split: int | None = None
    prefix: str | None = None


def make_row(source: Source, number: int, where: str, record: Record) -> Row:
    """The row of a record: its ids or text, its name and its metadata.

    Args:
        source: the file, which names rows that bear no name.
        number: line or row number in the file.
        where: file and row, for messages.
        record: the columns.

    Raises:
        Unusable: if there are neither ids nor text, or they are not what their column promises.
    """
    content = _content(record, source.columns)
    names = _by_lower_case(record)
    left_out = {*content.columns, *(names.get(name) for name in ("id", "text"))}
    ids, split, changes = content.ids, content.split, {}
    if ids is not None:
        tokens = obey_token_columns(ids, split, record, content.columns[0])
        ids, split, changes = tokens.ids, tokens.split, tokens.changes
        left_out |= tokens.columns
    given = (record[names[name]] for name in NAMES if name in names)
    name = next((value for value in given if not _is_missing(value)), None)
    return Row(
        where,
        number,
        f"{source.stem}-{number:05d}" if name is None else printable(name),
        content.text,
        ids,
        split,
        content.prefix,
        {
            printable(key): all_printable(value)
            for key, value in record.items()
            if key not in left_out
        },
        changes,
    )


def check_columns(columns: Collection[str], named: Columns) -> None:
    """Raise `Unusable` if none of the columns can hold token ids or text."""
    if next(_candidates(columns, named), None) is None:
        raise NoContent(_no_content(columns, named))


def is_usable(columns: Collection[str], named: Columns) -> bool:
    """Whether one of the columns can hold token ids or text."""
    return next(_candidates(columns, named), None) is not None


def unique_columns(names: Collection[str]) -> list[str]:
    """The names of a table's columns; one that occurred before gets `.2`, `.3` behind it."""
    unique: list[str] = []
    for name in names:
        number, new_name = 1, name
        while new_name in unique:
            number += 1
            new_name = f"{name}.{number}"
        unique.append(new_name)
    return unique


def _content(record: Record, named: Columns) -> _Content:
    """The content of a record: of the candidates, the first that holds what it promises."""
    first_problem = None
    for columns in _candidates(record, named):
        try:
            return _read_content(record, columns)
        except Unusable as problem:
            first_problem = first_problem or problem
    raise first_problem or NoContent(_no_content(record, named))


def _candidates(columns: Collection[str], named: Columns) -> Iterator[tuple[str, ...]]:
    """The columns that may hold the content, one name or two, the likeliest first."""
    if named.text is not None or named.prefix is not None:
        chosen = tuple(c for c in (named.text, named.prefix, named.continuation) if c is not None)
        if all(name in columns for name in chosen):
            yield chosen
        return
    names = _by_lower_case(columns)
    for candidate in (*ID_PAIRS, *((name,) for name in (*IDS, *TEXT)), *PAIRS):
        if all(name in names for name in candidate):
            yield tuple(names[name] for name in candidate)


def _read_content(record: Record, columns: tuple[str, ...]) -> _Content:
    """The content of one column, or of two.

    Raises:
        Unusable: if they hold neither token ids nor text.
    """
    name = columns[0].strip().lower()
    is_ids = name in IDS or name.endswith("_ids") or isinstance(record[columns[0]], list)
    if is_ids or hasattr(record[columns[0]], "tolist"):
        parts = [_ids(record, column) for column in columns]
        split = len(parts[0]) if len(parts) == 2 else None
        return _Content(columns, ids=[i for part in parts for i in part], split=split)
    texts = [_text(record, column) for column in columns]
    prefix = texts[0] if len(texts) == 2 else None
    return _Content(columns, text="".join(texts), prefix=prefix)


def _no_content(columns: Collection[str], named: Columns) -> str:
    names = ", ".join(printable(name) for name in list(columns)[:10]) or "none"
    if named.text is not None or named.prefix is not None:
        chosen = " and ".join(c for c in (named.text, named.prefix, named.continuation) if c)
        options = "--text-column" if named.text else "--prefix-column and --continuation-column"
        return f"its columns are {names}; {chosen} was asked for with {options}; name one of these"
    chat = next((name for name in columns if name.strip().lower() in CHATS), None)
    if chat is not None:
        return (
            f"{chat} is a chat; apply the model's chat template and give the result as text, or as "
            "prompt and completion"
        )
    return (
        f"its columns are {names}; it needs one of {', '.join(IDS + TEXT)}, or two such as "
        "prefix and suffix, prompt and completion; name others with --text-column, or "
        "--prefix-column and --continuation-column"
    )


def _by_lower_case(columns: Collection[str]) -> dict[str, str]:
    """Name in lower case -> name; the first of those that differ in case only."""
    names: dict[str, str] = {}
    for name in columns:
        names.setdefault(name.strip().lower(), name)
    return names


def _ids(record: Record, column: str) -> list[int]:
    """Token ids: a list or array, or a list written as text, as tables without lists have it."""
    ids = record[column]
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, str) and ids.lstrip().startswith("["):
        try:
            ids = json.loads(ids)
        except (ValueError, RecursionError):
            ids = None
    if not isinstance(ids, list) or not all(type(i) is int and -(2**31) <= i < 2**31 for i in ids):
        raise Unusable(f"{printable(column)} must be a list of token ids")
    return ids


def _text(record: Record, column: str) -> str:
    name, text = printable(column), record[column]
    if isinstance(text, bytes):
        text = decode_utf8(text)
    if not isinstance(text, str):
        raise Unusable(f"{name} must be a string")
    if len(text) > LIMIT:
        raise Unusable(TOO_LONG)
    if printable(text) != text:
        raise Unusable(f"{name} is not UTF-8 text; {SAVE_AS_UTF8}")
    return text


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
