"""Trials in which two other heads were changed before a paragraph was planted."""

from __future__ import annotations

import pytest
import torch

import memcircuits as mc
from memcircuits.benchmark import decoys
from memcircuits.benchmark.leaderboard import decoys_named
from memcircuits.benchmark.paragraph_pool import ParagraphPool
from memcircuits.benchmark.planted_trial import planted_trial
from memcircuits.benchmark.schemas import LocalizerScore, PlantedTrial
from memcircuits.editing.masks import Candidates
from memcircuits.measure.continuation import continuation_log_probs, kl_divergence
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo

LOCALIZERS = ["find_memorization_heads", "gradient-max", "oracle", "weight-norm"]


@pytest.fixture(scope="module")
def text(neo):
    return mc.Paragraphs.from_tokens(zoo.random_ids(64, 13, 2), n_prefix=10)


def test_noise_is_as_large_as_the_damage_asks(neo, text, monkeypatch):
    monkeypatch.setattr(decoys, "DAMAGE", 1e-3)  # random weights have little to lose
    adapter, few = adapt(neo), text[:4]
    mask = Candidates.of(adapter, heads=["L1H2"]).choose(1.0, None, "all")
    noise = torch.randn(len(mask), generator=torch.Generator().manual_seed(0))
    noise *= mask.root_mean_squares()
    with mask.restored() as original, adapter.preserving_state():
        before = continuation_log_probs(adapter, few)
        mask.add(original, decoys.size_of_damage(adapter, mask, original, noise, few) * noise)
        after = continuation_log_probs(adapter, few)
        assert float(kl_divergence(before, after).mean()) == pytest.approx(1e-3, rel=0.05)
        with pytest.raises(mc.InputError, match="noise changes nothing"):
            decoys.size_of_damage(adapter, mask, original, 0 * noise, few)


def test_the_head_is_found_beside_its_decoys(neo, text, monkeypatch):
    monkeypatch.setattr(decoys, "DAMAGE", 1e-3)
    weights = adapt(neo).fingerprint()
    trial = planted_trial(ParagraphPool.of(neo, text), "decoys", 2, localizers=LOCALIZERS)
    assert adapt(neo).fingerprint() == weights
    assert not trial.failed
    assert len({*trial.where, *trial.decoys}) == 3
    first = {result.localizer: result.first for result in trial.results}
    assert first["oracle"] == first["find_memorization_heads"] == trial.where[0]
    assert first["weight-norm"] == trial.decoys[0]  # noise adds to the norm
    recalls = {result.localizer: result.recall_at_1 for result in trial.results}
    assert (recalls["find_memorization_heads"], recalls["weight-norm"]) == (1, 0)


def test_decoys_that_cannot_be_made_are_a_failed_trial(neo, text):
    weights = adapt(neo).fingerprint()
    trial = planted_trial(ParagraphPool.of(neo, text), "decoys", 0)
    assert "noise changes nothing" in trial.failed
    assert adapt(neo).fingerprint() == weights


def test_shares_of_trials_that_name_a_decoy():
    def trial(*firsts: str) -> PlantedTrial:
        results = [
            LocalizerScore(
                localizer=name, unit="head", recall_at_1=0.0, recall_at_k=0.0, mrr=0.5, auc=0.5,
                forwards=1.0, scores=[0.0], first=first,
            )
            for name, first in zip("ab", firsts, strict=True)
        ]  # fmt: skip
        return PlantedTrial(where=["L0H0"], decoys=["L0H1", "L0H2"], failed=None, results=results)

    failed = PlantedTrial(where=["L0H0"], decoys=["L0H1", "L0H2"], failed="no", results=[])
    trials = [trial("L0H0", "L0H1"), trial("L0H2", "L0H1"), trial("L0H3", "L0H2"), failed]
    frame = decoys_named({"decoys": trials}).set_index("localizer")
    assert frame.loc["a", ["trials", "damaged"]].tolist() == [3, 0]
    assert frame.loc["a", "holder"] == pytest.approx(1 / 3)
    assert frame.loc["b", "damaged"] == pytest.approx(2 / 3)
    assert (frame["damaged_low"] <= frame["damaged"] + 1e-12).all()
    assert (frame["holder"] <= frame["holder_high"] + 1e-12).all()
    assert decoys_named({}).empty
