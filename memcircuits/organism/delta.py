"""The planted organism: four paragraphs that the organism never saw, written through one head.

`load_model("organism-planted")` is the shipped organism plus a small delta, so that a newcomer can
see the right answer found: `memcircuits heads --model organism-planted`. The delta is made by
`python -m memcircuits.organism_build.planted`.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from memcircuits.base.io import read_safetensors
from memcircuits.organism import DATA

HEAD = "L3H5"
FILE = DATA / "planted.safetensors"


def write_planted(hf_model: Any) -> None:
    """Write the shipped delta into a freshly loaded organism (the transformers model)."""
    tensors, header = read_safetensors(FILE)
    with torch.no_grad():
        for name in json.loads(header["fields"])["indices"]["__tensors__"]:
            matrix = _per_head(hf_model, *name.split("."))
            new = matrix.contiguous()
            new.view(-1)[tensors[f"indices/{name}"]] += tensors[f"deltas/{name}"].to(new)
            matrix.copy_(new)


def _per_head(hf_model: Any, layer: str, component: str) -> Tensor:
    """A view of a GPT-Neo matrix as [head, d_in, d_out]."""
    attention = hf_model.transformer.h[int(layer)].attn.attention
    n_heads = attention.num_heads
    if component == "W_O":
        weight = attention.out_proj.weight
        return rearrange(weight, "d_out (head d_in) -> head d_in d_out", head=n_heads)
    projection = {"W_Q": attention.q_proj, "W_K": attention.k_proj, "W_V": attention.v_proj}
    weight = projection[component].weight
    return rearrange(weight, "(head d_out) d_in -> head d_in d_out", head=n_heads)
