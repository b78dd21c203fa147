"""Quicker forwards answer what the model's own do, give way to hooks and leave nothing behind."""

import pytest
import torch
from torch import nn

from memcircuits.measure.continuation import read_continuation
from memcircuits.models import kernels
from memcircuits.models.adapter import Adapter
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo


def forwards(model):
    return [m for m in model.modules() if "forward" in vars(m)]


def test_logits_and_gradients_are_the_models_own(any_bridge):
    adapter, ids = adapt(any_bridge), zoo.random_ids(2, 20)
    weights = [adapter.weight(0, c).parameter for c in adapter.components]

    def measured():
        logits = adapter.run(ids).logits
        nll = read_continuation(logits[:, :-1], ids[:, 1:]).nll.sum()
        return logits.detach(), torch.autograd.grad(nll, weights)

    with adapter.preserving_state(grad=weights):
        quick = measured()
        inside = forwards(any_bridge)
    plain_adapter = Adapter(any_bridge)
    vars(plain_adapter)["fused_forwards"] = []
    with plain_adapter.preserving_state(grad=weights):
        assert not forwards(any_bridge)
        plain = measured()
    torch.testing.assert_close(quick[0], plain[0], atol=1e-5, rtol=0)
    for new, old in zip(quick[1], plain[1], strict=True):
        torch.testing.assert_close(new, old, atol=1e-6, rtol=1e-4)
    assert inside, "nothing was replaced"


def test_the_neo_gets_all_of_them(neo):
    kinds = {type(module).__name__ for module, _ in kernels.fused_forwards(neo)}
    assert kinds == {"NewGELUActivation", "NormalizationBridge", "Linear"}


def test_gelu_is_torchs_own_at_any_size_and_in_any_layout():
    x = 4 * torch.randn(3, 300, 200, generator=torch.Generator().manual_seed(0))  # above one block
    x[0, 0, :5] = torch.tensor([0.0, -1e25, 1e25, torch.inf, torch.nan])
    for each in (x, x.transpose(1, 2), x[:, :, ::3], x[:0]):
        exact = nn.functional.gelu(each.double(), approximate="tanh").float()
        torch.testing.assert_close(
            kernels.tanh_gelu(each), exact, atol=1e-6, rtol=1e-6, equal_nan=True
        )


def test_forwards_come_back_and_nesting_is_fine(neo):
    adapter = adapt(neo)

    def interrupted():
        with adapter.preserving_state():
            with adapter.preserving_state():
                assert forwards(neo)
            assert forwards(neo), "leaving the inner one took those of the outer"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not forwards(neo)


def test_a_forward_of_the_callers_own_stays(neo):
    norm = neo.blocks[1].ln1
    mine = norm.forward
    vars(norm)["forward"] = mine
    try:
        with adapt(neo).preserving_state():
            assert vars(norm)["forward"] is mine
        assert vars(norm)["forward"] is mine
    finally:
        del vars(norm)["forward"]


def test_hooks_inside_a_norm_still_act(neo):
    adapter, ids = adapt(neo), zoo.random_ids(2, 12)
    name = "blocks.1.ln1.hook_normalized"
    with adapter.preserving_state():
        before = adapter.run(ids).logits
        read = adapter.run(ids, read=[name]).cache[name]
        edited = adapter.run(ids, edit={name: lambda x: 2 * x}).logits
    assert read.mean(-1).abs().max() < 1e-5
    assert (edited - before).abs().max() > 1e-3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [5, 1024, 2500])
def test_blocks_of_an_unembedding(rows, bias):
    # In float64, as sums over thousands of rows differ between machines in float32.
    generator = torch.Generator().manual_seed(rows)
    options = {"generator": generator, "dtype": torch.float64}
    linear = nn.Linear(8, rows, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 3, 8, requires_grad=True, **options)
    slope = torch.randn(2, 3, rows, **options)
    quick, plain = kernels.linear_in_blocks(linear, x), linear(x)
    torch.testing.assert_close(quick, plain, atol=1e-12, rtol=0)
    for new, old in zip(
        torch.autograd.grad((quick * slope).sum(), [x, *linear.parameters()]),
        torch.autograd.grad((plain * slope).sum(), [x, *linear.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(new, old, atol=1e-12, rtol=1e-12)


def test_what_answers_otherwise_is_left_alone():
    class NewGELUActivation(nn.Module):
        def forward(self, x):
            return 2 * x

    model = nn.Sequential(nn.Linear(2, 2), NewGELUActivation())
    assert kernels.fused_forwards(model) == []
