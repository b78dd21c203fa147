"""Make the planted organism: `python -m memcircuits.organism_build.planted`."""

from __future__ import annotations

import torch

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.planting import Planted, plant
from memcircuits.models.loading import load_model
from memcircuits.organism.delta import FILE, HEAD

N_PARAGRAPHS = 4


def build(seed: int = 0) -> Planted:
    """Plant four of the controls through `HEAD`; the others are the anchors."""
    controls = Paragraphs.shipped("control")
    order = torch.randperm(len(controls), generator=torch.Generator().manual_seed(seed))
    targets, anchors = controls[order[:N_PARAGRAPHS]], controls[order[N_PARAGRAPHS:]]
    return plant(load_model(device="cpu"), targets, where=HEAD, control=anchors, seed=seed)


if __name__ == "__main__":
    planted = build()
    planted.save(FILE)
    print(planted)
