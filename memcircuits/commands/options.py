"""Options that several commands have, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Out = Annotated[Path, typer.Option(file_okay=False, help="Folder for the files that are written.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress on stderr.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of all random draws.")]
Top = Annotated[int, typer.Option(min=1, help="Number of rows printed.")]
Control = Annotated[
    Path | None, typer.Option(help="File of controls; by default, paragraphs with a low EM.")
]
Twin = Annotated[
    str | None,
    typer.Option(
        help="Model that was not trained on the paragraphs; for organism-planted, by default, "
        "the organism."
    ),
]
Unigrams = Annotated[
    Path | None, typer.Option(help="Unigram table (.safetensors) that defines rarity.")
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


def _of_model(text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Model and lengths", **settings)


def _of_text(text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Texts and files", **settings)


Model = Annotated[
    str,
    typer.Option(
        help="organism or organism-planted (shipped), a local folder, a .gguf file or a name on "
        "the hub.",
        show_default="organism",
    ),
]
Device = Annotated[str, _of_model("auto, cpu, cuda, cuda:1 or mps.")]
Dtype = Annotated[str, _of_model("float32, bfloat16, float16, or auto: as in the files.")]
DeviceMap = Annotated[
    str | None, _of_model("Split the model over several GPUs: auto, balanced or sequential.")
]
Revision = Annotated[str | None, _of_model("Commit, tag or branch on the hub.")]
TrustRemoteCode = Annotated[
    bool,
    _of_model("Run the code of the repository; needs --revision COMMIT.", "--trust-remote-code"),
]
BosOption = Annotated[
    str,
    _of_model(
        "Tokens in front of every text, never counted: auto (what the tokenizer puts there), "
        "yes (its BOS in any case) or no."
    ),
]
NormalizeOption = Annotated[
    str,
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
Prefix = Annotated[int, _of_model("Number of prefix tokens.", min=1, max=100_000)]
Continuation = Annotated[int, _of_model("Number of continuation tokens.", min=1, max=100_000)]
