"""Is a tokenizer what it is taken for? It is tried before it encodes the first text.

A wrong tokenizer raises no error: the ids are those of other words, or of another model's training,
and the model recites nothing. Three statements are tested on short texts of many kinds (`PROBES`):

1. *its own file*: the ids are those that the `tokenizers` library gives from the tokenizer.json
   which the model came with. The tokenizer classes of transformers rebuild what the file says from
   a vocabulary, and some rebuild it wrongly;
2. *special tokens*: nothing stands in front of a text or behind it that was not asked for;
3. *decode after encode*: the text comes back. It need not (some tokenizers lower-case all text or
   drop accents), because the ids decide; the report names what is lost.

It is also tried whether characters are cut into several tokens, whose bytes are then shown
(`memcircuits.data.token_text`). A tokenizer that fails the first or second statement is refused.
What could not be tried (a tokenizer of another library, no file) is not held against it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memcircuits.base.errors import InputError

PROBES = {
    "words": "The woods are lovely, dark and deep.",
    "capital letters": "NASA and McDonald's",
    "numbers": "In 1984, 3.14159 and 1,234,567",
    "several spaces": "a  b    c",
    "line breaks": "one\ntwo\n\n three",
    "tabs": "a\tb",
    "code": "def f(x):\n    return x != [1]",
    "accents": "naïve café Ångström",
    "combining accents": "cafe\u0301",
    "Chinese": "日本語の文章",
    "Arabic": "العربية",
    "emoji": "🙂 👩‍👧",
}
"""Kind of text -> an example; every kind can come back or be lost by itself."""


@dataclass(frozen=True)
class TokenizerReport:
    """What was found about a tokenizer.

    Attributes:
        kind: its class.
        checked_against_file: whether its own tokenizer.json was there to compare with.
        lost: kinds of text (`PROBES`) that do not come back when they are decoded.
        cuts_characters: whether a character may be cut into several tokens.
    """

    kind: str
    checked_against_file: bool
    lost: tuple[str, ...]
    cuts_characters: bool

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader of a result must know."""
        if not self.lost:
            return ()
        return (
            f"The tokenizer does not keep {', '.join(self.lost)}: the text that is shown is not "
            "the text that was given, and the ids decide.",
        )

    def properties(self) -> dict[str, Any]:
        """The report in words, ready for JSON."""
        return {
            "tokenizer": self.kind,
            "agrees with its file": True if self.checked_against_file else None,
            "text not kept": list(self.lost),
            "cuts characters": self.cuts_characters,
        }


def try_tokenizer(tokenizer: Any) -> TokenizerReport:
    """Test the statements on a tokenizer, once per object.

    Raises:
        InputError: if its ids are not those of its own file, or special tokens stand around text.
    """
    with contextlib.suppress(TypeError):  # neither hashable nor weakly referable
        if tokenizer in _reports:
            return _reports[tokenizer]
    report = _run_trials(tokenizer)
    with contextlib.suppress(TypeError):
        _reports[tokenizer] = report
    return report


def tokenizer_notes(tokenizer: Any) -> tuple[str, ...]:
    """What the reader of a result must know about the tokenizer; none if there is no tokenizer.

    Ids that were given need no tokenizer: one that would be refused is a note here.
    """
    if tokenizer is None:
        return ()
    try:
        return try_tokenizer(tokenizer).notes
    except InputError as error:
        return (f"Text is not shown as the model reads it: {error}.",)


_reports: weakref.WeakKeyDictionary[Any, TokenizerReport] = weakref.WeakKeyDictionary()


def _run_trials(tokenizer: Any) -> TokenizerReport:
    ids = {kind: _ids(tokenizer, text) for kind, text in PROBES.items()}
    encoded = {kind: row for kind, row in ids.items() if row is not None}
    _refuse_special_tokens(tokenizer, list(encoded.values()))
    file = _own_file(tokenizer)
    if file is not None:
        _refuse_other_ids(tokenizer, encoded, file)
    texts = {kind: _text(tokenizer, row) for kind, row in encoded.items()}
    single = [_text(tokenizer, [token]) for row in encoded.values() for token in row]
    return TokenizerReport(
        kind=type(tokenizer).__name__,
        checked_against_file=file is not None,
        lost=tuple(
            kind for kind, text in texts.items() if text is not None and text != PROBES[kind]
        ),
        cuts_characters=any("\ufffd" in text for text in single if text is not None),
    )


def _ids(tokenizer: Any, text: str) -> list[int] | None:
    """The ids of a text; None if it cannot be encoded, which is an error once a user's text is."""
    try:
        return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    except Exception:  # of any library
        return None


def _text(tokenizer: Any, ids: Sequence[int]) -> str | None:
    """What ids decode to, without the space that SentencePiece drops from the first word."""
    try:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)).lstrip(" ")
    except Exception:  # of any library
        return None


def _refuse_special_tokens(tokenizer: Any, rows: Sequence[Sequence[int]]) -> None:
    """Refuse a tokenizer that adds special tokens to every text, although none are asked for."""
    special = set(getattr(tokenizer, "all_special_ids", ())) - {
        getattr(tokenizer, "unk_token_id", None)
    }
    for place, where in ((0, "in front of"), (-1, "behind")):
        tokens = {row[place] for row in rows if row}
        if len(tokens) == 1 and tokens <= special:
            raise InputError(
                "tokenizer",
                f"{type(tokenizer).__name__} puts token {tokens.pop()} {where} every text, "
                "although no special tokens are asked for",
                "pass token ids (Paragraphs.from_tokens)",
            )


def _refuse_other_ids(tokenizer: Any, encoded: dict[str, list[int]], file: Path) -> None:
    """Refuse a tokenizer whose ids are not those of its own tokenizer.json."""
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(file))
    raw.no_padding()
    raw.no_truncation()
    for kind, ids in encoded.items():
        expected = raw.encode(PROBES[kind], add_special_tokens=False).ids
        if ids != expected:
            raise InputError(
                "tokenizer",
                f"{type(tokenizer).__name__} encodes {PROBES[kind][:12]!r} as {ids[:3]}, its own "
                f"tokenizer.json as {expected[:3]}",
                "load it with transformers.PreTrainedTokenizerFast(tokenizer_file=...), or pass "
                "token ids",
            )


def _own_file(tokenizer: Any) -> Path | None:
    """The tokenizer.json that a tokenizer was loaded beside, in a folder or in the hub's cache."""
    name = getattr(tokenizer, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    path = Path(name) / "tokenizer.json"
    if path.is_file():
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:  # the name of a file or folder
        return None
    return Path(cached) if isinstance(cached, str) else None
