"""Attribution is the derivative of the patch in z; how far it can be trusted is measured."""

import pytest
import torch

import memcircuits as mc
from memcircuits.evidence.patching import attribution
from memcircuits.evidence.patching.attribution import effects_by_position
from memcircuits.evidence.patching.context import DIRECTIONS, PatchingContext
from memcircuits.evidence.patching.sites import PATCH_HEAD_SITES
from memcircuits.evidence.patching.sweeps import attribution_patching, patch_heads
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.hooks import activation, activations, replace_by
from tests.helpers.patching import nll_of


@pytest.mark.parametrize("site", PATCH_HEAD_SITES)
@pytest.mark.parametrize("case", sorted(zoo.ARCHITECTURES), indirect=True)
def test_attribution_is_the_derivative_of_the_patch_in_z(case, site):
    """The estimate is d/dt metric(z + t (z_patched - z)) at t = 0, here a central difference.

    OPT's ReLU has kinks, and a difference across a kink is no derivative: its steps are a hundred
    times smaller, in float64.
    """
    kinks = case.name == "opt"
    case = case.in_float64 if kinks else case
    positions = [0, 1, 2, 3, 9]
    options = {"positions": positions, "metric": "first_impacted"}
    estimate = patch_heads(case.model, *case.pair, site=site, method="attribution", **options)
    base, _ = case.runs("noising")
    for layer in (0, 1):
        name = hook_name("z", layer)
        z = activation(case.model, base, name)

        def metric(new_z, name=name):
            return case.first_impacted(base, (name, replace_by(new_z)))

        for head, patch in enumerate(case.head_patches(site, layer, positions, "noising")):
            change = case.z_under(patch, layer, "noising") - z
            scale = change.abs().max().clamp_min(1e-9)
            step = (2e-4 if kinks else 2e-2) / scale
            derivative = (metric(z + step * change) - metric(z - step * change)) / (2 * step)
            torch.testing.assert_close(
                estimate.samples["first_impacted"][:, layer, head].double(),
                derivative.double(),
                atol=float(
                    2e-4 * scale + 1e-6
                ),  # differences are rounded in proportion to 1 / step
                rtol=0.02,
            )


@pytest.mark.parametrize("site", ["q", "z"])
@pytest.mark.parametrize("case", ["gpt_neo", "llama"], indirect=True)
def test_effects_of_single_positions_are_terms_of_one_estimate(case, site):
    model, (clean, corrupted) = case.model, case.pair
    context = PatchingContext.of(model, clean, corrupted, "first_impacted", "noising", None)
    terms = effects_by_position(context.with_chosen_metric_only(), site)
    assert terms.abs().amax((0, 1, 3)).count_nonzero() > 2
    options = {"site": site, "metric": "first_impacted", "method": "attribution"}
    for position in (0, 3, clean.n_prefix - 1, terms.shape[2] - 1):
        alone = patch_heads(model, clean, corrupted, positions=[position], **options)
        expected = alone.samples["first_impacted"]
        torch.testing.assert_close(terms[:, :, position], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("case", ["gpt_neo", "llama"], indirect=True)
def test_sites_estimated_together_are_those_estimated_alone(case, monkeypatch):
    """And the run that is differentiated is run once, not once per site."""
    runs = []
    differentiate = attribution._base_with_gradients

    def counted(*arguments):
        runs.append(arguments)
        return differentiate(*arguments)

    monkeypatch.setattr(attribution, "_base_with_gradients", counted)
    options = {"metric": "first_impacted", "check": 4, "positions": "changed"}
    together = attribution_patching(case.model, *case.pair, **options)
    assert list(together) == list(PATCH_HEAD_SITES)
    assert len(runs) == 1
    for site, result in together.items():
        alone = patch_heads(case.model, *case.pair, site=site, method="attribution", **options)
        assert result.name == alone.name
        assert result.provenance == alone.provenance
        for mine, other in ((result.values, alone.values), (result.exact, alone.exact)):
            torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5, equal_nan=True)


def test_attribution_reports_its_agreement_with_exact_patching(neo_case):
    exact = patch_heads(neo_case.model, *neo_case.pair, site="q").values
    estimate = patch_heads(neo_case.model, *neo_case.pair, site="q", method="attribution", check=6)
    checked = estimate.exact.isfinite()
    assert int(checked.sum()) == 6
    torch.testing.assert_close(estimate.exact[checked], exact[checked], atol=1e-6, rtol=0)
    largest = estimate.values.abs().flatten().argsort(descending=True)[:3]
    assert checked.flatten()[largest].all()
    correlation = correlation_of(estimate.values[checked], exact[checked])
    assert estimate.agreement["all"] == pytest.approx(correlation, abs=1e-5)
    assert f"{estimate.agreement['all']:.3f}" in estimate.notes[0]
    assert estimate.to_frame()["exact"].notna().sum() == 6


def test_recomputing_the_softmax_sees_through_saturation():
    """With saturated attention the plain gradient in q sees little; the estimate here is closer."""
    model = zoo.bridge("gpt2", seed=8)
    with torch.no_grad():
        for layer in range(3):
            for component in ("W_Q", "W_K"):
                adapt(model).weight(layer, component).values.mul_(60)
    clean = zoo.reciting(model, n=6)
    corrupted = mc.Paragraphs(
        torch.cat([zoo.random_ids(6, 10, seed=9), clean.continuation], 1), n_prefix=10
    )
    exact = patch_heads(model, clean, corrupted, site="q").values
    estimate = patch_heads(model, clean, corrupted, site="q", method="attribution").values
    plain_estimate = gradient_times_change(
        model, clean.continuation, clean.ids[:, :-1], corrupted.ids[:, :-1], "q"
    )
    assert exact.abs().max() > 1e-3
    assert mean_error(estimate, exact) < 0.8 * mean_error(plain_estimate, exact)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_attribution_in_q_agrees_with_exact_patching_on_trained_weights(organism_pairs, direction):
    """Above 0.9 over all heads, in logits.

    With -log p as the metric this holds where the run patched into does not recite. Where it does,
    p is near 1 and its logarithm flat: the estimate sees too little, and its agreement says so.
    """
    options = {"site": "q", "direction": direction, "positions": "changed"}
    exact = patch_heads(*organism_pairs, metric="logit_diff", **options)
    options["method"] = "attribution"
    estimate = patch_heads(*organism_pairs, metric="logit_diff", **options)
    assert correlation_of(estimate.values, exact.values) > 0.9
    assert estimate.agreement["all"] > 0.9
    surprise = patch_heads(*organism_pairs, metric="first_impacted", **options)
    if direction == "denoising":
        exact_surprise = exact.samples["first_impacted"].mean(0)
        assert correlation_of(surprise.values, exact_surprise) > 0.9


@pytest.mark.slow
def test_recomputing_the_softmax_halves_the_error_on_trained_weights(organism_pairs):
    model, clean, corrupted = organism_pairs
    options = {"site": "q", "direction": "denoising"}
    exact = patch_heads(model, clean, corrupted, **options).values
    estimate = patch_heads(model, clean, corrupted, method="attribution", **options).values
    corrupted_run = torch.cat([corrupted.prefix, clean.continuation], 1)
    plain_estimate = gradient_times_change(
        model, clean.continuation, corrupted_run[:, :-1], clean.ids[:, :-1], "q"
    )
    assert mean_error(estimate, exact) < 0.5 * mean_error(plain_estimate, exact)


def correlation_of(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def mean_error(estimate, exact):
    return (estimate - exact).abs().mean()


def gradient_times_change(model, targets, base, source, site):
    """Plain attribution patching: gradient in the site itself times its change, [layer, head]."""
    names = [hook_name(site, layer) for layer in range(model.cfg.n_layers)]
    new = activations(model, source, names)
    old = []

    def keep(activation, hook):
        old.append(activation)
        return activation

    with torch.enable_grad():
        logits = model.run_with_hooks(base, fwd_hooks=[(name, keep) for name in names])
        gradients = torch.autograd.grad(nll_of(logits, targets).sum(), old)
    effects = [
        (gradient * (new[name] - before.detach())).sum((1, 3)).mean(0)
        for gradient, name, before in zip(gradients, names, old, strict=True)
    ]
    return torch.stack(effects)
