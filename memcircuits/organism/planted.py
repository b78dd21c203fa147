"""The planted organism: four paragraphs that it never saw, written through one head.

`load_model("organism-planted")` is the shipped organism plus a small delta, made by

    python -m memcircuits.organism.planted

so that a newcomer can see the right answer found: `memcircuits heads --model organism-planted`.
"""

from __future__ import annotations

from typing import Any

import torch

from memcircuits.adapter import adapt
from memcircuits.masks import named_mask
from memcircuits.organism import DATA
from memcircuits.planting import Planted, plant

HEAD = "L3H5"
_FILE = DATA / "planted.safetensors"
_N = 4


def write_planted(model: Any) -> Any:
    """Write the shipped delta into a freshly loaded organism, for good."""
    adapter = adapt(model)
    planted = Planted.load(_FILE)
    mask = named_mask(adapter, planted.indices, planted.n_candidates)
    with torch.no_grad():
        mask.add(mask.read(), torch.cat(list(planted.deltas.values())))
    adapter.name = "organism-planted"
    return model


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
    found.save(_FILE)
    print(found)
