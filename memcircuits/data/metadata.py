"""Names and further columns of paragraphs: unique names, and the union of all records' columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_KNOWN = {
    "role",
    "source",
    "group",
    "document",
    "repetitions",
    "twin_repetitions",
    "count",
    "duplicates",
    "changed",
    "em",
    "em_as_written",
}
_SHORT, _MAX_COLUMNS = 24, 3  # characters of a value, columns that are shown


def unique_names(names: Sequence[Any]) -> tuple[str, ...]:
    """The names as text; one that occurred before gets `#2`, `#3` and so on behind it.

    Example:
        >>> unique_names(["doc", "doc", "other"])
        ('doc', 'doc#2', 'other')
    """
    given = [str(name) for name in names]
    taken, seen = set(given), Counter[str]()
    if len(taken) == len(given):
        return tuple(given)
    unique = []
    for name in given:
        seen[name] += 1
        new_name = name
        while seen[name] > 1 and new_name in taken:
            new_name = f"{name}#{seen[name]}"
            seen[name] += new_name in taken
        taken.add(new_name)
        unique.append(new_name)
    return tuple(unique)


def columns_of(records: Iterable[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The union of the records' columns, in order of appearance; None where a record has none."""
    records = list(records)
    names = dict.fromkeys(key for record in records for key in record)
    return {name: tuple(record.get(name) for record in records) for name in names}


def own_columns(metadata: Mapping[str, Sequence[Any]]) -> list[str]:
    """The columns by which the reader of a table knows a record again, such as its number.

    These are at most three, with short values of which some differ, and none that this library
    reads or writes itself.
    """
    return [
        name
        for name, values in metadata.items()
        if name not in _KNOWN
        and len({str(value) for value in values}) > 1
        and all(
            value is None or (isinstance(value, (str, int, float)) and len(str(value)) <= _SHORT)
            for value in values
        )
    ][:_MAX_COLUMNS]


def in_both(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are equal in both."""
    return {name: first[name] for name in first if name in second and first[name] == second[name]}
