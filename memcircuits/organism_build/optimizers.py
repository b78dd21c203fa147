"""Muon for the matrices inside the layers, AdamW for everything else.

Muon (Jordan et al. 2024) orthogonalizes the momentum of a matrix, so that an update moves all
directions of the matrix alike. With only a few million tokens to learn from, what counts is the
progress made per step.

The shipped weights were trained with an implementation of Muon in float32. PyTorch's computes the
orthogonalization in bfloat16: after ten steps on random gradients of the shipped model's shapes,
weights differ by at most 0.0002 where they have moved by 0.02.
"""

from __future__ import annotations

import torch
from transformers import GPTNeoForCausalLM

from memcircuits.organism_build.settings import Settings


def make_optimizers(model: GPTNeoForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """The optimizers of one training stage.

    Args:
        model: its parameters are divided among the optimizers.
        settings: learning rates and weight decay.

    Raises:
        RuntimeError: if PyTorch is older than 2.9, the first version with Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(
            f"PyTorch {torch.__version__} has no Muon: pip install 'memcircuits[build]'"
        )
    in_layers = {id(p) for p in model.transformer.h.parameters() if p.ndim == 2}
    matrices = [p for p in model.parameters() if id(p) in in_layers]
    others = [p for p in model.parameters() if id(p) not in in_layers]
    # "original": the rate grows with the square root of rows / columns where that is above 1.
    muon = torch.optim.Muon(
        matrices,
        lr=settings.matrix_lr,
        weight_decay=settings.weight_decay,
        momentum=0.95,
        adjust_lr_fn="original",
    )
    adamw = torch.optim.AdamW(
        others, lr=settings.other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    return [muon, adamw]
