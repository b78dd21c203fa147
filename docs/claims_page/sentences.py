"""Sentences that rest on numbers: are they what the numbers say, and if not, make them so.

`docs/claims.toml` is a list of claims. A claim has

* `says`: sentences, with a field where a number or name stands: `{FILE#PATH:FORMAT}`, or
  `{-FILE#PATH:FORMAT}` with the opposite sign. FILE is a JSON file of docs, or a page that a
  command wrote (heading -> rows of its tables by column; `1.2 to 3.4` is a list), and PATH leads
  into it;
* `at`: what `/PATH` is short for, if an address begins so;
* `pages`: files in each of which all of the sentences stand, whatever their line breaks;
* `holds`: comparisons that the sentences make in words, `[left, relation, right]`; left and right
  are numbers or `FILE#PATH`;
* `never`: former wordings that must stand nowhere any more.

A step of a PATH is a key; in a list of records it chooses those that have it among their values. A
step with `*` takes all keys that match. `PATH|mean` reduces what was found, see `REDUCTIONS`.

What rests on a section of `claims.json` that was not measured yet is not compared (`unmeasured`).
In a table, `—` keeps the place of such a number.
"""

from __future__ import annotations

import contextlib
import json
import operator
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from memcircuits.base.io import write_atomically
from memcircuits.base.statistics import bootstrap_interval

ROOT = Path(__file__).parents[2]
SEED = 1  # of intervals, as in docs/make_unlearning.py
WRITTEN = ("README.md", "docs/**/*.md", "docs/*/*.py", "memcircuits/**/*.py", "examples/**/*.py")
"""Where a former wording is looked for."""

_FIELD = re.compile(r"\{(-?)([^{}:]+):([^{}]*)\}")
_VALUE = r"(?:[-+]?\w+(?:[.,]\w+)*|—)"
MEASURED = "claims.json"
_NUMBER = r"[-+]?\d+(?:\.\d+)?"
RELATIONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


def _interval(values: Sequence[float]) -> list[float]:
    return bootstrap_interval(torch.tensor(values, dtype=torch.float64), seed=SEED).tolist()


REDUCTIONS: Mapping[str, Callable[[list[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "low": lambda values: _interval(values)[0],
    "high": lambda values: _interval(values)[1],
    "min": min,
    "max": max,
    "count": len,
}
"""How the values of several runs become one; `low` and `high` bound the mean's 95 % interval."""


def claims(root: Path = ROOT) -> list[dict[str, Any]]:
    """The list of claims."""
    return tomllib.loads((root / "docs" / "claims.toml").read_text("utf-8"))["claim"]


class Unmeasured(Exception):
    """A section of `claims.json` is not there yet."""


def unmeasured(root: Path = ROOT) -> set[str]:
    """The sections of `claims.json` that claims rest on and that were not measured yet."""
    text = (root / "docs" / "claims.toml").read_text("utf-8")
    file = root / "docs" / MEASURED
    there = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return set(re.findall(rf"{re.escape(MEASURED)}#(\w+)", text)) - set(there)


@lru_cache
def _numbers(path: Path, modified: int) -> Any:
    text = path.read_text("utf-8")
    return json.loads(text) if path.suffix == ".json" else _tables(text)


def _tables(page: str) -> dict[str, list[dict[str, Any]]]:
    """Heading -> the rows of the tables under it."""
    rows: dict[str, list[dict[str, Any]]] = {}
    heading, columns = "", None
    for line in page.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.startswith("|"):
            columns = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if columns is None:
            columns = cells
        elif not set(line) <= set("|- "):
            values = (_cell(cell) for cell in cells)
            rows.setdefault(heading, []).append(dict(zip(columns, values, strict=False)))
    return rows


def _cell(text: str) -> Any:
    """A number, the bounds of an interval, or the text."""
    if re.fullmatch(_NUMBER, text):
        return float(text)
    bounds = re.fullmatch(f"({_NUMBER}) to ({_NUMBER})", text)
    return [float(bound) for bound in bounds.groups()] if bounds else text


def look_up(address: str, root: Path = ROOT) -> Any:
    """What stands at `FILE#PATH`.

    Raises:
        KeyError: if nothing does.
        Unmeasured: if its section is still to be measured.
    """
    name, _, path = address.partition("#")
    path, _, reduction = path.partition("|")
    if name == MEASURED and path.split("/")[0] in unmeasured(root):
        raise Unmeasured(address)
    file = root / "docs" / name
    value = _follow(_numbers(file, file.stat().st_mtime_ns), path.split("/"))
    if not reduction:
        return value
    means = [sum(v) / len(v) if isinstance(v, list) else v for v in value]
    return REDUCTIONS[reduction](means)


def _follow(node: Any, steps: list[str]) -> Any:
    if not steps:
        return node
    if isinstance(node, list):
        if len(node) == 1 and isinstance(node[0], dict) and steps[0] in node[0]:
            return _follow(node[0], steps)
        if steps[0].isdigit():
            return _follow(node[int(steps[0])], steps[1:])
        return _follow([record for record in node if steps[0] in record.values()], steps[1:])
    for n in range(1, len(steps) + 1):  # a key may have slashes
        key, rest = "/".join(steps[:n]), steps[n:]
        if key in node:
            return _follow(node[key], rest)
        matching = [k for k in node if "*" in key and fnmatchcase(k, key)]
        if matching:
            return [_follow(node[k], rest) for k in sorted(matching)]
    raise KeyError("/".join(steps))


def _shown(sign: str, address: str, form: str, root: Path) -> str:
    value = look_up(address, root)
    return format(-value if sign else value, form).replace("%", " %")


def _pattern(sentence: str) -> re.Pattern[str]:
    """The sentence with any line breaks, and any values in a group for each field."""
    parts, end = [], 0
    for field in _FIELD.finditer(sentence):
        parts.append(_literal(sentence[end : field.start()]))
        parts.append(f"({_VALUE}{' %' if field[3].endswith('%') else ''})")
        end = field.end()
    return re.compile("".join([*parts, _literal(sentence[end:])]))


def _literal(text: str) -> str:
    return r"\s+".join(re.escape(word) for word in re.split(r"\s+", text))


def _stated(claim: Mapping[str, Any]) -> Iterator[tuple[str, str, list[tuple[str, str, str]]]]:
    """Page, sentence, and the sign, address and format of its fields."""
    for page in claim.get("pages", ()):
        for sentence in claim.get("says", ()):
            fields = [(sign, _full(a, claim), form) for sign, a, form in _FIELD.findall(sentence)]
            yield page, sentence, fields


def _full(address: str, claim: Mapping[str, Any]) -> str:
    return claim["at"] + address if address.startswith("/") else address


def check(root: Path = ROOT) -> list[str]:
    """One line for each claim that parts from its numbers, or was withdrawn and still stands."""
    problems = []
    for claim in claims(root):
        name = claim["name"]
        for page, sentence, fields in _stated(claim):
            found = _pattern(sentence).search((root / page).read_text("utf-8"))
            if found is None:
                problems.append(f"{name}: {page} does not say: {sentence}")
                continue
            for value, field in zip(found.groups(), fields, strict=True):
                with contextlib.suppress(Unmeasured):
                    now = _shown(*field, root)
                    if value != now:
                        problems.append(f"{name}: {page} says {value}, {field[1]} is {now}")
        for left, relation, right in claim.get("holds", ()):
            with contextlib.suppress(Unmeasured):
                sides = [
                    look_up(_full(side, claim), root) if isinstance(side, str) else side
                    for side in (left, right)
                ]
                if not RELATIONS[relation](*sides):
                    problems.append(f"{name}: it is not so that {left} {relation} {right}: {sides}")
        problems += list(_still_said(claim, root))
    return problems


def _still_said(claim: Mapping[str, Any], root: Path) -> Iterator[str]:
    former = [re.compile(_literal(words), re.IGNORECASE) for words in claim.get("never", ())]
    if former:
        for path in sorted(path for pattern in WRITTEN for path in root.glob(pattern)):
            text = path.read_text("utf-8")
            for pattern in former:
                if pattern.search(text):
                    yield f"{claim['name']}: {path.relative_to(root)} still says it"


def update(root: Path = ROOT) -> list[str]:
    """Put today's numbers into all sentences that are found; the pages that changed."""
    texts: dict[str, str] = {}
    for claim in claims(root):
        for page, sentence, fields in _stated(claim):
            text = texts.setdefault(page, (root / page).read_text("utf-8"))
            found = _pattern(sentence).search(text)
            if found is None:
                continue
            for i in range(len(fields), 0, -1):  # from the end: earlier spans stay as they are
                start, stop = found.span(i)
                with contextlib.suppress(Unmeasured):
                    text = text[:start] + _shown(*fields[i - 1], root) + text[stop:]
            texts[page] = text
    changed = [page for page, text in texts.items() if text != (root / page).read_text("utf-8")]
    for page in changed:
        write_atomically(root / page, texts[page])
    return changed
