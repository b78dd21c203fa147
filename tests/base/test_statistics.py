"""Intervals and p-values over groups of paragraphs, against numpy and by hand."""

import itertools

import numpy as np
import pytest
import torch

from memcircuits.base.statistics import (
    benjamini_hochberg,
    bootstrap_interval,
    bootstrap_means,
    finite_mean,
    group_means,
    group_notes,
    interval,
    left_out,
    permutation_p_value,
    permuted_differences,
    smallest_p_value,
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


def by_hand(samples, groups):
    """Group means by numpy, in the order of the groups' numbers."""
    return np.stack([samples[groups == g].mean(0) for g in np.unique(groups)])


@pytest.fixture
def clustered():
    """30 paragraphs in 9 groups of different sizes, two values each."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(30, 2)), rng.integers(0, 9, 30)


def test_group_means_are_those_by_numpy(clustered):
    samples, groups = clustered
    means = group_means(torch.from_numpy(samples), torch.from_numpy(groups))
    np.testing.assert_allclose(means.numpy(), by_hand(samples, groups), rtol=1e-12)
    counts = torch.tensor([1, 2, 4])
    assert group_means(counts, torch.tensor([0, 0, 1])).tolist() == [1.5, 4.0]
    assert group_means(counts, None) is counts


def test_a_cluster_bootstrap_is_that_by_numpy(clustered):
    samples, groups = clustered
    means = by_hand(samples, groups)
    rng = np.random.default_rng(1)
    resampled = [means[rng.integers(0, len(means), len(means))].mean(0) for _ in range(20_000)]
    expected = np.quantile(resampled, [0.025, 0.975], axis=0)
    ours = bootstrap_interval(
        torch.from_numpy(samples), torch.from_numpy(groups), draws=20_000, seed=2
    )
    np.testing.assert_allclose(ours.numpy(), expected, atol=0.02)
    rows = bootstrap_interval(torch.from_numpy(samples), draws=20_000, seed=2).numpy()
    assert np.abs(rows - expected).max() > 0.1  # paragraphs as if independent: another interval


def test_a_group_permutation_is_exact_by_enumeration(clustered):
    samples, groups = (a[:12] for a in clustered)
    means = by_hand(samples, groups)
    first, second = means[:3], means[3:]
    observed = first.mean(0) - second.mean(0)
    differences = [
        means[list(chosen)].mean(0) - np.delete(means, list(chosen), axis=0).mean(0)
        for chosen in itertools.combinations(range(len(means)), 3)
    ]
    expected = (np.array(differences) >= observed - 1e-9).mean(0)
    null = permuted_differences(
        torch.from_numpy(first),
        torch.from_numpy(second),
        20_000,
        torch.Generator().manual_seed(0),
    )
    p_value = permutation_p_value(torch.from_numpy(observed).float(), null)
    np.testing.assert_allclose(p_value.numpy(), expected, atol=0.015)
    assert smallest_p_value(3, len(means) - 3) == pytest.approx(1 / len(differences))


def test_a_relabelling_that_is_the_observed_one_counts_as_equal():
    generator = torch.Generator().manual_seed(0)
    first = 1e3 + torch.randn(1, 40, generator=generator)
    second = torch.randn(20, 40, generator=generator)
    null = permuted_differences(first, second, 2000, generator)
    p_value = permutation_p_value(first.mean(0) - second.mean(0), null)
    # The first paragraph is the largest of 21 in every column.
    assert p_value.sub(1 / 21).abs().max() < 0.015


def null_p_values(grouped, trials=300):
    """p-values of sets that do not differ, of documents whose paragraphs are nearly alike."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([8, 1, 3, 12, 2, 6, 5, 3])
    groups = torch.arange(len(sizes)).repeat_interleave(sizes)
    p_values = []
    for _ in range(trials):
        sets = []
        for _ in range(2):
            document = torch.randn(len(sizes), generator=generator)[groups]
            samples = document + 0.3 * torch.randn(len(groups), generator=generator)
            sets.append(group_means(samples, groups) if grouped else samples)
        null = permuted_differences(sets[0], sets[1], 199, generator)
        p_values.append(float(permutation_p_value(sets[0].mean() - sets[1].mean(), null)))
    return torch.tensor(p_values)


def null_coverage(grouped, trials=300, n_documents=30):
    """How often the 95 % interval of a mean of 0 contains 0."""
    generator = torch.Generator().manual_seed(1)
    groups = torch.arange(n_documents).repeat_interleave(6)
    hits = 0
    for seed in range(trials):
        document = torch.randn(n_documents, generator=generator)[groups]
        samples = document + 0.3 * torch.randn(len(groups), generator=generator)
        low, high = bootstrap_interval(
            samples, groups if grouped else None, seed=seed, draws=500
        ).tolist()
        hits += low <= 0 <= high
    return hits / trials


def test_dependent_paragraphs_give_false_positives_at_the_level_only_as_groups():
    # 300 trials: a rate of 5 % has a standard error of 1.3 %.
    assert 0.02 < float((null_p_values(grouped=True) <= 0.05).float().mean()) < 0.08
    assert float((null_p_values(grouped=False) <= 0.05).float().mean()) > 0.2


def test_intervals_of_dependent_paragraphs_cover_only_as_groups():
    assert null_coverage(grouped=True) > 0.9
    assert null_coverage(grouped=False) < 0.7


def former_interval(samples, seed, draws):
    """The bootstrap of independent paragraphs, as it was before there were groups."""
    n = len(samples)
    generator = torch.Generator().manual_seed(seed)
    resamples = torch.randint(n, (draws, n), generator=generator)
    weights = torch.zeros(draws, n).scatter_add_(1, resamples, torch.ones(draws, n)) / n
    means = (weights @ samples.reshape(n, -1).float()).view(draws, *samples.shape[1:])
    return torch.quantile(means, torch.tensor([0.025, 0.975]), dim=0)


def test_groups_of_one_paragraph_change_no_bit():
    samples = torch.randn(23, 6, 8, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(23)
    assert torch.equal(
        bootstrap_interval(samples, groups, seed=3, draws=300), former_interval(samples, 3, 300)
    )
    assert torch.equal(finite_mean(samples, groups), samples.mean(0))


def test_one_group_has_no_interval_and_few_groups_say_so():
    samples = torch.randn(4, 3)
    assert bootstrap_interval(samples[:1]).isnan().all()
    assert bootstrap_interval(samples, torch.zeros(4, dtype=torch.long)).isnan().all()
    assert group_notes({"given": torch.arange(5)}) == ()
    assert group_notes({"given": torch.tensor([0, 1, 2, 3, 4, 0])}) == (
        "6 given paragraphs are 5 independent groups: copies, near copies and parts of one "
        "document count once together.",
    )
    assert group_notes({"memorized": torch.tensor([0, 0])}) == (
        "2 memorized paragraphs are 1 independent group: copies, near copies and parts of one "
        "document count once together.",
        "One independent group of memorized paragraphs: there is no interval.",
    )
    assert group_notes({"control": torch.arange(4)}) == (
        "4 independent groups of control paragraphs: intervals from fewer than 5 are too narrow.",
    )
