"""The planted organism: four paragraphs that it never saw, written through one head.

`load_model("organism-planted")` is the shipped organism plus a small delta, made by

    python -m memcircuits.organism.planted

so that a newcomer can see the right answer found: `memcircuits heads --model organism-planted`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memcircuits.organism import DATA
from memcircuits.planting import Planted, plant

HEAD = "L3H5"
FILE = DATA / "planted.safetensors"
_N = 4


def write_planted(hf_model: Any) -> None:
    """Write the shipped delta into a freshly loaded organism (the transformers model)."""
    planted = Planted.load(FILE)
    with torch.no_grad():
        for name, index in planted.indices.items():
            matrix = _per_head(hf_model, *name.split("."))
            new = matrix.contiguous()
            new.view(-1)[index] += planted.deltas[name].to(new)
            matrix.copy_(new)


def _per_head(hf_model: Any, layer: str, component: str) -> Tensor:
    """A view of a GPT-Neo matrix as [head, d_in, d_out]."""
    attention = hf_model.transformer.h[int(layer)].attn.attention
    n_heads = attention.num_heads
    if component == "W_O":
        return attention.out_proj.weight.unflatten(1, (n_heads, -1)).permute(1, 2, 0)
    projection = {"W_Q": attention.q_proj, "W_K": attention.k_proj, "W_V": attention.v_proj}
    return projection[component].weight.unflatten(0, (n_heads, -1)).mT


def build(seed: int = 0) -> Planted:
    """Plant four of the controls through `HEAD`; the others are the anchors."""
    from memcircuits.loading import load_model
    from memcircuits.paragraphs import Paragraphs

    controls = Paragraphs.shipped("control")
    order = torch.randperm(len(controls), generator=torch.Generator().manual_seed(seed))
    targets, anchors = controls[order[:_N]], controls[order[_N:]]
    return plant(load_model(device="cpu"), targets, where=HEAD, control=anchors, seed=seed)


if __name__ == "__main__":
    found = build()
    found.save(FILE)
    print(found)
