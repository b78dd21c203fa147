"""Exact patches equal hand-written hooks and transformer_lens.patching."""

import pytest
import torch

from memcircuits.evidence.activation_edits import HeadEdit
from memcircuits.evidence.interventions import ResumableRun
from memcircuits.evidence.patching.context import DIRECTIONS
from memcircuits.evidence.patching.sites import LAYER_SITES, PATCH_HEAD_SITES
from memcircuits.evidence.patching.sweeps import patch_heads, patch_layers
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from tests.helpers.hooks import activation, activations, replace_at, replace_by
from tests.helpers.patching import DELEGATED, each_case, nll_of


@each_case()
def test_patching_clean_into_clean_changes_nothing(case):
    for site in PATCH_HEAD_SITES:
        for method in ("exact", "attribution"):
            unchanged = patch_heads(case.model, case.clean, case.clean, site=site, method=method)
            assert unchanged.samples["nll"].abs().max() < 1e-5, site
            assert any("have equal prefixes" in note for note in unchanged.notes)
    for site in case.layer_sites:
        assert patch_layers(case.model, case.clean, case.clean, site=site).values.abs().max() == 0


@each_case()
def test_patching_a_layer_with_its_own_values_changes_nothing(case):
    """`patch_layers` skips pairs that do not differ; here they are run."""
    adapter = adapt(case.model)
    for site in case.layer_sites:
        names = [hook_name(site, layer) for layer in range(adapter.n_layers)]
        with adapter.preserving_state():
            run = ResumableRun(adapter, case.clean, read=names)
            everywhere = torch.ones(1, 1, run.inputs.shape[1], dtype=torch.bool)
            for layer, name in enumerate(names):
                patched = run.patched(layer, name, run.cache[name], everywhere)
                torch.testing.assert_close(patched[0], run.clean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@each_case()
def test_the_whole_residual_stream_carries_the_total_effect(case, direction):
    before, after = (case.nll(tokens) for tokens in case.runs(direction))
    for site in ("resid_pre", "resid_mid"):
        if site not in case.layer_sites:
            continue
        patches = patch_layers(case.model, *case.pair, site=site, direction=direction)
        total_effect = torch.full_like(patches.whole, (after - before).mean())
        torch.testing.assert_close(patches.whole, total_effect, atol=1e-5, rtol=0)
        torch.testing.assert_close(patches.base["nll"], before, atol=1e-5, rtol=0)
        torch.testing.assert_close(patches.source["nll"], after, atol=1e-5, rtol=0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@each_case()
def test_the_changed_token_carries_the_total_effect_at_the_bottom(case, direction):
    """Only one token of the prefix differs; positions before it carry nothing in any layer."""
    before, after = (case.nll(tokens) for tokens in case.runs(direction))
    effects = patch_layers(case.model, *case.pair, direction=direction).samples["nll"]
    for row, total_effect in enumerate(after - before):
        differs = case.clean.prefix[row] != case.corrupted.prefix[row]
        (changed,) = differs.nonzero().flatten().tolist()
        assert effects[row, 0, changed] == pytest.approx(float(total_effect), abs=1e-5)
        if changed:
            assert effects[row, :, :changed].abs().max() == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("site", PATCH_HEAD_SITES)
@each_case()
def test_heads_equal_hand_written_hooks(case, site, direction):
    # Tokens differ at one of these in every pair of GPT-2, whose k matters nowhere else.
    positions = [0, 2, 5, 6, 9, 14]
    patches = patch_heads(
        case.model, *case.pair, site=site, direction=direction, positions=positions
    )
    base, _ = case.runs(direction)
    unpatched = case.nll(base)
    for layer in (0, case.n_layers - 1):
        hooks = case.head_patches(site, layer, positions, direction)
        effects = torch.stack([case.nll(base, hook) - unpatched for hook in hooks], 1)
        torch.testing.assert_close(patches.samples["nll"][:, layer], effects, atol=2e-5, rtol=0)
    assert patches.values.abs().max() > 1e-4


@pytest.mark.parametrize("site", LAYER_SITES)
@each_case()
def test_layers_equal_hand_written_hooks(case, site):
    adapter = adapt(case.model)
    if site == "resid_mid" and (adapter.parallel or adapter.is_bridge):
        pytest.skip("a Bridge's hook_resid_mid does not reach the residual stream")
    positions = [1, 9]
    patches = patch_layers(case.model, *case.pair, site=site, positions=positions)
    base, source = case.runs("noising")
    unpatched = case.nll(base)
    for layer in (0, case.n_layers - 1):
        name = hook_name(site, layer)
        new = activation(case.model, source, name)
        for column, position in enumerate(positions):
            effect = case.nll(base, (name, replace_at([position], new))) - unpatched
            torch.testing.assert_close(
                patches.samples["nll"][:, layer, column], effect, atol=2e-5, rtol=0
            )
        everywhere = case.nll(base, (name, replace_by(new))) - unpatched
        assert patches.whole[layer] == pytest.approx(float(everywhere.mean()), abs=2e-5)


@each_case(but=("neox", "hooked-neox"))
def test_resid_mid_equals_its_two_parts(case):
    """resid_mid = resid_pre + attn_out: adding the change of both to attn_out is the same patch.

    resid_pre itself stays as it is, so that the norm before attention reads what it read.
    """
    patches = patch_layers(case.model, *case.pair, site="resid_mid", positions=[4, 8])
    base, source = case.runs("noising")
    unpatched = case.nll(base)
    for layer in range(case.n_layers):
        resid_pre, attn_out = (hook_name(site, layer) for site in ("resid_pre", "attn_out"))
        old, new = (activations(case.model, ids, [resid_pre, attn_out]) for ids in (base, source))
        both = old[attn_out] + sum(new[name] - old[name] for name in (resid_pre, attn_out))
        effect = case.nll(base, (attn_out, replace_at([4], both))) - unpatched
        torch.testing.assert_close(patches.samples["nll"][:, layer, 0], effect, atol=2e-5, rtol=0)


@each_case()
def test_all_heads_together_are_the_attention_output(case):
    whole = patch_layers(case.model, *case.pair, site="attn_out", positions=[0]).whole
    base, source = case.runs("noising")
    unpatched = case.nll(base)
    for layer in range(case.n_layers):
        z = hook_name("z", layer)
        all_heads = (z, replace_by(activation(case.model, source, z)))
        effect = case.nll(base, all_heads) - unpatched
        assert whole[layer] == pytest.approx(float(effect.mean()), abs=2e-5)


@pytest.mark.parametrize("case", ["gpt_neo", "llama"], indirect=True)
def test_patching_z_equals_editing_heads(case):
    """The same numbers by `ResumableRun.edited`, which does not run the attention at all."""
    patches = patch_heads(case.model, *case.pair, site="z").samples["nll"]
    adapter = adapt(case.model)
    _, source = case.runs("noising")
    with adapter.preserving_state():
        run = ResumableRun(adapter, case.clean)
        for layer in range(adapter.n_layers):
            z = activation(case.model, source, hook_name("z", layer))
            edits = [HeadEdit((head,), z[:, :, [head]]) for head in range(adapter.n_heads)]
            effect = (run.edited(layer, edits) - run.clean())[..., 0].T
            torch.testing.assert_close(patches[:, layer], effect, atol=1e-5, rtol=0)


@each_case(but=("gemma2",))
def test_results_equal_those_of_transformer_lens(case):
    """transformer_lens.patching denoises, with one metric for the whole batch."""
    from transformer_lens import patching

    head_sweeps = {
        "q": patching.get_act_patch_attn_head_q_all_pos,
        "k": patching.get_act_patch_attn_head_k_all_pos,
        "v": patching.get_act_patch_attn_head_v_all_pos,
        "z": patching.get_act_patch_attn_head_out_all_pos,
        "pattern": patching.get_act_patch_attn_head_pattern_all_pos,
    }
    if case.name in DELEGATED:
        del head_sweeps["pattern"]
    layer_sweeps = {
        "resid_pre": patching.get_act_patch_resid_pre,
        "attn_out": patching.get_act_patch_attn_out,
        "mlp_out": patching.get_act_patch_mlp_out,
    }
    corrupted, clean = case.runs("denoising")
    options = {"direction": "denoising"}
    sites = [*head_sweeps, *layer_sweeps]
    names = [hook_name(site, layer) for site in sites for layer in range(case.n_layers)]

    def mean_nll(logits):
        return nll_of(logits, case.clean.continuation).mean()

    with torch.no_grad():
        _, clean_cache = case.model.run_with_cache(clean, names_filter=names)
        before = mean_nll(case.model(corrupted))

        def effects(sweep):
            return torch.as_tensor(sweep(case.model, corrupted, clean_cache, mean_nll)) - before

        for site, sweep in head_sweeps.items():
            ours = patch_heads(case.model, *case.pair, site=site, **options).values
            torch.testing.assert_close(ours, effects(sweep), atol=1e-4, rtol=0, msg=site)
        options["positions"] = range(corrupted.shape[1])
        for site, sweep in layer_sweeps.items():
            ours = patch_layers(case.model, *case.pair, site=site, **options).values
            torch.testing.assert_close(ours, effects(sweep), atol=1e-4, rtol=0, msg=site)
