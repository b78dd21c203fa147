"""EM equals greedy decoding at every position; replacements are the tokens they should be."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import memcircuits as mc
from memcircuits.data.unigrams import UnigramTable
from memcircuits.evidence.triggers.perturbation import perturb_prefix
from memcircuits.models.registry import adapt
from memcircuits.organism import DATA
from tests.helpers import models as zoo
from tests.helpers.decoding import PlainModel, em_of
from tests.helpers.organism import recited


@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_em_equals_greedy_decoding_at_every_position_of_20_paragraphs(name):
    model, plain = zoo.bridge(name), PlainModel(name)
    paragraphs = zoo.reciting(model, n=20)
    perturbation = perturb_prefix(model, paragraphs, draws=1)
    prefixes = paragraphs.prefix[:, None].repeat(1, 10, 1)
    prefixes[:, range(10), range(10)] = perturbation.replacements[..., 0]
    prefixes = prefixes.reshape(200, 10)
    truth = paragraphs.continuation.repeat_interleave(10, 0)
    expected = em_of(plain.decode(prefixes, 12), truth)
    assert perturbation.em.flatten().tolist() == expected.tolist()
    assert 0 < expected.float().mean() < 12
    ids = torch.cat([prefixes, truth], 1)
    torch.testing.assert_close(perturbation.nll.flatten(), plain.nll(ids, 10), atol=1e-5, rtol=0)
    assert perturbation.baseline_em.tolist() == [12] * 20


@pytest.mark.slow
def test_em_equals_greedy_decoding_of_the_organism():
    """Every prefix position of 8 recited paragraphs, decoded by transformers alone."""
    plain = AutoModelForCausalLM.from_pretrained(DATA, dtype=torch.float32).eval()
    model = mc.load_model()
    paragraphs = recited(model, 8)
    perturbation = perturb_prefix(model, paragraphs)
    assert perturbation.baseline_em.tolist() == [50] * 8
    for row in range(8):
        prefixes = paragraphs.prefix[[row]].repeat(50, 1)
        prefixes[range(50), range(50)] = perturbation.replacements[row, :, 0]
        continued = plain.generate(
            prefixes,
            attention_mask=torch.ones_like(prefixes),
            do_sample=False,
            min_new_tokens=50,  # nothing ends a text before it is 50 tokens longer
            max_new_tokens=50,
            pad_token_id=0,
        )
        truth = paragraphs.continuation[[row]].expand(50, -1)
        assert perturbation.em[row, :, 0].tolist() == em_of(continued[:, 50:], truth).tolist()
    assert 1 < (50 - perturbation.em.float()).mean() < 49


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


def test_baseline_and_surprisal_are_those_of_the_scan_and_of_the_plain_model(neo, plain_neo):
    paragraphs = zoo.mixed(neo)
    perturbation, scan = perturb_prefix(neo, paragraphs), mc.scan(neo, paragraphs)
    assert perturbation.baseline_em.tolist() == scan.em.tolist()
    torch.testing.assert_close(perturbation.baseline_nll, scan.nll)
    log_prob = plain_neo.logits(paragraphs.prefix).log_softmax(-1)
    expected = -log_prob[:, :-1].gather(-1, paragraphs.prefix[:, 1:, None])[..., 0]
    torch.testing.assert_close(perturbation.surprisal[:, 1:], expected, atol=1e-5, rtol=0)
    assert perturbation.surprisal[:, 0].isnan().all()


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
    replacements = perturb_prefix(neo, paragraphs, draws=2000).replacements
    assert set(replacements.flatten().tolist()) == set(range(zoo.D_VOCAB)) - {50}


def test_frequency_matched_tokens_are_neighbors_in_rank(neo):
    counts = torch.randperm(zoo.D_VOCAB, generator=torch.Generator().manual_seed(0))
    table = UnigramTable(counts, "made up")
    paragraphs = zoo.mixed(neo)
    replacements = perturb_prefix(
        neo, paragraphs, replacement="frequency", draws=200, unigrams=table
    ).replacements
    # Counts are their own ranks here.
    distance = (counts[replacements] - counts[paragraphs.prefix][..., None]).abs()
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


def test_neighbors_are_nearest_in_cosine(neo, plain_neo):
    paragraphs = zoo.mixed(neo)
    replacements = perturb_prefix(neo, paragraphs, replacement="neighbor", draws=2).replacements
    embedding = plain_neo.model.transformer.wte.weight.detach()
    for row, position in [(0, 0), (3, 7)]:
        token = paragraphs.ids[row, position]
        cosine = torch.cosine_similarity(embedding, embedding[token][None], dim=-1)
        cosine[token] = -2
        assert replacements[row, position].tolist() == cosine.argsort(descending=True)[:2].tolist()


def test_second_choice_is_the_most_likely_other_token(neo, plain_neo):
    paragraphs = zoo.mixed(neo)
    perturbation = perturb_prefix(neo, paragraphs, replacement="second", draws=2)
    logits = plain_neo.logits(paragraphs.prefix)
    for row, position in [(0, 1), (2, 9)]:
        order = logits[row, position - 1].argsort(descending=True).tolist()
        order.remove(int(paragraphs.ids[row, position]))
        assert perturbation.replacements[row, position].tolist() == order[:2]
    assert "first token" in perturbation.notes[0]
