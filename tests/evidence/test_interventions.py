"""Partial forwards equal full ones, in batches of any size, and leave the model as it was."""

from __future__ import annotations

import contextlib

import pytest
import torch

import memcircuits as mc
from memcircuits.evidence.activation_edits import HeadEdit
from memcircuits.evidence.interventions import FALLBACK, ResumableRun
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo


def full_forward(model, paragraphs, layer, head, new):
    """NLL and EM [row, 2] by TransformerLens alone: one hooked forward of whole paragraphs."""

    def hook(z, hook=None):
        z = z.clone()
        z[:, :, head] = new if new.ndim < 3 else new[:, : z.shape[1]]
        return z

    ids = paragraphs.ids
    with torch.no_grad():
        logits = model.run_with_hooks(ids, fwd_hooks=[(hook_name("z", layer), hook)])
    log_prob = logits[:, :-1].float().log_softmax(-1)
    log_prob = log_prob.gather(-1, ids[:, 1:, None])[..., 0][:, paragraphs.n_prefix - 1 :]
    decoded = logits[:, paragraphs.n_prefix - 1 : -1].argmax(-1)
    em = torch.tensor(
        [
            next((i for i, (a, b) in enumerate(zip(*row, strict=True)) if a != b), len(row[0]))
            for row in zip(decoded.tolist(), paragraphs.continuation.tolist(), strict=True)
        ]
    )
    return torch.stack([-log_prob.mean(-1), em.float()], -1)


@contextlib.contextmanager
def without_partial_forward(model):
    """Inside, every edit of `model` takes a full forward pass."""
    adapter = adapt(model)
    assert adapter.supports_partial_forward
    vars(adapter)["supports_partial_forward"] = False
    try:
        yield
    finally:
        vars(adapter)["supports_partial_forward"] = True


def resumable(model, paragraphs, **options):
    with adapt(model).preserving_state():
        return ResumableRun(adapt(model), paragraphs, **options)


def edited(run, layer, edits, **options):
    with run.adapter.preserving_state():
        return run.edited(layer, edits, **options)


def test_any_replacement_in_any_layer_equals_a_full_forward(any_bridge):
    paragraphs = zoo.mixed(any_bridge, n=2)
    adapter = adapt(any_bridge)
    run = resumable(any_bridge, paragraphs)
    assert run.partial_forward
    generator = torch.Generator().manual_seed(1)
    for layer in range(adapter.n_layers):
        news = [
            torch.zeros(adapter.d_head),
            run.z[layer][:, :, 1].mean(0),  # per position
            run.z[layer][:, :, 1].flip(0),  # another paragraph's
            torch.randn(adapter.d_head, generator=generator),
        ]
        shapes = [(1, 1), (1, -1), (4, -1), (1, 1)]
        edits = [
            HeadEdit((1,), z.reshape(*shape, 1, adapter.d_head))
            for z, shape in zip(news, shapes, strict=True)
        ]
        result = edited(run, layer, edits)
        for new, one in zip(news, result, strict=True):
            z = new if new.ndim == 1 else torch.cat([new, new[..., -1:, :]], -2)
            expected = full_forward(any_bridge, paragraphs, layer, 1, z)
            torch.testing.assert_close(one[:, 0], expected[:, 0], atol=2e-5, rtol=0)
            torch.testing.assert_close(one[:, 1], expected[:, 1])
        assert (result[:, :, 0] - run.clean()[:, 0]).abs().max() > 1e-3


@pytest.mark.skipif(not zoo.has_hooked(), reason="transformer-lens 4 has no HookedTransformer")
@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_hooked_transformers_support_partial_forwards_too(name):
    model = zoo.hooked(name)
    paragraphs = zoo.mixed(model, n=2)
    run = resumable(model, paragraphs)
    assert run.partial_forward
    for layer in range(adapt(model).n_layers):
        zero = torch.zeros(1, 1, 1, adapt(model).d_head)
        result = edited(run, layer, [HeadEdit((2,), zero)])[0]
        expected = full_forward(model, paragraphs, layer, 2, zero[0, 0, 0])
        torch.testing.assert_close(result[:, 0], expected[:, 0], atol=2e-5, rtol=0)
        torch.testing.assert_close(result[:, 1], expected[:, 1])


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_the_fallback_gives_the_same_numbers_and_says_so(any_bridge, mode):
    paragraphs = zoo.mixed(any_bridge, n=2)
    fast = mc.ablate_heads(any_bridge, paragraphs, mode=mode)
    with without_partial_forward(any_bridge):
        slow = mc.ablate_heads(any_bridge, paragraphs, mode=mode)
    torch.testing.assert_close(fast.samples["nll"], slow.samples["nll"], atol=2e-5, rtol=0)
    torch.testing.assert_close(fast.samples["em"], slow.samples["em"])
    assert fast.notes == ()
    assert slow.notes == (FALLBACK,)


def test_several_heads_in_one_edit(neo):
    paragraphs = zoo.mixed(neo, n=2)
    run = resumable(neo, paragraphs)
    z = torch.randn(1, 1, 2, 8, generator=torch.Generator().manual_seed(0))
    result = edited(run, 1, [HeadEdit((0, 3), z)])
    with without_partial_forward(neo):
        slow = edited(resumable(neo, paragraphs), 1, [HeadEdit((0, 3), z)])
    torch.testing.assert_close(result, slow, atol=2e-5, rtol=0)


def test_no_change_is_no_effect(any_bridge):
    paragraphs = zoo.mixed(any_bridge, n=2)
    run = resumable(any_bridge, paragraphs)
    for layer in range(adapt(any_bridge).n_layers):
        result = edited(run, layer, [HeadEdit((0,), run.z[layer][:, :, [0]])])[0]
        torch.testing.assert_close(result, run.clean(), atol=1e-5, rtol=0)


def test_another_measure(neo):
    paragraphs = zoo.mixed(neo, n=2)
    run = resumable(neo, paragraphs)
    zero = HeadEdit((2,), torch.zeros(1, 1, 1, 8))

    def first_token(logits, rows):
        return logits[:, 0].log_softmax(-1).gather(-1, run.targets[rows, :1])

    result = edited(run, 0, [zero], measure=first_token)
    assert result.shape == (1, 4, 1)
    with without_partial_forward(neo):
        slow = edited(resumable(neo, paragraphs), 0, [zero], measure=first_token)
    torch.testing.assert_close(result, slow, atol=2e-5, rtol=0)


def test_a_tiny_memory_budget_changes_only_the_pieces(neo):
    paragraphs = zoo.mixed(neo, n=3)
    whole = mc.ablate_heads(neo, paragraphs)
    rows = []
    embed = adapt(neo).unembed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt(neo), "unembed", lambda x: rows.append(len(x)) or embed(x))
        pieces = mc.ablate_heads(neo, paragraphs, memory_budget=1)
    assert set(rows) == {1}
    torch.testing.assert_close(whole.samples["nll"], pieces.samples["nll"], atol=2e-6, rtol=0)
    torch.testing.assert_close(whole.samples["em"], pieces.samples["em"])


def test_an_analysis_survives_running_out_of_memory(neo):
    paragraphs = zoo.mixed(neo, n=2)
    expected = mc.ablate_heads(neo, paragraphs)
    adapter, refused = adapt(neo), []

    def narrow(first, resid, *rest, **options):
        if len(resid) > 3:
            refused.append(len(resid))
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return type(adapter).run_blocks(adapter, first, resid, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "run_blocks", narrow)
        effects = mc.ablate_heads(neo, paragraphs)
    assert refused
    torch.testing.assert_close(effects.samples["nll"], expected.samples["nll"], atol=2e-6, rtol=0)


def test_the_callers_hooks_survive(neo):
    fired = []
    neo.add_hook(hook_name("z", 1), lambda z, hook: fired.append(1) or None)
    try:
        mc.ablate_heads(neo, zoo.mixed(neo, n=2))
        fired.clear()
        neo(zoo.random_ids(1, 8))
        assert fired == [1]
        assert not any(len(b._forward_pre_hooks) for b in neo.blocks)
        assert not any("forward" in vars(b.attn) for b in neo.blocks)
    finally:
        neo.reset_hooks()


def test_ctrl_c_leaves_the_model_whole(neo):
    paragraphs = zoo.mixed(neo, n=2)
    before = neo(paragraphs.ids)

    def interrupt(logits, rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edited(
            resumable(neo, paragraphs), 1, [HeadEdit((0,), torch.zeros(1, 1, 1, 8))],
            measure=interrupt,
        )  # fmt: skip
    assert torch.equal(neo(paragraphs.ids), before)
