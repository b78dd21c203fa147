"""Trials in which a head and an MLP hold the paragraph together."""

from __future__ import annotations

import torch

import memcircuits as mc
from memcircuits.base.heads import Head
from memcircuits.benchmark.leaderboard import leaderboard
from memcircuits.benchmark.paragraph_pool import ParagraphPool
from memcircuits.benchmark.planted_trial import planted_trial, scores_of
from memcircuits.benchmark.trial_kinds import COMPONENT_RANKING
from memcircuits.benchmark.units import LocalizationTask
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo

LOCALIZERS = [COMPONENT_RANKING, "attribution", "oracle", "random", "weight-norm"]


def test_a_head_and_an_mlp_that_hold_it_are_named(neo):
    text = mc.Paragraphs.from_tokens(zoo.random_ids(64, 13, 2), n_prefix=10)
    pool, weights = ParagraphPool.of(neo, text), adapt(neo).fingerprint()
    trial = planted_trial(pool, "head-and-mlp", 1, localizers=LOCALIZERS)
    assert adapt(neo).fingerprint() == weights
    assert not trial.failed
    head, mlp = trial.where
    assert Head.parse(head)
    assert mlp.endswith(".mlp")
    results = {result.localizer: result for result in trial.results}
    assert set(results) == set(LOCALIZERS)
    assert {result.unit for result in trial.results} == {"component"}
    assert {result.k for result in trial.results} == {2}
    assert results["oracle"].recall_at_k == results[COMPONENT_RANKING].recall_at_1 == 1
    rows = leaderboard({"head-and-mlp": [trial]}).set_index("localizer")
    assert rows.loc["oracle", "recall_at_k"] == 1


def test_the_ranking_is_put_in_the_order_of_components(neo):
    """The same as the zero ablation of each: heads first, then the MLP of each layer."""
    targets = mc.Paragraphs.from_tokens(zoo.random_ids(2, 13, 3), n_prefix=10)
    control = mc.Paragraphs.from_tokens(zoo.random_ids(4, 13, 4), n_prefix=10)
    planted = mc.plant(
        neo, targets, where=["L2H1", "L1.mlp"], control=control, kl_budget=10.0, progress=False
    )
    with planted.apply(neo):
        task = LocalizationTask(neo, targets, control, planted=planted)
        ranking, ablation = (
            scores_of(task, name, "component") for name in (COMPONENT_RANKING, "zero-ablation")
        )
    torch.testing.assert_close(ranking, ablation, atol=1e-5, rtol=0)
