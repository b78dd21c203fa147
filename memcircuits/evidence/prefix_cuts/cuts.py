"""Does a privacy audit that cuts its prefixes anywhere under-report what a model recites?

Whoever tests a model with the text of a document cuts it after some number of characters. The cut
mostly lies inside a token, and the tokenizer then gives the last letters other tokens than the
model has seen there in training: ` St` instead of the beginning of ` Star`. `cut_prefix` cuts a
prefix at any byte and continues it in three ways:

* `naive`: the text before the cut is encoded, and the model decodes greedily;
* `aligned`: the last tokens are taken back to where a word begins (at most `backtrack` tokens), and
  the model decodes greedily among the tokens that agree with the bytes taken back
  (Athiwaratkun et al. 2024, arXiv 2403.08688);
* `marginal`: all token sequences that agree with these bytes, each with its exact probability
  (`memcircuits.evidence.prefix_cuts.covering`), and greedy decoding after each.

What they recite is compared byte by byte with the true text. Where the model's most likely token
after the tokens kept is the true one, it is allowed, and the aligned way chooses it: so all that is
recited from there is recited after the cut. A cut between two tokens continues naively as `scan`
does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from memcircuits.base.errors import InputError, at_least, fraction
from memcircuits.base.progress import bar
from memcircuits.base.statistics import group_notes
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.token_bytes import TokenBytes
from memcircuits.data.tokens import encode
from memcircuits.evidence.prefix_cuts.covering import Covering, Cut, covering_sequences
from memcircuits.evidence.prefix_cuts.decoding import Start, recited_bytes
from memcircuits.evidence.prefix_cuts.result import PLACES, WAYS, CutPrefix
from memcircuits.models.adapter import Model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance


@plain_torch()
def cut_prefix(
    model: Model,
    paragraphs: ParagraphsLike,
    cuts: Sequence[int] = tuple(range(8)),
    *,
    backtrack: int = 3,
    tolerance: float = 1e-4,
    memory_budget: int | None = None,
    progress: bool = True,
) -> CutPrefix:
    """Cut prefixes at any byte, continue them in three ways and count the characters recited.

    Args:
        model: the model, with its tokenizer.
        paragraphs: the paragraphs.
        cuts: bytes from the end of the prefix to each cut; negative ones cut the prefix short.
        backtrack: maximum number of tokens taken back before a cut (3 in the paper).
        tolerance: covering sequences less probable than this share of the others are left out; 0
            follows all of them.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        A `CutPrefix`.

    Raises:
        InputError: for a cut outside the text, paragraphs that are not what their text is encoded
            as, a context that ends before a paragraph does, or a model without a tokenizer.

    Example:
        >>> cut = mc.cut_prefix(model, memorized, cuts=[0, 1])
        >>> cut.in_full["aligned"].tolist()
        [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    cuts = _checked_cuts(cuts)
    at_least("backtrack", backtrack, 1)
    fraction("tolerance", tolerance, zero=True)
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.inputs, "paragraphs")
    table = TokenBytes.of(adapter)
    texts, notes = _texts(table, paragraphs)
    kept = paragraphs[sorted(texts)]
    points = [
        _cut_text(table, texts[i], paragraphs[i], cut, backtrack)
        for i in sorted(texts)
        for cut in cuts
    ]
    with adapter.preserving_state():
        coverings = covering_sequences(
            adapter, table, [point.cut for point in points], tolerance, memory_budget
        )
        starts = [start for pair in zip(points, coverings, strict=True) for start in _starts(*pair)]
        with bar(len(set(starts)), "cut prefixes", progress=progress) as progress_bar:
            recited = recited_bytes(adapter, table, starts, memory_budget, progress_bar.update)
    numbers = [_numbers(*pair, recited) for pair in zip(points, coverings, strict=True)]
    shape = (len(kept), len(cuts))
    by_way = torch.tensor(numbers).view(*shape, len(WAYS), 2)
    return CutPrefix(
        cuts=cuts,
        recited={way: by_way[..., i, 0].contiguous() for i, way in enumerate(WAYS)},
        in_full={way: by_way[..., i, 1].contiguous() for i, way in enumerate(WAYS)},
        n_characters=torch.tensor([len(point.ends) for point in points]).view(shape),
        place=torch.tensor([point.place for point in points]).view(shape),
        names=kept.names,
        provenance=Provenance.of(
            adapter,
            {"paragraphs": kept},
            cuts=list(cuts),
            backtrack=backtrack,
            tolerance=tolerance,
        ),
        notes=(*notes, *_notes(points, coverings), *group_notes({"given": kept.groups})),
        groups=kept.groups,
    )


def _checked_cuts(cuts: Any) -> tuple[int, ...]:
    is_list = isinstance(cuts, Sequence) and not isinstance(cuts, str) and len(cuts) > 0
    if not is_list or not all(type(cut) is int for cut in cuts):
        raise InputError("cuts", repr(cuts), "give a list of whole numbers, such as [0, 1]")
    return tuple(dict.fromkeys(cuts))


def _texts(
    table: TokenBytes, paragraphs: Paragraphs
) -> tuple[dict[int, list[bytes]], tuple[str, ...]]:
    """The bytes of each token, of the paragraphs that are what their text is encoded as."""
    rows = paragraphs.ids.tolist()
    texts = {i: table.spelled(row) for i, row in enumerate(rows) if table.text_of(row) is not None}
    n_lost = len(rows) - len(texts)
    if not texts:
        raise InputError(
            "paragraphs",
            f"none of {n_lost} is what its text is encoded as",
            "make them from texts, with this model's tokenizer",
        )
    if not n_lost:
        return texts, ()
    reason = "their text is encoded as other tokens"
    return texts, (f"{n_lost} of {len(rows)} paragraphs were left out: {reason}",)


@dataclass(frozen=True)
class _CutText:
    """One paragraph cut at one byte.

    Attributes:
        cut: what is kept, taken back and true.
        naive: tokens of the text before the cut; None inside a character, which has none.
        ends: bytes after which a character of the true text ends.
        place: index of `PLACES`.
    """

    cut: Cut
    naive: tuple[int, ...] | None
    ends: list[int]
    place: int

    def characters(self, n_bytes: int) -> int:
        """Characters in the first bytes of the true text."""
        return bisect_right(self.ends, n_bytes)


def _cut_text(
    table: TokenBytes, tokens: list[bytes], paragraph: Paragraphs, cut: int, backtrack: int
) -> _CutText:
    """Cut one paragraph, given also as the bytes of its tokens."""
    text, (name,) = b"".join(tokens), paragraph.names
    at = sum(map(len, tokens[: paragraph.n_prefix])) + cut
    if not 0 < at < len(text):
        first, last = at - cut, len(text) - (at - cut)
        raise InputError(
            "cuts", cut, f"{name} has {first} bytes before and {last} after the end of its prefix"
        )
    start_of_character = at
    while text[start_of_character] & 0xC0 == 0x80:  # bytes that continue a character
        start_of_character -= 1
    before, following = text[:start_of_character], text[at:]
    ids = encode(before.decode(), table.tokenizer)
    kept = ids[: _n_kept(table, ids, before, backtrack)]
    if not kept:
        raise InputError("cuts", cut, f"no token of {name} lies before it; cut later")
    n_bytes = len(b"".join(table.spelled(kept)))
    ends = [
        i
        for i in range(1, len(following) + 1)
        if i == len(following) or following[i] & 0xC0 != 0x80
    ]
    boundaries = list(accumulate(map(len, tokens)))
    kind = "inside a token"
    if at in boundaries:
        is_word = table.begins_word(tokens, boundaries.index(at) + 1)
        kind = "between words" if is_word else "between tokens"
    return _CutText(
        Cut((*paragraph.bos, *kept), text[n_bytes:at], following),
        (*paragraph.bos, *ids) if start_of_character == at else None,
        ends,
        PLACES.index(kind),
    )


def _n_kept(table: TokenBytes, ids: list[int], before: bytes, backtrack: int) -> int:
    """How many tokens are kept: those before the last word, or all but `backtrack`; 0 if none can.

    Tokens that do not spell the text, such as an unknown one, are never kept.
    """
    tokens = table.spelled(ids)
    spelled = list(accumulate(tokens))
    n_right = sum(before.startswith(part) for part in spelled)
    first = max(1, len(ids) - backtrack)
    for n_kept in range(min(len(ids) - 1, n_right), first - 1, -1):
        if table.begins_word(tokens, n_kept):
            return n_kept
    return min(first, n_right)


def _starts(point: _CutText, covering: Covering) -> list[Start]:
    """Where decoding begins, for all ways of continuing a cut."""
    starts = [start for start, _ in covering.true]
    if covering.aligned is not None:
        starts.append(covering.aligned)
    if point.naive is not None:
        starts.append(Start(point.naive, b"", point.cut.following))
    return starts


def _numbers(
    point: _CutText, covering: Covering, recited: dict[Start, int]
) -> list[tuple[float, float]]:
    """Characters recited and the probability that all are, for every way of continuing a cut."""
    n_bytes = len(point.cut.following)

    def after(start: Start | None) -> tuple[float, float]:
        if start is None:
            return torch.nan, torch.nan
        return float(point.characters(recited[start])), float(recited[start] == n_bytes)

    naive = None if point.naive is None else Start(point.naive, b"", point.cut.following)
    return [after(naive), after(covering.aligned), _expected(point, covering, recited)]


def _expected(
    point: _CutText, covering: Covering, recited: dict[Start, int]
) -> tuple[float, float]:
    """Means over all covering sequences, each followed by greedy decoding."""
    if covering.total == 0:
        return torch.nan, torch.nan
    # Characters that the covering sequences themselves get right, then those decoded after them.
    characters = sum(
        probability
        for length, probability in enumerate(covering.bytes_right, 1)
        if length in point.ends
    )
    in_full = covering.all_right
    for start, probability in covering.true:
        n_ahead = point.characters(len(start.ahead))
        characters += probability * (point.characters(recited[start]) - n_ahead)
        in_full += probability * (recited[start] == len(point.cut.following))
    return characters / covering.total, in_full / covering.total


def _notes(points: Sequence[_CutText], coverings: Sequence[Covering]) -> tuple[str, ...]:
    """What the reader must know about cuts inside characters and sequences not followed."""
    notes = []
    n_inside = sum(point.naive is None for point in points)
    if n_inside:
        notes.append(f"{n_inside} cuts lie inside a character, before which there is no naive text")
    n_dead = sum(covering.aligned is None for covering in coverings)
    if n_dead:
        notes.append(f"after {n_dead} cuts no token agrees with the text: they are not continued")
    shares = [c.unexplored / (c.total + c.unexplored) for c in coverings if c.unexplored]
    largest = max(shares, default=0.0)
    if largest > 0.01:
        notes.append(
            f"covering sequences not followed may have up to {largest:.0%} of the probability; "
            "give a smaller tolerance"
        )
    return tuple(notes)
