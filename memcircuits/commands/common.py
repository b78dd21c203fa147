"""What all commands share: options, loading the model and paragraphs, printing, errors."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.data.unigrams import UnigramTable

Out = Annotated[Path, typer.Option(help="Folder for the files written.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of every random draw.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Paragraphs per forward pass; by default what fits.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Model = Annotated[
    str,
    typer.Option(
        help="organism or organism-planted (shipped), a local folder, a .gguf file or a name on "
        "the hub.",
        show_default="organism",
    ),
]


def _shared(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Model and lengths", **more)


Device = Annotated[str, _shared("auto, cpu, cuda, cuda:1 or mps.")]
Dtype = Annotated[str, _shared("float32, bfloat16 or float16.")]
Revision = Annotated[str | None, _shared("Commit, tag or branch on the hub.")]
TrustRemoteCode = Annotated[
    bool, _shared("Run a repository's own code; needs --revision COMMIT.", "--trust-remote-code")
]
Prefix = Annotated[int, _shared("Tokens of the prefix.", min=1, max=100_000)]
Continuation = Annotated[int, _shared("Tokens of the continuation.", min=1, max=100_000)]


@dataclass(frozen=True)
class Source:
    """The options of every command that takes a model and paragraphs, and what they name.

    A command has one parameter of this type, called `source`; `with_source` spells it out.
    """

    model: Model = "organism"
    paragraphs: Annotated[
        Path | None,
        typer.Option("--paragraphs", help="File of paragraphs; by default those shipped."),
    ] = None
    n_prefix: Prefix = 50
    n_continuation: Continuation = 50
    device: Device = "auto"
    dtype: Dtype = "float32"
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    quiet: Quiet = False

    @property
    def loading(self) -> dict[str, Any]:
        """What `load_model` takes beside the name."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }

    def load(self) -> tuple[Any, Paragraphs]:
        """The model and the paragraphs."""
        from memcircuits.data.paragraphs import Paragraphs
        from memcircuits.models.loading import load_model

        self.refuse_missing_paragraphs()
        say(f"loading {self.model}", self.quiet)
        loaded = load_model(self.model, **self.loading)
        if self.paragraphs is None:
            unknown = self.model == "organism-planted"
            return loaded, Paragraphs.shipped("control" if unknown else "all")
        return loaded, self.read(self.paragraphs, loaded)

    def read(self, path: Path, model: Any) -> Paragraphs:
        """Another file of paragraphs, of the same lengths."""
        from memcircuits.data.paragraphs import Paragraphs

        return Paragraphs.read(
            path, model, n_prefix=self.n_prefix, n_continuation=self.n_continuation
        )

    def refuse_missing_paragraphs(self) -> None:
        """The shipped paragraphs are for the shipped model only."""
        from memcircuits.core.errors import InputError

        if self.paragraphs is None and not is_shipped(self.model):
            raise InputError(
                "--paragraphs",
                "not given",
                f"the shipped paragraphs are the organism's, not {self.model}'s: give a file",
            )

    def unigrams(self, path: Path | None) -> UnigramTable | None:
        """The given table, the shipped one for the organism, else None."""
        return unigrams_for(self.model, path)


def with_source(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Source`: model and paragraphs first, the others last."""
    own = dict(inspect.signature(command, eval_str=True).parameters)
    if own.pop("source", None) is None:
        return command
    shared = inspect.signature(Source, eval_str=True).parameters
    first = ("model", "paragraphs")
    order = {name: shared[name] for name in first} | own | shared
    given = [option.replace(kind=option.KEYWORD_ONLY) for option in order.values()]

    @functools.wraps(command)
    def wrapped(**options: Any) -> None:
        source = Source(**{name: options.pop(name) for name in shared})
        command(source=source, **options)

    wrapped.__signature__ = inspect.Signature(given)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {option.name: option.annotation for option in given}
    return wrapped


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn expected failures into one line on stderr: exit 2 for bad input, 130 for Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("memcircuits: interrupted", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # whoever read the output has enough: Typer ends quietly
        raise
    except (ValueError, MemoryError, OSError) as error:
        from memcircuits.core.errors import InputError

        if not isinstance(error, (InputError, MemoryError, OSError)):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"memcircuits: {text}", err=True)
        raise typer.Exit(2) from None


def is_shipped(model: str) -> bool:
    """Whether a model name means the organism, or its planted variant."""
    return model in ("organism", "organism-planted")


def unigrams_for(model: str, path: Path | None) -> UnigramTable | None:
    """The given table, the shipped one for the organism, else None."""
    from memcircuits.data.unigrams import UnigramTable

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
