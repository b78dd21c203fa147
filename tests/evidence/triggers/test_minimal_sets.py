"""Minimal sets stop and start a recitation, as decoding by transformers shows."""

import pytest

import memcircuits as mc
from memcircuits.evidence.triggers.minimal_sets import minimal_sets
from memcircuits.evidence.triggers.perturbation import perturb_prefix
from tests.helpers import models as zoo
from tests.helpers.decoding import em_of


@pytest.fixture(scope="module")
def searched(neo):
    """Paragraphs that GPT-Neo recites, and their minimal sets."""
    paragraphs = zoo.reciting(neo, n=8)
    return paragraphs, minimal_sets(neo, paragraphs, threshold=0, draws=2)


def test_every_step_of_the_search_recites_what_it_says(searched, plain_neo):
    paragraphs, sets = searched
    for row in range(8):
        ids, steps = paragraphs.ids[row].clone(), int((sets.positions[row] >= 0).sum())
        assert len({*sets.positions[row, :steps].tolist()}) == steps
        for step in range(steps):
            ids[sets.positions[row, step]] = sets.replacements[row, step]
            decoded = plain_neo.decode(ids[None, :10], 12)
            assert em_of(decoded, paragraphs.continuation[[row]]) == sets.em[row, step]
        if not sets.stopping[row].isnan():
            assert sets.stopping[row] == steps
            assert sets.em[row, -1] == 0


def test_one_token_stops_where_it_does_in_the_full_sweep(searched, neo):
    paragraphs, sets = searched
    lowest_em = perturb_prefix(neo, paragraphs, draws=2).em.flatten(1).amin(-1)
    assert ((sets.stopping == 1) == (lowest_em == 0)).all()


def test_suffixes_recite_what_decoding_after_them_does(searched, plain_neo):
    paragraphs, sets = searched
    for length in (1, 4, 10):
        decoded = plain_neo.decode(paragraphs.prefix[:, 10 - length :], 12)
        em = em_of(decoded, paragraphs.continuation)
        assert sets.suffix_em[:, length - 1].tolist() == em.tolist()


def test_the_recitation_starts_at_the_shortest_suffix(searched):
    _, sets = searched
    for row, shortest in enumerate(sets.starting.tolist()):
        assert sets.suffix_em[row, shortest - 1] >= 12
        assert (sets.suffix_em[row, : shortest - 1] < 12).all()


def test_greedy_search_goes_on_where_one_token_is_not_enough(neo):
    paragraphs = zoo.reciting(neo, n=12, n_prefix=20, n_continuation=6)
    sets = minimal_sets(neo, paragraphs, threshold=0, replacement="neighbor", max_tokens=4)
    assert (sets.stopping > 1).any()
    assert (sets.em[:, 1:] <= sets.baseline_em[:, None]).all()
    stopped_at_once = minimal_sets(neo, paragraphs, threshold=5, max_tokens=1)
    assert stopped_at_once.positions.shape == (12, 1)
    frame = sets.to_frame()
    assert [len(p) for p in frame["positions"]] == (sets.positions >= 0).sum(-1).tolist()


def test_nothing_to_stop_takes_no_token(neo):
    controls = zoo.mixed(neo)[[4, 5]]
    sets = minimal_sets(neo, controls)
    assert sets.stopping.tolist() == [0.0, 0.0]
    assert (sets.positions == -1).all()


@pytest.mark.parametrize("threshold", [-1, 12])
def test_thresholds_are_numbers_of_tokens(neo, threshold):
    with pytest.raises(mc.InputError, match="threshold"):
        minimal_sets(neo, zoo.reciting(neo, n=1), threshold=threshold)
