"""The page of a document's map: totals, the longest recited passages, and the text itself."""

from __future__ import annotations

import itertools
import math
import shlex
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

from memcircuits.display.pages import (
    Block,
    DocumentText,
    Facts,
    Measure,
    Number,
    Numbers,
    Page,
    Prose,
    Segment,
    Table,
    link,
)
from memcircuits.display.text import number

if TYPE_CHECKING:
    from memcircuits.measure.document.document_map import DocumentMap

_LEAST_LOG10 = -10  # probabilities below are not told apart
_PROSE = {"", ".txt", ".md", ".text", ".rst"}
_COLUMNS = ["text", "line", "n_tokens", "n_characters", "n_windows", "probability"]
_LABELS = {
    "text": "passage",
    "n_tokens": "tokens",
    "n_characters": "characters",
    "n_windows": "windows",
}
_HELP = {
    "passage": "",
    "n_tokens": "tokens that are recited, without the prefix that was given",
    "n_windows": "windows that are recited in full; their continuations make up the passage",
    "probability": "probability that one sample is the continuation of the likeliest window",
}


def map_page(mapped: DocumentMap) -> Page:
    """The page of a map; nothing is measured."""
    model = mapped.provenance.model["name"]
    return Page(
        title=f"What {model} recites of {mapped.name}",
        lead=_lead(mapped),
        blocks=[
            _headline_numbers(mapped),
            _how_to_read(mapped),
            _longest_passages(mapped),
            _text(mapped),
            _facts(mapped),
        ],
        footer="Made by memcircuits.",
    )


def _lead(mapped: DocumentMap) -> str:
    if not mapped.spans:
        return "No window of the text is recited in full."
    longest = max(span.n_tokens for span in mapped.spans)
    passages = "1 passage" if len(mapped.spans) == 1 else f"{len(mapped.spans):,} passages"
    return (
        f"{100 * mapped.recited_share:.2g} % of the text is recited, in {passages}, "
        f"the longest of {longest:,} tokens."
    )


def _headline_numbers(mapped: DocumentMap) -> Numbers:
    longest = max((span.n_tokens for span in mapped.spans), default=0)
    n_memorized = int(mapped.is_memorized.sum())
    return Numbers(
        [
            Number(
                "Recited",
                f"{100 * mapped.recited_share:.2g} %",
                f"{int(mapped.recited.sum()):,} of {int(mapped.scored.sum()):,} tokens scored",
            ),
            Number("Passages", f"{len(mapped.spans):,}", f"the longest has {longest:,} tokens"),
            Number("Windows", f"{len(mapped.starts):,}", f"{n_memorized:,} recited in full"),
            Number("Text", f"{len(mapped.text):,}", f"characters, {mapped.n_tokens:,} tokens"),
        ]
    )


def _how_to_read(mapped: DocumentMap) -> Prose:
    every, ends, between = "At every token", "exactly", ""
    if mapped.stride > 1:
        every, ends = f"Every {mapped.stride} tokens", f"to {mapped.stride} tokens"
        between = " Around those recited nearly in full, one begins at every token."
    return Prose(
        [
            f"{every} a window begins: the model is given "
            f"{mapped.n_prefix} tokens of the text and nothing else, and its greedy continuation "
            f"is compared with the next {mapped.n_continuation}. If they agree, these "
            f"{mapped.n_continuation} are recited and underlined. Where such windows overlap or "
            f"touch, they are one passage.{between}",
            f"The ends of a passage are known {ends}, and the first "
            f"{mapped.n_prefix} tokens of the text cannot be recited, because nothing comes before "
            "them. Colours show what any window says of a place: how many tokens it recites, how "
            "probable its continuation is as a sample, and "
            + (
                "how similar the greedy one is."
                if "similarity" in mapped.measures
                else "how many of its tokens are the model's first choice."
            ),
            *mapped.notes,
        ],
        title="How to read it",
    )


def _longest_passages(mapped: DocumentMap) -> Table:
    frame = mapped.spans_frame()
    numbers = {span.first_token: i for i, span in enumerate(mapped.spans, start=1)}
    frame["n_characters"] = frame["end"] - frame["start"]
    frame["text"] = [
        link(" ".join(text.split())[:160] or "(white space)", f"#p{numbers[first]}")
        for text, first in zip(frame["text"], frame["first_token"], strict=True)
    ]
    return Table(
        frame[_COLUMNS],
        labels=_LABELS,
        help=_HELP,
        max_rows=500,
        page_size=10,
        title="The longest recited passages",
    )


def _text(mapped: DocumentMap) -> DocumentText:
    similarity = "similarity" if "similarity" in mapped.measures else "loose_match"
    name = (
        "similarity of the greedy continuation"
        if similarity == "similarity"
        else "share of tokens that are greedy choices"
    )
    log10 = np.maximum(mapped.at_tokens(mapped.probability_measure) / math.log(10), _LEAST_LOG10)
    values = np.stack([mapped.at_tokens("em"), log10.round(1), mapped.at_tokens(similarity)])
    return DocumentText(
        _segments(mapped, values.round(2)),
        [
            Measure("tokens recited", 0, mapped.n_continuation),
            Measure("probability of the continuation", _LEAST_LOG10, 0, "log10"),
            Measure(name, 0.5, 1, "share"),
        ],
        marks_mean="recited in full",
        monospaced=PurePath(mapped.name).suffix.lower() not in _PROSE,
        title="The text",
        note="The strip is the whole text: click into it to go to a place.",
    )


def _segments(mapped: DocumentMap, values: np.ndarray) -> list[Segment]:
    """The text cut where a value changes; `values` [measure, token] are those of its tokens."""
    n_characters = len(mapped.text)
    # A character belongs to the first of its tokens; behind the last token there may be none.
    ends = mapped.token_ends.numpy()
    token = np.searchsorted(ends, np.arange(n_characters), side="right")
    unknown = np.full((len(values), 1), np.nan)
    at_characters = np.concatenate([values, unknown], 1)[:, token]
    passages = np.zeros(n_characters)
    for index, span in enumerate(mapped.spans, start=1):
        passages[span.start : span.end] = index
    everything = np.nan_to_num(np.concatenate([at_characters, passages[None]]), nan=-1e9)
    changes = np.flatnonzero((everything[:, 1:] != everything[:, :-1]).any(0)) + 1
    bounds = [0, *changes.tolist(), n_characters]
    return [
        Segment(mapped.text[a:b], tuple(at_characters[:, a].tolist()), int(passages[a]))
        for a, b in itertools.pairwise(bounds)
    ]


def _facts(mapped: DocumentMap) -> Block:
    model, versions = mapped.provenance.model, mapped.provenance.versions
    return Facts(
        {
            "Model": f"{model['name']} ({model['architecture']}, {model['dtype']})",
            "Fingerprint of the weights": model["fingerprint"],
            "Windows": f"{mapped.n_prefix} + {mapped.n_continuation} tokens, "
            f"every {number(mapped.stride)}",
            "Versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
        },
        commands=[_command(mapped)],
        title="What was run",
    )


def _command(mapped: DocumentMap) -> str:
    """The command that makes the page again: every option that changes its numbers."""
    model = mapped.provenance.model
    own_bos = model.get("bos")
    bos = mapped.provenance.paragraphs.get("windows", {}).get("bos", own_bos)
    sampler = mapped.provenance.options.get("sampler") or {}
    options = {
        "model": model["name"],
        "revision": model.get("revision"),
        "dtype": model["dtype"] if model["dtype"] != "float32" else None,
        "stride": mapped.stride,
        "n_prefix": mapped.n_prefix,
        "n_continuation": mapped.n_continuation,
        "bos": None if bos == own_bos else ("yes" if bos else "no"),
        **mapped.provenance.reading_options("windows"),
        **sampler,
        "out": "map.html",
    }
    words = ["memcircuits", "map", mapped.name]
    for option, value in options.items():
        if value is not None:
            words += [f"--{option.replace('_', '-')}", str(value)]
    if "similarity" in mapped.measures:
        words.append("--near-verbatim")
    return shlex.join(words)
