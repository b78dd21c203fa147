"""Options that several commands have, each with its help and one meaning.

Values to choose from are `Literal`s, which Typer checks before anything is loaded and prints in
`--help`. They repeat the types of the functions that are called, which would import torch.
"""

from __future__ import annotations

import difflib
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from memcircuits.base.errors import InputError

Out = Annotated[Path, typer.Option(file_okay=False, help="Folder for the files that are written.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Say at the end how often the model ran.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of all random draws.")]
Top = Annotated[int, typer.Option(min=1, help="Number of rows printed.")]

_MOST_NAMES = 10_000  # read of a folder


def existing(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Refuse a file that is not there before anything is loaded."""
    if value is None:
        return None
    try:
        is_there = value.exists()
    except OSError:  # no file can have this name
        is_there = False
    if not is_there:
        name = param.opts[0] if param.opts[0].startswith("-") else param.opts[0].upper()
        raise InputError(name, value.name, f"there is no such file{_nearest_name(value)}")
    return value


def _nearest_name(path: Path) -> str:
    """A question that names the file beside a missing one whose name is most like its name."""
    try:
        entries = islice(path.parent.iterdir(), _MOST_NAMES)
        beside = [entry.name for entry in entries if entry.name.isprintable()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.8)
    return f"; did you mean {near[0]}?" if near else ""


Control = Annotated[
    Path | None,
    typer.Option(
        callback=existing,
        help="File of controls; by default, those of --paragraphs of which at most a fifth is "
        "recited.",
    ),
]
MaxParagraphs = Annotated[
    int,
    typer.Option(min=2, help="Maximum number of memorized paragraphs, and of controls, by --seed."),
]
MaxMemorized = Annotated[
    int,
    typer.Option(
        "--max-paragraphs", min=1, help="Maximum number of memorized paragraphs, by --seed."
    ),
]
Heads = Annotated[
    str | None, typer.Option(help="Use only these heads, for instance L1H2,L0H3; by default, all.")
]
MatchNll = Annotated[
    bool,
    typer.Option("--match-nll", help="Take the controls with the nearest loss, not random ones."),
]
Mode = Annotated[
    Literal["zero", "mean", "resample"],
    typer.Option(help="What a head's output is replaced by; the latter two are of the controls."),
]
Engine = Annotated[
    Literal["local", "ray"], typer.Option(help="Where the work is done (ray: extra `ray`).")
]
Twin = Annotated[
    str | None,
    typer.Option(
        help="Model that was not trained on the paragraphs; by default, the shipped model's twin."
    ),
]
Unigrams = Annotated[
    Path | None,
    typer.Option(callback=existing, help="Unigram table (.safetensors) that defines rarity."),
]
Components = Annotated[
    str | None, typer.Option(help="Use only these matrices, for instance W_in,W_out.")
]
Export = Annotated[
    Path | None, typer.Option(help="New folder for the edited model, in Hugging Face format.")
]
RayAddress = Annotated[
    str | None, typer.Option(help="Address of a Ray cluster; by default, this machine.")
]
Workers = Annotated[
    int | None,
    typer.Option(help="Number of models that Ray holds; by default, one per GPU.", min=1),
]


def _of_model(text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Model and lengths", **settings)


def _of_text(text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Texts and files", **settings)


Model = Annotated[
    str,
    typer.Option(
        help="organism, organism-twin or organism-planted (shipped), a local folder, a .gguf "
        "file or a name on the hub.",
        show_default="organism",
    ),
]
Device = Annotated[str, _of_model("auto, cpu, cuda, cuda:1 or mps.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "auto"],
    _of_model("Precision of the weights; auto: as in the files."),
]
DeviceMap = Annotated[
    Literal["auto", "balanced", "sequential"] | None,
    _of_model("Split the model over several GPUs."),
]
Revision = Annotated[str | None, _of_model("Commit, tag or branch on the hub.")]
TrustRemoteCode = Annotated[
    bool,
    _of_model("Run the code of the repository; needs --revision COMMIT.", "--trust-remote-code"),
]
BosOption = Annotated[
    Literal["auto", "yes", "no"],
    _of_model(
        "Tokens in front of every text, never counted: auto (what the tokenizer puts there), "
        "yes (its BOS in any case) or no."
    ),
]
NormalizeOption = Annotated[
    Literal["auto", "none"],
    _of_text(
        "auto undoes what saving and copying does to text (line ends, non-breaking spaces and "
        "others); none keeps it as written."
    ),
]
TextColumn = Annotated[str | None, _of_text("Column of the text, where its name does not tell.")]
PrefixColumn = Annotated[str | None, _of_text("Column of the prefix; needs --continuation-column.")]
ContinuationColumn = Annotated[
    str | None, _of_text("Column of the continuation; needs --prefix-column.")
]
Stride = Annotated[
    int | None,
    _of_text(
        "Tokens from one window of a row to the next; by default, only its first window is read.",
        min=1,
    ),
]
TxtOption = Annotated[
    Literal["auto", "document", "paragraph"],
    _of_text(
        "A text file is one document, or holds paragraphs between blank lines; auto: documents "
        "in a folder or with --stride, else paragraphs."
    ),
]
Strict = Annotated[
    bool,
    _of_text(
        "Refuse rows that are too short or damaged; by default, they are skipped and counted.",
        "--strict",
    ),
]
Prefix = Annotated[int, _of_model("Number of prefix tokens.", min=1, max=100_000)]
Continuation = Annotated[int, _of_model("Number of continuation tokens.", min=1, max=100_000)]
