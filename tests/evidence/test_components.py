"""Heads, MLPs, layers and neurons in one ranking: effects by plain hooks, sums, controls, costs."""

import dataclasses

import pytest
import torch

import memcircuits as mc
from memcircuits.base.components import Component
from memcircuits.benchmark.units import count_forwards
from memcircuits.evidence import screening
from memcircuits.evidence.ablation import Ablation
from memcircuits.evidence.component_effects import ComponentEffects, measure_effects
from memcircuits.evidence.component_grid import ComponentGrid
from memcircuits.evidence.component_scores import score_components
from memcircuits.evidence.control_choices import compare_controls
from memcircuits.evidence.controls import own_continuations, repetitions
from memcircuits.evidence.ranking import Ranking
from memcircuits.evidence.ranking_summary import summary
from memcircuits.measure.continuation import continuation_logits, score_continuation
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.models.hooks import hook_name
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.gradients import double_bridge
from tests.helpers.oracle import Plain

QUIET = {"progress": False, "draws": 20}
UNITS = ("head", "mlp", "layer", "neuron")


@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_neurons_and_sets_of_components_equal_plain_hooks(name):
    """Neurons singly and in a group, and components of several layers at once."""
    model, plain = zoo.bridge(name), Plain(name, zoo.hf_model(name))
    paragraphs = zoo.mixed(model, n=2)
    neurons = [(0, 3), (1, 7), (2, 0)]
    named = [Component("neuron", layer, neuron=i) for layer, i in neurons]
    head, mlp = Component("head", 1, 2), Component("mlp", 0)
    parts = [*named, named, [head, mlp, named[2]]]
    without = [
        *({"neurons": [neuron]} for neuron in neurons),
        {"neurons": neurons},
        {"heads": [(1, 2)], "mlps": [0], "neurons": [(2, 0)]},
    ]
    effects = Ablation(model, paragraphs, mode="zero").effects(parts, progress=False)
    with torch.no_grad():
        clean = plain.nll(paragraphs.ids, paragraphs.n_prefix)
        for i, options in enumerate(without):
            with plain.without(**options):
                expected = plain.nll(paragraphs.ids, paragraphs.n_prefix) - clean
                margin = plain_margin(plain, paragraphs)
            torch.testing.assert_close(effects[:, i, 0], expected, atol=2e-5, rtol=0)
            change = margin - plain_margin(plain, paragraphs)
            torch.testing.assert_close(effects[:, i, 2], change, atol=2e-4, rtol=1e-4)
    assert effects[..., 0].abs().amax(0).min() > 1e-5


def plain_margin(plain, paragraphs):
    logits = plain.logits(paragraphs.ids)[:, paragraphs.n_prefix - 1 : -1]
    true = paragraphs.continuation[..., None]
    others = logits.scatter(-1, true, -torch.inf).amax(-1)
    return (logits.gather(-1, true)[..., 0] - others).mean(-1)


@pytest.mark.parametrize("mode", ["mean", "resample"])
def test_means_and_samples_of_mlps_and_neurons(neo, mode):
    """Their replacements are what the reference's run holds at the same position."""
    pair, plain = zoo.mixed(neo)[[0, 4]], Plain("gpt_neo", zoo.hf_model("gpt_neo"))
    parts = [Component("mlp", 2), Component("neuron", 1, neuron=9)]
    effects = Ablation(neo, pair, mode=mode).effects(parts, progress=False)
    change = {
        "mean": lambda x: x.mean(0, keepdim=True).expand_as(x),
        "resample": lambda x: x.flip(0),  # each gets the other's
    }[mode]
    out = plain.blocks[2].mlp.c_proj.register_forward_hook(lambda _, args, out: change(out))
    with torch.no_grad():
        of_mlp = plain.nll(pair.ids, pair.n_prefix)
        out.remove()

        def neuron(_, args):
            post = args[0].clone()
            post[..., 9] = change(post[..., 9])
            return (post,)

        pre = plain.blocks[1].mlp.c_proj.register_forward_pre_hook(neuron)
        of_neuron = plain.nll(pair.ids, pair.n_prefix)
        pre.remove()
        clean = plain.nll(pair.ids, pair.n_prefix)
    torch.testing.assert_close(effects[:, 0, 0], of_mlp - clean, atol=1e-5, rtol=0)
    torch.testing.assert_close(effects[:, 1, 0], of_neuron - clean, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def ranking(neo):
    return mc.find_memorization_components(neo, zoo.mixed(neo, n=6), units=UNITS, **QUIET)


def test_the_frame_has_the_contract(ranking):
    frame = ranking.to_frame()
    assert list(frame.columns[:6]) == ["unit", "layer", "head", "neuron", "rank", "score"]
    assert {"ci_low", "ci_high", "q_value"} <= {*frame.columns}
    assert frame["score"].is_monotonic_decreasing
    assert frame["unit"].value_counts().to_dict() == {
        "head": 16,
        "mlp": 4,
        "layer": 4,
        "neuron": 36,
    }
    assert frame["head"].notna().equals(frame["unit"] == "head")
    assert frame["neuron"].notna().equals(frame["unit"] == "neuron")
    named = [str(component) for component in ranking.top_components(3)]
    first = frame.iloc[0]
    assert named[0] == str(
        Component(
            first["unit"],
            first["layer"],
            head=-1 if first["unit"] != "head" else first["head"],
            neuron=-1 if first["unit"] != "neuron" else first["neuron"],
        )
    )
    assert ranking.figure() is not None
    assert "MLPs" in ranking.summary()


def test_heads_of_all_units_are_those_of_heads_alone(neo, ranking):
    alone = mc.find_memorization_heads(neo, zoo.mixed(neo, n=6), **QUIET)
    torch.testing.assert_close(ranking.scores.values, alone.score)
    assert ranking.top(4) == alone.top(4)
    assert "lies outside heads" in alone.summary()
    # Sum, joint effect and share; intervals are resampled after other draws.
    torch.testing.assert_close(alone.levels["mlp"][:3], ranking.levels["mlp"][:3])


def test_single_effects_and_the_interaction_add_up_to_the_joint_effect(ranking):
    levels = ranking.levels_frame().set_index("level")
    for level, unit in {"head": "head", "mlp": "mlp"}.items():
        singles = ranking.score[:, ranking.grid.columns(unit)].sum()
        assert levels.loc[level, "sum"] == pytest.approx(float(singles), abs=1e-4)
    total = levels.loc["head", "sum"] + levels.loc["mlp", "sum"]
    assert levels.loc["all", "sum"] == pytest.approx(total, abs=1e-5)
    assert levels.loc["mlp", "share"] == pytest.approx(levels.loc["mlp", "sum"] / total, abs=1e-5)
    together = levels["sum"] + levels["interaction"]
    assert together.to_list() == pytest.approx(levels["joint"].to_list())
    assert levels["interaction"].abs().max() > 0.01


def test_one_mlp_that_all_text_needs_is_named_beside_the_sum():
    grid = ComponentGrid(("head", "mlp"), 2, 2)
    score = torch.tensor([[0.4, 0.4, 3.4], [0.8, 0.8, 1.6]])
    on_controls = torch.tensor([[0.1, 0.1, 6.1], [0.1, 0.1, 0.2]])
    levels = {
        "head": torch.tensor([2.4, 3.2, 0.32, 0.3, 0.4]),
        "mlp": torch.tensor([5.0, 3.7, 0.68, 0.6, 0.7]),
    }
    counts = {"measured": 30, "measured_control": 30}
    arguments = [grid, [Component("mlp", 0)], score > 3, counts, levels, score]
    text = summary(*arguments, on_controls)
    assert "recitation needs both" in text
    assert "L0.mlp alone makes 3.40 of the sum of MLPs, and all text needs it" in text
    assert "rises by 6.10 nats/token. The other MLPs make 1.60, heads 2.40." in text
    # Controls do not need it, or it is no half of the sum: nothing is said.
    assert "all text needs" not in summary(*arguments, on_controls / 2)
    smaller = torch.where(score == 3.4, 2.4, score)
    assert "all text needs" not in summary(*arguments[:-1], smaller, on_controls)
    levels["mlp"][1] = 6.0
    assert "Removed at once, MLPs cost more." in summary(*arguments, on_controls)


def test_what_is_not_connected_has_no_effect():
    source = zoo.hf_model("gpt_neo")
    with torch.no_grad():
        source.transformer.h[1].attn.attention.out_proj.weight[:, 8:16] = 0
        source.transformer.h[2].mlp.c_proj.weight.zero_()
        source.transformer.h[2].mlp.c_proj.bias.zero_()
        source.transformer.h[0].mlp.c_proj.weight[:, 5] = 0
    model = as_bridge(source, zoo.tokenizer(), name="tiny-cut")
    parts = [Component("head", 1, 1), Component("mlp", 2), Component("neuron", 0, neuron=5)]
    effects = Ablation(model, zoo.mixed(model), mode="zero").effects(parts, progress=False)
    assert effects[..., 0].abs().max() < 1e-5


def test_the_interaction_is_a_difference_of_shares(neo):
    options = {"score": "interaction", "control_text": "own", **QUIET}
    ranking = mc.find_memorization_components(neo, zoo.mixed(neo, n=8), **options)
    parts = [c for unit in ("head", "mlp") for c in ranking.grid.components(unit)]
    falls = [
        -Ablation(neo, paragraphs, mode="zero").effects(parts, progress=False)[..., 2]
        for paragraphs in (ranking.memorized, ranking.control)
    ]
    for unit, columns in {"head": slice(0, 16), "mlp": slice(16, 20)}.items():
        memorized, control = (f[:, columns].mean(0) / f[:, columns].mean() for f in falls)
        score = ranking.score[:, ranking.grid.columns(unit)].flatten()
        torch.testing.assert_close(score, memorized - control, atol=1e-4, rtol=1e-4)
        assert score.sum().abs() < 1e-3
    assert ranking.score_units == "shares of the mean"


def test_shares_of_what_does_not_matter_are_refused():
    """The same effects for both sets, then none on average for one of them."""
    grid = ComponentGrid(("head",), 1, 2)
    parts = tuple(grid.components("head"))
    falls = torch.tensor([[[0.0, 0.0, -1.0], [0.0, 0.0, -3.0]]]).repeat(4, 1, 1)
    samples = {"memorized": falls, "control": 2 * falls}
    effects = ComponentEffects(grid, parts, samples, torch.full((1, 2), torch.nan), {}, ())
    scores = score_components(effects, "interaction", 50, torch.Generator().manual_seed(0))
    assert scores.score.abs().max() < 1e-6  # one set merely has twice as much to lose
    none = dataclasses.replace(effects, samples={**samples, "control": -falls})
    with pytest.raises(mc.InputError, match="no head matters to the control"):
        score_components(none, "interaction", 50, torch.Generator().manual_seed(0))


def test_a_ranking_of_components_saves_and_reports(neo, ranking, tmp_path):
    loaded = Ranking.load(ranking.save(tmp_path / "ranking.safetensors"))
    assert loaded.to_frame().equals(ranking.to_frame())
    assert loaded.levels_frame().equals(ranking.levels_frame())
    page = ranking.to_html(tmp_path / "report.html", triggers=0).read_text(encoding="utf-8")
    assert "Heads or MLPs?" in page
    assert "find_memorization_components" in page
    written = loaded.writes(components=2, k=2, model=neo).to_frame()
    assert len(written) == 4
    assert "layer" not in set(written["unit"])


def test_controls_of_which_the_model_is_sure(neo):
    paragraphs = zoo.mixed(neo, n=6)
    ranking = mc.find_memorization_heads(neo, paragraphs, control_text="own", **QUIET)
    scan_result = mc.scan(neo, ranking.control, progress=False)
    assert scan_result.is_memorized.all()  # the model writes them itself
    own = greedy_continuations(neo, paragraphs[6:], progress=False)
    written = {tuple(row) for row in own.ids.tolist()}
    assert {tuple(row) for row in ranking.control.ids.tolist()} <= written
    assert "the model's own continuations" in ranking.notes[0]
    assert ranking.provenance.options["control_text"] == "own"


def test_own_continuations_are_neither_loops_nor_the_text(neo):
    recited = zoo.reciting(neo, n=4)
    with pytest.raises(mc.InputError, match="control_text"):
        own_continuations(neo, recited, progress=False)
    own = own_continuations(neo, zoo.mixed(neo, n=8)[8:], progress=False)
    assert mc.scan(neo, own, progress=False).is_memorized.all()


def test_what_the_model_half_knows_or_was_trained_on_is_no_control(neo):
    """EM counts up to the first slip, and hides what follows it."""
    recited, text = zoo.reciting(neo, n=4), zoo.mixed(neo, n=4)[4:]
    ids = text.ids.clone()
    ids[0] = recited.ids[0]
    ids[0, 10] = (ids[0, 10] + 1) % zoo.D_VOCAB  # one slip; then greedy all the way
    for position in range(11, 22):
        with torch.no_grad():
            ids[0, position] = adapt(neo).forward(ids[:1, :position])[0, -1].argmax()
    trained = (9, 9, 9, 9, 0, 3, 0, 0)
    names = tuple(f"p{i}" for i in range(8))
    both = mc.Paragraphs(torch.cat([recited.ids, ids]), 10, names, {"repetitions": trained})
    ranking = mc.find_memorization_heads(neo, both, **QUIET)
    assert ranking.control.names == ("p6", "p7")
    assert "none was trained on" in ranking.notes[0]
    given = mc.find_memorization_heads(neo, both[:4], control=both[4:], **QUIET)
    assert given.control.names == ("p4", "p5", "p6", "p7")
    assert "1 were trained on, up to 3 times" in given.notes[0]


def test_each_choice_of_controls_stands_beside_the_others(neo, tmp_path):
    paragraphs = zoo.mixed(neo, n=4)
    table = compare_controls(neo, paragraphs, units=["head"], **QUIET)
    alone = mc.find_memorization_heads(neo, paragraphs, **QUIET)
    assert table["controls"].to_list() == [
        "texts",
        "texts nearest in NLL",
        "own text",
        "own text, interaction",
    ]
    assert table["significant"][0] == int(alone.significant.sum())
    assert table["first"][0].startswith(str(alone.top(1)[0]))
    assert table["agreement"][0] == pytest.approx(1)
    assert table["greedy"][2] == 1  # the model writes them itself
    page = alone.to_html(tmp_path / "report.html", triggers=0, controls=table)
    assert "Other controls" in page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wide():
    """The shape of GPT-Neo 125M, much narrower: 12 layers of 12 heads."""
    from transformers import AutoModelForCausalLM, GPTNeoConfig

    config = GPTNeoConfig(
        vocab_size=zoo.D_VOCAB,
        max_position_embeddings=32,
        hidden_size=48,
        num_layers=12,
        num_heads=12,
        intermediate_size=96,
        attention_types=[[["global", "local"], 6]],
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return as_bridge(zoo.shaken(model.eval()), zoo.tokenizer(), name="tiny-125m")


def test_a_screen_of_everything_costs_at_most_a_fifth_of_the_head_sweep(wide):
    """Counted in forward passes of one paragraph, gradients three times; evidence beside it not."""
    n = 100  # the default of `max_paragraphs`
    recited = zoo.reciting(wide, n=n, n_prefix=3, n_continuation=3)
    text = mc.Paragraphs.from_tokens(zoo.random_ids(n, 6, seed=4), n_prefix=3)
    adapter = adapt(wide)
    sets = [Ablation(wide, paragraphs, mode="zero") for paragraphs in (recited, text)]
    grid = ComponentGrid.of(adapter, ("head", "mlp", "neuron"))
    with count_forwards(adapter) as cost:
        effects = measure_effects(*sets, grid, method="screen", progress=False)
    # The sweep of heads: a clean run, and for each head the blocks from its layer on.
    sweep = 2 * n * (1 + 12 * sum((12 - layer) / 12 for layer in range(12)))
    assert cost["forwards"] <= sweep / 5
    assert len(effects.components) >= screening.SIZES.ranked
    assert any("belong before it" in note for note in effects.notes)
    assert {"head", "neuron"} <= {component.unit for component in effects.components}


def test_screened_neurons_say_what_they_may_miss(neo):
    paragraphs = zoo.mixed(neo, n=4)
    ranking = mc.find_memorization_components(neo, paragraphs, units=["neuron"], **QUIET)
    seen = ranking.evidence["verified"]
    assert int(seen.sum()) == 36
    assert (ranking.p_value[~seen] == 1).all()
    text = " ".join(ranking.notes)
    assert "32 of 512 neurons were ablated exactly" in text
    assert "4 neurons drawn at random" in text
    assert ranking.levels == {}
    with pytest.raises(mc.InputError, match="no heads were ranked"):
        ranking.top(1)


@pytest.mark.parametrize("units", [("neuron",), UNITS], ids=["alone", "others"])
def test_neurons_are_ablated_for_the_slope_of_their_log_odds(neo, units):
    """In float64, by automatic differentiation of log(p / (1 - p)) in a gate on every neuron."""
    model, paragraphs = double_bridge("gpt_neo"), zoo.mixed(neo, n=4)
    adapter, falls = adapt(model), []
    for group in (paragraphs[:4], paragraphs[4:]):
        d_mlp = adapter.weight(0, "W_out").values.shape[1]
        gates = torch.ones(adapter.n_layers, d_mlp, dtype=torch.float64, requires_grad=True)
        edit = {
            hook_name("post", i): lambda post, gate=gate: post * gate
            for i, gate in enumerate(gates)
        }
        with adapter.preserving_state(), torch.enable_grad():
            p = continuation_logits(adapter, group, edit=edit).softmax(-1)
            p = p.gather(-1, group.continuation[..., None])
            falls += torch.autograd.grad((p / (1 - p)).log().mean(), gates)
    best = (falls[0] - falls[1]).flatten().topk(32).indices
    sets = [Ablation(model, group, mode="zero") for group in (paragraphs[:4], paragraphs[4:])]
    effects = measure_effects(*sets, ComponentGrid.of(adapter, units), progress=False)
    chosen = {(part.layer, part.neuron) for part in effects.components if part.unit == "neuron"}
    assert len(chosen) == 36  # four are drawn at random
    assert {divmod(int(i), d_mlp) for i in best} <= chosen


def test_neurons_estimates_equal_their_gradient(any_bridge):
    """Scaling a neuron by a little changes the NLL by that share of its attribution."""
    paragraphs, adapter = zoo.mixed(any_bridge, n=2), adapt(any_bridge)
    ablation = Ablation(any_bridge, paragraphs, mode="zero")
    grid = ComponentGrid.of(adapter, ("mlp", "neuron"))
    estimates = screening.attributions(ablation, grid, progress=False)
    assert estimates[:, :, 0].isnan().all()  # MLPs have no slope
    name, step = "blocks.1.mlp.hook_post", 1e-2

    def nll(size):
        def scale(post):
            post = post.clone()
            post[..., 3] *= 1 - size
            return post

        with adapter.preserving_state():
            return score_continuation(adapter, paragraphs, edit={name: scale}).nll

    rise = (nll(step) - nll(-step)) / (2 * step)
    torch.testing.assert_close(estimates[:, 1, 1 + 3], rise, atol=2e-3, rtol=2e-2)
    assert estimates[:, :, 1:].abs().max() > 1e-2


def test_the_estimate_of_an_mlp_is_its_effect_on_the_pilot(neo):
    paragraphs = zoo.mixed(neo, n=4)
    sets = {"memorized": paragraphs[:4], "control": paragraphs[4:]}
    ablations = {name: Ablation(neo, group, mode="zero") for name, group in sets.items()}
    grid = ComponentGrid.of(adapt(neo), ("head", "mlp", "layer"))
    pilot = {"memorized": torch.tensor([0, 2]), "control": torch.tensor([1, 3])}
    generator = torch.Generator().manual_seed(0)
    estimates = screening.Estimates(ablations, pilot, grid, generator, progress=False)
    parts = [*grid.components("mlp"), *grid.components("layer")]
    for name, ablation in ablations.items():
        exact = ablation.effects(parts, progress=False)[pilot[name], :, 0]
        columns = estimates.rows[name][:, :, 4:].transpose(1, 2).flatten(1)
        torch.testing.assert_close(columns, exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"units": ["heads"]}, "units"),
        ({"units": []}, "choose some"),
        ({"units": "head"}, "give a list"),
        ({"score": "nll"}, "score"),
        ({"score": "interaction", "method": "screen"}, "compares every component"),
        ({"control_text": "mine"}, "control_text"),
    ],
)
def test_bad_options(neo, options, says):
    with pytest.raises(mc.InputError, match=says):
        mc.find_memorization_components(neo, zoo.mixed(neo), **options)


def test_rankings_of_earlier_versions_are_of_heads(ranking):
    heads = ranking.grid.columns("head")
    old = dataclasses.replace(
        ranking,
        score=ranking.score[:, heads],
        ci=ranking.ci[:, :, heads],
        p_value=ranking.p_value[:, heads],
        evidence={name: values[:, heads] for name, values in ranking.evidence.items()},
        units=("head",),
        n_heads=0,
        levels={},
    )
    assert len(old.to_frame()) == 16
    assert "neuron" not in old.to_frame()
    assert "outside heads" not in old.summary()


def test_no_share_is_told_where_mlps_cost_controls_more(ranking):
    levels = {name: values.clone() for name, values in ranking.levels.items()}
    levels["mlp"][0], levels["mlp"][2] = -0.6, -0.2
    text = dataclasses.replace(ranking, levels=levels).summary()
    assert "MLPs -0.60" in text
    assert "outside heads" not in text


def test_copies_in_a_scanned_corpus_are_no_repetitions_in_training(neo):
    rows = zoo.random_ids(2, 22)
    known = mc.Paragraphs(rows, 10, metadata={"repetitions": [3, 0]})
    assert repetitions(known).tolist() == [3, 0]
    assert repetitions(mc.Paragraphs(rows, 10, metadata={"duplicates": [3, 1]})) is None
