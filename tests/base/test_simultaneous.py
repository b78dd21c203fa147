"""Statements about many values at once hold as often as they promise, where the truth is known."""

import numpy as np
import torch

from memcircuits.base.simultaneous import max_p_value, rank_intervals
from memcircuits.base.statistics import bootstrap_means, interval


def test_corrected_p_values_by_hand():
    observed = torch.tensor([3.0, 0.0])
    null = torch.tensor([[0.0, 1.0], [1.0, -1.0], [-1.0, 3.0]])
    every = np.array([[3, 0], [0, 1], [1, -1], [-1, 3]])
    standard = (every - every.mean(0)) / every.std(0, ddof=1)
    expected = (standard.max(1)[:, None] >= standard[0] - 1e-9).mean(0)
    np.testing.assert_allclose(max_p_value(observed, null).numpy(), expected, rtol=1e-6)


def named_without_reason(p_value, trials=400, n_values=48):
    """How often some value has p <= 0.05 though none differs from the null."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.1, 10, n_values)  # values of very different size count alike
    named = 0
    for _ in range(trials):
        common = torch.randn(200, 1, generator=generator)  # and may depend on each other
        draws = (common + torch.randn(200, n_values, generator=generator)) * spread
        named += bool((p_value(draws[0], draws[1:]) <= 0.05).any())
    return named / trials


def one_at_a_time(observed, null):
    return (1 + (null >= observed).sum(0)) / (1 + len(null))


def test_only_corrected_p_values_name_nothing_where_there_is_nothing():
    # 400 trials: a rate of 5 % has a standard error of 1.1 %.
    assert 0.02 < named_without_reason(max_p_value) < 0.08
    assert named_without_reason(one_at_a_time) > 0.4


def test_a_value_that_stands_out_can_be_named_among_a_thousand():
    """The smallest corrected p-value does not depend on how many values there are."""
    null = torch.randn(200, 1024, generator=torch.Generator().manual_seed(0))
    observed = torch.zeros(1024)
    observed[7] = 30.0
    p_value = max_p_value(observed, null)
    assert p_value.argmin() == 7
    assert p_value[7] < 0.05
    assert (p_value < 0.05).sum() == 1


def test_values_far_apart_have_one_rank_and_equal_ones_all():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(500, 3, generator=generator)
    apart, equal = torch.tensor([0.0, 100.0, 50.0]), torch.zeros(3)
    assert rank_intervals(apart, apart + noise).tolist() == [[3, 1, 2], [3, 1, 2]]
    assert rank_intervals(equal, noise).tolist() == [[1, 1, 1], [3, 3, 3]]


def test_a_common_disturbance_leaves_the_order_certain():
    """Differences are resampled as they are, not as differences of two separate intervals."""
    generator = torch.Generator().manual_seed(0)
    common = 10 * torch.randn(500, 1, generator=generator)
    values = torch.tensor([0.0, 1.0])
    draws = values + common + 0.01 * torch.randn(500, 2, generator=generator)
    assert rank_intervals(values, draws).tolist() == [[2, 1], [2, 1]]


def covered(ranks_of, trials=200, n=60):
    """How often the true ranks of 12 values, two of them equal to the first, are all allowed."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.tensor([1.0, 1.0, 1.0, *[0.5] * 4, *[0.0] * 5])
    # Equal values share ranks: whichever of them comes first, an interval must allow the best.
    best = 1 + (truth[:, None] > truth).sum(0)
    worst = len(truth) - (truth[:, None] < truth).sum(0)
    hits = 0
    for seed in range(trials):
        paragraph = torch.randn(n, 1, generator=generator)
        samples = truth + paragraph + 0.6 * torch.randn(n, len(truth), generator=generator)
        draws = bootstrap_means(samples, 400, torch.Generator().manual_seed(seed))
        low, high = ranks_of(samples.mean(0), draws)
        hits += bool(((low <= best) & (worst <= high)).all())
    return hits / trials


def bootstrapped_ranks(estimate, resampled):
    ranks = 1 + (-resampled).argsort(-1).argsort(-1)
    return interval(ranks.double())


def test_rank_intervals_cover_all_ranks_at_once_where_bootstrapped_ranks_do_not():
    assert covered(rank_intervals) > 0.91  # 200 trials: 95 % has a standard error of 1.5 %
    assert covered(bootstrapped_ranks) < 0.5
