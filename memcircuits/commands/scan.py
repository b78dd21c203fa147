"""`memcircuits scan`: which passages are recited, of a file or, with `--out`, of a corpus."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memcircuits.commands.inputs import Inputs, load
from memcircuits.commands.options import Json
from memcircuits.commands.output import Answer, print_notes, print_table, say, say_written
from memcircuits.commands.scan_options import CorpusOptions, ExtractionOptions
from memcircuits.commands.scan_printing import print_scan, say_missed, say_next, totals_by_role

if TYPE_CHECKING:
    from memcircuits.measure.corpus.folder import ScanFolder
    from memcircuits.measure.scanning import Scan


def scan(
    inputs: Inputs,
    extraction: ExtractionOptions,
    options: CorpusOptions,
    top: Annotated[
        int, typer.Option(min=0, help="Number of passages printed, the longest recitations first.")
    ] = 10,
    html: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="Also write a page of the passages, to search and to filter."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Which passages does the model recite? The longest recitations as text, and totals.

    Example: memcircuits scan --html scan.html

    A folder of text files is read file by file; --stride 100 reads every window of 50 + 50 tokens:
    memcircuits scan --model MODEL --paragraphs chapters/ --stride 100

    With --out, the windows of a corpus of any size are written to parquet files, and a scan that
    was stopped can be continued:
    memcircuits scan --paragraphs corpus.jsonl.zst --stride 100 --out scan --resume
    """
    import memcircuits as mc

    if options.out is not None:
        if html is not None:
            raise mc.InputError("--html", html.name, "it is for scans without --out")
        _scan_corpus(inputs, extraction, options, options.out, top, json)
        return
    options.check_unused()
    sampler = extraction.sampler()
    model, paragraphs = inputs.load()
    result = mc.scan(
        model,
        paragraphs,
        sampler=sampler,
        near_verbatim=extraction.near_verbatim,
        batch_size=options.batch_size,
        progress=inputs.progress,
    )
    written = [] if html is None else [result.to_html(html)]
    if json:
        _answer(result, written).print_json()
    else:
        print_scan(inputs, result, top, said=paragraphs.notes)
        say_next(inputs, result.em.numpy(), result.token_correct.shape[1])
    say_written(written, inputs.quiet)


def _scan_corpus(
    inputs: Inputs,
    extraction: ExtractionOptions,
    options: CorpusOptions,
    out: Path,
    top: int,
    json: bool,
) -> None:
    import memcircuits as mc
    from memcircuits.organism import DATA

    inputs.check_paragraphs_given()
    corpus = str(inputs.paragraphs or DATA / "paragraphs.jsonl")
    arguments: dict[str, Any] = {
        "windows": options.windows(inputs),
        **inputs.reading,
        "sampler": extraction.sampler(),
        "near_verbatim": extraction.near_verbatim,
        "part_records": options.part_records,
        "batch_size": options.batch_size,
        "resume": options.resume,
        "progress": inputs.progress,
    }
    shard = options.shard()
    loading = inputs.loading | _device_of_process(inputs, options)
    if options.engine == "ray":
        from memcircuits.measure.corpus.on_ray import scan_with_ray

        if shard != (0, 1):
            raise mc.InputError("--num-shards", shard[1], "with Ray, give --workers instead")
        arguments |= {"workers": options.workers, "address": options.ray_address}
        say(f"loading {inputs.model}", inputs.quiet)
        loader = functools.partial(mc.load_model, inputs.model, **loading)
        folder = scan_with_ray(loader, corpus, out, **arguments)
        tokenizer = None
    else:
        from memcircuits.measure.corpus.scan import scan_to_disk

        model = load(inputs.model, inputs.quiet, **loading)
        tokenizer = model.tokenizer
        folder = scan_to_disk(model, corpus, out, shard=shard, **arguments)
    if json:
        _folder_answer(folder, out).print_json()
        return
    _print_folder(folder, shard, top, tokenizer)
    if folder.complete and folder.summary["memorized"]:
        options_of_model = Inputs(
            model=inputs.model,
            paragraphs=out,
            n_prefix=inputs.n_prefix,
            n_continuation=inputs.n_continuation,
            bos=inputs.bos,
            **inputs.loading,
        )
        say(f"Next: memcircuits heads {options_of_model.typed}", inputs.quiet)


def _device_of_process(inputs: Inputs, options: CorpusOptions) -> dict[str, Any]:
    """The GPU that `accelerate launch` or `torchrun` gave to this process, if any."""
    import torch

    from memcircuits.base.errors import InputError

    local_rank = os.environ.get("LOCAL_RANK")
    if options.shard_index is not None or local_rank is None:
        return {}
    if not local_rank.isdigit():
        raise InputError("LOCAL_RANK", local_rank, "unset it, or give --shard-index")
    if inputs.device != "auto" or not torch.cuda.is_available():
        return {}
    return {"device": f"cuda:{int(local_rank)}"}


def _folder_answer(folder: ScanFolder, out: Path) -> Answer:
    return Answer(
        "scan",
        summary=_sentence(folder.summary),
        values={"complete": folder.complete, "totals": folder.summary},
        notes=folder.notes,
        files=[out],
    )


def _sentence(totals: dict[str, Any]) -> str:
    return (
        f"{totals['windows']:,} windows of {totals['rows']:,} rows, {totals['memorized']:,} "
        f"memorized, {totals['quarantined']:,} rows or windows unusable"
    )


def _print_folder(
    folder: ScanFolder, shard: tuple[int, int], top: int, tokenizer: Any | None
) -> None:
    complete = folder.complete  # before the totals: another process may finish in between
    totals = folder.summary
    print_notes(folder.notes)
    typer.echo(_sentence(totals))
    if totals.get("unread"):
        for row in folder.quarantine():
            if row.get("unread"):
                typer.echo(f"not read to its end: {row['where']}: {row['reason']}")
    for reason, n in totals["left_out"].items():
        typer.echo(f"left out: {n} ({reason})")
    typer.echo(
        f"{totals['drifted']} of {totals['drift_sampled']} sampled windows get other ids when "
        "their text is encoded again"
    )
    if not complete:
        typer.echo(f"shard {shard[0]} of {shard[1]} is finished, others are not")
        return
    seconds, tokens = totals["seconds"], totals["tokens_in_these_seconds"]
    if tokens:
        typer.echo(f"{tokens / seconds:,.0f} tokens/s in each process")
    else:
        typer.echo("all parts existed already")
    n_continuation, stride = (folder.manifest["windows"][k] for k in ("n_continuation", "stride"))
    if totals["windows"] and stride is not None:
        recited = folder.table(columns=["em"], filters=[("em", ">=", n_continuation // 2)])
        n_prefix = folder.manifest["windows"]["n_prefix"]
        say_missed(recited["em"].to_numpy(), n_prefix, n_continuation, stride)
    if top and totals["windows"]:
        typer.echo("\nThe longest recitations (end of the prefix | continuation):")
        print_table(folder.longest(top, tokenizer))


def _answer(result: Scan, written: list[Path]) -> Answer:
    from memcircuits.measure.sampling import MOST_SAMPLES

    frame = result.to_frame()
    frame["samples"] = frame["samples"].where(frame["samples"] <= MOST_SAMPLES)
    return Answer(
        "scan",
        summary=str(result),
        values={"n_continuation": result.token_correct.shape[1], "n_prefix": result.n_prefix},
        tables={"groups": totals_by_role(frame), "paragraphs": frame},
        notes=result.notes,
        files=written,
        provenance=result.provenance,
    )
