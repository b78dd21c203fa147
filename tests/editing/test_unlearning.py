"""Edits change what they say and nothing else, can be taken back, and do what they are for."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits.cli import app
from memcircuits.core.errors import InputError
from memcircuits.core.heads import Head
from memcircuits.editing import unlearning
from memcircuits.editing.edit import Edit
from memcircuits.editing.evaluation import edit_divergence, evaluate_edit, extraction_probability
from memcircuits.editing.masks import Candidates
from memcircuits.editing.noise import weight_noise
from memcircuits.editing.recipe import NATURAL_GRADIENT, STOEHR_2024, Recipe
from memcircuits.editing.relearning import recovery_curve
from memcircuits.measure.gradients import mean_gradient
from memcircuits.models.registry import adapt
from tests import matrix
from tests.helpers import models as zoo

ARCHITECTURES = sorted(zoo.ARCHITECTURES)
CONTROL = mc.Paragraphs.from_tokens(zoo.random_ids(10, 22, seed=5), n_prefix=10)
UNSEEN = mc.Paragraphs.from_tokens(zoo.random_ids(6, 22, seed=6), n_prefix=10)
QUICK = Recipe(steps=3, learning_rate=1e-2)
FORGET = {"fraction": 0.02, "kl_budget": 0.05, "progress": False}


def quick(model, memorized, **options):
    options = {"recipe": QUICK, "em_below": 0.0, "kl_budget": None, "progress": False} | options
    return mc_unlearn(model, memorized, options.pop("control", CONTROL), **options)


mc_unlearn = unlearning.unlearn


def everything(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def neo_edit():
    """A model of its own, what it recites, and an edit that makes it forget that."""
    model = zoo.bridge("gpt_neo")
    memorized = zoo.reciting(model)
    return model, memorized, mc_unlearn(model, memorized, CONTROL, **FORGET)


# -- masks ----------------------------------------------------------------------------------------


def test_the_top_mask_holds_the_largest_gradients(neo):
    adapter = adapt(neo)
    candidates = Candidates.of(adapter)
    weights = list(candidates.weights)
    _, found = mean_gradient(adapter, CONTROL, weights, progress=False)
    mask = candidates.choose(0.01, found)
    values = torch.cat([g.abs().flatten() for g in found])
    assert len(mask) == round(0.01 * len(values)) == round(0.01 * mask.n_candidates)
    inside = mask.gather([dict_of(weights, found)[id(w.parameter)] for w in mask.weights])
    assert inside.abs().min() >= values.sort(descending=True).values[len(mask) - 1]


def dict_of(weights, tensors):
    return {id(w.parameter): t for w, t in zip(weights, tensors, strict=True)}


def test_random_masks_have_the_sizes_they_are_compared_by(neo):
    adapter = adapt(neo)
    candidates = Candidates.of(adapter)
    _, scores = mean_gradient(adapter, CONTROL, list(candidates.weights), progress=False)
    generator = torch.Generator().manual_seed(0)
    top = candidates.choose(0.01, scores)
    anywhere = candidates.choose(0.01, None, "random", generator)
    matched = candidates.choose(0.01, scores, "random-per-tensor", generator)
    everything = candidates.choose(1.0, None, "all")
    assert len(top) == len(anywhere) == len(matched)
    assert {k: len(v) for k, v in zip(top.named, top.indices, strict=True)} == {
        k: len(v) for k, v in zip(matched.named, matched.indices, strict=True)
    }
    assert len(everything) == len(candidates) == sum(w.values.numel() for w in adapter.weights())
    assert any(not torch.equal(a, b) for a, b in zip(top.indices, matched.indices, strict=True))
    again = candidates.choose(0.01, None, "random", torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(anywhere.indices, again.indices, strict=True))


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "llama"])
def test_a_mask_stays_within_the_heads_layers_and_components_asked_for(name):
    model = zoo.bridge(name)
    memorized = zoo.reciting(model)
    found = quick(model, memorized, fraction=0.1, heads=["L1H3"])
    shared = adapt(model).n_heads // adapt(model).n_kv_heads
    assert set(found.indices) <= {"1.W_Q", "1.W_K", "1.W_V", "1.W_O"}
    for matrix_name, index in found.indices.items():
        weight = adapt(model).weight(1, matrix_name.partition(".")[2])
        head = 3 // (shared if matrix_name[2:] in ("W_K", "W_V") else 1)
        assert (index // weight.values[0].numel() == head).all()
    found = quick(model, memorized, layers=[0, 2], components=["W_in"])
    assert set(found.indices) <= {"0.W_in", "2.W_in"}
    assert Candidates.of(adapt(model), heads=[Head(0, 0)]).weights[0].layer == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reading_and_writing_a_mask(name):
    model = zoo.bridge(name)
    mask = Candidates.of(adapt(model)).choose(
        0.05, None, "random", torch.Generator().manual_seed(1)
    )
    before = everything(model)
    with mask.restored() as original:
        mask.add(original, torch.ones(len(mask)))
        changed = {k: (t != before[k]).sum() for k, t in model.state_dict().items()}
        assert sum(changed.values()) == len(mask)
        for old, new in zip(original, mask.read(), strict=True):
            torch.testing.assert_close(new, old + 1)
    assert same(before, model.state_dict())


# -- what an edit changes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exactly_the_masked_weights_change_and_come_back(name):
    model = zoo.bridge(name)
    before = everything(model)
    found = quick(model, zoo.reciting(model), fraction=0.005)
    assert same(before, model.state_dict())
    total = sum(w.values.numel() for w in adapt(model).weights())
    assert found.n_candidates == total
    assert found.n_masked == round(0.005 * total)
    with found.apply(model) as edited:
        assert edited is model
        changes = {k: t - before[k] for k, t in model.state_dict().items()}
    assert same(before, model.state_dict())
    assert 0 < sum(int((c != 0).sum()) for c in changes.values()) == found.n_changed
    assert found.n_changed <= found.n_masked
    norm = sum(float(c.double().square().sum()) for c in changes.values()) ** 0.5
    assert found.norm == pytest.approx(norm, rel=1e-6)
    frame = found.to_frame()
    assert frame["changed"].sum() == found.n_changed
    assert (frame["norm"] ** 2).sum() ** 0.5 == pytest.approx(norm, rel=1e-5)


def test_hooked_transformers_are_edited_alike():
    if not zoo.has_hooked():
        pytest.skip("transformer-lens 4 has no HookedTransformer")
    model = matrix.model("gpt_neo", "HookedTransformer raw")
    bridge = matrix.model("gpt_neo", "Bridge raw")
    memorized = zoo.reciting(bridge)
    one, other = (quick(m, memorized, recipe=STOEHR_2024) for m in (model, bridge))
    assert set(one.indices) == set(other.indices)
    for name, index in one.indices.items():
        assert len(set(index.tolist()) ^ set(other.indices[name].tolist())) <= 0.1 * len(index)
    with one.apply(model):
        found = mc.scan(model, memorized, progress=False).nll
    with other.apply(bridge):
        expected = mc.scan(bridge, memorized, progress=False).nll
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_bfloat16_models_come_back_too():
    model = mc.loading.as_bridge(
        zoo.hf_model("gpt_neo").bfloat16(), zoo.tokenizer(), name="tiny-half"
    )
    before = everything(model)
    found = quick(model, zoo.reciting(model), fraction=0.01)
    with found.apply(model):
        changed = sum(int((t != before[k]).sum()) for k, t in model.state_dict().items())
    assert changed == found.n_changed > 0
    assert same(before, model.state_dict())


def test_restored_after_an_exception_and_after_an_interrupt(neo_edit, monkeypatch):
    model, memorized, found = neo_edit
    before = everything(model)
    with pytest.raises(RuntimeError, match="mine"), found.apply(model):
        raise RuntimeError("mine")
    assert same(before, model.state_dict())
    steps = []

    def interrupted(self, *args, **kwargs):
        steps.append(not same(before, model.state_dict()))
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(model, memorized)
    assert steps == [False, True, True]  # it was in the middle of an edit
    assert same(before, model.state_dict())


def test_divergence_names_the_step_and_restores(neo_edit, monkeypatch):
    model, memorized, _ = neo_edit
    before = everything(model)

    def diverge(adam):  # norms keep the loss of a tiny model finite at any learning rate
        for group in adam.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.Adam, "step", diverge)
    with pytest.raises(InputError, match=r"learning_rate: .*not finite at step 1;"):
        quick(model, memorized)
    assert same(before, model.state_dict())


def test_an_edit_fits_only_its_own_weights(neo_edit):
    model, _, found = neo_edit
    with pytest.raises(InputError, match="made for weights"), found.apply(zoo.bridge("gpt2")):
        pass
    other = zoo.bridge("gpt_neo", seed=1)
    with pytest.raises(InputError, match="made for weights"), found.apply(other):
        pass
    with (
        found.apply(model),
        pytest.raises(InputError, match="one edit at a time"),
        found.apply(model),
    ):
        pass


def test_save_and_load(neo_edit, tmp_path):
    model, _, found = neo_edit
    again = Edit.load(found.save(tmp_path / "edit.safetensors"))
    assert again.provenance == found.provenance
    assert again.to_frame().equals(found.to_frame())
    assert again.steps().equals(found.steps())
    with found.apply(model):
        expected = everything(model)
    with again.apply(model):
        assert same(expected, model.state_dict())
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((tmp_path / "edit.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        Edit.load(damaged)


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "neox", "llama"])
def test_an_exported_folder_is_the_edited_model(name, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    zoo.save(name, tmp_path / "source")
    model = mc.load_model(tmp_path / "source")
    memorized = zoo.reciting(model)
    found = quick(model, memorized, fraction=0.01)
    folder = found.export(tmp_path / "edited", tmp_path / "source")
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    differ = sum(
        int((a != b).sum()) for a, b in zip(plain.parameters(), source.parameters(), strict=True)
    )
    assert differ == found.n_changed
    with found.apply(model), torch.no_grad():
        expected = adapt(model).forward(memorized.ids)
    with torch.no_grad():
        torch.testing.assert_close(plain(memorized.ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder).encode("<7>", add_special_tokens=False) == [7]
    with pytest.raises(InputError, match="not empty"):
        found.export(folder, tmp_path / "source")
    zoo.save(name, tmp_path / "other", seed=3)
    with pytest.raises(InputError, match="made for weights"):
        found.export(tmp_path / "wrong", tmp_path / "other")
    assert not (tmp_path / "wrong").exists()


# -- what an edit does ----------------------------------------------------------------------------


def test_the_targets_are_forgotten_and_unseen_controls_kept(neo_edit):
    model, memorized, found = neo_edit
    assert (mc.scan(model, memorized, progress=False).em == 12).all()
    with found.apply(model):
        em = mc.scan(model, memorized, progress=False).em
    assert found.stopped == "em"
    assert int(em.max()) < 1.2
    assert float(found.history["em"][found.kept]) == pytest.approx(float(em.float().mean()))
    assert float(found.history["kl"][found.kept]) <= 0.05
    assert float(found.history["kl"][0]) == pytest.approx(0, abs=1e-6)
    # A change as large as this one, but in random directions, does far less to the targets.
    assert float(edit_divergence(model, found, UNSEEN).mean()) < 0.2


def test_several_targets_are_forgotten_one_by_one(neo_edit):
    model, memorized, found = neo_edit
    n = round(FORGET["fraction"] * found.n_candidates)
    assert len(found.history["em"]) <= 1 + len(memorized)  # a row for each that had to be edited
    assert n < found.n_masked <= n * (len(found.history["em"]) - 1)  # the union of their masks
    # The KL is that of all turns together, on the controls held out by the same seed.
    _, held = unlearning._split(CONTROL, 0)
    kl = float(edit_divergence(model, found, held).mean())
    assert float(found.history["kl"][-1]) == pytest.approx(kl, rel=1e-4)
    alone = mc_unlearn(model, memorized[:1], CONTROL, **FORGET)
    assert alone.n_masked == n
    rate = found.history["em"]
    assert (rate[1:] < rate[:-1]).all()


def test_one_by_one_stops_within_the_budget_of_all(neo_edit):
    model, memorized, found = neo_edit
    kl = found.history["kl"]
    budget = float(0.9 * kl[-2] + 0.1 * kl[-1])
    stopped = mc_unlearn(model, memorized, CONTROL, **FORGET | {"kl_budget": budget})
    assert stopped.stopped == "kl"
    assert float(stopped.history["kl"].max()) <= budget
    before = len(kl) - 1  # the turns before the last are the same
    for name, rows in stopped.history.items():
        torch.testing.assert_close(rows[:before], found.history[name][:before])


def test_nothing_to_forget_changes_nothing(neo_edit):
    model, memorized, _ = neo_edit
    found = mc_unlearn(model, memorized, CONTROL, **FORGET, em_below=13)
    assert (found.n_changed, found.stopped) == (0, "em")
    assert found.history["em"].tolist() == [12]


def test_without_an_em_that_is_enough_all_targets_share_a_mask(neo_edit):
    model, memorized, _ = neo_edit
    recipe = dataclasses.replace(NATURAL_GRADIENT, steps=2, objective="margin")
    found = mc_unlearn(model, memorized, CONTROL, **FORGET, em_below=0, recipe=recipe)
    assert found.n_masked == round(FORGET["fraction"] * found.n_candidates)


def test_an_interrupt_in_a_later_turn_takes_back_the_earlier_ones(neo_edit, monkeypatch):
    model, memorized, _ = neo_edit
    before = everything(model)
    together, turns = unlearning._Editor.together, []

    def interrupted(self, *args, **kwargs):
        turns.append(not same(before, model.state_dict()))
        if len(turns) == 2:
            raise KeyboardInterrupt
        return together(self, *args, **kwargs)

    monkeypatch.setattr(unlearning._Editor, "together", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mc_unlearn(model, memorized, CONTROL, **FORGET)
    assert turns == [False, True]
    assert same(before, model.state_dict())


def test_edit_gives_prefixes_another_continuation():
    model = zoo.bridge("gpt_neo")
    memorized = zoo.reciting(model, n=2)
    wanted = mc.Paragraphs(zoo.random_ids(2, 22, seed=9), 10)
    found = unlearning.edit(
        model,
        memorized,
        wanted,
        CONTROL,
        fraction=0.2,
        kl_budget=0.5,
        progress=False,
        recipe=dataclasses.replace(NATURAL_GRADIENT, steps=200, step_kl=3e-3),
    )
    assert found.stopped == "em"
    new = mc.Paragraphs(torch.cat([memorized.prefix, wanted.continuation], 1), 10)
    with found.apply(model):
        assert (mc.scan(model, new, progress=False).em == 12).all()
        assert (mc.scan(model, memorized, progress=False).em < 12).all()
    assert float(found.history["em_new"][found.kept]) == 12


def test_the_kl_budget_stops_the_reference_recipe(neo_edit):
    model, memorized, _ = neo_edit
    recipe = dataclasses.replace(STOEHR_2024, steps=50, learning_rate=3e-3, kl_weight=0.01)
    free = quick(model, memorized, recipe=recipe, kl_budget=1e9)
    assert free.stopped == "steps"
    budget = float(free.history["kl"].max()) / 2
    stopped = quick(model, memorized, recipe=recipe, kl_budget=budget)
    assert stopped.stopped == "kl"
    assert float(stopped.history["kl"][-1]) > budget >= float(stopped.history["kl"][stopped.kept])
    assert stopped.kept == len(stopped.history["kl"]) - 2


def test_shorter_steps_are_tried_within_the_budget(neo_edit):
    model, memorized, _ = neo_edit
    recipe = dataclasses.replace(NATURAL_GRADIENT, steps=8)
    one = quick(model, memorized, recipe=dataclasses.replace(recipe, steps=1), em_below=0)
    first = float(one.history["kl"][1])
    found = quick(model, memorized, recipe=recipe, em_below=0, kl_budget=first / 2)
    kl = found.history["kl"]
    assert kl[1] == pytest.approx(first, rel=1e-3)  # refused, and nothing would be left
    assert found.stopped == "kl"
    assert found.kept > 1
    assert first / 8 < kl[found.kept] <= first / 2
    forget = found.history["forget"]
    assert forget[found.kept] < forget[0]


def test_shrinking_keeps_the_targets_forgotten(neo_edit):
    model, memorized, found = neo_edit
    whole = mc_unlearn(
        model,
        memorized,
        CONTROL,
        recipe=dataclasses.replace(NATURAL_GRADIENT, shrink=False),
        **FORGET,
    )
    assert found.norm <= whole.norm
    assert float(found.history["kl"][found.kept]) <= float(whole.history["kl"][whole.kept])
    assert float(found.history["em_max"][found.kept]) < 1.2


def test_the_same_seed_gives_the_same_edit(neo_edit):
    model, memorized, found = neo_edit
    state = torch.get_rng_state()
    again = mc_unlearn(model, memorized, CONTROL, **FORGET)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(again.deltas[name], delta) for name, delta in found.deltas.items())
    other = mc_unlearn(model, memorized, CONTROL, **FORGET, seed=1)
    assert set(other.deltas) != set(found.deltas) or other.norm != found.norm


# -- measuring edits ------------------------------------------------------------------------------


def test_an_empty_edit_changes_no_measure(neo_edit):
    model, memorized, found = neo_edit
    nothing = dataclasses.replace(
        found, deltas={k: torch.zeros_like(v) for k, v in found.deltas.items()}
    )
    report = evaluate_edit(
        model, nothing, memorized, UNSEEN, heldout=UNSEEN, attacks=3, progress=False
    )
    for name, (before, after) in report.samples.items():
        if name == "control/kl":
            assert float(after.abs().max()) < 1e-6
        else:
            assert torch.equal(before, after), name
    assert report.mean("control/em") == (12.0, 12.0)
    assert report.mean("memorized/em") == (12.0, 12.0)


def test_the_report_agrees_with_scans_by_hand(neo_edit, tmp_path):
    model, memorized, found = neo_edit
    report = evaluate_edit(
        model, found, memorized, UNSEEN, heldout=UNSEEN, others=memorized, attacks=5, progress=False
    )
    em, attacked = (report.samples[f"memorized/{name}"] for name in ("em", "em_attacked"))
    assert (attacked >= em).all()
    assert torch.equal(report.samples["others/em"], em)
    with found.apply(model):
        scan = mc.scan(model, memorized, progress=False)
        text = mc.scan(model, mc.Paragraphs(UNSEEN.ids, 1), progress=False)
    assert report.mean("memorized/em")[1] == pytest.approx(float(scan.em.float().mean()))
    assert report.mean("memorized/bits")[1] == pytest.approx(float(scan.bits.mean()), rel=1e-5)
    frame = report.to_frame().set_index(["set", "measure"])
    perplexity = frame.loc[("heldout", "perplexity"), "after"]
    assert perplexity == pytest.approx(float(text.nll.mean().exp()), rel=1e-4)
    assert (frame["ci_low"] <= frame["change"] + 1e-6).all()
    assert (frame["change"] <= frame["ci_high"] + 1e-6).all()
    again = type(report).load(report.save(tmp_path / "report.safetensors"))
    assert again.to_frame().equals(report.to_frame())


def test_extraction_probability_by_hand():
    p = torch.tensor([0.5, 1.0, 0.0])
    found = extraction_probability(p.log(), 2)
    assert found.tolist() == pytest.approx([0.75, 1.0, 0.0])


def test_relearning_brings_it_back_and_leaves_no_trace(neo_edit):
    model, memorized, found = neo_edit
    before = everything(model)
    curve = recovery_curve(
        model,
        found,
        memorized[2:],
        memorized[:2],
        steps=4,
        learning_rate=1e-4,
        every=2,
        progress=False,
    )
    assert same(before, model.state_dict())
    assert all(p.grad is None for p in model.parameters())
    assert curve.em.shape == (2, 3, 2)
    assert (curve.em[1, 0] == 12).all()
    assert (curve.em[0, 0] < 2).all()
    assert curve.steps.tolist() == [0, 2, 4]
    assert curve.steps_to(0) == 0
    frame = curve.to_frame()
    assert len(frame) == 6
    with pytest.raises(InputError, match=r"^trained:"):
        recovery_curve(model, found, memorized, memorized[:1], progress=False)


def test_noise_of_size_zero_is_no_noise_and_large_noise_ends_the_recitation(neo_edit):
    model, memorized, _ = neo_edit
    before = everything(model)
    found = weight_noise(
        model, memorized, CONTROL, sizes=(0.0, 0.3, 3.0), fraction=0.05, draws=2, progress=False
    )
    assert same(before, model.state_dict())
    assert (found.em["memorized"][0] == 12).all()
    control = mc.scan(model, CONTROL, progress=False).nll
    torch.testing.assert_close(found.nll["control"][0], control.expand(2, -1))
    assert float(found.em["memorized"][2].mean()) < 6
    frame = found.to_frame()
    assert list(frame["set"].unique()) == ["memorized", "control"]
    assert len(frame) == 6
    everywhere = weight_noise(
        model, memorized, CONTROL, sizes=(0.0,), mask="all", draws=1, progress=False
    )
    assert everywhere.n_weights == everywhere.n_candidates


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.5}, "fraction"),
        ({"fraction": -0.1}, "fraction"),
        ({"mask": "best"}, "mask"),
        ({"control": CONTROL[:1]}, "control"),
        ({"heads": ["L9H0"]}, "heads"),
        ({"heads": ["first"]}, "head"),
        ({"layers": [4]}, "layers"),
        ({"components": ["W_E"]}, "components"),
        ({"heads": ["L0H0"], "components": ["W_in"]}, "heads, layers, components"),
        ({"recipe": Recipe(objective="loss")}, "objective"),
        ({"recipe": Recipe(curvature="some")}, "curvature"),
        ({"recipe": Recipe(steps=0)}, "steps"),
    ],
)
def test_bad_input_is_named_and_nothing_is_changed(neo_edit, options, argument):
    model, memorized, _ = neo_edit
    before = everything(model)
    with pytest.raises(InputError, match=f"^{argument}:"):
        quick(model, memorized, **options)
    assert same(before, model.state_dict())


def test_controls_that_are_memorized_are_refused(neo_edit):
    model, memorized, found = neo_edit
    with pytest.raises(InputError, match=r"^control: 1 of its paragraphs"):
        quick(model, memorized, control=CONTROL + memorized[1:2])
    with pytest.raises(InputError, match=r"^targets:"):
        unlearning.edit(model, memorized, memorized, CONTROL)
    with pytest.raises(InputError, match=r"^targets:"):
        unlearning.edit(model, memorized, CONTROL, CONTROL)
    with pytest.raises(InputError, match=r"^sizes:"):
        weight_noise(model, memorized, CONTROL, sizes=(-1.0,))
    bad = {k: torch.full_like(v, torch.nan) for k, v in found.deltas.items()}
    with pytest.raises(InputError, match="not finite"):
        dataclasses.replace(found, deltas=bad)


# -- commands -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run a command on a tiny model in a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    zoo.save("gpt_neo", folder / "model")
    paragraphs = zoo.mixed(zoo.bridge("gpt_neo"), n=8)
    with (folder / "paragraphs.jsonl").open("w") as file:
        for name, ids in zip(paragraphs.names, paragraphs.ids.tolist(), strict=True):
            file.write(json.dumps({"id": name, "ids": ids}) + "\n")

    def call(*arguments: str, as_json: bool = True):
        shared = ["--model", folder / "model", "--paragraphs", folder / "paragraphs.jsonl"]
        lengths = ["--n-prefix", "10", "--n-continuation", "12", "--quiet", *["--json"] * as_json]
        words = [*arguments, *map(str, shared), *lengths]
        return CliRunner().invoke(app, words, catch_exceptions=False)

    return call


@pytest.mark.parametrize("objective", ["nll", "contrastive"])
def test_gradients_command(run, tmp_path, objective):
    result = run("gradients", "--objective", objective, "--out", str(tmp_path))
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    sets = {"contrastive"} if objective == "contrastive" else {"memorized", "control"}
    assert set(found) == sets
    assert all(0 < group["layer_share"] < 1 for group in found.values())
    assert len(list(tmp_path.glob("gradients-*.safetensors"))) == len(sets)


def test_activations_command(run, tmp_path):
    result = run("gradients", "--activations", "--out", str(tmp_path))
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert set(found) == {"memorized", "control"}
    assert {row["site"] for row in found["memorized"]} == {"q", "k", "v", "z", "pre", "post"}
    assert len(list(tmp_path.glob("activations-*.safetensors"))) == 2


def test_unlearn_command_compares_arms_and_tries_to_bring_it_back(run, tmp_path):
    heldout = tmp_path / "heldout.jsonl"
    lines = [json.dumps({"id": str(i), "ids": ids}) for i, ids in enumerate(UNSEEN.ids.tolist())]
    heldout.write_text("\n".join(lines))
    result = run(
        "unlearn", "--fraction", "0.02", "--kl-budget", "0.05", "--arms", "--recover", "2",
        "--noise", "--heldout", str(heldout), "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    arms = {(row["set"], row["measure"]): row for row in found["arms"]}
    changed = arms["edit", "changed"]
    assert changed["no-op"] == 0
    assert 0 < changed["random"] <= 0.02 * changed["all"] / 0.95
    assert 0 < changed["top"] <= 0.02 * changed["all"] / 0.95
    em = arms["memorized", "em"]
    assert em["no-op"] == 12
    assert em["top"] < 2
    assert {"random", "random-per-tensor", "all"} <= set(em)
    assert arms["control, own text", "em"]["no-op"] == 12
    assert arms["others", "in_full"]["no-op"] == 1
    assert arms["heldout", "perplexity"]["no-op"] > 1
    assert [row["step"] for row in found["recovery"] if row["arm"] == "edited"] == [0, 1, 2]
    assert {row["set"] for row in found["noise"]} == {"memorized", "control"}


def test_unlearn_command(run, tmp_path):
    out, export = tmp_path / "out", tmp_path / "export"
    result = run(
        "unlearn", "--targets", "2", "--fraction", "0.02", "--kl-budget", "0.05",
        "--out", str(out), "--export", str(export),
    )  # fmt: skip
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["changed"] <= found["masked"]
    measures = {(row["set"], row["measure"]): row for row in found["measures"]}
    assert measures[("memorized", "em")]["before"] == 12
    assert measures[("memorized", "em")]["after"] < 2
    assert Edit.load(out / "edit.safetensors").n_changed == found["changed"]
    assert len(found["paragraphs"]) == 2
    modes = {path.stat().st_mode & 0o777 for path in export.iterdir()}
    assert modes == {(export / "config.json").stat().st_mode & 0o777}
    again = mc.load_model(export)
    recited = zoo.mixed(zoo.bridge("gpt_neo"), n=8)
    em = mc.scan(again, recited[:8], progress=False).em
    assert int((em < 2).sum()) >= 2


def test_unlearn_command_says_what_it_edited_and_why_it_ended(run, tmp_path):
    result = run("unlearn", "--kl-budget", "1e-9", "--out", str(tmp_path), as_json=False)
    assert "another step would have passed --kl-budget" in result.stdout
    assert "edited: recited" in result.stdout
    assert "others still recited" in result.stdout


def test_edit_command(run, tmp_path):
    result = run("edit", "--fraction", "0.2", "--kl-budget", "0.5", "--out", str(tmp_path))
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert "em_new" in found["steps"][0]
    assert (tmp_path / "edit.safetensors").is_file()
