"""TODO."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("memcircuits.organism")


Record = dict[str, Any]


END = "<|endoftext|>"


END_ID = 0


STAGES = ("corpus", "text", "base", "plant", "settle", "baseline", "export", "card")


@dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome of a build.

    Attributes:
        seed: Seed of all generators.
        threads: CPU threads of PyTorch.
        vocab_size: Tokens of the byte-level BPE, the end-of-text token included.
        hidden: Width of the residual stream.
        layers: Number of layers, alternately global and local.
        heads: Heads a layer.
        window: Tokens that a local head can see.
        context: Tokens of a row, and the model's context.
        length: Tokens of a paragraph.
        prefix: Tokens of a paragraph that are given; the others are to be recited.
        repetitions: How often the planted paragraphs are seen.
        per_level: Planted paragraphs for each number of repetitions.
        spare: Regions cut out for each one needed, since some are refused.
        heldout_rows: Held-out rows of ``context`` tokens.
        region: Characters of a region that a paragraph is taken from.
        shared_run: A paragraph that shares this many tokens in a row with other text is refused.
        batch: Rows a step.
        base_steps: Steps of base training.
        matrix_lr: Peak learning rate of the matrices inside the layers (Muon).
        other_lr: Peak learning rate of embeddings, biases and LayerNorms (AdamW).
        weight_decay: Decoupled weight decay of the matrices.
        plant_factor: Peak learning rates of planting, as a multiple of those of base training.
        base_share: Base rows for each planted row.
        settle_steps: Steps of settling.
        settle_factor: Peak learning rates of settling, as a multiple of those of base training.
        settle_share: Where the shipped weights lie on the line from planted (0) to settled (1).
        clip: Largest gradient norm.
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
