"""`document_map`: every window of a document, scored by a scan to disk that can be resumed.

The document is encoded as a whole (`memcircuits.data.documents`). Its windows begin every `stride`
tokens; one more ends with the text. A window that is recited in full marks its continuation, never
its prefix, which was given; the first `n_prefix` tokens of the document cannot be marked.

A passage that is hardly longer than a window may begin between two of them, and its ends lie
between two. Windows beside it are recited nearly in full. Around them a second scan begins windows
at every token.

The scan reads rows, and each of its parts is written once for all. So the document is cut into rows
of 256 windows, which overlap by a window, and each row becomes one part: whoever gives a `folder`
loses at most one part when the work is interrupted, and the same call goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Int

from memcircuits.base.errors import InputError
from memcircuits.base.io import write_atomically
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.bos import Bos, bos_ids
from memcircuits.data.documents import Document, read_document
from memcircuits.data.normalizing import Normalize, reading_notes
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.windows import Windows
from memcircuits.measure.corpus.folder import ScanFolder
from memcircuits.measure.corpus.parts import ON_REQUEST
from memcircuits.measure.corpus.scan import scan_to_disk
from memcircuits.measure.document.document_map import DocumentMap
from memcircuits.measure.recitation_statistics import borders_on_recitation, missed_between_windows
from memcircuits.measure.sampling import Sampler
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

_WINDOWS_PER_ROW = 256
SHORT_TEXT = 1000
"""Tokens of a text in which a map begins a window at every token, unless it is told otherwise."""

_MEASURES = ("em", "nll", "log_prob", "loose_match", "extraction_strength")


@plain_torch()
def document_map(  # noqa: PLR0913
    model: Model,
    text_or_file: str | os.PathLike[str],
    *,
    stride: int | None = None,
    n_prefix: int = 50,
    n_continuation: int = 50,
    bos: Bos = "auto",
    normalize: Normalize = "auto",
    sampler: Sampler | None = None,
    near_verbatim: bool = False,
    folder: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> DocumentMap:
    r"""Which parts of a document does the model recite?

    Args:
        model: the model.
        text_or_file: a text, or the path of a text file of any length.
        stride: tokens from one window to the next; around windows that are recited nearly in full,
            windows begin at every token. By default 1 for texts of up to `SHORT_TEXT` tokens, and
            10 for longer ones, where a note says what may be missed.
        n_prefix: tokens that are given.
        n_continuation: tokens that have to be recited.
        bos: tokens in front of every window, as in `Paragraphs.from_texts`.
        normalize: whether the text is normalised, as in `Paragraphs.from_texts`.
        sampler: how text is drawn, for the probability of a continuation; by default from the
            model's own distribution.
        near_verbatim: also decode the windows that are not recited in full, for the similarity of
            the model's continuation; takes several times as long.
        folder: where the numbers are written while they are computed. A call that was interrupted
            goes on from there when it is repeated; by default, nothing is kept.
        batch_size: windows per forward pass; by default as many as fit.
        progress: show a bar on stderr.

    Raises:
        InputError: if the file cannot be read, the document is shorter than a window, or the folder
            holds the map of another document, model or stride.

    Example:
        >>> text = "\n\n".join(memorized.texts(model) + control.texts(model))
        >>> mapped = mc.document_map(model, text, stride=10)
        >>> len(mapped.spans)
        4
    """
    adapter = adapt(model)
    document = read_document(text_or_file, adapter, normalize=normalize)
    if stride is None:
        stride = 1 if len(document.ids) <= SHORT_TEXT else 10
    windows = Windows(n_prefix, n_continuation, stride)
    if len(document.ids) < windows.length:
        raise InputError(
            "text_or_file",
            f"{document.name} has {len(document.ids)} tokens",
            f"a window has n_prefix + n_continuation = {windows.length}; give a longer text or "
            "smaller lengths",
        )
    front = bos_ids(adapter, bos)

    def scan_rows(rows: list[tuple[int, int]], step: int, place: Path) -> Scanned:
        place.mkdir(exist_ok=True, parents=True)
        scan = scan_to_disk(
            adapter,
            _write_rows(place, document, rows, front),
            place,
            windows=replace(windows, stride=step),
            bos=bos,
            sampler=sampler,
            near_verbatim=near_verbatim,
            part_records=1,
            batch_size=batch_size,
            resume=True,
            progress=progress,
        )
        return Scanned.of(scan, rows)

    with _folder_for(folder) as place:
        scanned = scan_rows(_rows(document, windows), stride, place)
        between = _rows_between(scanned, windows, len(document.ids))
        if between:
            scanned = scanned.with_windows(scan_rows(between, 1, place / "between"))
        return _map_of(adapter, document, windows, scanned, normalize)


class Scanned(NamedTuple):
    """The windows that were read, in their order.

    Attributes:
        starts: first token of each window.
        measures: measure -> value of each window.
        bos: ids of the tokens in front of every window.
        sampler: how text is drawn, as the manifest of a scan says it.
        notes: of the scan.
    """

    starts: Int[np.ndarray, " window"]
    measures: dict[str, np.ndarray]
    bos: tuple[int, ...]
    sampler: Any
    notes: tuple[str, ...]

    @classmethod
    def of(cls, scan: ScanFolder, rows: list[tuple[int, int]]) -> Self:
        """The windows of a finished scan of these rows."""
        on_request = [name for name in ON_REQUEST if name in scan.manifest["measures"]]
        names = [*_MEASURES, *on_request]
        table = scan.table(columns=["row", "start", *names])
        firsts = np.array([first for first, _ in rows])
        return cls(
            firsts[table["row"].to_numpy() - 1] + table["start"].to_numpy(),
            {name: table[name].to_numpy() for name in names},
            tuple(scan.manifest["bos"]),
            scan.manifest["sampler"],
            tuple(scan.notes),
        )

    def with_windows(self, more: Scanned) -> Scanned:
        """Both, each window once."""
        starts, first = np.unique(np.concatenate([self.starts, more.starts]), return_index=True)
        measures = {
            name: np.concatenate([values, more.measures[name]])[first]
            for name, values in self.measures.items()
        }
        return self._replace(starts=starts, measures=measures)


@contextlib.contextmanager
def _folder_for(folder: str | os.PathLike[str] | None) -> Iterator[Path]:
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def _rows(document: Document, windows: Windows) -> list[tuple[int, int]]:
    """First token and token behind the last of the rows that are scanned."""
    stride = windows.stride or 1
    last = len(document.ids) - windows.length
    n_windows = last // stride + 1
    rows = []
    for first in range(0, n_windows, _WINDOWS_PER_ROW):
        final = min(first + _WINDOWS_PER_ROW, n_windows) - 1
        rows.append((first * stride, final * stride + windows.length))
    if last % stride:  # one window that ends with the text
        rows.append((last, len(document.ids)))
    return rows


def _rows_between(scanned: Scanned, windows: Windows, n_tokens: int) -> list[tuple[int, int]]:
    """Rows of windows to look at beside those that are recited nearly in full.

    One that recites e tokens may lie n_continuation - e tokens behind one that recites all.
    """
    n, stride, em = windows.n_continuation, windows.stride or 1, scanned.measures["em"]
    nearly = np.flatnonzero(borders_on_recitation(em, n, stride))
    if not len(nearly):
        return []
    ranges = [
        np.arange(start - max(stride - 1, n - e), start + stride)
        for start, e in zip(scanned.starts[nearly], em[nearly], strict=True)
    ]
    starts = np.unique(np.concatenate(ranges))
    # Those that were read are read again: without them the rows would be short, and so the batches.
    starts = starts[(starts >= 0) & (starts <= n_tokens - windows.length)]
    runs = np.split(starts, np.flatnonzero(np.diff(starts) > 1) + 1)
    return [
        (int(run[i]), int(run[min(i + _WINDOWS_PER_ROW, len(run)) - 1]) + windows.length)
        for run in runs
        for i in range(0, len(run), _WINDOWS_PER_ROW)
    ]


def _write_rows(
    folder: Path, document: Document, rows: list[tuple[int, int]], front: tuple[int, ...]
) -> Path:
    """The rows as a file of token ids, named after all of them: a scan goes on with no other.

    Every row begins with the tokens in front of it, which the scan takes away again: a row of the
    document might begin with the same tokens and would lose them.
    """
    content = document.ids.numpy().astype("<i8").tobytes()
    name = f"document-{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    lines = [
        json.dumps({"id": f"token-{first}", "ids": [*front, *document.ids[first:stop].tolist()]})
        + "\n"
        for first, stop in rows
    ]
    return write_atomically(folder / name, "".join(lines))


def _map_of(
    adapter: Adapter, document: Document, windows: Windows, scanned: Scanned, normalize: Normalize
) -> DocumentMap:
    """The map of the windows that were read."""
    starts = torch.from_numpy(scanned.starts)
    paragraphs = Paragraphs(
        document.ids.unfold(0, windows.length, 1)[starts],
        windows.n_prefix,
        bos=scanned.bos,
        reading_options={} if normalize == "auto" else {"normalize": normalize},
    )
    stride = windows.stride or 1
    missed = [missed_between_windows(windows.length, stride)] if stride > 1 else []
    options = {"document": document.name, "stride": windows.stride, "sampler": scanned.sampler}
    return DocumentMap(
        name=document.name,
        text=document.text,
        token_starts=document.starts,
        token_ends=document.ends,
        n_prefix=windows.n_prefix,
        n_continuation=windows.n_continuation,
        stride=stride,
        starts=starts,
        measures={name: torch.from_numpy(v.copy()) for name, v in scanned.measures.items()},
        provenance=Provenance.of(adapter, {"windows": paragraphs}, **options),
        notes=(*scanned.notes, *missed, *reading_notes([document.changes])),
    )
