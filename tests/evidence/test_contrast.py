"""Contrast: states by transformers, statistics by scipy and by hand, one text in two models."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import scipy.stats
import torch

import memcircuits as mc
from memcircuits.evidence.contrasts.statistics import Gram, auc, compare_sets
from tests.helpers import models as zoo

MEMORIZED = mc.Paragraphs.from_tokens(zoo.random_ids(5, 22, seed=1), n_prefix=10)
CONTROL = mc.Paragraphs.from_tokens(zoo.random_ids(6, 22, seed=2), n_prefix=10)
QUICK = {"draws": 19, "progress": False}


def column(result, feature, place="", layer=-1):
    (at,) = [
        i
        for i, name in enumerate(result.features)
        if (name, result.place[i], result.layer[i]) == (feature, place, layer)
    ]
    return result.memorized[:, at], result.control[:, at]


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "llama"])
def test_hidden_states_are_those_of_transformers(name):
    result = mc.contrast(zoo.bridge(name), MEMORIZED, CONTROL, **QUICK)
    model = zoo.hf_model(name)
    with torch.no_grad():
        states = model(MEMORIZED.ids, output_hidden_states=True).hidden_states
    for layer, state in enumerate(states[:-1]):  # the last one is behind the final norm
        state = state.numpy()
        parts = {"last prefix token": state[:, 9:10], "continuation": state[:, 10:]}
        for place, part in parts.items():
            norm = np.linalg.norm(part, axis=-1).mean(1)
            np.testing.assert_allclose(column(result, "norm", place, layer)[0], norm, rtol=1e-4)
            variance = part.var(-1).mean(1)
            ours = column(result, "variance", place, layer)[0]
            np.testing.assert_allclose(ours, variance, rtol=1e-4)
            mean = part.mean(1)
            unit = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
            cosine = ((unit @ unit.T).sum(1) - 1) / (len(unit) - 1)
            ours = column(result, "cosine", place, layer)[0]
            np.testing.assert_allclose(ours, cosine, atol=1e-4)


def test_probabilities_and_text_by_hand(neo):
    tags = {"tagger": lambda text: ["LOW" if len(w) == 3 else "HIGH" for w in text.split()]}
    counts = mc.UnigramTable(torch.arange(1, 102), "made up")
    result = mc.contrast(neo, MEMORIZED, CONTROL, unigrams=counts, **tags, **QUICK)
    with torch.no_grad():
        log_p = zoo.hf_model("gpt_neo")(CONTROL.ids).logits[:, 9:-1].log_softmax(-1).numpy()
    p = np.exp(np.take_along_axis(log_p, CONTROL.continuation.numpy()[..., None], -1)[..., 0])
    expected = {
        "p mean": p.mean(1),
        "p variance": p.var(1),
        "entropy": -(np.exp(log_p) * log_p).sum(-1).mean(1),
        "NLL": -np.log(p).mean(1),
        "margin": np.diff(np.sort(log_p)[..., -2:])[..., 0].mean(1),
    }
    texts = [" ".join(f"<{i}>" for i in row) for row in CONTROL.continuation.tolist()]
    rarity = -np.log((np.arange(1, 102) + 1) / (np.arange(1, 102) + 1).sum())
    expected |= {
        "characters per token": [len(t) / 12 for t in texts],
        "characters per word": [np.mean([len(w) for w in t.split()]) for t in texts],
        "compressed size": [len(zlib.compress(t.encode(), 9)) / len(t) for t in texts],
        "rarity": rarity[CONTROL.continuation.numpy()].mean(1),
        "share of LOW": [np.mean([len(w) == 3 for w in t.split()]) for t in texts],
    }
    for feature, values in expected.items():
        np.testing.assert_allclose(column(result, feature)[1], values, rtol=2e-4, err_msg=feature)


def test_auc_is_the_statistic_of_mann_and_whitney():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 6, 30).astype(float)
    first = np.arange(30) < 12
    u = scipy.stats.mannwhitneyu(values[first], values[~first]).statistic
    ours = auc(torch.tensor(values), torch.tensor(first))
    assert float(ours) == pytest.approx(u / (12 * 18))


def test_direction_leaves_the_paragraph_itself_out():
    states = torch.randn(9, 1, 5, generator=torch.Generator().manual_seed(0))
    features = Gram(states).features((torch.arange(9) < 4)[None])
    for i in range(9):
        means = [
            states[[j for j in range(9) if j != i and (j < 4) == is_first], 0].mean(0)
            for is_first in (True, False)
        ]
        expected = states[i, 0] @ (means[0] - means[1])
        assert float(features.direction[0, i, 0]) == pytest.approx(float(expected), abs=1e-4)


def test_states_that_differ_are_told_apart_and_others_are_not():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 2, 16, generator=generator)
    noise[:20, 1] += 2.0  # only the second state differs
    _, _, direction = compare_sets(Gram(noise), 20, 99, generator)
    assert direction["auc"][1] > 0.95
    assert direction["p_value"][1] <= 0.01
    assert direction["p_value"][0] > 0.05


def test_one_text_in_two_models_of_which_one_recites_it():
    """`organism-planted` differs from the organism in one head of layer 3."""
    planted, organism = mc.load_model("organism-planted"), mc.load_model()
    never_seen = mc.Paragraphs.shipped("control")
    recited = mc.scan(planted, never_seen, progress=False).memorized
    others = never_seen[100:104]
    results = [mc.contrast(model, recited, others, **QUICK) for model in (planted, organism)]
    for at in range(len(results[0].features)):
        values = [result.memorized[:, at] for result in results]
        if results[0].family[at] == "text" or 0 <= results[0].layer[at] <= 3:
            if results[0].features[at] not in ("direction", "cosine"):
                assert torch.equal(*values), results[0].features[at]
            torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
    assert (column(results[0], "p mean")[0] > column(results[1], "p mean")[0] + 0.3).all()
    above = [column(result, "norm", "continuation", 4)[0] for result in results]
    assert (above[0] - above[1]).abs().min() > 1e-3


def test_controls_nearest_in_nll(neo):
    result = mc.contrast(neo, MEMORIZED[:3], CONTROL, match_nll=True, **QUICK)
    nll = mc.scan(neo, MEMORIZED[:3] + CONTROL, progress=False).nll
    distance = (nll[3:] - nll[:3].mean()).abs()
    kept = distance.argsort()[:3].sort().values
    torch.testing.assert_close(column(result, "NLL")[1], nll[3:][kept])
    assert "nearest in NLL" in result.notes[1]


def test_bad_input_is_refused(neo):
    with pytest.raises(
        mc.InputError, match="memorized: 1 paragraph of one group; give at least two"
    ):
        mc.contrast(neo, MEMORIZED[:1], CONTROL, **QUICK)
    with pytest.raises(mc.InputError, match="control: 1 of its paragraphs are in the memorized"):
        mc.contrast(neo, MEMORIZED, MEMORIZED[:1] + CONTROL, **QUICK)
    longer = mc.Paragraphs.from_tokens(zoo.random_ids(3, 30, seed=3), n_prefix=10)
    with pytest.raises(mc.InputError, match=r"control: 10 \+ 20 tokens; give 10 \+ 12"):
        mc.contrast(neo, MEMORIZED, longer, **QUICK)
    with pytest.raises(mc.InputError, match="tagger"):
        mc.contrast(neo, MEMORIZED, CONTROL, tagger="nltk", **QUICK)
