"""The metrics of a localizer, by hand and against SciPy."""

import math

import pytest
import torch
from scipy.stats import binomtest

import memcircuits as mc
from memcircuits.benchmark.metrics import METRICS, metrics, wilson


def test_metrics_by_hand():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.5, math.nan])
    truth = torch.tensor([False, False, True, False, True])
    result = metrics(scores, truth)
    assert result["recall_at_1"] == 0
    assert result["recall_at_k"] == 0.5
    assert result["mrr"] == 0.5
    # Of 6 pairs: 0.5 beats 0.1, ties with 0.5, loses to 0.9; what is not a number is last.
    assert result["auc"] == pytest.approx(1.5 / 6)
    assert (result["k"], result["units"]) == (2, 5)


def test_a_perfect_ranking_scores_one():
    perfect = metrics(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, True]))
    assert [perfect[name] for name in METRICS] == [1, 1, 1, 1]


@pytest.mark.parametrize("n_planted", [0, 5])
def test_a_truth_without_contrast_is_refused(n_planted):
    with pytest.raises(mc.InputError, match="truth"):
        metrics(torch.zeros(5), torch.arange(5) < n_planted)


def test_the_auc_is_the_mann_whitney_statistic():
    from scipy.stats import mannwhitneyu

    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(8, (40,), generator=generator).float()  # with ties
    truth = torch.rand(40, generator=generator) < 0.3
    u_statistic = mannwhitneyu(scores[truth].numpy(), scores[~truth].numpy()).statistic
    n_pairs = int(truth.sum()) * int((~truth).sum())
    assert metrics(scores, truth)["auc"] == pytest.approx(u_statistic / n_pairs)


def test_the_interval_of_a_proportion():
    for hits, n in ((0, 7), (5, 100), (20, 20)):
        expected = binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert all(map(math.isnan, wilson(1.0, 1)))  # one trial has no interval
