"""`memcircuits unigrams build`: count the tokens of a corpus, as a measure of their rarity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands.inputs import load
from memcircuits.commands.options import (
    Engine,
    Json,
    Model,
    Quiet,
    RayAddress,
    Revision,
    TrustRemoteCode,
)
from memcircuits.commands.output import Answer, say_written


def build(
    paragraphs: Annotated[
        str,
        typer.Option(
            "--paragraphs", help="File, folder or hf:NAME; its documents are counted in full."
        ),
    ],
    model: Model = "organism",
    out: Annotated[Path, typer.Option(dir_okay=False, help="File to write.")] = Path(
        "unigrams.safetensors"
    ),
    processes: Annotated[
        int, typer.Option(min=1, help="Number of processes that encode and count.")
    ] = 1,
    engine: Engine = "local",
    ray_address: RayAddress = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Count how often each token occurs in a corpus; `heads --unigrams` takes the table.

    Example: memcircuits unigrams build --paragraphs corpus.jsonl.zst --out unigrams.safetensors
    """
    import memcircuits as mc
    from memcircuits.data.tokens import vocabulary_size

    loaded = load(
        model, quiet, device="cpu", revision=revision, trust_remote_code=trust_remote_code
    )
    tokenizer, d_vocab = loaded.tokenizer, vocabulary_size(loaded)
    del loaded  # the weights are not needed for counting
    if engine == "ray":
        from memcircuits.measure.corpus.on_ray import count_with_ray

        table = count_with_ray(
            paragraphs, tokenizer, d_vocab=d_vocab, address=ray_address, progress=not quiet
        )
    else:
        table = mc.UnigramTable.from_corpus(
            paragraphs, tokenizer, d_vocab=d_vocab, processes=processes, progress=not quiet
        )
    table.save(out)
    n_seen = int((table.counts > 0).sum())
    summary = f"{table.n_tokens:,} tokens of {table.source}, {n_seen:,} of {d_vocab:,} ids seen"
    if json:
        Answer(
            "unigrams build",
            summary=summary,
            values={
                "n_tokens": table.n_tokens,
                "d_vocab": d_vocab,
                "seen": n_seen,
                "source": table.source,
                "tokenizer": table.tokenizer,
            },
            files=[out],
        ).print_json()
    else:
        typer.echo(summary)
    say_written([out], quiet)
