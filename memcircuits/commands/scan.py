"""`memcircuits scan`: which paragraphs are recited, of a file or, with `--out`, of a corpus."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memcircuits.commands.inputs import Inputs
from memcircuits.commands.options import Json
from memcircuits.commands.output import print_json, print_notes, print_table, records, say

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.data.windows import Windows
    from memcircuits.measure.corpus.folder import ScanFolder
    from memcircuits.measure.sampling import Sampler
    from memcircuits.measure.scanning import Scan

_NOT_PRINTED = [
    "bits",
    "loose_match",
    "min_k",
    "extraction_strength",
    "samples",
    "bucket",
    "finite",
]


def _of_corpus(text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Corpora, with --out", **settings)


def _of_extraction(text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Beyond greedy decoding", **settings)


@dataclass(frozen=True)
class ExtractionOptions:
    """The options that say what is measured beside EM and NLL."""

    temperature: Annotated[
        float, _of_extraction("Temperature of the samples that extract the text.")
    ] = 1.0
    top_k: Annotated[
        int | None, _of_extraction("Samples draw from this many tokens; by default, all.", min=1)
    ] = None
    top_p: Annotated[
        float, _of_extraction("Samples draw from the likeliest tokens of this total probability.")
    ] = 1.0
    near_verbatim: Annotated[
        bool,
        _of_extraction("Decode greedily too, to find recitations with slips.", "--near-verbatim"),
    ] = False

    def sampler(self) -> Sampler | None:
        """How text is drawn; None for the model's own distribution."""
        from memcircuits.measure.sampling import Sampler

        sampler = Sampler(self.temperature, self.top_k, self.top_p)
        return None if sampler.is_plain else sampler


@dataclass(frozen=True)
class CorpusOptions:
    """The options of a scan of a corpus into a folder."""

    out: Annotated[
        Path | None, typer.Option(help="Scan a corpus of any size into this folder.")
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Paragraphs per forward pass; by default, as many as fit."),
    ] = None
    resume: Annotated[bool, _of_corpus("Continue a scan that was stopped.", "--resume")] = False
    stride: Annotated[
        int | None,
        _of_corpus("Tokens between window starts; by default, one window per row.", min=1),
    ] = None
    offset: Annotated[int, _of_corpus("Start of the first window, in tokens.", min=0)] = 0
    min_unique: Annotated[
        float, _of_corpus("Minimum fraction of different tokens in a window.")
    ] = 0.0
    drop: Annotated[
        list[str] | None, _of_corpus("Leave out windows that contain this; repeatable.")
    ] = None
    deduplicate: Annotated[
        bool, _of_corpus("Scan exact duplicates once and count them.", "--deduplicate")
    ] = False
    part_records: Annotated[
        int, _of_corpus("Maximum number of rows per part, and of KiB of text.", min=1)
    ] = 4096
    shard_index: Annotated[
        int | None, _of_corpus("Index of this job in a job array, from 0.", min=0)
    ] = None
    num_shards: Annotated[int | None, _of_corpus("Number of jobs in the array.", min=1)] = None
    engine: Annotated[str, _of_corpus("local, or ray (extra `ray`).")] = "local"
    ray_address: Annotated[
        str | None, _of_corpus("Address of a Ray cluster; by default, this machine.")
    ] = None
    workers: Annotated[
        int | None,
        _of_corpus("Number of models that Ray holds; by default, one per GPU.", min=1),
    ] = None

    def check_unused(self) -> None:
        """Raise `InputError` if an option needs --out, and it is not given."""
        from memcircuits.base.errors import InputError

        corpus_only = {
            "--resume": self.resume,
            "--stride": self.stride,
            "--offset": self.offset,
            "--min-unique": self.min_unique,
            "--drop": self.drop,
            "--deduplicate": self.deduplicate,
            "--num-shards": self.num_shards,
            "--engine": self.engine if self.engine != "local" else None,
        }
        for name, value in corpus_only.items():
            if value:
                raise InputError(name, value, "it needs --out FOLDER")

    def windows(self, inputs: Inputs) -> Windows:
        """What is cut from the rows of the corpus."""
        from memcircuits.data.windows import Windows

        return Windows(
            n_prefix=inputs.n_prefix,
            n_continuation=inputs.n_continuation,
            stride=self.stride,
            offset=self.offset,
            min_unique=self.min_unique,
            drop=tuple(self.drop or ()),
            deduplicate=self.deduplicate,
        )

    def shard(self) -> tuple[int, int]:
        """Index and number of shards: as given, or set by `accelerate launch` or `torchrun`."""
        from memcircuits.base.errors import InputError

        index, number = self.shard_index, self.num_shards
        if (index is None) != (number is None):
            raise InputError("--shard-index", index, "give --shard-index and --num-shards together")
        if index is not None and number is not None:
            return index, number
        try:
            return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        except ValueError as error:
            raise InputError("RANK", str(error), "unset it, or give --shard-index") from None


def scan(
    inputs: Inputs,
    extraction: ExtractionOptions,
    options: CorpusOptions,
    top: Annotated[
        int, typer.Option(min=0, help="Number of rows printed, those with the highest EM first.")
    ] = 20,
    json: Json = False,
) -> None:
    """Which paragraphs does the model recite? EM, NLL and margins of every one.

    Example: memcircuits scan --model EleutherAI/gpt-neo-125m --paragraphs 50_50_preds.pt

    With --out, the windows of a corpus are written to parquet files, and a scan that was stopped
    can be continued:
    memcircuits scan --paragraphs corpus.jsonl.zst --stride 100 --out scan --resume
    """
    import memcircuits as mc

    if options.out is not None:
        _scan_corpus(inputs, extraction, options, options.out, json)
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
    _print_scan(result, json, top)


def _scan_corpus(
    inputs: Inputs,
    extraction: ExtractionOptions,
    options: CorpusOptions,
    out: Path,
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
    say(f"loading {inputs.model}", inputs.quiet)
    load = functools.partial(mc.load_model, inputs.model, **loading)
    if options.engine == "ray":
        from memcircuits.measure.corpus.on_ray import scan_with_ray

        if shard != (0, 1):
            raise mc.InputError("--num-shards", shard[1], "with Ray, give --workers instead")
        arguments |= {"workers": options.workers, "address": options.ray_address}
        folder = scan_with_ray(load, corpus, out, **arguments)
    elif options.engine == "local":
        from memcircuits.measure.corpus.scan import scan_to_disk

        folder = scan_to_disk(load(), corpus, out, shard=shard, **arguments)
    else:
        raise mc.InputError("--engine", options.engine, "choose local or ray")
    _print_folder(folder, shard, json)
    opened = f"memcircuits.measure.corpus.folder.ScanFolder.open({str(out)!r})"
    say(f"in {out}: {opened}", inputs.quiet)


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


def _print_folder(folder: ScanFolder, shard: tuple[int, int], json: bool) -> None:
    totals = folder.summary
    if json:
        notes = list(folder.notes)
        print_json({"complete": folder.complete, "totals": totals, "notes": notes})
        return
    print_notes(folder.notes)
    typer.echo(
        f"{totals['windows']} windows of {totals['rows']} rows, {totals['memorized']} memorized, "
        f"{totals['quarantined']} unusable"
    )
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
    if not folder.complete:
        typer.echo(f"shard {shard[0]} of {shard[1]} is finished, others are not")
        return
    seconds, tokens = totals["seconds"], totals["tokens_in_these_seconds"]
    if tokens:
        typer.echo(f"{tokens / seconds:,.0f} tokens/s in each process")
    else:
        typer.echo("all parts existed already")


def _print_scan(result: Scan, json: bool, top: int) -> None:
    from memcircuits.measure.recitation_statistics import REPETITION_COLUMNS

    frame = result.to_frame()
    groups = _summary(frame)
    if json:
        n_continuation = result.token_correct.shape[1]
        print_json(
            {
                "summary": groups,
                "n_continuation": n_continuation,
                "notes": list(result.notes),
                "paragraphs": records(frame),
            }
        )
        return
    print_notes(result.notes)
    ordered = frame.sort_values(["em", "nll"], ascending=[False, True], kind="stable")
    hidden = [name for name in _NOT_PRINTED if name != "samples" or result.token_sampled is None]
    print_table(ordered.drop(columns=hidden).head(top))
    if len(frame) > top:
        typer.echo(f"... {len(frame):,} paragraphs; all with --json, or --top {len(frame)}")
    if any(key in result.metadata for key in REPETITION_COLUMNS):
        print_table(result.by_repetitions())
    for name, group in groups.items():
        typer.echo(
            f"{name}: {group['n']} paragraphs, {group['memorized']} memorized, "
            f"mean EM {group['em']:.2f}, mean NLL {group['nll']:.3f} nats/token"
            + (f", {group['near_verbatim']} near-verbatim" if "near_verbatim" in group else "")
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
            **(
                {"near_verbatim": int(group["near_verbatim"].sum())}
                if "near_verbatim" in group
                else {}
            ),
        }
        for name, group in groups.items()
    }
