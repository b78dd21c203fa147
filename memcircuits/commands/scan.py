"""`memcircuits scan`: which paragraphs are recited, of a file or, with `--out`, of a corpus."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memcircuits.commands import common as c

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.measure.corpus.folder import ScanFolder
    from memcircuits.measure.scanning import Scan


def _corpus(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Corpora, with --out", **more)


Out = Annotated[Path | None, typer.Option(help="Scan a corpus of any size into this folder.")]
Resume = Annotated[bool, _corpus("Go on with a scan that was stopped.", "--resume")]
Stride = Annotated[
    int | None, _corpus("Tokens between windows; by default one window a row.", min=1)
]
Offset = Annotated[int, _corpus("Where the first window begins, in tokens.", min=0)]
MinUnique = Annotated[float, _corpus("Keep windows with a larger share of different tokens.")]
Drop = Annotated[list[str] | None, _corpus("Leave out windows that contain this; repeatable.")]
Deduplicate = Annotated[bool, _corpus("Scan exact duplicates once, count them.", "--deduplicate")]
PartRecords = Annotated[int, _corpus("Rows, and KiB of text, that one part covers.", min=1)]
ShardIndex = Annotated[int | None, _corpus("This job of a job array, from 0.", min=0)]
NumShards = Annotated[int | None, _corpus("Jobs of the job array.", min=1)]
Engine = Annotated[str, _corpus("local, or ray (extra `ray`).")]
RayAddress = Annotated[str | None, _corpus("A Ray cluster; by default this machine.")]
Workers = Annotated[int | None, _corpus("Models that Ray holds; by default one per GPU.", min=1)]


def scan(
    source: c.Source,
    top: Annotated[
        int, typer.Option(min=0, help="Rows of the table printed, those with most EM first.")
    ] = 20,
    json: c.Json = False,
    out: Out = None,
    batch_size: c.BatchSize = None,
    resume: Resume = False,
    stride: Stride = None,
    offset: Offset = 0,
    min_unique: MinUnique = 0.0,
    drop: Drop = None,
    deduplicate: Deduplicate = False,
    part_records: PartRecords = 4096,
    shard_index: ShardIndex = None,
    num_shards: NumShards = None,
    engine: Engine = "local",
    ray_address: RayAddress = None,
    workers: Workers = None,
) -> None:
    """Which paragraphs does the model recite? EM, NLL and margins of every one.

    Example: memcircuits scan --model EleutherAI/gpt-neo-125m --paragraphs 50_50_preds.pt

    With --out, windows of a corpus go to parquet files, and a scan that was stopped goes on:
    memcircuits scan --paragraphs corpus.jsonl.zst --stride 100 --out scan --resume
    """
    import memcircuits as mc

    if out is None:
        corpus_only = {
            "--resume": resume,
            "--stride": stride,
            "--offset": offset,
            "--min-unique": min_unique,
            "--drop": drop,
            "--deduplicate": deduplicate,
            "--num-shards": num_shards,
            "--engine": engine if engine != "local" else None,
        }
        for name, value in corpus_only.items():
            if value:
                raise mc.InputError(name, value, "it needs --out FOLDER")
        loaded, given = source.load()
        found = mc.scan(loaded, given, batch_size=batch_size, progress=not source.quiet)
        _print_scan(found, json, top)
        return

    from memcircuits.data.windows import Windows
    from memcircuits.organism import DATA

    source.refuse_missing_paragraphs()
    corpus = str(source.paragraphs or DATA / "paragraphs.jsonl")
    windows = Windows(
        source.n_prefix,
        source.n_continuation,
        stride,
        offset,
        min_unique,
        tuple(drop or ()),
        deduplicate,
    )
    options: dict[str, Any] = {
        "windows": windows,
        "part_records": part_records,
        "batch_size": batch_size,
        "resume": resume,
        "progress": not source.quiet,
    }
    shard, local_rank = _shard(shard_index, num_shards)
    loading = source.loading
    if source.device == "auto" and local_rank is not None and _cuda():
        loading["device"] = f"cuda:{local_rank}"
    c.say(f"loading {source.model}", source.quiet)
    load = functools.partial(mc.load_model, source.model, **loading)
    if engine == "ray":
        from memcircuits.measure.corpus.on_ray import scan_with_ray

        if shard != (0, 1):
            raise mc.InputError("--num-shards", shard[1], "with Ray, give --workers instead")
        scan_folder = scan_with_ray(
            load, corpus, out, workers=workers, address=ray_address, **options
        )
    elif engine == "local":
        from memcircuits.measure.corpus.scan import scan_to_disk

        scan_folder = scan_to_disk(load(), corpus, out, shard=shard, **options)
    else:
        raise mc.InputError("--engine", engine, "choose local or ray")
    _print_folder(scan_folder, shard, json)
    c.say(
        f"in {out}: memcircuits.measure.corpus.folder.ScanFolder.open({str(out)!r})", source.quiet
    )


def _shard(index: int | None, number: int | None) -> tuple[tuple[int, int], int | None]:
    """The shard, and the GPU that `accelerate launch` or `torchrun` gave to this process."""
    from memcircuits.core.errors import InputError

    if (index is None) != (number is None):
        raise InputError("--shard-index", index, "give --shard-index and --num-shards together")
    if index is not None and number is not None:
        return (index, number), None
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = os.environ.get("LOCAL_RANK")
        return (rank, world), None if local is None else int(local)
    except ValueError as error:
        raise InputError("RANK", str(error), "unset it, or give --shard-index") from None


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _print_folder(found: ScanFolder, shard: tuple[int, int], json: bool) -> None:
    totals = found.summary
    if json:
        c.print_json({"complete": found.complete, "totals": totals})
        return
    typer.echo(
        f"{totals['windows']} windows of {totals['rows']} rows, {totals['memorized']} memorized, "
        f"{totals['quarantined']} unusable"
    )
    for reason, n in totals["left_out"].items():
        typer.echo(f"left out: {n} ({reason})")
    typer.echo(
        f"{totals['drifted']} of {totals['drift_sampled']} sampled windows get other ids when "
        "their text is encoded again"
    )
    if found.complete:
        seconds, tokens = totals["seconds"], totals["tokens_in_these_seconds"]
        if tokens:
            typer.echo(f"{tokens / seconds:,.0f} tokens/s in each process")
        else:
            typer.echo("everything was there already")
    else:
        typer.echo(f"shard {shard[0]} of {shard[1]} is finished, others are not")


def _print_scan(found: Scan, json: bool, top: int) -> None:
    from memcircuits.measure.derived import REPETITION_COLUMNS

    frame = found.to_frame()
    groups = _summary(frame)
    if json:
        n = found.token_correct.shape[1]
        c.print_json({"summary": groups, "n_continuation": n, "paragraphs": c.records(frame)})
        return
    hidden = ["bits", "loose_match", "min_k", "samples", "bucket", "finite"]
    order = frame.sort_values(["em", "nll"], ascending=[False, True], kind="stable")
    c.print_table(order.drop(columns=hidden).head(top))
    if len(frame) > top:
        typer.echo(f"... {len(frame):,} paragraphs; all with --json, or --top {len(frame)}")
    if any(key in found.metadata for key in REPETITION_COLUMNS):
        c.print_table(found.by_repetitions())
    for name, group in groups.items():
        typer.echo(
            f"{name}: {group['n']} paragraphs, {group['memorized']} memorized, "
            f"mean EM {group['em']:.2f}, mean NLL {group['nll']:.3f} nats/token"
        )


def _summary(frame: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Counts and means over all paragraphs and, where known, per role."""
    groups = {"all": frame}
    if "role" in frame:
        groups |= dict(iter(frame.groupby("role")))
    return {
        str(name): {
            "n": len(group),
            "memorized": int(group["memorized"].sum()),
            "em": float(group["em"].mean()),
            "max_em": int(group["em"].max()),
            "nll": float(group["nll"].mean()),
        }
        for name, group in groups.items()
    }
