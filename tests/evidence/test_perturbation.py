"""EM equals real greedy decoding at every position; pairs, causes and minimal sets do as told."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

import memcircuits as mc
from memcircuits.data.unigrams import UnigramTable
from memcircuits.evidence.triggers.minimal_sets import MinimalSets, minimal_sets
from memcircuits.evidence.triggers.perturbation import Perturbation, perturb_prefix
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.models.registry import adapt
from memcircuits.organism import DATA
from memcircuits.results.result import Result
from tests.helpers import models as zoo


@functools.cache
def hf_model(name):
    model = zoo.hf_model(name)
    # Tokens 0 and 1 are ordinary here: no token may end the text.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = None
    return model


def decoded(name, prefixes, n):
    """The continuation that transformers decodes greedily."""
    found = hf_model(name).generate(
        prefixes, attention_mask=torch.ones_like(prefixes), do_sample=False, max_new_tokens=n
    )
    assert found.shape == (len(prefixes), prefixes.shape[1] + n)
    return found[:, prefixes.shape[1] :]


def nll_of(name, ids, n_prefix):
    """NLL from the plain transformers model."""
    with torch.no_grad():
        log_prob = hf_model(name)(ids[:, :-1]).logits[:, n_prefix - 1 :].log_softmax(-1)
    return -log_prob.gather(-1, ids[:, n_prefix:, None])[..., 0].mean(-1)


def em_of(guess, truth):
    """Tokens equal before the first mismatch, counted one by one."""
    rows = []
    for a, b in zip(guess.tolist(), truth.tolist(), strict=True):
        count = 0
        while count < len(a) and a[count] == b[count]:
            count += 1
        rows.append(count)
    return torch.tensor(rows)


@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_em_equals_greedy_decoding_at_every_position_of_20_paragraphs(name):
    model = zoo.bridge(name)
    paragraphs = zoo.reciting(model, n=20)
    found = perturb_prefix(model, paragraphs, draws=1)
    prefixes = paragraphs.prefix[:, None].repeat(1, 10, 1)
    prefixes[:, range(10), range(10)] = found.replacements[..., 0]
    prefixes = prefixes.reshape(200, 10)
    truth = paragraphs.continuation.repeat_interleave(10, 0)
    expected = em_of(decoded(name, prefixes, 12), truth)
    assert found.em.flatten().tolist() == expected.tolist()
    assert 0 < expected.float().mean() < 12
    ids = torch.cat([prefixes, truth], 1)
    torch.testing.assert_close(found.nll.flatten(), nll_of(name, ids, 10), atol=1e-5, rtol=0)
    assert found.baseline_em.tolist() == [12] * 20


@pytest.mark.slow
def test_em_equals_greedy_decoding_of_the_organism():
    """Every prefix position of 20 recited paragraphs, decoded by transformers alone."""
    plain = AutoModelForCausalLM.from_pretrained(DATA, dtype=torch.float32).eval()
    planted = mc.Paragraphs.shipped("planted")
    often = [i for i, n in enumerate(planted.metadata["repetitions"]) if n == 256]
    paragraphs = planted[often[:20]]
    found = perturb_prefix(mc.load_model(), paragraphs)
    assert found.baseline_em.tolist() == [50] * 20
    for row in range(20):
        prefixes = paragraphs.prefix[[row]].repeat(50, 1)
        prefixes[range(50), range(50)] = found.replacements[row, :, 0]
        continued = plain.generate(
            prefixes,
            attention_mask=torch.ones_like(prefixes),
            do_sample=False,
            min_new_tokens=50,  # nothing ends a text before it is 50 tokens longer
            max_new_tokens=50,
            pad_token_id=0,
        )
        truth = paragraphs.continuation[[row]].expand(50, -1)
        assert found.em[row, :, 0].tolist() == em_of(continued[:, 50:], truth).tolist()
    assert 1 < (50 - found.em.float()).mean() < 49


@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_running_only_what_follows_the_replaced_token_changes_nothing(name, monkeypatch):
    model = zoo.bridge(name)
    paragraphs = zoo.reciting(model, n=18, n_prefix=20)  # longer than any local window
    adapter = adapt(model)
    assert adapter.supports_prefix_cache(paragraphs.ids.shape[1] - 1)
    runs = []
    run_after_prefix = adapter.run_after_prefix

    def counted(start, *arguments, **options):
        runs.append(start)
        return run_after_prefix(start, *arguments, **options)

    monkeypatch.setattr(adapter, "run_after_prefix", counted)
    shared = perturb_prefix(model, paragraphs, draws=2)
    assert len({*runs}) > 1
    monkeypatch.setattr(adapter, "supports_prefix_cache", lambda n_pos: False)
    runs.clear()
    whole = perturb_prefix(model, paragraphs, draws=2)
    assert not runs
    assert torch.equal(shared.em, whole.em)
    torch.testing.assert_close(shared.nll, whole.nll, atol=1e-5, rtol=0)


def test_baseline_and_surprisal_are_those_of_the_scan_and_of_the_plain_model(neo):
    paragraphs = zoo.mixed(neo)
    found, scanned = perturb_prefix(neo, paragraphs), mc.scan(neo, paragraphs)
    assert found.baseline_em.tolist() == scanned.em.tolist()
    torch.testing.assert_close(found.baseline_nll, scanned.nll)
    with torch.no_grad():
        log_prob = hf_model("gpt_neo")(paragraphs.prefix).logits.log_softmax(-1)
    expected = -log_prob[:, :-1].gather(-1, paragraphs.prefix[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.surprisal[:, 1:], expected, atol=1e-5, rtol=0)
    assert found.surprisal[:, 0].isnan().all()


@pytest.mark.skipif(not zoo.has_hooked(), reason="HookedTransformer is gone")
@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "neox", "llama"])
def test_hooked_transformer_agrees_with_the_bridge(name):
    bridge, hooked = zoo.bridge(name), zoo.hooked(name)
    paragraphs = zoo.reciting(bridge, n=3)
    options = {"draws": 2, "seed": 4}
    a, b = (perturb_prefix(m, paragraphs, **options) for m in (bridge, hooked))
    assert torch.equal(a.replacements, b.replacements)
    assert torch.equal(a.em, b.em)
    torch.testing.assert_close(a.nll, b.nll, atol=1e-4, rtol=0)


# -- replacements ---------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", ["random", "frequency", "neighbor", "second"])
def test_replacements_are_other_tokens_and_repeat_with_the_seed(neo, replacement):
    paragraphs = zoo.mixed(neo)
    state = torch.random.get_rng_state()
    options = {"replacement": replacement, "draws": 3}
    first = perturb_prefix(neo, paragraphs, seed=1, **options)
    again = perturb_prefix(neo, paragraphs, seed=1, **options)
    other = perturb_prefix(neo, paragraphs, seed=2, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (first.replacements != paragraphs.prefix[..., None]).all()
    assert first.replacements.min() >= 0
    assert first.replacements.max() < zoo.D_VOCAB
    assert torch.equal(first.replacements, again.replacements)
    assert torch.equal(first.nll, again.nll)
    drawn = torch.equal(first.replacements[:, 1:], other.replacements[:, 1:])
    assert drawn == (replacement in ("neighbor", "second"))


def test_random_replacements_reach_every_other_token(neo):
    paragraphs = mc.Paragraphs.from_tokens(torch.full((1, 4), 50), n_prefix=2)
    found = perturb_prefix(neo, paragraphs, draws=2000).replacements
    assert set(found.flatten().tolist()) == set(range(zoo.D_VOCAB)) - {50}


def test_frequency_matched_tokens_are_neighbors_in_rank(neo):
    counts = torch.randperm(zoo.D_VOCAB, generator=torch.Generator().manual_seed(0))
    table = UnigramTable(counts, "made up")
    paragraphs = zoo.mixed(neo)
    found = perturb_prefix(
        neo, paragraphs, replacement="frequency", draws=200, unigrams=table
    ).replacements
    # Counts are their own ranks here.
    distance = (counts[found] - counts[paragraphs.prefix][..., None]).abs()
    assert distance.min() == 1
    middle = (counts[paragraphs.prefix] >= 10) & (counts[paragraphs.prefix] < zoo.D_VOCAB - 10)
    assert distance[middle].max() == 10
    assert distance.max() <= 20  # at the ends of the table


def test_counting_the_paragraphs_themselves_is_said(neo):
    paragraphs = zoo.mixed(neo)
    assert "counted in the paragraphs" in str(
        perturb_prefix(neo, paragraphs, replacement="frequency").notes
    )
    table = UnigramTable.from_tokens(paragraphs.ids, zoo.D_VOCAB)
    given = perturb_prefix(neo, paragraphs, replacement="frequency", unigrams=table)
    assert given.notes == ()


def test_neighbors_are_nearest_in_cosine(neo):
    paragraphs = zoo.mixed(neo)
    found = perturb_prefix(neo, paragraphs, replacement="neighbor", draws=2).replacements
    embedding = hf_model("gpt_neo").transformer.wte.weight.detach()
    for row, position in [(0, 0), (3, 7)]:
        token = paragraphs.ids[row, position]
        cosine = torch.cosine_similarity(embedding, embedding[token][None], dim=-1)
        cosine[token] = -2
        assert found[row, position].tolist() == cosine.argsort(descending=True)[:2].tolist()


def test_second_choice_is_the_most_likely_other_token(neo):
    paragraphs = zoo.mixed(neo)
    found = perturb_prefix(neo, paragraphs, replacement="second", draws=2)
    with torch.no_grad():
        logits = hf_model("gpt_neo")(paragraphs.prefix).logits
    for row, position in [(0, 1), (2, 9)]:
        order = logits[row, position - 1].argsort(descending=True).tolist()
        order.remove(int(paragraphs.ids[row, position]))
        assert found.replacements[row, position].tolist() == order[:2]
    assert "first token" in found.notes[0]


# -- pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_greedy_continuations_equal_decoding_from_any_guess(name, shares, monkeypatch):
    model = zoo.bridge(name)
    if not shares:
        monkeypatch.setattr(adapt(model), "supports_prefix_cache", lambda n_pos: False)
    guess = mc.Paragraphs.from_tokens(zoo.random_ids(20, 22, seed=3), n_prefix=10)
    found = greedy_continuations(model, guess)
    assert torch.equal(found.prefix, guess.prefix)
    assert torch.equal(found.continuation, decoded(name, guess.prefix, 12))
    assert torch.equal(greedy_continuations(model, found).ids, found.ids)


def test_pairs_are_the_worst_replacements_with_what_the_model_then_writes(neo):
    paragraphs = zoo.reciting(neo, n=6)
    found = perturb_prefix(neo, paragraphs, draws=3)
    clean, corrupted = found.pairs()
    assert torch.equal(clean.ids, paragraphs.ids)
    assert clean.names == corrupted.names
    expected = decoded("gpt_neo", corrupted.prefix, 12)
    assert torch.equal(corrupted.continuation, expected)
    metadata = pd.DataFrame(corrupted.metadata)
    for row, fact in metadata.iterrows():
        (changed,) = (corrupted.prefix[row] != clean.prefix[row]).nonzero().flatten().tolist()
        assert fact["position"] == changed
        assert fact["replacement"] == corrupted.prefix[row, changed]
        assert fact["em"] == found.em[row].min() == fact["first_impacted"]
        worst = found.nll[row][found.em[row] == fact["em"]].max()
        assert worst in found.nll[row, changed]
    assert metadata["em"].tolist() == em_of(expected, clean.continuation).tolist()


def test_paragraphs_that_nothing_disturbs_are_left_out(neo):
    paragraphs = zoo.reciting(neo, n=3)
    found = perturb_prefix(neo, paragraphs)
    replacements = found.replacements.clone()
    replacements[1] = paragraphs.prefix[1, :, None]  # as if it were replaced by itself
    unmoved = Perturbation(**{**vars(found), "replacements": replacements})
    clean, corrupted = unmoved.pairs()
    assert clean.names == corrupted.names == (paragraphs.names[0], paragraphs.names[2])
    alone = perturb_prefix(neo, paragraphs[1])
    same = Perturbation(**{**vars(alone), "replacements": replacements[[1]]})
    with pytest.raises(mc.InputError, match="no single replacement"):
        same.pairs()


# -- summaries ------------------------------------------------------------------------------------


def made_up(em, *, baseline=12.0, ids=None, surprisal=None):
    em = torch.as_tensor(em)
    n, length, _ = em.shape
    neo = zoo.bridge("gpt_neo")
    real = perturb_prefix(neo, zoo.reciting(neo, n=1))
    return Perturbation(
        em=em,
        nll=-em.float(),
        replacements=torch.zeros_like(em),
        baseline_em=torch.full((n,), baseline),
        baseline_nll=torch.zeros(n),
        surprisal=torch.zeros(n, length) if surprisal is None else surprisal,
        ids=zoo.random_ids(n, length + 2) if ids is None else ids,
        n_prefix=length,
        names=tuple(f"p{i}" for i in range(n)),
        replacement="random",
        provenance=real.provenance,
    )


def test_drop_by_hand():
    found = made_up([[[12, 12], [6, 8]], [[0, 2], [12, 12]]])
    assert found.em_drop.tolist() == [[0.0, 5.0], [11.0, 0.0]]
    mean, low, high = found.mean_em_drop()
    assert mean == 4.0
    assert (low, high) == (2.5, 5.5)  # each paragraph twice, at the ends


def test_frame_by_hand():
    frame = made_up([[[12, 12], [6, 8]], [[0, 2], [12, 12]]]).to_frame()
    assert frame["id"].tolist() == ["p0", "p0", "p1", "p1"]
    assert frame["position"].tolist() == [0, 1, 0, 1]
    assert frame["em"].tolist() == [12.0, 7.0, 1.0, 12.0]
    assert frame["em_se"].tolist() == [0.0, 1.0, 1.0, 0.0]
    assert frame["drop"].tolist() == [0.0, 5.0, 11.0, 0.0]
    assert made_up([[[3]]]).to_frame()["em_se"].isna().all()


def test_curves_and_figures(neo):
    found = perturb_prefix(neo, zoo.reciting(neo, n=3), draws=4)
    mean, one = found.curves(), found.curves(1)
    np.testing.assert_allclose(mean["em"], found.em.float().mean((0, 2)), rtol=1e-6)
    np.testing.assert_allclose(one["nll"], found.nll[1].mean(-1), rtol=1e-6)
    assert (mean["em_low"] <= mean["em"]).all()
    assert (mean["em"] <= mean["em_high"]).all()
    assert "em_low" not in perturb_prefix(neo, zoo.reciting(neo, n=1)).curves(0)
    assert found.figure(1).layout.title.text.endswith(found.names[1])
    assert list(found.figure().data)


def test_causes_equal_least_squares_with_a_dummy_per_paragraph():
    generator = torch.Generator().manual_seed(0)
    n, length = 30, 12
    ids = zoo.random_ids(n, length + 2)
    counts = torch.randint(0, 1000, (zoo.D_VOCAB,), generator=generator)
    table = UnigramTable(counts, "made up")
    surprisal = torch.rand(n, length, generator=generator) * 5
    em = torch.randint(0, 13, (n, length, 1), generator=generator)
    found = made_up(em, ids=ids, surprisal=surprisal).causes(table, resamples=500)

    # Independent route: raw columns, one dummy variable per paragraph, numpy.
    rarity = -np.log((counts.numpy() + 1) / (counts.numpy() + 1).sum())[ids[:, 1:length].numpy()]
    position = np.broadcast_to(np.arange(1, length), (n, length - 1))
    columns = [position, rarity, surprisal[:, 1:].numpy()]
    dummies = np.kron(np.eye(n), np.ones((length - 1, 1)))
    x = np.concatenate([np.stack([c.reshape(-1) for c in columns], 1), dummies], 1)
    y = (12.0 - em[:, 1:, 0].double().numpy()).reshape(-1)
    slopes = np.linalg.lstsq(x, y, rcond=None)[0][:3]
    spread = [np.std(c - c.mean(1, keepdims=True), ddof=1) for c in columns]
    np.testing.assert_allclose(found["coefficient"], slopes * spread, rtol=1e-4, atol=1e-5)
    assert found["cause"].tolist() == ["position", "rarity", "surprisal"]


def test_causes_find_the_cause_and_clear_the_others():
    generator = torch.Generator().manual_seed(1)
    n, length = 60, 20
    ids = zoo.random_ids(n, length + 2, seed=5)
    counts = torch.arange(zoo.D_VOCAB) ** 3
    table = UnigramTable(counts, "made up")
    rarity = -table.log_prob[ids[:, :length]]
    # Surprisal follows rarity, but only rarity breaks the recitation.
    surprisal = rarity + torch.randn(n, length, generator=generator)
    noise = torch.randn(n, length, generator=generator)
    fragile = 5 * torch.randn(n, 1, generator=generator)
    em = (40 - 2 * rarity - noise - fragile)[..., None]
    found = made_up(em, baseline=50.0, ids=ids, surprisal=surprisal)
    causes = found.causes(table).set_index("cause")
    spread = (rarity[:, 1:] - rarity[:, 1:].mean(1, keepdim=True)).flatten().std()
    assert causes.loc["rarity", "ci_low"] < 2 * spread < causes.loc["rarity", "ci_high"]
    assert causes.loc["rarity", "spearman_low"] > 0.5
    for cause in ("position", "surprisal"):
        assert causes.loc[cause, "ci_low"] < 0 < causes.loc[cause, "ci_high"]
    assert causes.loc["surprisal", "spearman_low"] > 0.2  # what a plot alone would show


# -- minimal sets ---------------------------------------------------------------------------------


def test_minimal_sets_stop_and_start_what_they_say():
    model = zoo.bridge("gpt_neo")
    paragraphs = zoo.reciting(model, n=8)
    found = minimal_sets(model, paragraphs, threshold=0, draws=2)
    for row in range(8):
        ids, steps = paragraphs.ids[row].clone(), int((found.positions[row] >= 0).sum())
        assert len({*found.positions[row, :steps].tolist()}) == steps
        for step in range(steps):
            ids[found.positions[row, step]] = found.replacements[row, step]
            em = em_of(decoded("gpt_neo", ids[None, :10], 12), paragraphs.continuation[[row]])
            assert em == found.em[row, step]
        if not found.stopping[row].isnan():
            assert found.stopping[row] == steps
            assert found.em[row, -1] == 0
    # One token suffices exactly where it does in the full sweep.
    single = perturb_prefix(model, paragraphs, draws=2)
    assert ((found.stopping == 1) == (single.em.flatten(1).amin(-1) == 0)).all()
    for length in (1, 4, 10):
        short = paragraphs.prefix[:, 10 - length :]
        em = em_of(decoded("gpt_neo", short, 12), paragraphs.continuation)
        assert found.suffix_em[:, length - 1].tolist() == em.tolist()
    shortest = found.starting
    rows = torch.arange(8)
    assert (found.suffix_em[rows, shortest - 1] >= 12).all()
    assert all((found.suffix_em[row, : shortest[row] - 1] < 12).all() for row in range(8))


def test_greedy_search_goes_on_where_one_token_is_not_enough(neo):
    paragraphs = zoo.reciting(neo, n=12, n_prefix=20, n_continuation=6)
    found = minimal_sets(neo, paragraphs, threshold=0, replacement="neighbor", max_tokens=4)
    assert (found.stopping > 1).any()
    assert (found.em[:, 1:] <= found.baseline_em[:, None]).all()
    stopped_at_once = minimal_sets(neo, paragraphs, threshold=5, max_tokens=1)
    assert stopped_at_once.positions.shape == (12, 1)
    frame = found.to_frame()
    assert [len(p) for p in frame["positions"]] == (found.positions >= 0).sum(-1).tolist()


def test_nothing_to_stop_takes_no_token(neo):
    controls = zoo.mixed(neo)[[4, 5]]
    found = minimal_sets(neo, controls)
    assert found.stopping.tolist() == [0.0, 0.0]
    assert (found.positions == -1).all()


# -- results and errors ---------------------------------------------------------------------------


def test_results_survive_saving(neo, tmp_path):
    paragraphs = zoo.reciting(neo, n=3)
    found = perturb_prefix(neo, paragraphs, draws=2)
    loaded = Perturbation.load(found.save(tmp_path / "p.safetensors"))
    pd.testing.assert_frame_equal(loaded.to_frame(), found.to_frame())
    assert loaded.names == found.names
    with pytest.raises(mc.InputError, match="pass model="):
        loaded.pairs()
    assert torch.equal(loaded.pairs(model=neo).corrupted.ids, found.pairs().corrupted.ids)
    sets = minimal_sets(neo, paragraphs)
    again = Result.load(sets.save(tmp_path / "m.safetensors"))
    assert isinstance(again, MinimalSets)
    pd.testing.assert_frame_equal(again.to_frame(), sets.to_frame())


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"replacement": "rare"}, "replacement"),
        ({"draws": 0}, "draws"),
        ({"draws": 101, "replacement": "neighbor"}, "draws"),
        ({"memory_budget": 0}, "memory_budget"),
        (
            {"replacement": "frequency", "unigrams": UnigramTable(torch.ones(5).long(), "x")},
            "unigrams",
        ),
    ],
)
def test_bad_options_name_the_argument(neo, options, argument):
    with pytest.raises(mc.InputError) as error:
        perturb_prefix(neo, zoo.reciting(neo, n=1), **options)
    assert error.value.argument == argument


@pytest.mark.parametrize("threshold", [-1, 12])
def test_thresholds_are_numbers_of_tokens(neo, threshold):
    with pytest.raises(mc.InputError, match="threshold"):
        minimal_sets(neo, zoo.reciting(neo, n=1), threshold=threshold)


def test_small_memory_gives_the_same_numbers(neo):
    paragraphs = zoo.reciting(neo, n=2)
    whole = perturb_prefix(neo, paragraphs)
    pieces = perturb_prefix(neo, paragraphs, memory_budget=200_000)
    assert torch.equal(whole.em, pieces.em)
    torch.testing.assert_close(whole.nll, pieces.nll, atol=1e-5, rtol=0)


def test_non_finite_logits_are_refused():
    model = zoo.bridge("gpt2", seed=3)
    with torch.no_grad():
        next(model.unembed.parameters()).fill_(torch.nan)
    with pytest.raises(mc.InputError, match="non-finite"):
        perturb_prefix(model, mc.Paragraphs.from_tokens(zoo.random_ids(2, 8), n_prefix=4))
