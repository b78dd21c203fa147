"""Options of `memcircuits scan`: what is measured beside EM, and scans of corpora into folders."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from memcircuits.commands.inputs import Inputs

if TYPE_CHECKING:
    from memcircuits.data.windows import Windows
    from memcircuits.measure.sampling import Sampler


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
    engine: Annotated[
        Literal["local", "ray"], _of_corpus("Where the work is done (ray: extra `ray`).")
    ] = "local"
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
            stride=inputs.stride,
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
