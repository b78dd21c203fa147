"""The model and the paragraphs that a command is about, and the options that name them."""

from __future__ import annotations

import dataclasses
import difflib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memcircuits.commands.common import naming
from memcircuits.commands.options import (
    BosOption,
    Continuation,
    ContinuationColumn,
    Device,
    DeviceMap,
    Dtype,
    Model,
    NormalizeOption,
    Prefix,
    PrefixColumn,
    Quiet,
    Revision,
    Strict,
    Stride,
    TextColumn,
    TrustRemoteCode,
    TxtOption,
    Verbose,
    existing,
)
from memcircuits.commands.output import say
from memcircuits.commands.work import count_work

if TYPE_CHECKING:
    from memcircuits.data.bos import Bos
    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.data.unigrams import UnigramTable

SHIPPED_LENGTH = 50  # tokens of prefix and of continuation

BOS: dict[str, Bos] = {"auto": "auto", "yes": True, "no": False}

# What each shipped model would be without the paragraphs that it was given.
_TWINS = {
    "organism": "organism-twin",
    "organism-twin": "organism",
    "organism-planted": "organism",
}


@dataclass(frozen=True)
class Inputs:
    """The options of every command that takes a model and paragraphs.

    A command has one parameter of this type, called `inputs` (see `common.with_options`).
    """

    model: Model = "organism"
    paragraphs: Annotated[
        Path | None,
        typer.Option(
            "--paragraphs",
            callback=existing,
            help="File, folder of files or folder of a scan; by default, the paragraphs shipped.",
        ),
    ] = None
    n_prefix: Prefix = SHIPPED_LENGTH
    n_continuation: Continuation = SHIPPED_LENGTH
    bos: BosOption = "auto"
    stride: Stride = None
    txt: TxtOption = "auto"
    strict: Strict = False
    normalize: NormalizeOption = "auto"
    text_column: TextColumn = None
    prefix_column: PrefixColumn = None
    continuation_column: ContinuationColumn = None
    device: Device = "auto"
    dtype: Dtype = "float32"
    device_map: DeviceMap = None
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    quiet: Quiet = False
    verbose: Verbose = False

    @property
    def progress(self) -> bool:
        """Whether progress is shown."""
        return not self.quiet

    @property
    def reading(self) -> dict[str, Any]:
        """The arguments `bos`, `txt`, `columns` and `normalize` of what reads text.

        Raises:
            InputError: if only one of the columns of prefix and continuation is named.
        """
        from memcircuits.data.formats.records import Columns

        with naming("--text-column, --prefix-column, --continuation-column", "columns"):
            columns = Columns(self.text_column, self.prefix_column, self.continuation_column)
        return {
            "bos": BOS[self.bos],
            "txt": self.txt,
            "columns": columns,
            "normalize": self.normalize,
        }

    @property
    def typed(self) -> str:
        """These options as they are typed, without defaults, --quiet and --verbose."""
        parts = []
        for entry in dataclasses.fields(self):
            value, option = getattr(self, entry.name), "--" + entry.name.replace("_", "-")
            if value == entry.default or entry.name in ("quiet", "verbose"):
                continue
            parts += [option] if value is True else [option, shlex.quote(str(value))]
        return " ".join(parts)

    @property
    def loading(self) -> dict[str, Any]:
        """The arguments of `load_model` beside the name."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "device_map": self.device_map,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }

    def load(self, *, paired: bool = False) -> tuple[Any, Paragraphs]:
        """The model and the paragraphs; if a file is `paired` with them, no row is skipped."""
        from memcircuits.data.paragraphs import Paragraphs

        self.check_paragraphs_given()
        self.check_file(self.paragraphs)
        model = load(self.model, self.quiet, **self.loading)
        if self.paragraphs is not None:
            return model, self.read(self.paragraphs, model, strict=paired or self.strict)
        is_planted = self.model == "organism-planted"
        return model, Paragraphs.shipped("control" if is_planted else "all")

    def read(
        self,
        path: Path,
        model: Any,
        option: str = "--paragraphs",
        *,
        strict: bool | None = None,
    ) -> Paragraphs:
        """The paragraphs of the file that an option names; what was skipped or cut is said."""
        from memcircuits.data.paragraphs import Paragraphs

        with naming(option, "paragraphs"):
            paragraphs = Paragraphs.read(
                path,
                model,
                n_prefix=self.n_prefix,
                n_continuation=self.n_continuation,
                stride=self.stride,
                strict=self.strict if strict is None else strict,
                **self.reading,
            )
        for note in paragraphs.notes:
            typer.echo(f"{option}: {note}", err=True)
        return paragraphs

    def check_file(self, path: Path | None, option: str = "--paragraphs") -> None:
        """Refuse a file that cannot be read before the model is loaded."""
        if path is None:
            return
        from memcircuits.data.reading import check_file

        columns = self.reading["columns"]
        with naming(option, "paragraphs"):
            check_file(path, columns, txt=self.txt, strided=self.stride is not None)

    def check_paragraphs_given(self) -> None:
        """Raise `InputError` if the shipped paragraphs would be used where they do not fit.

        They are for the shipped model, and their lengths are fixed.
        """
        from memcircuits.base.errors import InputError

        refuse_misspelt("--model", self.model)
        if self.paragraphs is None and not is_shipped(self.model):
            raise InputError(
                "--paragraphs",
                "not given",
                f"the shipped paragraphs are the organism's, not {self.model}'s: give a file",
            )
        self.reading  # noqa: B018 - wrong values are refused before the model is loaded
        if self.paragraphs is not None:
            return
        lengths = {"--n-prefix": self.n_prefix, "--n-continuation": self.n_continuation}
        for option, length in lengths.items():
            if length != SHIPPED_LENGTH:
                raise InputError(
                    option, length, "the shipped paragraphs have 50 + 50 tokens: give a file"
                )
        if self.bos == "yes":
            raise InputError(
                "--bos", "yes", "the organism was trained without it: give a file of paragraphs"
            )
        unused = {
            "--stride": self.stride,
            "--txt": self.txt != "auto" and self.txt,
            "--text-column": self.text_column,
            "--prefix-column": self.prefix_column,
            "--continuation-column": self.continuation_column,
        }
        for option, value in unused.items():
            if value:
                raise InputError(
                    option, str(value), "it is about --paragraphs FILE, which is not given"
                )


def load(name: str, quiet: bool, option: str = "--model", **loading: Any) -> Any:
    """Load the model that an option names by `load_model`, which checks its arguments."""
    from memcircuits.models.loading import load_model

    refuse_misspelt(option, name)
    say(f"loading {name}", quiet)
    with naming(option, "model"):
        model = load_model(name, **loading)
    count_work(model, name)
    return model


def load_twin(inputs: Inputs, name: str | None) -> Any:
    """The twin of a model; without a name that of a shipped model."""
    from memcircuits.base.errors import InputError

    name = name or _TWINS.get(inputs.model)
    if name is None:
        raise InputError(
            "--twin", "not given", f"{inputs.model} has no twin of its own: give a model"
        )
    return load(name, inputs.quiet, "--twin", **inputs.loading)


def refuse_misspelt(option: str, name: str) -> None:
    """Refuse what is nearly the name of a shipped model, and no file.

    Raises:
        InputError: which says what was meant.
    """
    from memcircuits.base.errors import InputError

    near = difflib.get_close_matches(name, _TWINS, n=1, cutoff=0.8)
    if near and name not in _TWINS and not Path(name).exists():
        raise InputError(option, name, f"there is no such model; did you mean {near[0]}?")


def is_shipped(model: str) -> bool:
    """Whether a model name means the organism, its twin or its planted variant."""
    return model in _TWINS


def unigram_table(model: str, path: Path | None) -> UnigramTable | None:
    """The table of a file; without a file the shipped one for the organism, else None."""
    from memcircuits.data.unigrams import UnigramTable

    if path is not None:
        with naming("--unigrams", "path"):
            return UnigramTable.read(path)
    return UnigramTable.shipped() if is_shipped(model) else None
