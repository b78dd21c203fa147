"""Paragraphs with numbers that are not finite are left out of every mean, counted and named."""

from __future__ import annotations

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.benchmark.pages import write_leaderboard
from memcircuits.benchmark.schemas import PlantedTrial
from memcircuits.editing.noise import weight_noise
from memcircuits.evidence.patching.sweeps import patch_layers
from memcircuits.models.loading import as_bridge
from memcircuits.results.provenance import Provenance
from memcircuits.results.score_map import ScoreMap
from tests import matrix
from tests.helpers import models as zoo

POISON = 77


@pytest.fixture(scope="module")
def poisoned():
    """A model whose logits are NaN once it has seen token 77 (its embedding is NaN)."""
    source = zoo.hf_model("llama")
    with torch.no_grad():
        source.get_input_embeddings().weight[POISON] = float("nan")
    model = as_bridge(source, zoo.tokenizer(), name="tiny-poisoned")
    ids = zoo.mixed(model, n=4).ids
    ids[ids == POISON] = 5
    recited = zoo.reciting(model, n=8).ids
    recited = recited[(recited != POISON).all(1)][:4]
    ids = torch.cat([recited, ids[4:]])
    bad = ids[[0, 5]].clone()
    bad[:, 3] = POISON
    return (
        model,
        mc.Paragraphs.from_tokens(ids, n_prefix=10),
        mc.Paragraphs.from_tokens(torch.cat([ids[:2], bad, ids[2:]]), n_prefix=10),
    )


GOOD = [0, 1, 4, 5, 6, 7, 8, 9]


def test_scan_quarantines_paragraphs_that_are_not_finite(poisoned):
    model, clean, mixed = poisoned
    result, expected = (mc.scan(model, p, progress=False) for p in (mixed, clean))
    assert result.finite.tolist() == [i in GOOD for i in range(10)]
    assert torch.equal(result.em[GOOD], expected.em)
    assert torch.allclose(result.nll[GOOD], expected.nll, atol=1e-6)
    assert not result.is_memorized[[2, 3]].any()
    assert not result.is_control[[2, 3]].any()


def test_ranking_leaves_them_out_and_says_so(poisoned):
    model, clean, mixed = poisoned
    rankings = [
        mc.find_memorization_heads(model, p, draws=100, progress=False) for p in (mixed, clean)
    ]
    result, expected = rankings
    assert result.counts["not_finite"] == 2
    assert any("non-finite" in note for note in result.notes)
    assert result.score.isfinite().all()
    assert torch.allclose(result.score, expected.score, atol=1e-6)
    assert result.top(3) == expected.top(3)


def same_numbers(result: matrix.Numbers, expected: matrix.Numbers) -> None:
    assert result.keys() == expected.keys()
    for key, value in result.items():
        assert torch.allclose(value, expected[key], atol=1e-6), key


NOTE = "2 of 10 paragraphs had non-finite numbers and were left out"
MEANS = {  # result -> the numbers that are means over paragraphs
    "ablate_heads": (lambda m, p: mc.ablate_heads(m, p, progress=False), ("values",)),
    "ablate_heads, mean": (
        lambda m, p: mc.ablate_heads(m, p, mode="mean", progress=False),
        ("values",),
    ),
    "rare_token_attention": (
        lambda m, p: mc.rare_token_attention(
            m, p, matrix.unigrams(), permutations=5, progress=False
        ),
        ("values", "entropy"),
    ),
    "patch_heads": (
        lambda m, p: mc.patch_heads(m, p, matrix.twins(p), progress=False),
        ("values", "share"),
    ),
    "patch_heads, attribution": (
        lambda m, p: mc.patch_heads(m, p, matrix.twins(p), method="attribution", progress=False),
        ("values", "share"),
    ),
    "patch_layers": (
        lambda m, p: patch_layers(m, p, matrix.twins(p), positions=[0, 5], progress=False),
        ("values", "whole"),
    ),
    "parameter_gradients": (
        lambda m, p: mc.parameter_gradients(m, p, progress=False),
        ("values", "layers"),
    ),
    "parameter_gradients, each": (
        lambda m, p: mc.parameter_gradients(m, p, average="paragraph", progress=False),
        ("values", "statistics"),
    ),
    "activation_gradients": (
        lambda m, p: mc.activation_gradients(m, p, progress=False),
        ("values", "error"),
    ),
}


@pytest.mark.parametrize("name", MEANS)
def test_means_are_those_without_them_and_the_note_counts_them(poisoned, name):
    model, clean, mixed = poisoned
    measure, fields = MEANS[name]
    outcome, expected = measure(model, mixed), measure(model, clean)
    assert NOTE in outcome.notes
    assert not any("non-finite" in note for note in expected.notes)
    for field in fields:
        values = [getattr(result, field) for result in (outcome, expected)]
        same_numbers(*(v if isinstance(v, dict) else {field: v} for v in values))
    if isinstance(outcome, ScoreMap):
        assert outcome.top(5) == expected.top(5)
        assert outcome.samples[next(iter(outcome.samples))].shape[0] == 10


def test_contrast_perturbation_and_noise_leave_them_out(poisoned):
    model, _, mixed = poisoned
    pairs = [(mixed[:5], mixed[5:]), (mixed[[0, 1, 4]], mixed[5:])]
    result, expected = (
        mc.contrastive_gradients(model, *pair, curvature=False, progress=False) for pair in pairs
    )
    same_numbers(result.values, expected.values)
    assert result.notes == (
        "memorized: 2 of 5 paragraphs had non-finite numbers and were left out",
    )
    changed = mc.perturb_prefix(model, mixed, seed=1, progress=False)
    assert set(changed.names) <= {mixed.names[i] for i in GOOD}
    assert changed.nll.isfinite().all()
    assert any("left out" in note for note in changed.notes)
    curve = weight_noise(model, mixed[:5], mixed[5:], sizes=(0.0,), progress=False)
    assert curve.nll["memorized"].shape[-1] == 3
    assert curve.nll["memorized"].isfinite().all()


def test_edits_refuse_them_by_name(poisoned):
    model, _, mixed = poisoned
    for call in (
        lambda: mc.unlearn(model, mixed[:4], mixed[5:], progress=False),
        lambda: mc.edit(model, mixed[:2], mixed[7:9], mixed[2:6], progress=False),
        lambda: mc.plant(model, mixed[2:4], where="L1.mlp", control=mixed[:2], progress=False),
        lambda: mc.plant(model, mixed[:2], where="L1.mlp", control=mixed[3:5], progress=False),
    ):
        named = r"^(memorized|paragraphs|control): paragraphs with non-finite"
        with pytest.raises(InputError, match=named):
            call()


def test_anchors_that_a_broken_model_would_write_are_refused():
    source = zoo.hf_model("llama")
    model = as_bridge(source, zoo.tokenizer(), name="tiny-broken")
    paragraphs = zoo.mixed(model)
    with torch.no_grad():
        source.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"^control: not given, and text .* non-finite"):
        mc.plant(model, paragraphs, where="L1.mlp", progress=False)


def test_heads_without_a_finite_value_are_not_ranked():
    provenance = Provenance({"basis": "raw"}, {}, {}, {})
    values = torch.tensor([[1.0, float("nan")], [float("inf"), 3.0]])
    result = ScoreMap("x", "nats", values, provenance)
    assert [str(head) for head in result.top(10)] == ["L1H1", "L0H0"]


def test_a_benchmark_in_which_no_place_held_anything_says_so(tmp_path):
    failed = PlantedTrial(where=["L0H0"], failed="it does not hold the text", seconds=1.0)
    (tmp_path / "run.json").write_text(
        '{"model": {"name": "tiny", "fingerprint": "0"}, "options": {"n": 1, "seed": 0}}'
    )
    *_, markdown, page = write_leaderboard({"head": [failed]}, tmp_path)
    for path in (markdown, page):
        assert "1 of 1 places could not hold the text" in path.read_text()
