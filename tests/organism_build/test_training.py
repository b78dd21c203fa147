"""The network and its training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from memcircuits.organism_build.model import new_model, use_fused_kernels
from memcircuits.organism_build.optimizers import make_optimizers
from memcircuits.organism_build.records import read_rows
from memcircuits.organism_build.rows import base_rows
from memcircuits.organism_build.training import train
from tests.organism_build.micro import MICRO, MicroBuild


def test_an_update_of_a_matrix_has_singular_values_near_one() -> None:
    model = new_model(replace(MICRO, hidden=64, weight_decay=0.0))
    muon, _ = make_optimizers(model, replace(MICRO, weight_decay=0.0))
    matrices = muon.param_groups[0]["params"]
    before = [matrix.detach().clone() for matrix in matrices]
    generator = torch.Generator().manual_seed(0)
    for matrix in matrices:
        matrix.grad = torch.randn(matrix.shape, generator=generator)
    muon.step()
    for old, new in zip(before, matrices, strict=True):
        rows, columns = old.shape
        rate = MICRO.matrix_lr * max(1.0, rows / columns) ** 0.5
        values = torch.linalg.svdvals((old - new.detach()) / rate)
        if rows != columns:  # a random square matrix has singular values near 0
            assert values.min() > 0.5
        assert values.max() < 1.5


def test_muon_trains_the_matrices_of_the_layers_and_adamw_everything_else() -> None:
    model = new_model(MICRO)
    muon, adamw = make_optimizers(model, MICRO)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    of_adamw = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert of_muon == {n for n in names.values() if ".h." in n and n.endswith("weight")} - {
        n for n in names.values() if "ln_" in n
    }
    assert of_muon | of_adamw == set(names.values())
    assert not of_muon & of_adamw
    assert [o.param_groups[0]["lr"] for o in (muon, adamw)] == [0.01, 0.002]


def test_a_model_with_fused_kernels_gives_the_same_logits() -> None:
    settings = replace(MICRO, layers=2)
    rows = torch.randint(0, 384, (3, 24), generator=torch.Generator().manual_seed(0))
    plain = new_model(settings).eval()
    fused = use_fused_kernels(new_model(settings)).eval()
    torch.testing.assert_close(plain(rows).logits, fused(rows).logits, atol=1e-5, rtol=1e-5)


def test_making_a_model_does_not_change_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    new_model(MICRO)
    assert torch.equal(before, torch.random.get_rng_state())


class StopError(Exception):
    """Stands for a killed process."""


def test_a_stopped_run_continues_to_the_same_weights(micro: MicroBuild, tmp_path: Path) -> None:
    rows = base_rows(np.load(micro.work / "stream.npy"), 24, 24, np.random.default_rng(0))
    heldout = read_rows(micro.work / "heldout.jsonl")

    def run(checkpoint: Path, schedule=lambda done: 1.0) -> torch.nn.Module:
        model = new_model(MICRO)
        options = {"schedule": schedule, "every": 2}
        train(model, rows, heldout, MICRO, checkpoint=checkpoint, **options)
        return model

    def stop(done: float) -> float:
        if done > 0.6:
            raise StopError
        return 1.0

    whole = run(tmp_path / "whole.pt")
    with pytest.raises(StopError):
        run(tmp_path / "stopped.pt", stop)
    resumed = run(tmp_path / "stopped.pt")
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
