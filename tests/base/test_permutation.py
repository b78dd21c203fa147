"""Permutation p-values: exact by enumeration, 5 % under the null, and small enough to matter."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats

from memcircuits.base import permutation
from memcircuits.base.permutation import permutation_test, permutations_needed
from memcircuits.base.statistics import benjamini_hochberg


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_equals_the_enumeration_of_all_labellings():
    """Welch's t by scipy, over all 126 labellings of 4 against 5."""
    values = torch.randn(9, 3, generator=generator(1)) + torch.tensor([0.0, 0.8, -1.0])
    first, second = values[:4], values[4:]
    outcome = permutation_test(first, second, 3, generator(), at_least=20000)
    for column in range(3):
        x = values[:, column].double().numpy()

        def t(rows, x=x):
            others = np.setdiff1d(np.arange(9), rows)
            return stats.ttest_ind(x[list(rows)], x[others], equal_var=False).statistic

        labellings = [t(rows) for rows in combinations(range(9), 4)]
        exact = np.mean(np.array(labellings) >= t(range(4)) - 1e-9)
        normal = stats.ttest_ind(x[:4], x[4:], equal_var=False, alternative="greater").pvalue
        assert float(outcome.p_value[column]) == pytest.approx(max(exact, normal), abs=0.015)
    assert not outcome.fitted.any()


def test_one_group_is_compared_by_its_difference():
    values = torch.arange(10.0)[:, None]
    outcome = permutation_test(values[9:], values[:9], 1, generator(), at_least=4000)
    assert float(outcome.p_value) == pytest.approx(0.1, abs=0.02)  # the largest of ten


def test_what_does_not_vary_is_never_significant():
    first, second = torch.zeros(6, 2), torch.zeros(7, 2)
    assert (permutation_test(first, second, 2, generator()).p_value == 1).all()


def null_rate(n_first, n_second, spread, n_tests, runs=100):
    """How often any of `n_tests` correlated tests is significant where nothing differs."""
    named = 0
    for seed in range(runs):
        g = generator(seed)
        shared = torch.randn(n_first + n_second, 1, generator=g)
        values = 0.5 * shared + torch.randn(n_first + n_second, n_tests, generator=g)
        values[:n_first] *= spread
        p = permutation_test(values[:n_first], values[n_first:], n_tests, g).p_value
        named += bool((benjamini_hochberg(p) < 0.05).any())
    return named / runs


@pytest.mark.parametrize(
    ("n_first", "n_second", "spread"), [(20, 20, 1.0), (20, 40, 0.4), (12, 30, 2.0)]
)
def test_the_null_stays_at_five_percent(n_first, n_second, spread):
    """Also where one set is smaller and varies more or less than the other."""
    assert null_rate(n_first, n_second, spread, n_tests=12) <= 0.05 + 3 * (0.05 * 0.95 / 100) ** 0.5


def test_a_fitted_tail_keeps_the_null(monkeypatch):
    monkeypatch.setattr(permutation, "MAX_PERMUTATIONS", 2000)
    assert null_rate(20, 25, 1.0, n_tests=200, runs=100) <= 0.05 + 3 * (0.05 * 0.95 / 100) ** 0.5


@pytest.mark.parametrize("n_tests", [144, 1024])
def test_one_component_of_many_can_be_significant(n_tests, monkeypatch):
    monkeypatch.setattr(permutation, "MAX_PERMUTATIONS", 2**16)
    g = generator(3)
    first, second = torch.randn(40, 8, generator=g), torch.randn(40, 8, generator=g)
    first[:, 0] += 1.6
    outcome = permutation_test(first, second, n_tests, g)
    p = torch.ones(n_tests)
    p[:8] = outcome.p_value
    q = benjamini_hochberg(p)
    assert q[0] < 0.05
    assert (q[1:] > 0.05).all()
    assert bool(outcome.fitted.any()) == (n_tests == 1024)


def test_a_fitted_p_value_is_near_the_exact_one(monkeypatch):
    """Normal samples: t-test p-values of 1e-4 to 1e-6, from a few thousand permutations."""
    monkeypatch.setattr(permutation, "MAX_PERMUTATIONS", 20000)
    g = generator(5)
    first, second = torch.randn(50, 6, generator=g), torch.randn(50, 6, generator=g)
    first += torch.linspace(0.8, 1.05, 6)
    outcome = permutation_test(first, second, 50000, g)
    exact = stats.ttest_ind(first, second, equal_var=False, alternative="greater").pvalue
    small = outcome.fitted.numpy()
    assert small.any()
    ratio = outcome.p_value.double().numpy()[small] / exact[small]
    assert (ratio > 0.2).all()
    assert (ratio < 50).all()  # rather too large than too small


def test_permutations_grow_with_the_number_of_tests():
    assert permutations_needed(144) == 57600
    assert permutation_test(torch.randn(3, 1), torch.randn(3, 1), 10, generator()).permutations == (
        4000
    )
