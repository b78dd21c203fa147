"""Intervals and p-values over paragraphs, against numpy and by hand."""

import numpy as np
import pytest
import torch

from memcircuits.core.statistics import (
    benjamini_hochberg,
    bootstrap_interval,
    bootstrap_means,
    finite_mean,
    interval,
    left_out,
    permuted_differences,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_interval_is_the_central_95_percent(dtype):
    resampled = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = np.quantile(resampled.double().numpy(), [0.025, 0.975], axis=0)
    np.testing.assert_allclose(interval(resampled).numpy(), expected, rtol=1e-5)


def test_a_bootstrap_interval_is_that_of_the_resampled_means():
    samples = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    means = bootstrap_means(samples, 300, torch.Generator().manual_seed(7))
    assert torch.equal(bootstrap_interval(samples, seed=7, draws=300), interval(means))


def test_paragraphs_with_non_finite_numbers_are_left_out_and_counted():
    samples = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [3.0, 4.0]])
    assert finite_mean(samples).tolist() == [2.0, 3.0]
    assert left_out(torch.tensor([True, False, True])) == (
        "1 of 3 paragraphs had non-finite numbers and were left out",
    )
    assert left_out(torch.tensor([True])) == ()


def test_bootstrap_means_have_the_spread_of_the_mean():
    samples = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    means = bootstrap_means(samples, 4000, torch.Generator().manual_seed(1))
    torch.testing.assert_close(means.mean(0), samples.mean(0), atol=0.01, rtol=0)
    expected = samples.std(0, correction=0) / 200**0.5
    torch.testing.assert_close(means.std(0), expected, rtol=0.06, atol=0)


def test_permuted_differences_are_exact_on_a_hand_worked_case():
    first, second = torch.tensor([[0.0]]), torch.tensor([[1.0], [2.0]])
    null = permuted_differences(first, second, 600, torch.Generator().manual_seed(0))
    values, counts = null.flatten().round(decimals=4).unique(return_counts=True)
    assert values.tolist() == [-1.5, 0.0, 1.5]  # each paragraph alone against the other two
    assert counts.min() > 150


def test_benjamini_hochberg_by_hand():
    q = benjamini_hochberg(torch.tensor([0.01, 0.04, 0.03, 0.20]))
    torch.testing.assert_close(q, torch.tensor([0.04, 0.16 / 3, 0.16 / 3, 0.20]))
