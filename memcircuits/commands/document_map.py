"""`memcircuits map`: which parts of a book or a file does the model recite?"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from memcircuits.commands.common import naming
from memcircuits.commands.inputs import BOS, load
from memcircuits.commands.options import (
    BosOption,
    Continuation,
    Device,
    Dtype,
    Json,
    Model,
    NormalizeOption,
    Prefix,
    Quiet,
    Revision,
    TrustRemoteCode,
    existing,
)
from memcircuits.commands.output import Answer, print_notes, print_table, say_written
from memcircuits.commands.scan_options import ExtractionOptions

_PRINTED = ["line", "n_tokens", "n_windows", "probability", "text"]


def map(
    extraction: ExtractionOptions,
    file: Annotated[
        Path, typer.Argument(callback=existing, help="Text file: a book, a source file, a page.")
    ],
    model: Model = "organism",
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens from one window to the next; by default 1 for texts of up to 1,000 "
            "tokens, else 10.",
        ),
    ] = None,
    n_prefix: Prefix = 50,
    n_continuation: Continuation = 50,
    out: Annotated[Path, typer.Option(dir_okay=False, help="The page to write.")] = Path(
        "map.html"
    ),
    top: Annotated[int, typer.Option(min=0, help="Number of passages printed.")] = 10,
    bos: BosOption = "auto",
    normalize: NormalizeOption = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Windows per forward pass; by default, as many as fit."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Which parts of a document does the model recite? Every window of it, as a page.

    The page shows the text with the recited passages marked. Beside it are the passages as .csv,
    all windows as .json, and the map for `DocumentMap.load` as .safetensors. While it runs, numbers
    are kept in a folder beside the page (map.scan); after an interruption the same command goes on.

    Example: memcircuits map book.txt --out map.html
    """
    import memcircuits as mc
    from memcircuits.base.io import write_atomically

    if out.suffix != ".html":
        raise mc.InputError("--out", out.name, "give a name that ends with .html")
    if file.is_dir():
        remedy = (
            "give one text file; memcircuits scan --paragraphs FOLDER --stride 1 reads a folder"
        )
        raise mc.InputError("FILE", f"{file.name} is a folder", remedy)
    sampler = extraction.sampler()
    loading: dict[str, Any] = {"device": device, "dtype": dtype, "revision": revision}
    loaded = load(model, quiet, trust_remote_code=trust_remote_code, **loading)
    unfinished = out.with_suffix(".scan")
    with naming("FILE", "text_or_file"):
        mapped = mc.document_map(
            loaded,
            file,
            stride=stride,
            n_prefix=n_prefix,
            n_continuation=n_continuation,
            bos=BOS[bos],
            normalize=normalize,
            sampler=sampler,
            near_verbatim=extraction.near_verbatim,
            folder=unfinished,
            batch_size=batch_size,
            progress=not quiet,
        )
    passages = mapped.spans_frame()
    written = [
        mapped.to_html(out),
        write_atomically(out.with_suffix(".csv"), passages.to_csv(index=False)),
        mapped.to_json(out.with_suffix(".json")),
        mapped.save(out.with_suffix(".safetensors")),
    ]
    shutil.rmtree(unfinished)
    if json:
        Answer(
            "map",
            summary=str(mapped),
            values={"recited_share": mapped.recited_share, "n_windows": len(mapped.starts)},
            tables={"spans": passages},
            notes=mapped.notes,
            files=written,
            provenance=mapped.provenance,
        ).print_json()
    else:
        typer.echo(str(mapped))
        shown = passages[_PRINTED].head(top)
        if len(shown):
            print_table(shown)
            typer.echo("probability: that one sample is the whole continuation of some window")
        print_notes(mapped.notes)
    say_written(written, quiet)
