"""Measures beyond greedy EM, from the same pass: worked by hand or by simulation."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import memcircuits as mc
from memcircuits.measure.recitation_statistics import (
    borders_on_recitation,
    em_buckets,
    samples_needed,
)
from tests.helpers import models as zoo


@pytest.fixture(scope="module")
def by_hand(neo):
    """A scan whose numbers are chosen: two paragraphs, four continuation tokens."""
    paragraphs = mc.Paragraphs.from_tokens(zoo.random_ids(2, 14), n_prefix=10)
    scan_result = mc.scan(neo, paragraphs)
    log_prob = torch.tensor([[0.5, 0.25, 1.0, 1.0], [0.5, 0.5, 0.5, 0.125]]).log()
    correct = torch.tensor([[True, False, True, True], [True, True, True, True]])
    return dataclasses.replace(scan_result, token_log_prob=log_prob, token_correct=correct)


def test_bits(by_hand):
    assert by_hand.bits.tolist() == pytest.approx([3, 6])


def test_min_k_is_the_mean_of_the_least_likely(by_hand):
    assert by_hand.min_k(0.5).tolist() == pytest.approx(
        [(math.log(0.5) + math.log(0.25)) / 2, (math.log(0.125) + math.log(0.5)) / 2]
    )
    assert by_hand.min_k(0.01).tolist() == pytest.approx([math.log(0.25), math.log(0.125)])
    assert by_hand.min_k(1.0).tolist() == pytest.approx((-by_hand.nll).tolist())


def test_loose_match_goes_on_after_a_mismatch(by_hand):
    assert by_hand.em.tolist() == [1, 4]
    assert by_hand.loose_match.tolist() == [0.75, 1.0]


def test_k_extractable(by_hand):
    assert by_hand.extractable(1).tolist() == [True, True]
    assert by_hand.extractable(2).tolist() == [False, True]
    assert by_hand.extractable(4).tolist() == by_hand.is_memorized.tolist()
    with pytest.raises(mc.InputError, match="has 4 tokens"):
        by_hand.extractable(5)


@pytest.mark.parametrize("k", [32, 50, 64])
def test_k_extractability_of_recited_paragraphs(neo, k):
    """k tokens of prefix, k of continuation: what the benchmarks of that length ask."""
    recited = zoo.reciting(neo, n=2, n_prefix=64, n_continuation=64)
    ids = recited.ids[:, 64 - k : 64 + k] if k < 64 else recited.ids
    scan_result = mc.scan(neo, mc.Paragraphs.from_tokens(ids, n_prefix=k))
    assert torch.equal(scan_result.extractable(k), scan_result.em == k)
    if k == 64:
        assert scan_result.extractable(k).all()


def test_samples_by_hand(by_hand):
    # p = 1/8: 1 - (7/8)^n >= 0.9 from n = 18 on; p = 1/64: from n = 147 on.
    assert by_hand.samples_needed(0.9).tolist() == [18, 147]
    assert 1 - (7 / 8) ** 18 >= 0.9 > 1 - (7 / 8) ** 17
    assert by_hand.discoverable(18, 0.9).tolist() == [True, False]
    assert by_hand.discoverable(17, 0.9).tolist() == [False, False]


def test_samples_at_the_edges():
    result = samples_needed(np.array([0.0, -1e-12, -700.0, -800.0, np.nan]), 0.9)
    assert result[:2].tolist() == [1, 1]
    assert np.isfinite(result[2])
    assert result[2] > 1e300
    assert np.isinf(result[3])
    assert np.isnan(result[4])
    with pytest.raises(mc.InputError, match="between 0 and 1"):
        samples_needed(np.zeros(1), 1.0)


def test_discoverable_extraction_equals_sampling(neo):
    """Draw continuations of two tokens from the model: they appear as often as p says."""
    paragraphs = mc.Paragraphs.from_tokens(zoo.random_ids(1, 10), n_prefix=8)
    p = mc.scan(neo, paragraphs).log_prob.exp().item()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model = zoo.hf_model("gpt_neo")
        first = model(paragraphs.prefix).logits[0, -1].softmax(-1)
        drawn = torch.multinomial(first, 200_000, replacement=True, generator=generator)
        hits = drawn == paragraphs.ids[0, 8]
        second = model(paragraphs.ids[:, :9]).logits[0, -1].softmax(-1)
        more = torch.multinomial(second, int(hits.sum()), replacement=True, generator=generator)
    seen = (more == paragraphs.ids[0, 9]).sum().item()
    assert seen == pytest.approx(200_000 * p, abs=4 * math.sqrt(200_000 * p) + 1)


def test_buckets_are_the_papers():
    em = np.array([0, 10, 11, 29, 30, 49, 50])
    assert em_buckets(em, 50) == ["0-10", "0-10", "11-29", "11-29", "30-49", "30-49", "50"]
    assert em_buckets(np.array([0, 2, 3, 7, 8, 11, 12]), 12)[1:3] == ["0-2", "3-7"]
    assert em_buckets(np.array([0, 1]), 1) == ["0-0", "1"]


def test_facts_never_hide_measures(neo):
    """The paper's own table has columns em and nll: ours are the ones measured."""
    given = zoo.mixed(neo)
    given = mc.Paragraphs(given.ids, 10, given.names, {"em": (99,) * 8, "count": (1, 2) * 4})
    frame = mc.scan(neo, given).to_frame()
    assert frame["em"].max() == 12
    assert frame["given_em"].tolist() == [99] * 8
    assert frame["count"].tolist() == [1, 2] * 4


def test_the_duplication_curve_by_hand(neo):
    given = zoo.mixed(neo)
    scan_result = mc.scan(
        neo, mc.Paragraphs(given.ids, 10, given.names, {"count": (4,) * 4 + (1,) * 4})
    )
    curve = scan_result.by_repetitions()
    assert curve["repetitions"].tolist() == [1, 4]
    assert curve["em"].tolist() == [scan_result.em[4:].float().mean().item(), 12]
    assert curve["memorized"].tolist() == [0, 4]
    assert any(list(trace.x) == [1, 4] for trace in scan_result.figure().data)


def test_many_counts_are_grouped_by_powers_of_two(neo):
    ids = zoo.random_ids(25, 22)
    given = mc.Paragraphs(ids, 10, metadata={"count": tuple(range(25))})
    curve = mc.scan(neo, given).by_repetitions()
    assert curve["repetitions"].tolist() == [0, 1, 2, 4, 8, 16]
    assert curve["n"].tolist() == [1, 1, 2, 4, 8, 9]


def test_windows_beside_a_passage_are_told_from_others():
    em = np.array([0, 24, 29, 30, 49, 50])  # a window 9 tokens behind recites 41, but for slips

    def beside(stride):
        return em[borders_on_recitation(em, 50, stride)].tolist()

    assert beside(10) == [30, 49]
    assert beside(1) == []
    assert beside(100) == [29, 30, 49]  # farther apart: at least half of the continuation
