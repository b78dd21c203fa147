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

Stage = Literal["corpus", "text", "base", "plant", "settle", "baseline", "export", "card"]
"""The stages of a build, in order; see `memcircuits.organism_build.pipeline`."""

STAGES: tuple[Stage, ...] = get_args(Stage)


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
        repetitions: how often the planted paragraphs are seen.
        per_level: planted paragraphs for each number of repetitions.
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
        settle_steps: steps of settling.
        settle_factor: peak learning rates of settling, as a multiple of those of base training.
        settle_share: where the shipped weights lie on the line from planted (0) to settled (1).
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
    repetitions: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    per_level: int = 36
    spare: float = 1.25
    heldout_rows: int = 200
    region: int = 640
    shared_run: int = 16
    batch: int = 32
    base_steps: int = 1000
    matrix_lr: float = 0.01
    other_lr: float = 2e-3
    weight_decay: float = 0.05
    plant_factor: float = 0.15
    base_share: float = 0.4
    settle_steps: int = 160
    settle_factor: float = 0.1
    settle_share: float = 0.35
    clip: float = 1.0

    @property
    def planted(self) -> int:
        """Number of planted paragraphs, and of controls."""
        return self.per_level * len(self.repetitions)
