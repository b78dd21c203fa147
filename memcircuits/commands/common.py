"""What all commands share: options, loading the model and paragraphs, printing, errors."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.paragraphs import Paragraphs
    from memcircuits.unigrams import UnigramTable

Model = Annotated[
    str,
    typer.Option(
        help="organism or organism-planted (shipped), a local folder, a .gguf file or a name on "
        "the hub.",
        show_default="organism",
    ),
]
ParagraphFile = Annotated[
    Path | None,
    typer.Option("--paragraphs", help="File of paragraphs; by default those shipped."),
]
Out = Annotated[Path, typer.Option(help="Folder for the files written.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of every random draw.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Paragraphs per forward pass; by default what fits.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch on the hub.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run a repository's own code; needs --revision COMMIT."
    ),
]
Prefix = Annotated[
    int, typer.Option("--n-prefix", min=1, max=100_000, help="Tokens of the prefix.")
]
Continuation = Annotated[
    int, typer.Option("--n-continuation", min=1, max=100_000, help="Tokens of the continuation.")
]


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn expected failures into one line on stderr: exit 2 for bad input, 130 for Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("memcircuits: interrupted", err=True)
        raise typer.Exit(130) from None
    except (ValueError, MemoryError, OSError) as error:
        from memcircuits.checks import InputError

        if not isinstance(error, (InputError, MemoryError, OSError)):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"memcircuits: {text}", err=True)
        raise typer.Exit(2) from None


def load(
    model: str,
    paragraphs: Path | None,
    *,
    device: str = "auto",
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    n_prefix: int = 50,
    n_continuation: int = 50,
    quiet: bool = False,
) -> tuple[Any, Paragraphs]:
    """The model and the paragraphs of a command."""
    from memcircuits.checks import InputError
    from memcircuits.loading import load_model
    from memcircuits.paragraphs import Paragraphs

    if paragraphs is None and not is_shipped(model):
        raise InputError(
            "--paragraphs", "not given", f"the shipped paragraphs are the organism's, not {model}'s"
        )
    say(f"loading {model}", quiet)
    loaded = load_model(
        model, revision=revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    if paragraphs is None:
        return loaded, Paragraphs.shipped("control" if model == "organism-planted" else "all")
    return loaded, Paragraphs.read(
        paragraphs, loaded, n_prefix=n_prefix, n_continuation=n_continuation
    )


def is_shipped(model: str) -> bool:
    """Whether a model name means the organism, or its planted variant."""
    return model in ("organism", "organism-planted")


def unigrams_for(model: str, path: Path | None) -> UnigramTable | None:
    """The given table, the shipped one for the organism, else None."""
    from memcircuits.unigrams import UnigramTable

    if path is not None:
        return UnigramTable.read(path)
    return UnigramTable.shipped() if is_shipped(model) else None


def say(text: str, quiet: bool) -> None:
    """A line of progress on stderr."""
    if not quiet:
        typer.echo(text, err=True)


def print_json(data: Any) -> None:
    """Data on stdout; NaN becomes null."""
    typer.echo(json.dumps(data, indent=1, allow_nan=False))


def print_table(frame: pd.DataFrame) -> None:
    """A table on stdout, numbers to four digits."""
    typer.echo(frame.to_string(index=False, float_format=lambda x: f"{x:.4g}"))


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A frame as JSON records; NaN becomes null."""
    found: list[dict[str, Any]] = json.loads(frame.to_json(orient="records", double_precision=10))
    return found


def stdout_is_piped() -> bool:
    """Whether stdout is not a terminal."""
    return not sys.stdout.isatty()
