"""The fingerprint names the exact weights, is kept while they stay, and notices every change."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import memcircuits as mc
from memcircuits.editing.recipe import Recipe
from memcircuits.models import fingerprint as module
from memcircuits.models.fingerprint import checksum, fingerprint, weights_state
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo


@pytest.fixture
def model():
    """A model that a test may change."""
    return zoo.bridge("gpt_neo")


@pytest.fixture
def checksums(monkeypatch):
    """Grows by one for every tensor that is read."""
    read: list[torch.Size] = []

    def counted(tensor):
        read.append(tensor.shape)
        return checksum(tensor)

    monkeypatch.setattr(module, "checksum", counted)
    return read


def weight(model):
    return adapt(model).weight(1, "W_in").parameter


# -- kept while the weights stay ------------------------------------------------------------------


def test_a_second_call_reads_no_weights(model, checksums):
    first = adapt(model).fingerprint()
    n_tensors = len(model.state_dict())
    assert len(checksums) == n_tensors
    assert adapt(model).fingerprint() == first
    assert len(checksums) == n_tensors


def test_a_ranking_reads_the_weights_once(model, checksums):
    mc.find_memorization_heads(model, zoo.mixed(model), draws=20, progress=False)
    assert len(checksums) == len(model.state_dict())


def test_each_model_has_its_own(model):
    other = zoo.bridge("gpt_neo", seed=1)
    assert adapt(model).fingerprint() != adapt(other).fingerprint()
    assert adapt(model).fingerprint() == fingerprint(model.state_dict())
    assert adapt(model).fingerprint() == adapt(zoo.bridge("gpt_neo")).fingerprint()


# -- every change is noticed ----------------------------------------------------------------------


def in_place(model):
    with torch.no_grad():
        weight(model)[0, 0] += 1


def through_a_view(model):
    adapt(model).weight(1, "W_O").values[0, 0, 0] += 1


def in_inference_mode(model):
    with torch.inference_mode():
        weight(model)[0, 0] += 1


def load_state_dict(model):
    weights = copy.deepcopy(model.original_model.state_dict())
    next(iter(weights.values()))[0, 0] += 1
    model.original_model.load_state_dict(weights)


def assigned_state_dict(model):
    weights = copy.deepcopy(model.original_model.state_dict())
    next(iter(weights.values()))[0, 0] += 1
    model.original_model.load_state_dict(weights, assign=True)


def replaced_data(model):
    weight(model).data = weight(model).data + 1


def replaced_data_twice(model):
    """The second new tensor may get the memory of the old weights."""
    for _ in range(2):
        weight(model).data = weight(model).data + 1


def transposed_data(model):
    square = adapt(model).weight(1, "W_Q").parameter
    square.data = square.data.T


def data_in_place(model):
    weight(model).data.add_(1)


def one_neuron_of_data(model):
    weight(model).data[5] += 1


def one_column_of_data(model):
    weight(model).data[:, 5] += 1


def a_bias(model):
    with torch.no_grad():
        model.blocks[0].ln1.bias[0] += 1


def optimizer(name, **options):
    def step(model):
        parameter = weight(model)
        parameter.grad = torch.ones_like(parameter)
        getattr(torch.optim, name)([parameter], lr=0.1, **options).step()

    return step


CHANGES = {
    "in place": in_place,
    "through a view": through_a_view,
    "in inference mode": in_inference_mode,
    "load_state_dict": load_state_dict,
    "load_state_dict, assigned": assigned_state_dict,
    "new data": replaced_data,
    "new data twice": replaced_data_twice,
    "transposed data": transposed_data,
    "data in place": data_in_place,
    "one row of data": one_neuron_of_data,
    "one column of data": one_column_of_data,
    "a bias": a_bias,
    "SGD": optimizer("SGD"),
    "SGD, foreach": optimizer("SGD", foreach=True),
    "AdamW, foreach": optimizer("AdamW", foreach=True),
    "AdamW, one by one": optimizer("AdamW", foreach=False),
    "AdamW, fused": optimizer("AdamW", fused=True),
}


@pytest.mark.parametrize("change", [pytest.param(f, id=name) for name, f in CHANGES.items()])
def test_a_change_is_noticed(model, change):
    before = adapt(model).fingerprint()
    change(model)
    after = adapt(model).fingerprint()
    assert after != before
    assert after == fingerprint(model.state_dict())


def test_another_type_is_noticed_and_the_way_back_too(model):
    before = adapt(model).fingerprint()
    model.original_model.to(torch.bfloat16)
    rounded = adapt(model).fingerprint()
    assert rounded == fingerprint(model.state_dict()) != before
    model.original_model.to(torch.float32)
    assert adapt(model).fingerprint() == fingerprint(model.state_dict())
    assert adapt(model).fingerprint() not in (before, rounded)


def test_an_edit_is_noticed_and_undone(model):
    paragraphs = zoo.mixed(model)
    options = {"recipe": Recipe(steps=1), "kl_budget": math.inf, "progress": False}
    edit = mc.unlearn(model, paragraphs[:3], paragraphs[4:], **options)
    before = adapt(model).fingerprint()
    with edit.apply(model):
        inside = adapt(model).fingerprint()
        assert inside == fingerprint(model.state_dict()) != before
    assert adapt(model).fingerprint() == before == fingerprint(model.state_dict())


@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (768, 3072), (9000, 60), (300, 14336)])
def test_a_change_of_any_row_or_column_of_a_large_matrix_is_noticed(shape):
    """Not all numbers of it are compared when nothing else tells of a change."""
    matrix = torch.zeros(shape)
    before = weights_state({"W": matrix})
    assert weights_state({"W": matrix}) == before
    for axis, length in enumerate(shape):
        for index in range(0, length, length // 40):
            line = matrix.data.select(axis, index)
            line += 1
            assert weights_state({"W": matrix}) != before
            line -= 1
    assert weights_state({"W": matrix}) == before


def test_tensors_that_count_no_changes_are_always_read():
    with torch.inference_mode():
        tensors = {"W": torch.zeros(10_000)}
        digits = fingerprint(tensors)
        tensors["W"][1] = 1
    assert weights_state(tensors) is None
    assert fingerprint(tensors) != digits


# -- what it is made of ---------------------------------------------------------------------------


def plain_sums(tensor):
    """The sums of a tensor's words in Python's own integers."""
    raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
    words = [
        int.from_bytes(raw[i : i + 8], "little", signed=True)
        for i in range(0, len(raw) // 8 * 8, 8)
    ]
    sums = (sum(words), sum(i * word for i, word in enumerate(words, 1)))
    wrapped = [(total + 2**63) % 2**64 - 2**63 for total in sums]
    return (*wrapped, *raw[len(words) * 8 :])


def test_checksums_equal_plain_python():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.randn(33, generator=generator).to(dtype)
        for tensor in (values, values[1:], values[:32].view(4, 8).T, values[:0], values[5]):
            assert checksum(tensor, chunk=4) == checksum(tensor) == plain_sums(tensor)
