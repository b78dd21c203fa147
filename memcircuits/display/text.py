"""Turning untrusted text into harmless text: the three ways in which data enters a page.

Tokens come from a corpus and from a model, so they may contain anything: `</script>`, a NUL,
half of an emoji, a mark that makes the rest of the line run from right to left. A page is safe
because data enters it in three ways only, each of which makes it harmless:

1. as *text*, through Jinja2's autoescape, after `clean` has made invisible characters
   visible (`visible` does the same for one token, and shows its spaces and newlines too);
2. as *data*, through `json_block`: plain ASCII JSON without `<`, `>` or `&`, in a
   `<script type="application/json">` block, which browsers never execute;
3. as a *number*, formatted here.

As a second defence, the page's content-security-policy names the hash of each script that may run
(`csp_hash`), so that no other script runs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata

from markupsafe import Markup

MINUS = "\u2212"
UNKNOWN = "\u2013"  # what is shown for a number that is missing


_MARKS = {" ": "·", "\n": "⏎", "\t": "⇥"}

# control, format (joiners, direction marks), surrogate, private, unassigned, line, paragraph
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


# Bytes that are no whole character, as `surrogateescape` decodes them, and U+FFFD: it says that
# something could not be decoded, so that different bytes would look alike.
_NO_CHARACTER = re.compile("[\udc80-\udcff]+|\ufffd")


def _code(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"


def _tells_nothing(character: str) -> bool:
    return unicodedata.category(character) in _INVISIBLE or character == "\ufffd"


def text_of_bytes(raw: bytes) -> str:
    """UTF-8 bytes as text; those that are no whole character are written out, `⟨E6 97⟩`.

    Example:
        >>> text_of_bytes("日".encode()[:2] + b" a")
        '⟨E6 97⟩ a'
    """

    def written_out(match: re.Match[str]) -> str:
        return f"⟨{match[0].encode('utf-8', 'surrogateescape').hex(' ').upper()}⟩"

    return _NO_CHARACTER.sub(written_out, raw.decode("utf-8", "surrogateescape"))


def clean(text: str) -> str:
    """Text with every invisible character but newline and tab spelled out as `⟨U+XXXX⟩`.

    So is the replacement character, which stands for anything that could not be decoded.

    The result can be written as UTF-8 (lone surrogates are gone) and read in one direction.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_code(c) if _tells_nothing(c) and c not in "\n\t" else c for c in text)


def visible(token: str, limit: int = 60, *, tell: bool = True) -> str:
    """One token with its invisible characters shown: spaces as `·`, a newline as `⏎`.

    Args:
        token: the token's text, as decoded.
        limit: maximum number of characters; longer tokens are cut.
        tell: append the length of a token that was cut.
    """
    if not token:
        return "∅"
    text = "".join(_MARKS.get(c) or (_code(c) if _tells_nothing(c) else c) for c in token[:limit])
    if unicodedata.combining(text[0]):
        text = "◌" + text
    if len(token) > limit:
        text += f"… ({len(token):,} characters)" if tell else "…"
    return text


def number(value: float, digits: int = 3) -> str:
    """A number as text: about `digits` significant digits, an exponent only where it is needed."""
    if value != value:
        return UNKNOWN
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", MINUS)
    size = abs(value)
    if 1e-3 <= size < 1e6:
        before_point = len(str(int(size))) if size >= 1 else 0
        text = f"{value:,.{max(0, digits - before_point)}f}"
    else:
        text = f"{value:.{digits - 1}e}"
    if not text.strip("-0.,"):
        text = text.lstrip("-")  # no minus before a zero
    return text.replace("-", MINUS)


def short(value: float) -> str:
    """A round number without trailing zeros, for axes and the ends of scales."""
    text = number(value)
    is_decimal = "." in text and "e" not in text
    return text.rstrip("0").rstrip(".") if is_decimal else text


def json_block(data: object) -> Markup:
    """JSON that cannot end the script element it is in, whatever strings it holds.

    Raises:
        ValueError: if a number in it is NaN or infinite, which JSON does not have.
    """
    encoded = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        encoded = encoded.replace(character, f"\\u{ord(character):04x}")
    return Markup(encoded)


def csp_hash(source: str) -> str:
    """The content-security-policy source expression that admits exactly this script or style."""
    digest = hashlib.sha256(source.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
