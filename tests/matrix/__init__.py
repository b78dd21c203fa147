"""Every public analysis on every architecture, model class and basis, against plain PyTorch.

`compare.ANALYSES` is the table: to add an analysis, add a line. `ours` measures with this package,
`by_hand` the same with transformers and PyTorch alone, on the models and paragraphs of `cases`.
`python -m tests.matrix` measures all of it for the installed transformer-lens and writes its part
of docs/matrix.md; the parts of other versions stay as they are.
"""

from tests.matrix.cases import (
    CLASSES,
    VARIANTS,
    Numbers,
    model,
    paragraphs,
    plain,
    twin_model,
    twins,
    unigrams,
    variants,
)
from tests.matrix.compare import ANALYSES, compared, difference, measured

__all__ = [
    "ANALYSES",
    "CLASSES",
    "VARIANTS",
    "Numbers",
    "compared",
    "difference",
    "measured",
    "model",
    "paragraphs",
    "plain",
    "twin_model",
    "twins",
    "unigrams",
    "variants",
]
