"""Candidates for the score of heads: effects by other routes, nulls, and known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr, ttest_ind

import memcircuits as mc
from memcircuits.benchmark.estimands import (
    ESTIMANDS,
    EffectSets,
    HeadEffects,
    _auc,
    _partial,
    _t,
    compare_estimands,
    head_effects,
    matched_pairs,
    scaled,
    score_heads,
    significant_heads,
)
from tests.helpers import models as zoo
from tests.helpers.oracle import Plain

BY_NAME = {estimand.name: estimand for estimand in ESTIMANDS}
N_HEADS = 12


def made_up(n: int, seed: int, *, extra: float = 0.0, size: float = 1.0) -> HeadEffects:
    """Effects around 1 (times `size`); head 4 has `extra` of them."""
    generator = torch.Generator().manual_seed(seed)
    values = size * (1 + 0.2 * torch.randn(n, N_HEADS, 3, generator=generator))
    values[:, 4] += size * extra
    margin = torch.randn(n, generator=generator)
    return HeadEffects(values, margin, tuple(f"{seed}-{i}" for i in range(n)))


def test_effects_are_those_of_ablation_and_of_plain_pytorch(neo):
    paragraphs = zoo.mixed(neo, n=2)
    result = head_effects(neo, paragraphs, progress=False)
    ablation = mc.ablate_heads(neo, paragraphs).samples
    torch.testing.assert_close(result.values[..., 0], ablation["nll"].flatten(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(result.values[..., 2], -ablation["em"].flatten(1))
    plain = Plain("gpt_neo", zoo.hf_model("gpt_neo"))

    def margin():
        logits = plain.logits(paragraphs.ids)[:, paragraphs.n_prefix - 1 : -1]
        rows = []
        for row, targets in zip(logits, paragraphs.continuation, strict=True):
            others = [
                torch.cat([x[:t], x[t + 1 :]]).max() for x, t in zip(row, targets, strict=True)
            ]
            true = row.gather(-1, targets[:, None])[:, 0]
            rows.append((true - torch.stack(others)).mean())
        return torch.stack(rows)

    with torch.no_grad():
        clean = margin()
        with plain.head_input(2, lambda z: z.index_fill(2, torch.tensor([3]), 0.0)):
            removed = margin()
    torch.testing.assert_close(result.margin, clean, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.values[:, 2 * 4 + 3, 1], clean - removed, atol=1e-5, rtol=0)


def test_a_main_effect_names_all_heads_and_a_share_the_one_that_differs():
    """Trained text has three times as much to lose everywhere, and head 4 more than its share."""
    trained, own = made_up(40, 0, extra=0.5, size=3.0), made_up(40, 1)
    main, share = BY_NAME["NLL, trained - own text"], BY_NAME["share of NLL, trained - own text"]
    assert significant_heads(trained, own, main) == (N_HEADS, 0)
    above, _ = significant_heads(trained, own, share)
    assert above == 1
    assert score_heads(trained, own, share).argmax() == 4
    assert scaled(trained, share).mean() == pytest.approx(1)


def test_where_there_is_nothing_to_name_hardly_any_test_names_a_head():
    for estimand in ESTIMANDS:
        named = [
            sum(significant_heads(made_up(20, i), made_up(20, 100 + i), estimand, draws=200))
            for i in range(20)
        ]
        assert sum(n > 0 for n in named) <= 4  # 5 % of 20 is 1; 5 have a probability of 0.3 %


def test_t_is_welchs():
    pooled = torch.randn(15, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = ttest_ind(pooled[:6].numpy(), pooled[6:].numpy(), equal_var=False).statistic
    np.testing.assert_allclose(_t(pooled, torch.arange(15)[None], 6)[0].numpy(), expected)


def test_pairs_have_equal_margins():
    first, second = torch.tensor([0.0, 5.0, 10.0]), torch.tensor([9.9, 0.2, 0.1, 30.0])
    assert sorted(matched_pairs(first, second).tolist()) == [[0, 2], [2, 0]]
    far = torch.tensor([100.0, 101.0])
    assert len(matched_pairs(torch.tensor([0.0, 1.0]), far)) == 0
    matched = BY_NAME["share of margin, matched"]
    trained = made_up(20, 0)._replace(margin=torch.arange(20.0) + 1000)
    assert score_heads(trained, made_up(20, 1), matched).isnan().all()
    assert significant_heads(trained, made_up(20, 1), matched) == (0, 0)


def test_auc_and_partial_rank_correlation():
    positive, negative = np.array([3.0, 2.0]), np.array([1.0, 2.0, 0.0])
    wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert _auc(positive, negative) == pytest.approx(np.mean(wins))
    x, y, z = np.random.default_rng(0).normal(size=(3, 30))
    assert _partial(x, y, None) == pytest.approx(spearmanr(x, y).statistic)
    r = spearmanr(np.stack([x, y, z], 1)).statistic
    expected = (r[0, 1] - r[0, 2] * r[1, 2]) / math.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert _partial(x, y, z) == pytest.approx(expected)
    assert math.isnan(_partial(np.ones(4), y[:4], None))


def test_candidates_are_compared_on_both_halves():
    """With effects in head 4 that grow with the dose, its share follows dose and bits."""
    dose = torch.arange(30.0)
    dosed = made_up(30, 3)
    dosed.values[:, 4] += dose[:, None] / 10
    truth = torch.zeros(40, N_HEADS)
    truth[:, 4] = 1.0
    sets = EffectSets(
        trained=made_up(40, 0, extra=1.0), own=made_up(40, 1), text=made_up(40, 2), dosed=dosed,
        repetitions=dose, remembered=dose / 3, truth={"necessity": truth},
    )  # fmt: skip
    frame = compare_estimands(sets, k=1)
    assert frame["half"].tolist() == ["choose"] * len(ESTIMANDS) + ["report"] * len(ESTIMANDS)
    assert frame["n"].tolist() == [20] * len(frame)
    share = frame[frame["estimand"] == "share of NLL, trained - own text"].iloc[1]
    assert (share["above"], share["recall_necessity"]) == (1, 1.0)
    assert share["auc"] > 0.95
    assert share["bits"] > 0.8
    assert share["dose"] > 0.8
    assert (frame["null"] <= 1).all()
