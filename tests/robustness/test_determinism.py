"""The same seed gives the same bits, whatever happened before."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import memcircuits as mc
from memcircuits.models.loading import as_bridge
from memcircuits.results.result import Result
from tests.helpers import models as zoo
from tests.helpers.calls import CALLS

pytestmark = pytest.mark.any_version


def test_the_same_seed_gives_the_same_bits(tmp_path):
    """On fresh models, in any state of the global generators; another seed differs."""
    files = []
    for turn, seed in enumerate((3, 3, 4)):
        torch.manual_seed(turn)
        np.random.seed(turn)
        random.seed(turn)
        model = zoo.bridge("gpt_neo")
        paragraphs = zoo.mixed(model)
        kept = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        ranking = mc.find_memorization_heads(
            model, paragraphs, mode="resample", draws=50, seed=seed, progress=False
        )
        resampled = mc.ablate_heads(model, paragraphs, mode="resample", seed=seed, progress=False)
        now = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        assert torch.equal(kept[0], now[0])
        assert kept[1:] == now[1:]
        paths = [tmp_path / f"{kind}-{turn}" for kind in ("ranking", "ablation")]
        files.append(
            [r.save(p).read_bytes() for r, p in zip((ranking, resampled), paths, strict=True)]
        )
    assert files[0] == files[1]
    assert files[0][0] != files[2][0]
    assert files[0][1] != files[2][1]


def content(result: object, folder: Path) -> object:
    """What a call gave, bit by bit."""
    if isinstance(result, Result):
        return result.save(folder / "result").read_bytes()
    if isinstance(result, mc.Paragraphs):
        return content(result.ids, folder)
    if isinstance(result, torch.Tensor):
        return result.dtype, tuple(result.shape), result.contiguous().numpy().tobytes()
    if isinstance(result, dict):
        return {key: content(value, folder) for key, value in result.items()}
    assert isinstance(result, (bytes, str)), type(result)
    return result


@pytest.fixture(scope="module")
def fresh():
    """Two fresh models of the same weights."""
    sources = (zoo.shaken(zoo.hf_model("llama")) for _ in range(2))
    return [as_bridge(source, zoo.tokenizer(), name="tiny-llama") for source in sources]


@pytest.mark.parametrize("call", CALLS)
def test_every_call_repeated_gives_the_same_bits(fresh, tmp_path, call):
    """On another model object of the same weights, in another state of the global generators."""
    rows = []
    for turn, model in enumerate(fresh):
        torch.manual_seed(turn)
        np.random.seed(turn)
        random.seed(turn)
        rows.append(content(CALLS[call](model, "llama"), tmp_path))
    assert rows[0] == rows[1]
