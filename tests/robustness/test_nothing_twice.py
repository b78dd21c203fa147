"""Nothing is computed twice: a ranking takes the passes of its parts; weights are hashed once."""

from __future__ import annotations

import pytest

import memcircuits as mc
from memcircuits.base.components import Component
from memcircuits.benchmark.units import count_forwards
from memcircuits.evidence.ablation import Ablation
from memcircuits.models import fingerprint
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo

QUIET = {"progress": False}


def passes(model, work):
    """Forward passes of one paragraph; a backward pass counts two."""
    adapter = adapt(model)
    with count_forwards(adapter) as cost:
        work()
    return cost["forwards"]


@pytest.mark.parametrize("units", [("head",), ("head", "mlp")])
def test_a_ranking_takes_the_passes_of_its_parts(neo, units):
    adapter = adapt(neo)
    paragraphs = zoo.mixed(neo)
    scan = mc.scan(neo, paragraphs, **QUIET)
    ranking = mc.find_memorization_components(neo, scan, units=units, draws=20, **QUIET)
    sets = [scan.memorized, scan.control]
    assert [len(group) for group in sets] == [len(ranking.memorized_ids), len(ranking.control_ids)]
    heads = [Component("head", *head) for head in adapter.heads()]
    mlps = [Component("mlp", layer) for layer in range(adapter.n_layers)]
    # Each head, each MLP, all heads, all MLPs and all of both: whatever is ranked, each one once.
    taken_out = [*heads, *mlps, heads, mlps, heads + mlps]

    def parts():
        for group in sets:
            Ablation(neo, group, mode="zero").effects(taken_out, **QUIET)
            mc.parameter_gradients(neo, group, **QUIET)
        mc.rare_token_attention(neo, scan.memorized, ranking.unigrams, **QUIET)

    def whole(given):
        options = {"units": units, "draws": 20, **QUIET}
        return passes(neo, lambda: mc.find_memorization_components(neo, given, **options))

    expected = passes(neo, parts)
    clean = sum(map(len, sets))  # levels are measured from a clean run of their own
    assert expected <= whole(scan) <= expected + clean + 1e-6
    scanning = passes(neo, lambda: mc.scan(neo, paragraphs, **QUIET))
    assert scanning == pytest.approx(len(paragraphs))
    assert whole(paragraphs) == pytest.approx(whole(scan) + scanning)


def test_the_weights_are_hashed_once(monkeypatch, tmp_path):
    model = zoo.bridge("gpt_neo")
    paragraphs = zoo.mixed(model)
    hashed = []
    original = fingerprint.fingerprint
    monkeypatch.setattr(
        fingerprint, "fingerprint", lambda tensors: hashed.append(1) or original(tensors)
    )
    ranking = mc.find_memorization_heads(model, paragraphs, draws=20, **QUIET)
    ranking.to_html(tmp_path / "report.html", progress=False)
    mc.ablate_heads(model, paragraphs, **QUIET)
    mc.parameter_gradients(model, paragraphs, **QUIET)
    mc.perturb_prefix(model, paragraphs[:2], **QUIET)
    assert len(hashed) <= 1
