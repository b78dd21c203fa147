"""Masks, subnetworks and cores: a mask of ones is the model, and what was written is found."""

import pytest
import torch

import memcircuits as mc
from memcircuits.evidence.subnetworks.hard_concrete import (
    initial_log_odds,
    open_probability,
    train_gates,
)
from memcircuits.evidence.subnetworks.mean_ablation import MeanAblation
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.oracle import Plain

HEAD = mc.Head(2, 1)


@pytest.fixture(scope="module")
def written(neo):
    """A paragraph that the tiny model recites through one head only, and controls."""
    target = mc.Paragraphs.from_tokens(zoo.random_ids(1, 14, seed=3), n_prefix=10)
    control = mc.Paragraphs.from_tokens(zoo.random_ids(12, 14, seed=4), n_prefix=10)
    planted = mc.plant(
        neo, target, where=str(HEAD), control=control, kl_budget=10.0, progress=False
    )
    assert planted.history["em"][planted.kept] == 4
    return target, control, planted


def all_gates(model, reference):
    return MeanAblation(adapt(model), reference, ("z", "mlp_out"))


def greedy_elimination(model, target, reference, n_kept):
    """The parts left when the least needed of all is taken away again and again."""
    ablation = all_gates(model, reference)
    kept = list(range(ablation.n_gates))
    row = torch.zeros(1, dtype=torch.long)

    def nll(parts):
        mask = torch.zeros(1, ablation.n_gates)
        mask[0, parts] = 1
        return float(ablation.score(target, row, mask).nll)

    while len(kept) > n_kept:
        without = {part: nll([p for p in kept if p != part]) for part in kept}
        kept.remove(min(without, key=without.get))
    return set(kept)


@pytest.mark.parametrize("name", ["gpt_neo", "llama", "neox"])
def test_gates_equal_plain_hooks(name):
    """All open: the model. One head and one MLP closed: their means, put there by hand."""
    model, plain = zoo.bridge(name), Plain(name, zoo.hf_model(name))
    paragraphs = zoo.mixed(model)
    adapter, reference = adapt(model), paragraphs[2:7]
    with adapter.preserving_state():
        ablation = all_gates(model, reference)
        gates = torch.ones(2, ablation.n_gates)
        gates[1, [1 * adapter.n_heads + 2, adapter.n_layers * adapter.n_heads + 1]] = 0
        rows = torch.tensor([0, 5])
        scores = ablation.score(paragraphs, rows, gates)
    nll = plain.nll(paragraphs.ids, paragraphs.n_prefix).detach()
    torch.testing.assert_close(scores.nll[0], nll[0], atol=1e-5, rtol=0)

    def replace_head(z):
        z = z.clone()
        z[:, :, 2] = plain.z(reference.ids)[1][:, :, 2].mean(0)
        return z

    mlp = plain.blocks[1].mlp
    outputs = []
    handle = mlp.register_forward_hook(lambda _, args, out: outputs.append(out))
    plain.logits(reference.ids)
    handle.remove()
    mean = outputs[0].mean(0)
    handle = mlp.register_forward_hook(lambda _, args, out: mean.expand_as(out))
    with torch.no_grad(), plain_head(plain, 1, replace_head):
        expected = plain.nll(paragraphs.ids[5:6], paragraphs.n_prefix)
    handle.remove()
    torch.testing.assert_close(scores.nll[1:], expected, atol=1e-5, rtol=0)
    assert abs(float(expected[0]) - float(nll[5])) > 1e-3


def plain_head(plain, layer, change):
    """Replace z of a layer; what `change` itself runs is left alone."""
    inside = []

    def once(z):
        if inside:
            return None
        inside.append(True)
        return change(z)

    return plain.head_input(layer, once)


def test_training_reaches_the_sparsity_and_keeps_what_the_loss_needs():
    """By hand: the loss falls with the first two of eight gates, and never with the others."""
    generator = torch.Generator().manual_seed(0)
    start = initial_log_odds(3, 8, generator, torch.device("cpu"))
    need = torch.tensor([2.0, 1.0, 0, 0, 0, 0, 0, 0])
    log_odds = train_gates(lambda gates: -(gates * need).sum(-1), start, 0.75, generator)
    share = open_probability(log_odds).mean(-1)
    torch.testing.assert_close(share, torch.full((3,), 0.25), atol=1e-4, rtol=0)
    assert (log_odds.topk(2).indices.sort(-1).values == torch.tensor([0, 1])).all()


def test_a_subnetwork_has_as_many_parts_as_asked_for(neo):
    paragraphs = zoo.mixed(neo)
    for sparsity, n in ((0.5, 10), (0.9, 2), (0.999, 1)):
        result = mc.core(neo, paragraphs[:4], paragraphs[4:], seeds=2, sparsity=sparsity, steps=2)
        assert (result.kept.sum(-1) == n).all()
    assert [note.split(":")[0] for note in result.notes[:2]] == ["memorized", "control"]
    whole = result.scores["memorized, whole"]
    torch.testing.assert_close(whole[:, 2], mc.scan(neo, paragraphs[:4]).nll, atol=1e-5, rtol=0)
    assert whole[:, 0].tolist() == [12.0] * 4


def test_conditions_are_the_masks_that_their_names_say(neo):
    paragraphs = zoo.mixed(neo)
    result = mc.core(neo, paragraphs[:4], paragraphs[4:], seeds=2, steps=5)
    own, other = result.in_core("memorized"), result.in_core("control")
    masks = {"only memorized": own, "without control": ~other, "without own": ~(own & ~other)}
    ablation = all_gates(neo, paragraphs[4:])
    for name, mask in masks.items():
        gates = mask.float().expand(4, -1)
        nll = ablation.score(paragraphs[:4], torch.arange(4), gates).nll
        torch.testing.assert_close(result.scores[f"memorized, {name}"][:, 2], nll)
    assert (own & ~other).any()


def test_the_written_head_is_in_every_core_as_greedy_elimination_says(neo, written):
    target, control, planted = written
    with planted.apply(neo), torch.no_grad():
        result = mc.core(neo, target, control, seeds=4, progress=False)
        by_elimination = greedy_elimination(neo, target, control, n_kept=10)
    assert HEAD in result.own_heads
    assert HEAD.layer * 4 + HEAD.head in by_elimination
    # Both agree on most parts; two random halves of 20 parts share 5.
    shares = [len(by_elimination & set(k.nonzero().flatten().tolist())) for k in result.kept[0]]
    assert sum(shares) / len(shares) >= 7
    only, without = (result.scores[f"memorized, {c} memorized"] for c in ("only", "without"))
    assert only[0, 2] < without[0, 2]


def test_effective_size_is_within_three_points_and_one_less_is_not(neo, written):
    target, control, planted = written
    with planted.apply(neo), torch.no_grad():
        result = mc.core(neo, target, control, seeds=3, progress=False)
        ablation = all_gates(neo, control)

        def accuracy(size, seed):
            mask = torch.zeros(1, ablation.n_gates)
            mask[0, result.log_odds[0, seed].argsort(descending=True, stable=True)[:size]] = 1
            return float(ablation.score(target, torch.tensor([0]), mask).correct.float().mean())

        for seed, size in enumerate(result.effective_size[0].tolist()):
            assert accuracy(size, seed) >= 1 - 0.03
            assert size == 1 or accuracy(size - 1, seed) < 1 - 0.03


@pytest.mark.any_version
def test_the_head_of_the_planted_organism_is_in_every_core():
    model = mc.load_model("organism-planted", device="cpu")
    scan = mc.scan(model, mc.Paragraphs.shipped("control"))
    result = mc.core(model, scan.memorized, scan.control[:24], seeds=3, steps=40)
    assert mc.Head(3, 5) in result.heads("memorized")


def test_shuffled_labels_make_cores_of_their_own(neo):
    paragraphs = zoo.mixed(neo)
    result = mc.core(neo, paragraphs[:4], paragraphs[4:], seeds=2, steps=3, shuffles=3)
    assert result.shuffled.shape == (3, *result.kept.shape)
    cores = result.shuffled[..., :16].all(2)
    expected = [(a ^ b).sum() / 32 for a, b in cores]
    torch.testing.assert_close(result.false_core_rate, torch.stack(expected))
    again = mc.core(neo, paragraphs[:4], paragraphs[4:], seeds=2, steps=3)
    assert torch.equal(again.kept, result.kept)  # shuffles come after, and change nothing


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seeds": 0}, "seeds: 0; give an integer of at least 1"),
        ({"steps": 0}, "steps"),
        ({"sparsity": 0}, "sparsity: 0; give a number in"),
        ({"sparsity": 1.0}, "sparsity: 1.0; give a number below 1"),
        ({"shuffles": -1}, "shuffles"),
        ({"control": torch.zeros(2, 30, dtype=torch.long)}, "control: 10 . 20 tokens|control: 50"),
    ],
)
def test_bad_options(neo, options, says):
    paragraphs = zoo.mixed(neo)
    control = options.pop("control", None)
    if control is not None:
        control = mc.Paragraphs.from_tokens(control, n_prefix=10)
    with pytest.raises(mc.InputError, match=says):
        mc.core(neo, paragraphs[:4], paragraphs[4:] if control is None else control, **options)


def test_a_control_among_the_memorized_paragraphs_is_refused(neo):
    paragraphs = zoo.mixed(neo)
    with pytest.raises(mc.InputError, match="in the memorized set"):
        mc.core(neo, paragraphs[:4], paragraphs[3:])


def test_the_name_is_a_function_and_a_folder():
    import memcircuits.base.errors

    assert callable(mc.core)
    assert memcircuits.base.errors.InputError is mc.InputError
