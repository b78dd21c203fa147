"""Listings: the files that a path means, and those that are passed over, each with the reason.

A folder means all its files of known formats, in the order of their names. Passed over are hidden
files, links to folders, links to files that are read already, files of unknown formats, tables
without a column that can be used, and plain texts that are about the data: licences, read-me files
and the like. Nothing is passed over in silence.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from memcircuits.base.errors import InputError, one_of
from memcircuits.data.formats import arrays, tables
from memcircuits.data.formats.columns import check_columns
from memcircuits.data.formats.detection import kind_of
from memcircuits.data.formats.records import (
    BadRow,
    Columns,
    NoContent,
    Source,
    Unusable,
)
from memcircuits.data.formats.sources import FORMATS
from memcircuits.data.formats.text import Txt

_ABOUT_DATA = re.compile(
    r"(licen[cs]es?|read[-_ ]?me|copying|copyright|notices?|change(s|log)|authors"
    r"|contribut(ing|ors)|citation|terms|disclaimer|install|requirements|(sha\d+|md5)(sums?)?|checksums?|manifest)"
    r"([-_. ].*)?",
    re.IGNORECASE,
)
_SHOWN = 5  # files that a sentence names


@dataclass(frozen=True)
class Listing:
    """The files that a path means.

    Attributes:
        sources: those that are read, in order.
        passed_over: those that are not, with the reason.
        txt_note: what a row of a text file is, where the caller left that open.
    """

    sources: list[Source]
    passed_over: list[BadRow]
    txt_note: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read and passed over, where the caller named no single file; the text note."""
        notes = []
        if len(self.sources) > 1 or self.passed_over:
            read = _some([source.name for source in self.sources])
            notes.append(f"{_files(self.sources)} read: {read}.")
        if self.txt_note:
            notes.append(self.txt_note)
        if self.passed_over:
            names = _some([f"{file.where} ({file.reason})" for file in self.passed_over])
            notes.append(f"{_files(self.passed_over)} passed over: {names}.")
        return tuple(notes)


def find_sources(path: str | os.PathLike[str], columns: Columns | None = None) -> list[Source]:
    """The files that are read, texts by paragraph; see `list_files`."""
    return list_files(path, columns, txt="paragraph").sources


def list_files(
    path: str | os.PathLike[str],
    columns: Columns | None = None,
    *,
    txt: Txt = "auto",
    strided: bool = False,
) -> Listing:
    """The files of a corpus, in a fixed order.

    Args:
        path: a file; a folder; or `hf:NAME[@REVISION][:SPLIT[:CONFIG]]`, a dataset on the hub
            (streamed) or a saved one. A scan that may be resumed should pin the revision.
        columns: the columns that hold the text, where their names do not tell.
        txt: what a row of a text file is (`memcircuits.data.formats.text`).
        strided: whether all windows of a row are read, not only the first one.

    Raises:
        InputError: if there is nothing to read, or a file's format is not known.
    """
    one_of("txt", txt, get_args(Txt))
    listing = _files_of(os.fspath(path), columns or Columns())
    if not any(source.kind == "txt" for source in listing.sources):
        return listing
    in_folder = len(listing.sources) > 1 or Path(path).is_dir()
    if txt == "document" or (txt == "auto" and (in_folder or strided)):
        listing = _with_documents(listing)
    return dataclasses.replace(listing, txt_note=_txt_note(listing) if txt == "auto" else "")


def _with_documents(listing: Listing) -> Listing:
    """The listing with every text file as one document."""
    sources = [
        dataclasses.replace(source, kind="document") if source.kind == "txt" else source
        for source in listing.sources
    ]
    return dataclasses.replace(listing, sources=sources)


def _txt_note(listing: Listing) -> str:
    """What a row of the text files is, and how to choose the other."""
    if any(source.kind == "document" for source in listing.sources):
        return (
            'Every text file is read as one document; txt="paragraph" (--txt paragraph) splits it '
            "at blank lines."
        )
    return (
        f"{listing.sources[0].name} is split at blank lines, and every paragraph is a row; "
        'txt="document" (--txt document) reads it as one text.'
    )


def _files_of(name: str, columns: Columns) -> Listing:
    """The files that a path means; arguments and errors as `list_files`."""
    try:
        if name.startswith("hf:"):
            return Listing(_dataset(name, columns), [])
        location = Path(name)
        try:
            is_file, is_folder = location.is_file(), location.is_dir()
        except (OSError, ValueError):  # a name that no file can have
            is_file = is_folder = False
        if is_folder:
            return _folder(location, columns)
        if not is_file:
            raise InputError("paragraphs", location.name, "there is no such file")
        location = arrays.first_half(location) or location
        kind = "pair" if arrays.other_half(location) else kind_of(location, columns)
    except Unusable as problem:
        raise InputError("paragraphs", Path(name).name, str(problem)) from None
    return Listing([Source(str(location), location.name, kind, columns)], [])


def _dataset(name: str, columns: Columns) -> list[Source]:
    """A dataset by name: the files of a saved one, or one that `datasets` opens."""
    path = name.removeprefix("hf:").lstrip("/") if not name.startswith("hf:/") else name[3:]
    folder, split, _ = tables.dataset_parts(path)
    if tables.is_saved_dataset(Path(folder)):
        return _saved_dataset(Path(folder), split, columns)
    return [Source(name, path, "hf", columns)]


def _saved_dataset(folder: Path, split: str | None, columns: Columns) -> list[Source]:
    return [
        Source(str(path), f"{folder.name}/{path.relative_to(folder).as_posix()}", "arrow", columns)
        for path in tables.files_of_saved_dataset(folder, split)
    ]


def _folder(folder: Path, columns: Columns) -> Listing:
    """The files of a folder: a saved dataset, the parts of a scan, or all of known formats."""
    if tables.is_saved_dataset(folder):
        return Listing(_saved_dataset(folder, None, columns), [])
    if (folder / "manifest.json").is_file() and (folder / "parts").is_dir():
        folder /= "parts"
    sources: list[Source] = []
    passed_over: list[BadRow] = []
    seen: set[str] = set()
    for path in sorted(_files_below(folder)):
        name = path.relative_to(folder).as_posix()
        try:
            source = _source_in_folder(path, name, columns, seen)
        except Unusable as problem:
            passed_over.append(BadRow(name, str(problem)))
        else:
            sources += [source] if source else []
    if not sources:
        files = _some([f"{file.where} ({file.reason})" for file in passed_over]) or "none at all"
        remedy = f"it holds no file that can be read: {files}"
        raise InputError("paragraphs", f"{folder.name} is a folder", remedy)
    return Listing(sources, passed_over)


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, and links to folders, which are not followed."""
    for root, folders, files in os.walk(folder):
        yield from (Path(root, name) for name in files)
        yield from (Path(root, name) for name in folders if Path(root, name).is_symlink())
        hidden = [name for name in folders if name.startswith(".")]
        yield from (Path(root, name) for name in hidden)
        folders[:] = [name for name in folders if not name.startswith(".")]


def _source_in_folder(path: Path, name: str, columns: Columns, seen: set[str]) -> Source | None:
    """The source that a file of a folder is; None if it is read with another one.

    Raises:
        Unusable: if it is passed over.
    """
    if any(part.startswith(".") for part in Path(name).parts):
        raise Unusable("hidden")
    if path.is_dir():
        raise Unusable("a link to a folder")
    if not path.is_file():
        raise Unusable("a link to nothing" if path.is_symlink() else "not a file")
    if (real := os.path.realpath(path)) in seen:
        raise Unusable("another name of a file that is read")
    if arrays.first_half(path) is not None:
        return None
    if arrays.stands_before_pair(path):
        raise Unusable("what stands before the prefixes of a pair")
    kind = "pair" if arrays.other_half(path) else kind_of(path, columns, in_folder=True)
    if kind == "txt" and _ABOUT_DATA.fullmatch(path.name):
        raise Unusable("about the data")
    source = Source(str(path), name, kind, columns)
    _check_content(source)
    seen.add(real)
    return source


def _check_content(source: Source) -> None:
    """Raise `NoContent` if the first record of a file has no column that can be used.

    Whatever else is wrong with a file is said when it is read.
    """
    source_format = FORMATS[source.kind]
    try:
        first = next(iter(source_format.read(source)), None)
        if first is not None and not isinstance(first[1], BadRow):
            check_columns(source_format.decode(first[1]), source.columns)
    except NoContent:
        raise
    except Unusable:
        return


def _files(files: Sized) -> str:
    """`3 files were`."""
    return "1 file was" if len(files) == 1 else f"{len(files):,} files were"


def _some(names: list[str]) -> str:
    """The first names of a list, and how many there are more."""
    shown = ", ".join(names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")
