"""Patches equal hand-written hooks and transformer_lens.patching; attribution is a derivative."""

import dataclasses
import functools

import pytest
import torch

import memcircuits as mc
from memcircuits.evidence.interventions import HeadEdit, ResumableRun
from memcircuits.evidence.patching.context import DIRECTIONS
from memcircuits.evidence.patching.results import LayerPatches, PatchMap
from memcircuits.evidence.patching.sites import LAYER_SITES, PATCH_HEAD_SITES
from memcircuits.evidence.patching.sweeps import patch_heads, patch_layers
from memcircuits.evidence.triggers.perturbation import perturb_prefix
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo

# A Bridge observes the attention of these, so writes to the pattern do nothing there.
DELEGATED = ("gpt_neo", "opt")


@functools.cache
def models(name):
    """A model by architecture; `hooked-` ones are HookedTransformers.

    Queries are scaled up: attention that is nearly uniform hardly depends on them.
    """
    hooked = name.startswith("hooked-")
    model = zoo.hooked(name.removeprefix("hooked-")) if hooked else zoo.bridge(name)
    adapter = adapt(model)
    with torch.no_grad():
        for layer in range(adapter.n_layers):
            adapter.weight(layer, "W_Q").values.mul_(6)
    return model


@functools.cache
def in_float64(name):
    """The same weights with more digits, for finite differences."""
    model = zoo.bridge(name).double()
    with torch.no_grad():
        for key, value in models(name).state_dict().items():
            model.state_dict()[key].copy_(value)
    return model


@pytest.fixture
def neo():
    return models("gpt_neo")


@functools.cache
def pairs(name, n=3):
    """Recited paragraphs and twins whose continuations first differ somewhere in the middle."""
    model = models(name)
    clean = zoo.reciting(model, n=n)
    corrupted = perturb_prefix(model, clean).pairs().corrupted
    mixed = clean.continuation.clone()
    mixed[:, 3:] = (clean.continuation[:, 3:] + 1) % zoo.D_VOCAB
    ids = torch.cat([corrupted.prefix, mixed], 1)
    return clean, mc.Paragraphs(ids, clean.n_prefix)


NAMES = [
    *sorted(zoo.ARCHITECTURES),
    *(f"hooked-{n}" for n in ("gpt2", "neox", "llama") if zoo.has_hooked()),
]


def runs(name, direction):
    """Inputs of the run patched into and of the run that gives activations, and the targets."""
    clean, corrupted = pairs(name)
    inputs = [clean.ids[:, :-1], torch.cat([corrupted.prefix, clean.continuation], 1)[:, :-1]]
    return *(inputs if direction == "noising" else inputs[::-1]), clean.continuation


def nll_of(logits, targets):
    log_prob = logits[:, -targets.shape[1] :].log_softmax(-1)
    return -log_prob.gather(-1, targets[..., None])[..., 0].mean(-1)


def activations(model, tokens, names):
    """Read by TransformerLens itself."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=names)
    return {name: cache[name].clone() for name in names}


def hooked_nll(model, tokens, targets, hooks):
    """NLL under hand-written hooks, by TransformerLens itself."""
    with torch.no_grad():
        return nll_of(model.run_with_hooks(tokens, fwd_hooks=hooks), targets)


# -- identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_patching_clean_into_clean_changes_nothing(name):
    model = models(name)
    clean, _ = pairs(name)
    for site in PATCH_HEAD_SITES:
        for method in ("exact", "attribution"):
            found = patch_heads(model, clean, clean, site=site, method=method)
            assert found.samples["nll"].abs().max() < 1e-5, site
            assert any("have equal prefixes" in note for note in found.notes)
    adapter = adapt(model)
    for site in LAYER_SITES:
        if site == "resid_mid" and adapter.parallel:
            continue
        assert patch_layers(model, clean, clean, site=site).values.abs().max() == 0
        # Rows that a sweep skips because nothing differs are run here.
        own = [hook_name(site, layer) for layer in range(adapter.n_layers)]
        with adapter.preserving_state():
            restart = ResumableRun(adapter, clean.ids, clean.n_prefix, read=own)
            every = torch.ones(1, 1, restart.inputs.shape[1], dtype=torch.bool)
            for layer, hook in enumerate(own):
                patched = restart.patched(layer, hook, restart.cache[hook], every)
                torch.testing.assert_close(patched[0], restart.clean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_residual_stream_carries_the_whole_difference(name, direction):
    model = models(name)
    base, source, targets = runs(name, direction)
    with torch.no_grad():
        before, after = (nll_of(model(tokens), targets) for tokens in (base, source))
    for site in ("resid_pre", "resid_mid"):
        if site == "resid_mid" and adapt(model).parallel:
            continue
        found = patch_layers(model, *pairs(name), site=site, direction=direction)
        whole = torch.full_like(found.whole, (after - before).mean())
        torch.testing.assert_close(found.whole, whole, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.base["nll"], before, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.source["nll"], after, atol=1e-5, rtol=0)
    # Only the prefix differs, so at the very bottom each pair's changed token says it all.
    clean, corrupted = pairs(name)
    found = patch_layers(model, clean, corrupted, direction=direction).samples["nll"]
    for row, difference in enumerate(after - before):
        (changed,) = (clean.prefix[row] != corrupted.prefix[row]).nonzero().flatten().tolist()
        assert found[row, 0, changed] == pytest.approx(float(difference), abs=1e-5)
        if changed:
            assert found[row, :, :changed].abs().max() == 0


# -- hand-written hooks ---------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("site", PATCH_HEAD_SITES)
@pytest.mark.parametrize("name", NAMES)
def test_heads_equal_hand_written_hooks(name, site, direction):
    # Tokens differ at one of these in every pair of GPT-2, whose k matters nowhere else.
    model, positions = models(name), [0, 2, 5, 6, 9, 14]
    found = patch_heads(model, *pairs(name), site=site, direction=direction, positions=positions)
    base, source, targets = runs(name, direction)
    clean = hooked_nll(model, base, targets, [])
    n_layers, n_heads = found.values.shape
    for layer in (0, n_layers - 1):
        z, v = hook_name("z", layer), hook_name("v", layer)
        name_here = hook_name(site, layer)
        new = activations(model, source, [name_here])[name_here]
        old_v = activations(model, base, [v])[v]
        for head in range(n_heads):

            def vectors(old, hook, new=new, head=head):
                old = old.clone()
                old[:, positions, head] = new[:, positions, head]
                return old

            def pattern(old, hook, new=new, head=head):
                old = old.clone()
                old[:, head, positions] = new[:, head, positions]
                return old

            def through_z(old, hook, new=new, head=head, v=old_v):
                shared = v.shape[2] * head // n_heads
                old = old.clone()
                old[:, positions, head] = (new[:, head] @ v[:, :, shared])[:, positions]
                return old

            if site != "pattern":
                hooks = [(name_here, vectors)]
            elif name in DELEGATED:
                hooks = [(z, through_z)]
            else:
                hooks = [(name_here, pattern)]
            expected = hooked_nll(model, base, targets, hooks) - clean
            torch.testing.assert_close(
                found.samples["nll"][:, layer, head], expected, atol=2e-5, rtol=0
            )
    assert found.values.abs().max() > 1e-4


@pytest.mark.parametrize("site", LAYER_SITES)
@pytest.mark.parametrize("name", NAMES)
def test_layers_equal_hand_written_hooks(name, site):
    model, positions = models(name), [1, 9]
    if site == "resid_mid" and (adapt(model).parallel or adapt(model).is_bridge):
        pytest.skip("a Bridge's hook_resid_mid does not reach the residual stream")
    found = patch_layers(model, *pairs(name), site=site, positions=positions)
    base, source, targets = runs(name, "noising")
    clean = hooked_nll(model, base, targets, [])
    for layer in (0, found.values.shape[0] - 1):
        hook = hook_name(site, layer)
        new = activations(model, source, [hook])[hook]
        for column, position in enumerate(positions):

            def one(old, hook, new=new, position=position):
                old = old.clone()
                old[:, position] = new[:, position]
                return old

            expected = hooked_nll(model, base, targets, [(hook, one)]) - clean
            torch.testing.assert_close(
                found.samples["nll"][:, layer, column], expected, atol=2e-5, rtol=0
            )
        whole = hooked_nll(model, base, targets, [(hook, lambda _, hook, new=new: new)]) - clean
        assert found.whole[layer] == pytest.approx(float(whole.mean()), abs=2e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("neox", "hooked-neox")])
def test_resid_mid_equals_its_two_parts(name):
    """resid_mid = resid_pre + attn_out: patching both by hand is the same."""
    model = models(name)
    found = patch_layers(model, *pairs(name), site="resid_mid", positions=[4, 8])
    base, source, targets = runs(name, "noising")
    clean = hooked_nll(model, base, targets, [])
    for layer in range(found.values.shape[0]):
        names = [hook_name("resid_pre", layer), hook_name("attn_out", layer)]
        old, new = (activations(model, tokens, names) for tokens in (base, source))

        def sum_of_both(_, hook, old=old, new=new, names=names):
            # resid_pre is left alone, so that the norm before attention reads what it read.
            changed = old[names[1]].clone()
            both = sum(new[n][:, 4] - old[n][:, 4] for n in names)
            changed[:, 4] += both
            return changed

        expected = hooked_nll(model, base, targets, [(names[1], sum_of_both)]) - clean
        torch.testing.assert_close(found.samples["nll"][:, layer, 0], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_all_heads_together_are_the_attention_output(name):
    model = models(name)
    found = patch_layers(model, *pairs(name), site="attn_out", positions=[0]).whole
    base, source, targets = runs(name, "noising")
    clean = hooked_nll(model, base, targets, [])
    for layer in range(len(found)):
        z = hook_name("z", layer)
        new = activations(model, source, [z])[z]
        expected = hooked_nll(model, base, targets, [(z, lambda _, hook, new=new: new)]) - clean
        assert found[layer] == pytest.approx(float(expected.mean()), abs=2e-5)


@pytest.mark.parametrize("name", ["gpt_neo", "llama"])
def test_patching_z_equals_editing_heads(name):
    """The same numbers by the engine's other route, which does not run the attention at all."""
    model = models(name)
    clean, corrupted = pairs(name)
    found = patch_heads(model, clean, corrupted, site="z").samples["nll"]
    adapter = adapt(model)
    with adapter.preserving_state():
        restart = ResumableRun(adapter, clean.ids, clean.n_prefix)
        source = runs(name, "noising")[1]
        for layer in range(adapter.n_layers):
            z = activations(model, source, [hook_name("z", layer)])[hook_name("z", layer)]
            edits = [HeadEdit((head,), z[:, :, [head]]) for head in range(adapter.n_heads)]
            effect = (restart.edited(layer, edits) - restart.clean())[..., 0].T
            torch.testing.assert_close(found[:, layer], effect, atol=1e-5, rtol=0)


# -- transformer_lens.patching --------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NAMES if "gemma" not in n])
def test_results_equal_those_of_transformer_lens(name):
    """Its convention is denoising, with one metric for the whole batch."""
    from transformer_lens import patching

    model = models(name)
    base, source, targets = runs(name, "denoising")
    n_layers = adapt(model).n_layers

    def metric(logits):
        return nll_of(logits, targets).mean()

    sites = [*PATCH_HEAD_SITES, "resid_pre", "attn_out", "mlp_out"]
    names = [hook_name(site, layer) for site in sites for layer in range(n_layers)]
    with torch.no_grad():
        _, cache = model.run_with_cache(source, names_filter=names)
        before = metric(model(base))
        for site, function in {
            "q": patching.get_act_patch_attn_head_q_all_pos,
            "k": patching.get_act_patch_attn_head_k_all_pos,
            "v": patching.get_act_patch_attn_head_v_all_pos,
            "z": patching.get_act_patch_attn_head_out_all_pos,
            "pattern": patching.get_act_patch_attn_head_pattern_all_pos,
        }.items():
            if site == "pattern" and name in DELEGATED:
                continue
            expected = torch.as_tensor(function(model, base, cache, metric)) - before
            found = patch_heads(model, *pairs(name), site=site, direction="denoising")
            torch.testing.assert_close(found.values, expected, atol=1e-4, rtol=0, msg=site)
        for site, function in {
            "resid_pre": patching.get_act_patch_resid_pre,
            "attn_out": patching.get_act_patch_attn_out,
            "mlp_out": patching.get_act_patch_mlp_out,
        }.items():
            expected = torch.as_tensor(function(model, base, cache, metric)) - before
            found = patch_layers(
                model,
                *pairs(name),
                site=site,
                direction="denoising",
                positions=range(base.shape[1]),
            )
            torch.testing.assert_close(found.values, expected, atol=1e-4, rtol=0, msg=site)


# -- attribution ----------------------------------------------------------------------------------


@pytest.mark.parametrize("site", PATCH_HEAD_SITES)
@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "neox", "opt", "llama", "qwen3", "gemma2"])
def test_attribution_is_the_derivative_of_the_patch_in_z(name, site):
    """A small step of z towards what the patch makes of it, by hand-written hooks.

    OPT's ReLU has kinks, and a difference across one is no derivative: its steps are a hundred
    times smaller, in float64.
    """
    kinks = name == "opt"
    model, positions = in_float64(name) if kinks else models(name), [0, 1, 2, 3, 9]
    options = {"site": site, "positions": positions, "metric": "first_impacted"}
    found = patch_heads(model, *pairs(name), method="attribution", **options)
    clean, _ = pairs(name)
    base, source, targets = runs(name, "noising")
    n_heads, n_kv = adapt(model).n_heads, found.values.shape[1]
    at = clean.n_prefix - 1 + 3  # continuations differ from their fourth token on

    def first(logits):
        return -logits[:, at].log_softmax(-1).gather(-1, targets[:, [3]])[:, 0].double()

    for layer in (0, 1):
        names = [hook_name(s, layer) for s in ("z", "v", site)]
        old, new = (activations(model, tokens, sorted({*names})) for tokens in (base, source))
        z = old[names[0]]
        for head in range(n_kv):
            mine = range(head * n_heads // n_kv, (head + 1) * n_heads // n_kv)
            target = z.clone()
            if site == "pattern":
                shared = old[names[1]].shape[2] * head // n_heads
                mixed = new[names[2]][:, head] @ old[names[1]][:, :, shared]
                target[:, positions, head] = mixed[:, positions]
            else:
                edited = {}

                def patch(activation, hook, head=head, new=new, name=names[2]):
                    activation = activation.clone()
                    activation[:, positions, head] = new[name][:, positions, head]
                    return activation

                def keep(activation, hook, edited=edited):
                    edited["z"] = activation.clone()

                with torch.no_grad():
                    model.run_with_hooks(base, fwd_hooks=[(names[2], patch), (names[0], keep)])
                target[:, :, mine] = edited["z"][:, :, mine]
            scale = (target - z).abs().max().clamp_min(1e-9)
            step = (2e-4 if kinks else 2e-2) / scale

            def moved(sign, z=z, target=target, step=step, hook=names[0]):
                changed = z + sign * step * (target - z)
                with torch.no_grad():
                    return first(
                        model.run_with_hooks(base, fwd_hooks=[(hook, lambda *_, **__: changed)])
                    )

            slope = (moved(1) - moved(-1)) / (2 * step)
            torch.testing.assert_close(
                found.samples["first_impacted"][:, layer, head].double(),
                slope.double(),
                atol=float(2e-4 * scale + 1e-6),
                rtol=0.02,
            )


def test_attribution_says_how_far_to_trust_it(neo):
    pair = pairs("gpt_neo")
    exact = patch_heads(neo, *pair, site="q")
    found = patch_heads(neo, *pair, site="q", method="attribution", check=6)
    checked = found.exact.isfinite()
    assert int(checked.sum()) == 6
    torch.testing.assert_close(found.exact[checked], exact.values[checked], atol=1e-6, rtol=0)
    largest = found.values.abs().flatten().argsort(descending=True)[:3]
    assert checked.flatten()[largest].all()
    estimates = torch.stack([found.values[checked], exact.values[checked]])
    assert found.agreement["all"] == pytest.approx(float(torch.corrcoef(estimates)[0, 1]), abs=1e-5)
    assert f"{found.agreement['all']:.3f}" in found.notes[0]
    assert found.to_frame()["exact"].notna().sum() == 6


def test_recomputing_the_softmax_sees_through_saturation():
    """With saturated attention the plain gradient in q sees little; the estimate here is closer."""
    model = zoo.bridge("gpt2", seed=8)
    with torch.no_grad():
        for layer in range(3):
            for component in ("W_Q", "W_K"):
                weight = adapt(model).weight(layer, component)
                weight.values.mul_(60)
    clean = zoo.reciting(model, n=6)
    corrupted = mc.Paragraphs(
        torch.cat([zoo.random_ids(6, 10, seed=9), clean.continuation], 1), n_prefix=10
    )
    exact = patch_heads(model, clean, corrupted, site="q").values
    found = patch_heads(model, clean, corrupted, site="q", method="attribution").values
    plain = plain_attribution(model, clean, corrupted, "q")
    assert exact.abs().max() > 1e-3
    error, plain_error = ((x - exact).abs().mean() for x in (found, plain))
    assert error < 0.8 * plain_error


@functools.cache
def organism_pairs():
    """Eight recited paragraphs of the organism and their most destructive random replacements.

    How good a first-order estimate is depends on the weights: random ones make everything above z
    about as curved as it can be, so estimates are judged on trained weights.
    """
    model, planted = mc.load_model(), mc.Paragraphs.shipped("planted")
    often = [i for i, n in enumerate(planted.metadata["repetitions"]) if n == 256]
    return model, *perturb_prefix(model, planted[often[:8]]).pairs()


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_attribution_in_q_agrees_with_exact_patching_on_trained_weights(direction):
    """Above 0.9 over all heads, in logits.

    With -log p as the metric this holds where the run patched into does not recite. Where it does,
    p is near 1 and its logarithm flat: the estimate sees too little, and its agreement says so.
    """
    options = {"site": "q", "direction": direction, "positions": "changed"}
    exact = patch_heads(*organism_pairs(), metric="logit_diff", **options)
    found = patch_heads(*organism_pairs(), metric="logit_diff", method="attribution", **options)

    def agreement(estimate, truth):
        return float(torch.corrcoef(torch.stack([estimate.flatten(), truth.flatten()]))[0, 1])

    assert agreement(found.values, exact.values) > 0.9
    assert found.agreement["all"] > 0.9
    surprise = patch_heads(
        *organism_pairs(), metric="first_impacted", method="attribution", **options
    )
    if direction == "denoising":
        assert agreement(surprise.values, exact.samples["first_impacted"].mean(0)) > 0.9


@pytest.mark.slow
def test_recomputing_the_softmax_halves_the_error_on_trained_weights():
    model, clean, corrupted = organism_pairs()
    options = {"site": "q", "direction": "denoising"}
    exact = patch_heads(model, clean, corrupted, **options).values
    found = patch_heads(model, clean, corrupted, method="attribution", **options).values
    plain = plain_attribution(model, clean, corrupted, "q", "denoising")
    error, plain_error = ((x - exact).abs().mean() for x in (found, plain))
    assert error < 0.5 * plain_error


def plain_attribution(model, clean, corrupted, site, direction="noising"):
    """Gradient in the site itself times its change."""
    inputs = [clean.ids[:, :-1], torch.cat([corrupted.prefix, clean.continuation], 1)[:, :-1]]
    inputs = inputs if direction == "noising" else inputs[::-1]
    names = [hook_name(site, layer) for layer in range(model.cfg.n_layers)]
    new, kept = activations(model, inputs[1], names), {}

    def keep(activation, hook):
        kept[len(kept)] = activation
        return activation

    with torch.enable_grad():
        logits = model.run_with_hooks(inputs[0], fwd_hooks=[(name, keep) for name in names])
        loss = nll_of(logits, clean.continuation).sum()
        gradients = torch.autograd.grad(loss, list(kept.values()))
    rows = [
        (g * (new[name] - kept[i].detach())).sum((1, 3)).mean(0)
        for i, (g, name) in enumerate(zip(gradients, names, strict=True))
    ]
    return torch.stack(rows)


# -- metrics, positions, forms --------------------------------------------------------------------


def test_metrics_are_what_they_say(neo):
    clean, corrupted = pairs("gpt_neo")
    found = patch_heads(neo, clean, corrupted, site="z", metric="logit_diff")
    assert list(found.samples) == ["logit_diff", "nll", "em", "first_impacted"]
    with torch.no_grad():
        logits = neo(clean.ids[:, :-1])[:, clean.n_prefix - 1 :]
    rows, three = torch.arange(len(clean)), torch.tensor(3)
    log_prob = logits.log_softmax(-1)
    true, other = clean.continuation[:, 3], corrupted.continuation[:, 3]
    assert (clean.continuation[:, :3] == corrupted.continuation[:, :3]).all()
    difference = logits[rows, three, true] - logits[rows, three, other]
    torch.testing.assert_close(found.base["logit_diff"], difference, atol=1e-5, rtol=0)
    impacted = -log_prob[rows, three, true]
    torch.testing.assert_close(found.base["first_impacted"], impacted, atol=1e-5, rtol=0)
    assert found.base["em"].tolist() == [12.0] * len(clean)
    assert found.source["em"].max() < 12
    assert found.units == "logits"
    assert found.measure("em").units == "tokens"
    torch.testing.assert_close(found.measure("em").values, found.samples["em"].mean(0))


def test_a_callable_metric_gets_logits_and_rows(neo):
    clean, corrupted = pairs("gpt_neo")
    seen = set()

    def own_nll(logits, rows):
        seen.update(rows.tolist())
        assert logits.shape[1:] == (12, zoo.D_VOCAB)
        return nll_of(logits, clean.continuation[rows])

    for method in ("exact", "attribution"):
        options = {"site": "k", "method": method}
        own = patch_heads(neo, clean, corrupted, metric=own_nll, **options)
        named = patch_heads(neo, clean, corrupted, metric="nll", **options)
        torch.testing.assert_close(own.values, named.values, atol=1e-6, rtol=0)
        assert own.name == "noising k: own_nll"
    assert seen == {0, 1, 2}
    with pytest.raises(mc.InputError, match="one number per row"):
        patch_heads(neo, clean, corrupted, metric=lambda logits, rows: logits.mean())


def test_changed_positions_are_those_that_differ(neo):
    clean, corrupted = pairs("gpt_neo")
    differ = (clean.prefix != corrupted.prefix).any(0).nonzero().flatten().tolist()
    found = patch_heads(neo, clean, corrupted, site="v", positions="changed").samples["nll"]
    for position in differ:
        rows = clean.prefix[:, position] != corrupted.prefix[:, position]
        one = patch_heads(neo, clean, corrupted, site="v", positions=[position]).samples["nll"]
        torch.testing.assert_close(found[rows], one[rows], atol=1e-6, rtol=0)


def test_grouped_query_sites_have_key_value_heads():
    model = models("llama")
    for site in PATCH_HEAD_SITES:
        found = patch_heads(model, *pairs("llama"), site=site)
        grouped = site in ("k", "v")
        assert found.axis == ("kv_head" if grouped else "head")
        assert found.values.shape == (3, 2 if grouped else 4)
        assert found.axis in found.to_frame()


def test_share_is_of_the_whole_difference(neo):
    found = patch_heads(neo, *pairs("gpt_neo"), site="z", direction="denoising")
    whole = float((found.source["nll"] - found.base["nll"]).mean())
    torch.testing.assert_close(found.share * whole, found.values)
    assert whole < 0  # bringing everything back makes the continuation likelier


@pytest.mark.parametrize("site", ["q", "k", "v", "z", "pattern"])
def test_models_that_cannot_be_continued_give_the_same(neo, site, monkeypatch):
    pair = pairs("gpt_neo")
    fast = [patch_heads(neo, *pair, site=site, method=m) for m in ("exact", "attribution")]
    monkeypatch.setitem(vars(adapt(neo)), "supports_partial_forward", False)
    slow = [patch_heads(neo, *pair, site=site, method=m) for m in ("exact", "attribution")]
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=0)
        assert any("full forward pass" in note for note in b.notes)
    layers = patch_layers(neo, *pair, site="mlp_out")
    monkeypatch.undo()
    torch.testing.assert_close(
        layers.values, patch_layers(neo, *pair, site="mlp_out").values, atol=1e-5, rtol=0
    )


def test_resid_mid_needs_a_model_that_can_be_continued(neo, monkeypatch):
    monkeypatch.setitem(vars(adapt(neo)), "supports_partial_forward", False)
    with pytest.raises(mc.InputError, match="resid_mid"):
        patch_layers(neo, *pairs("gpt_neo"), site="resid_mid")


def test_results_survive_saving(neo, tmp_path):
    found = patch_heads(neo, *pairs("gpt_neo"), site="k", method="attribution")
    loaded = PatchMap.load(found.save(tmp_path / "heads.safetensors"))
    assert loaded.to_frame().equals(found.to_frame())
    assert loaded.agreement == found.agreement
    assert list(loaded.samples) == list(found.samples)
    layers = patch_layers(neo, *pairs("gpt_neo"), site="mlp_out")
    again = LayerPatches.load(layers.save(tmp_path / "layers.safetensors"))
    assert again.to_frame().equals(layers.to_frame())
    assert again.positions == layers.positions == tuple(range(10))
    assert list(layers.figure().data)
    assert list(found.figure().data)


def test_the_model_leaves_as_it_came(neo):
    before = {key: value.clone() for key, value in neo.state_dict().items()}
    flags = [p.requires_grad for p in neo.parameters()]
    neo.train()
    patch_heads(neo, *pairs("gpt_neo"), site="q", method="attribution")
    patch_layers(neo, *pairs("gpt_neo"), site="resid_mid")
    assert all(module.training for module in neo.modules())
    neo.eval()
    assert [p.requires_grad for p in neo.parameters()] == flags
    assert all(p.grad is None for p in neo.parameters())
    assert all(torch.equal(value, before[key]) for key, value in neo.state_dict().items())
    assert not any(point.fwd_hooks or point.bwd_hooks for point in neo.hook_dict.values())


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"site": "resid_pre"}, "site"),
        ({"method": "guess"}, "method"),
        ({"direction": "up"}, "direction"),
        ({"metric": "loss"}, "metric"),
        ({"metric": "em", "method": "attribution"}, "metric"),
        ({"positions": []}, "positions"),
        ({"positions": [21]}, "positions"),
        ({"positions": "first"}, "positions"),
        ({"check": 1}, "check"),
    ],
)
def test_bad_options_name_the_argument(neo, options, argument):
    with pytest.raises(mc.InputError) as error:
        patch_heads(neo, *pairs("gpt_neo"), **options)
    assert error.value.argument == argument


def test_pairs_must_match_and_differ(neo):
    clean, corrupted = pairs("gpt_neo")
    with pytest.raises(mc.InputError, match="row by row"):
        patch_heads(neo, clean, corrupted[[0]])
    same = dataclasses.replace(clean, ids=torch.cat([corrupted.prefix, clean.continuation], 1))
    with pytest.raises(mc.InputError, match="equal continuations"):
        patch_heads(neo, clean, same, metric="first_impacted")
    assert list(patch_heads(neo, clean, same).samples) == ["nll", "em"]
    with pytest.raises(mc.InputError, match="list of positions"):
        patch_layers(neo, clean, corrupted, positions="changed")


def test_parallel_blocks_have_no_resid_mid():
    with pytest.raises(mc.InputError, match="parallel"):
        patch_layers(models("neox"), *pairs("neox"), site="resid_mid")


@pytest.mark.parametrize("metric", ["nll", "logit_diff"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_the_first_head_goes_furthest_towards_the_other_run(metric, direction):
    """Whatever sign that has; and figures are orange where less is recited."""
    found = patch_heads(models("gpt_neo"), *pairs("gpt_neo"), metric=metric, direction=direction)
    way = (found.source[metric] - found.base[metric]).mean()
    best = found.top(1)[0]
    assert (found.values * way.sign()).max() == found.values[best] * way.sign()
    assert str(best) in str(found)
    assert found.figure().data[0].reversescale == (metric == "logit_diff")
    frame = patch_layers(
        models("gpt_neo"), *pairs("gpt_neo"), metric=metric, direction=direction, positions=[3]
    ).to_frame()
    torch.testing.assert_close(
        torch.tensor(frame["share"]), torch.tensor(frame["value"]) / way.double()
    )
