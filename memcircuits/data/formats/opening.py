"""Bytes: files are unpacked, and brought to UTF-8, by what their first bytes say.

How a file is compressed, and whether its text is UTF-16 or UTF-32, is read from its first bytes and
never from its name. What has no such sign is taken as UTF-8; `records.decode_utf8` refuses other
encodings row by row, because bytes of Latin-1 cannot be told from those of its relatives.
"""

from __future__ import annotations

import codecs
import contextlib
import io
from collections.abc import Iterator
from typing import IO, Any

from memcircuits.data.formats.records import LIMIT, Source, errors_as_unusable

HEAD = 2**16
"""Bytes of a file from which its format is told."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

COMPRESSION = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\x04\x22\x4d\x18": "lz4",
    b"\xfd7zXZ\x00": "xz",
}
"""First bytes of a compressed file -> the compression."""

_UNICODE = {  # the longer marks first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_MIN_NULS = 0.4  # share of zero bytes at every second place, in Western text as UTF-16


@contextlib.contextmanager
def open_text(path: str) -> Iterator[IO[bytes]]:
    """The content of a text file as UTF-8, unpacked; a byte-order mark stays in front.

    Raises:
        Unusable: if it cannot be opened or unpacked, also later while it is read.
    """
    with errors_as_unusable(), contextlib.ExitStack() as stack:
        raw = stack.enter_context(_unpacked(path))
        stream = stack.enter_context(io.BufferedReader(raw, HEAD))
        head = stream.peek(HEAD)
        encoding = _unicode_encoding(head)
        if encoding is not None:
            stream = stack.enter_context(io.BufferedReader(_AsUtf8(stream, encoding), HEAD))
        elif b"\r" in head and b"\n" not in head:  # lines as the first Macintosh ended them
            stream = stack.enter_context(io.BufferedReader(_WithLineFeeds(stream), HEAD))
        yield stream


def head_of(path: str) -> tuple[bytes, bool]:
    """The first bytes of a file's text, and whether they are all of it.

    Raises:
        Unusable: if it cannot be opened or unpacked.
    """
    with open_text(path) as stream:
        head = stream.read(HEAD)
        return head, len(head) < HEAD


def magic_of(path: str) -> bytes:
    """The first bytes of a file as they lie on the disk."""
    with errors_as_unusable(), open(path, "rb") as file:
        return file.read(512)


def compression_of(magic: bytes) -> str | None:
    """The compression that the first bytes of a file tell."""
    return next((name for sign, name in COMPRESSION.items() if magic.startswith(sign)), None)


def lines_of(source: Source) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines of a text file; None for one that is too long."""
    with open_text(source.path) as stream:
        number = 0
        while line := stream.readline(LIMIT + 1):
            number += 1
            if len(line) <= LIMIT:
                yield number, line
                continue
            # Pass over the remainder of the line without keeping it.
            while line and not line.endswith(b"\n"):
                line = stream.readline(LIMIT)
            yield number, None


def _unpacked(path: str) -> Any:
    import lzma

    import pyarrow as pa

    codec = compression_of(magic_of(path))
    if codec == "xz":
        return lzma.open(path)
    return pa.input_stream(path, compression=codec)


def _unicode_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, where a mark or the zero bytes tell it; None for all others."""
    for mark, name in _UNICODE.items():
        if head.startswith(mark):
            return name
    even, odd = head[::2].count(0), head[1::2].count(0)
    enough = _MIN_NULS * len(head) / 2
    if len(head) >= 4 and odd > enough and not even:
        return "utf-16-le"
    if len(head) >= 4 and even > enough and not odd:
        return "utf-16-be"
    return None


class _Translated(io.RawIOBase):
    """A stream whose content is translated while it is read."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            raw = self._stream.read(HEAD)
            self._rest = self._translate(raw)
            if not raw:
                break
        n = min(len(buffer), len(self._rest))
        buffer[:n], self._rest = self._rest[:n], self._rest[n:]
        return n

    def _translate(self, raw: bytes) -> bytes:
        raise NotImplementedError


class _AsUtf8(_Translated):
    """Another encoding of Unicode, as UTF-8."""

    def __init__(self, stream: Any, encoding: str) -> None:
        super().__init__(stream)
        self._decoder = codecs.getincrementaldecoder(encoding)()

    def _translate(self, raw: bytes) -> bytes:
        return self._decoder.decode(raw, final=not raw).encode()


class _WithLineFeeds(_Translated):
    """Lines that end in a carriage return, ending in a line feed."""

    def _translate(self, raw: bytes) -> bytes:
        return raw.replace(b"\r", b"\n")
