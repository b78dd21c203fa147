"""Metrics, positions and results of patching are what they say; bad input is refused by name."""

import dataclasses

import pytest
import torch

import memcircuits as mc
from memcircuits.evidence.patching.metrics import METRIC_UNITS
from memcircuits.evidence.patching.results import LayerPatches, PatchMap
from memcircuits.evidence.patching.sites import PATCH_HEAD_SITES
from memcircuits.evidence.patching.sweeps import patch_heads, patch_layers
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.patching import FIRST_IMPACTED, nll_of


def test_metrics_are_what_they_say(neo_case):
    clean, corrupted = neo_case.pair
    patches = patch_heads(neo_case.model, clean, corrupted, site="z", metric="logit_diff")
    with torch.no_grad():
        logits = neo_case.model(clean.ids[:, :-1])[:, clean.n_prefix - 1 :][:, FIRST_IMPACTED]
    before = slice(0, FIRST_IMPACTED)
    assert torch.equal(clean.continuation[:, before], corrupted.continuation[:, before])
    rows = torch.arange(len(clean))
    token = clean.continuation[:, FIRST_IMPACTED]
    other_token = corrupted.continuation[:, FIRST_IMPACTED]
    expected = {
        "logit_diff": logits[rows, token] - logits[rows, other_token],
        "first_impacted": -logits.log_softmax(-1)[rows, token],
        "nll": neo_case.nll(clean.ids[:, :-1]),
        "em": torch.full((len(clean),), 12.0),
    }
    for name, values in expected.items():
        torch.testing.assert_close(patches.base[name], values, atol=1e-5, rtol=0, msg=name)
    assert patches.source["em"].max() < 12


def test_the_chosen_metric_comes_first_and_others_can_be_read(neo_case):
    patches = patch_heads(neo_case.model, *neo_case.pair, site="z", metric="logit_diff")
    assert list(patches.samples) == ["logit_diff", "nll", "em", "first_impacted"]
    assert patches.units == "logits"
    for name, units in METRIC_UNITS.items():
        assert patches.measure(name).units == units
        torch.testing.assert_close(patches.measure(name).values, patches.samples[name].mean(0))


def test_a_callable_metric_gets_logits_and_rows(neo_case):
    clean, corrupted = neo_case.pair
    rows_seen = set()

    def own_nll(logits, rows):
        rows_seen.update(rows.tolist())
        assert logits.shape[1:] == (12, zoo.D_VOCAB)
        return nll_of(logits, clean.continuation[rows])

    for method in ("exact", "attribution"):
        options = {"site": "k", "method": method}
        own = patch_heads(neo_case.model, clean, corrupted, metric=own_nll, **options)
        named = patch_heads(neo_case.model, clean, corrupted, metric="nll", **options)
        torch.testing.assert_close(own.values, named.values, atol=1e-6, rtol=0)
        assert own.name == "noising k: own_nll"
    assert rows_seen == {0, 1, 2}


def test_a_callable_metric_returns_one_number_per_row(neo_case):
    with pytest.raises(mc.InputError, match="one number per row"):
        patch_heads(neo_case.model, *neo_case.pair, metric=lambda logits, rows: logits.mean())


def test_changed_positions_are_those_that_differ(neo_case):
    model, (clean, corrupted) = neo_case.model, neo_case.pair
    differs = clean.prefix != corrupted.prefix
    changed = patch_heads(model, clean, corrupted, site="v", positions="changed").samples["nll"]
    for position in differs.any(0).nonzero().flatten().tolist():
        rows = differs[:, position]
        one = patch_heads(model, clean, corrupted, site="v", positions=[position]).samples["nll"]
        torch.testing.assert_close(changed[rows], one[rows], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_grouped_query_sites_have_key_value_heads(case):
    for site in PATCH_HEAD_SITES:
        patches = patch_heads(case.model, *case.pair, site=site)
        grouped = site in ("k", "v")
        assert patches.axis == ("kv_head" if grouped else "head")
        assert patches.values.shape == (3, 2 if grouped else 4)
        assert patches.axis in patches.to_frame()


def test_share_is_the_effect_over_the_total_effect(neo_case):
    patches = patch_heads(neo_case.model, *neo_case.pair, site="z", direction="denoising")
    total_effect = float((patches.source["nll"] - patches.base["nll"]).mean())
    torch.testing.assert_close(patches.share * total_effect, patches.values)
    assert total_effect < 0  # the clean prefix makes the continuation more likely


@pytest.mark.parametrize("metric", ["nll", "logit_diff"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_the_first_head_goes_furthest_towards_the_other_run(neo_case, metric, direction):
    """Whatever sign the metric has; and figures are orange where less is recited."""
    options = {"metric": metric, "direction": direction}
    patches = patch_heads(neo_case.model, *neo_case.pair, **options)
    total_effect = (patches.source[metric] - patches.base[metric]).mean()
    best = patches.top(1)[0]
    towards = patches.values * total_effect.sign()
    assert towards.max() == towards[best]
    assert str(best) in str(patches)
    assert patches.figure().data[0].reversescale == (metric == "logit_diff")
    frame = patch_layers(neo_case.model, *neo_case.pair, positions=[3], **options).to_frame()
    torch.testing.assert_close(
        torch.tensor(frame["share"]), torch.tensor(frame["value"]) / total_effect.double()
    )


@pytest.mark.parametrize("site", PATCH_HEAD_SITES)
def test_models_without_partial_forward_passes_give_the_same(neo_case, site, monkeypatch):
    model, pair = neo_case.model, neo_case.pair
    methods = ("exact", "attribution")
    partial = [patch_heads(model, *pair, site=site, method=method) for method in methods]
    partial_layers = patch_layers(model, *pair, site="mlp_out")
    monkeypatch.setitem(vars(adapt(model)), "supports_partial_forward", False)
    full = [patch_heads(model, *pair, site=site, method=method) for method in methods]
    for a, b in zip(partial, full, strict=True):
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=0)
        assert any("full forward pass" in note for note in b.notes)
    full_layers = patch_layers(model, *pair, site="mlp_out")
    torch.testing.assert_close(full_layers.values, partial_layers.values, atol=1e-5, rtol=0)


def test_resid_mid_needs_partial_forward_passes(neo_case, monkeypatch):
    monkeypatch.setitem(vars(adapt(neo_case.model)), "supports_partial_forward", False)
    with pytest.raises(mc.InputError, match="resid_mid"):
        patch_layers(neo_case.model, *neo_case.pair, site="resid_mid")


@pytest.mark.parametrize("case", ["neox"], indirect=True)
def test_parallel_blocks_have_no_resid_mid(case):
    with pytest.raises(mc.InputError, match="parallel"):
        patch_layers(case.model, *case.pair, site="resid_mid")


def test_results_survive_saving(neo_case, tmp_path):
    heads = patch_heads(neo_case.model, *neo_case.pair, site="k", method="attribution")
    loaded = PatchMap.load(heads.save(tmp_path / "heads.safetensors"))
    assert loaded.to_frame().equals(heads.to_frame())
    assert loaded.agreement == heads.agreement
    assert list(loaded.samples) == list(heads.samples)
    layers = patch_layers(neo_case.model, *neo_case.pair, site="mlp_out")
    again = LayerPatches.load(layers.save(tmp_path / "layers.safetensors"))
    assert again.to_frame().equals(layers.to_frame())
    assert again.positions == layers.positions == tuple(range(10))
    assert list(layers.figure().data)
    assert list(heads.figure().data)


def test_the_model_leaves_as_it_came(neo_case):
    model = neo_case.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.train()
    patch_heads(model, *neo_case.pair, site="q", method="attribution")
    patch_layers(model, *neo_case.pair, site="resid_mid")
    assert all(module.training for module in model.modules())
    model.eval()
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        pytest.param({"site": "resid_pre"}, "site", id="layer-site"),
        pytest.param({"method": "guess"}, "method", id="unknown-method"),
        pytest.param({"direction": "up"}, "direction", id="unknown-direction"),
        pytest.param({"metric": "loss"}, "metric", id="unknown-metric"),
        pytest.param({"metric": "em", "method": "attribution"}, "metric", id="no-gradient"),
        pytest.param({"positions": []}, "positions", id="no-position"),
        pytest.param({"positions": [21]}, "positions", id="position-too-large"),
        pytest.param({"positions": "first"}, "positions", id="unknown-positions"),
        pytest.param({"check": 1}, "check", id="too-few-checks"),
    ],
)
def test_bad_options_name_the_argument(neo_case, options, argument):
    with pytest.raises(mc.InputError) as error:
        patch_heads(neo_case.model, *neo_case.pair, **options)
    assert error.value.argument == argument


def test_clean_and_corrupted_must_match_row_by_row(neo_case):
    with pytest.raises(mc.InputError, match="row by row"):
        patch_heads(neo_case.model, neo_case.clean, neo_case.corrupted[[0]])


def test_metrics_of_the_impacted_token_need_different_continuations(neo_case):
    clean, corrupted = neo_case.pair
    same = dataclasses.replace(clean, ids=torch.cat([corrupted.prefix, clean.continuation], 1))
    with pytest.raises(mc.InputError, match="equal continuations"):
        patch_heads(neo_case.model, clean, same, metric="first_impacted")
    assert list(patch_heads(neo_case.model, clean, same).samples) == ["nll", "em"]


def test_layers_are_swept_over_a_list_of_positions(neo_case):
    with pytest.raises(mc.InputError, match="list of positions"):
        patch_layers(neo_case.model, *neo_case.pair, positions="changed")
