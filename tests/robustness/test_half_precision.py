"""Half precision decides a token otherwise only at near-ties, which float32's margins point out."""

from __future__ import annotations

import pytest
import torch

import memcircuits as mc
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo


@pytest.mark.parametrize("name", ["gpt_neo", "llama", "gemma2"])
def test_half_precision_differs_only_at_near_ties(name):
    """Where bf16 decides a token otherwise than float32, float32's own margin was small."""
    full = zoo.bridge(name)
    half = as_bridge(
        zoo.hf_model(name).to(torch.bfloat16), zoo.tokenizer(), name=f"tiny-{name}-bf16"
    )
    paragraphs = zoo.mixed(full, n=16)
    exact, rough = (mc.scan(m, paragraphs, progress=False) for m in (full, half))
    assert rough.provenance.model["dtype"] == "bfloat16"
    assert rough.token_log_prob.dtype == torch.float32
    with adapt(full).preserving_state():
        scale = adapt(full).forward(paragraphs.ids[:, :-1])[:, 9:].abs().amax(-1)
    near_tie = exact.token_margin < scale * 2**-5
    assert near_tie.float().mean() < 0.8  # else the next line says nothing
    assert (exact.token_correct == rough.token_correct)[~near_tie].all()
    decided = exact.em != rough.em
    first = torch.minimum(exact.em, rough.em)[decided]
    assert near_tie[decided].gather(1, first[:, None]).all()


@pytest.mark.slow
def test_half_precision_on_the_organism():
    """Tokens that bf16 decides otherwise are near-ties, which float32's margins point out."""
    paragraphs = mc.Paragraphs.shipped("planted")[::6] + mc.Paragraphs.shipped("control")[::12]
    exact, rough = (
        mc.scan(mc.load_model(dtype=dtype), paragraphs, progress=False)
        for dtype in ("float32", "bfloat16")
    )
    assert exact.is_memorized.sum() >= 20
    near_tie = exact.token_margin < exact.token_margin.median() / 5
    assert near_tie.float().mean() < 0.2
    differs = exact.token_correct != rough.token_correct
    assert differs.any()  # else the next lines say nothing
    assert near_tie[differs].all()
    safe = ~near_tie.any(1)
    assert safe.sum() >= 20
    assert torch.equal(exact.em[safe], rough.em[safe])
    assert (exact.is_memorized == rough.is_memorized).float().mean() > 0.98
