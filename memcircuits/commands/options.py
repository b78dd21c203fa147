"""TODO."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Targets = Annotated[
    int, typer.Option("--targets", min=1, help="At most so many memorized paragraphs, by --seed.")
]


Control = Annotated[
    Path | None, typer.Option(help="File of controls; by default paragraphs with a low EM.")
]


Fraction = Annotated[
    float, typer.Option(help="How many of the candidate weights may change for each paragraph.")
]


Heads = Annotated[
    str | None, typer.Option(help="Only these heads' matrices, for instance L1H2,L0H3.")
]


Layers = Annotated[str | None, typer.Option(help="Only these layers, for instance 0,1.")]


Components = Annotated[
    str | None, typer.Option(help="Only these matrices, for instance W_in,W_out.")
]


KlBudget = Annotated[float, typer.Option(help="KL that held-out controls may show, nats/token.")]


Heldout = Annotated[
    Path | None,
    typer.Option(help="File of texts whose perplexity is measured; the organism has its own."),
]


Export = Annotated[
    Path | None, typer.Option(help="New folder for the edited model, in Hugging Face format.")
]
