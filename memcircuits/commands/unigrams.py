"""`memcircuits unigrams build`: count the tokens of a corpus, as a measure of their rarity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands import common as c


def build(
    paragraphs: Annotated[
        str, typer.Option("--paragraphs", help="File, folder or hf:NAME; whole documents count.")
    ],
    model: c.Model = "organism",
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("unigrams.safetensors"),
    processes: Annotated[int, typer.Option(min=1, help="Processes that encode and count.")] = 1,
    engine: Annotated[str, typer.Option(help="local, or ray (extra `ray`).")] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="A Ray cluster; by default this machine.")
    ] = None,
    revision: c.Revision = None,
    trust_remote_code: c.TrustRemoteCode = False,
    json: c.Json = False,
    quiet: c.Quiet = False,
) -> None:
    """Count how often each token occurs in a corpus; `heads --unigrams` takes the table.

    Example: memcircuits unigrams build --paragraphs corpus.jsonl.zst --out unigrams.safetensors
    """
    import memcircuits as mc
    from memcircuits.data.tokens import vocabulary_size

    c.say(f"loading {model}", quiet)
    loaded = mc.load_model(
        model, device="cpu", revision=revision, trust_remote_code=trust_remote_code
    )
    tokenizer, size = loaded.tokenizer, vocabulary_size(loaded)
    del loaded
    if engine == "ray":
        from memcircuits.measure.corpus.on_ray import count_with_ray

        table = count_with_ray(
            paragraphs, tokenizer, d_vocab=size, address=ray_address, progress=not quiet
        )
    elif engine == "local":
        table = mc.UnigramTable.from_corpus(
            paragraphs, tokenizer, d_vocab=size, processes=processes, progress=not quiet
        )
    else:
        raise mc.InputError("--engine", engine, "choose local or ray")
    table.save(out)
    seen = int((table.counts > 0).sum())
    if json:
        c.print_json(
            {
                "n_tokens": table.n_tokens,
                "d_vocab": size,
                "seen": seen,
                "source": table.source,
                "tokenizer": table.tokenizer,
            }
        )
    else:
        typer.echo(f"{table.n_tokens:,} tokens of {table.source}, {seen:,} of {size:,} ids seen")
    c.say(f"wrote {out}", quiet)
