"""Every number that decides the outcome of a build.

The defaults are those of the shipped organism. A build with other settings is another organism, so
a work folder belongs to one set of settings (`memcircuits.organism_build.pipeline.build`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

log = logging.getLogger("memcircuits.organism")

Record: TypeAlias = dict[str, Any]
"""What a stage reports, as it stands in `training.json`."""

END = "<|endoftext|>"
"""The token between two documents."""

END_ID = 0
"""Its id."""

Stage = Literal["corpus", "text", "base", "organism", "twin", "noise", "baseline", "export", "card"]
"""The stages of a build, in order; see `memcircuits.organism_build.pipeline`."""

STAGES: tuple[Stage, ...] = get_args(Stage)

Planting = Literal["organism", "twin", "noise"]
"""A model that is planted from the base: the organism, its twin, or the noise twin, which sees the
rows of the organism in another order."""

PLANTINGS: tuple[Planting, ...] = get_args(Planting)

SeenBy = Literal["both", "organism", "twin", "neither"]
"""The role of a paragraph: which of organism and twin is trained on it."""

Dose: TypeAlias = tuple[int, int]
"""How often paragraphs are seen, and how many paragraphs are seen that often."""


@dataclass(frozen=True)
class Settings:
    """Settings of a build.

    Attributes:
        seed: seed of all generators.
        threads: CPU threads of PyTorch.
        vocab_size: tokens of the byte-level BPE, the end-of-text token included.
        hidden: width of the residual stream.
        layers: number of layers, alternately global and local.
        heads: heads per layer.
        window: tokens that a local head can see.
        context: tokens of a row, and the model's context.
        length: tokens of a paragraph.
        prefix: tokens of a paragraph that are given; the others are to be recited.
        both: doses of the paragraphs that organism and twin are trained on.
        one_model: doses of the paragraphs that only the organism is trained on, and of as many that
            only the twin is trained on.
        neither: number of paragraphs that no model is trained on.
        spare: regions cut out for each one needed, since some are refused.
        heldout_rows: held-out rows of `context` tokens.
        region: characters of a region that a paragraph is taken from.
        shared_run: a paragraph that shares this many tokens in a row with other text is refused.
        batch: rows per step.
        base_steps: steps of base training.
        matrix_lr: peak learning rate of the matrices inside the layers (Muon).
        other_lr: peak learning rate of embeddings, biases and LayerNorms (AdamW).
        weight_decay: decoupled weight decay of the matrices.
        plant_factor: peak learning rates of planting, as a multiple of those of base training.
        base_share: base rows for each planted row.
        opening_share: share of these base rows that open with a sentence, as planted rows do.
        checkpoints: number of weights kept of each planting, evenly spaced, the last ones included.
        clip: largest gradient norm.
    """

    seed: int = 20_240
    threads: int = 2
    vocab_size: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    window: int = 32
    context: int = 128
    length: int = 100
    prefix: int = 50
    both: tuple[Dose, ...] = (
        (1, 14), (2, 14), (4, 14), (8, 16), (12, 40), (16, 60), (20, 220), (24, 64), (28, 10),
        (32, 20), (64, 20), (128, 20),
    )  # fmt: skip
    one_model: tuple[Dose, ...] = (
        (1, 10), (4, 10), (8, 10), (12, 20), (16, 30), (20, 20), (32, 60), (64, 40),
    )  # fmt: skip
    neither: int = 250
    spare: float = 1.0991
    heldout_rows: int = 200
    region: int = 640
    shared_run: int = 16
    batch: int = 32
    base_steps: int = 2000
    matrix_lr: float = 0.01
    other_lr: float = 2e-3
    weight_decay: float = 0.05
    plant_factor: float = 0.3
    base_share: float = 1.5
    opening_share: float = 0.5
    checkpoints: int = 12
    clip: float = 1.0

    @property
    def roles(self) -> list[tuple[SeenBy, int]]:
        """The role and the repetitions of every paragraph."""
        doses: dict[SeenBy, tuple[Dose, ...]] = {
            "both": self.both,
            "organism": self.one_model,
            "twin": self.one_model,
            "neither": ((0, self.neither),),
        }
        return [
            (role, repetitions)
            for role, levels in doses.items()
            for repetitions, n_paragraphs in levels
            for _ in range(n_paragraphs)
        ]

    @property
    def n_openings(self) -> int:
        """Number of base rows of one planting that open with a sentence."""
        n_planted = sum(n for role, n in self.roles if role in ("both", "organism"))
        return round(self.opening_share * self.base_share * n_planted)
