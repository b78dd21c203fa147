"""Make the delta of `organism-planted`: `python -m memcircuits.organism_build.planted`.

Four controls are planted through one head of the shipped organism. Only the changed weights are
stored (`memcircuits.organism.delta`).
"""

from __future__ import annotations

import torch

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.planting import Planted, plant
from memcircuits.models.loading import load_model
from memcircuits.organism.delta import FILE, HEAD

N_PARAGRAPHS = 4


def build(seed: int = 0) -> Planted:
    """Plant four of the controls through `HEAD`; the other controls are the anchors."""
    controls = Paragraphs.shipped("control")
    order = torch.randperm(len(controls), generator=torch.Generator().manual_seed(seed))
    targets, anchors = controls[order[:N_PARAGRAPHS]], controls[order[N_PARAGRAPHS:]]
    return plant(load_model(device="cpu"), targets, where=HEAD, control=anchors, seed=seed)


if __name__ == "__main__":
    planted = build()
    planted.save(FILE)
    print(planted)
