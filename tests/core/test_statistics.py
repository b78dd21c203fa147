"""Intervals over paragraphs, against numpy."""

import numpy as np
import pytest
import torch

from memcircuits.core.statistics import (
    bootstrap_interval,
    bootstrap_means,
    finite_mean,
    interval,
    left_out,
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
