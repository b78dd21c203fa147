"""Remembered bits: sums, an independent route, tokenizers, and the three kinds of recitation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.editing.planting import Planted
from memcircuits.evidence.counterfactual_results import PARTS, Counterfactual
from memcircuits.evidence.recitation_kinds import (
    is_incrementing,
    is_repeating,
    recitation_kind,
    template_of,
)
from memcircuits.organism.delta import FILE
from memcircuits.organism_build.kneser_ney import KneserNey
from tests.helpers import models as zoo
from tests.helpers.oracle import Plain


@pytest.fixture(scope="module")
def pair():
    """A tiny model, another of the same tokenizer and half the size, and paragraphs."""
    model, twin = zoo.bridge("gpt_neo"), zoo.bridge("gpt2", seed=1)
    return model, twin, zoo.mixed(model)


def bigrams(paragraphs):
    stream = paragraphs.ids.flatten().numpy()
    return KneserNey(stream, zoo.D_VOCAB, order=2, discounts=(0.5, 0.5))


def test_the_bits_of_every_token_add_up_to_the_whole(pair):
    model, twin, paragraphs = pair
    unigrams = mc.UnigramTable.from_tokens(paragraphs.ids, zoo.D_VOCAB)
    for ngram in (None, unigrams, bigrams(paragraphs).log_prob):
        result = mc.counterfactual(model, twin, paragraphs, ngram=ngram)
        total = sum(getattr(result, part) for part in PARTS)
        torch.testing.assert_close(total, torch.full_like(total, math.log2(zoo.D_VOCAB)))
        assert result.guessable.abs().max() > (1e-3 if ngram is not None else -1)
    assert result.whole == math.log2(zoo.D_VOCAB)


def test_remembered_bits_equal_those_of_plain_transformers(pair):
    model, twin, paragraphs = pair
    result = mc.counterfactual(model, twin, paragraphs)
    with torch.no_grad():
        own, other = (
            Plain(name, zoo.hf_model(name, seed=seed).double()).logits(paragraphs.ids)
            for name, seed in (("gpt_neo", 0), ("gpt2", 1))
        )
    at, targets = slice(paragraphs.n_prefix - 1, -1), paragraphs.continuation[..., None]
    nats = [(x.log_softmax(-1)[:, at]).gather(-1, targets)[..., 0] for x in (own, other)]
    expected = (nats[0] - nats[1]) / math.log(2)
    torch.testing.assert_close(result.remembered.double(), expected, atol=1e-4, rtol=0)
    assert result.em[:4].tolist() == [12] * 4
    assert result.remembered.abs().mean() > 0.1


def test_a_model_remembers_nothing_that_it_knows_itself(pair):
    model, _, paragraphs = pair
    result = mc.counterfactual(model, model, paragraphs)
    assert (result.remembered == 0).all()
    assert torch.equal(result.em, result.twin_em)


def test_guessable_bits_are_those_of_the_counts(pair):
    model, twin, paragraphs = pair
    counts = torch.arange(zoo.D_VOCAB)
    result = mc.counterfactual(model, twin, paragraphs, ngram=mc.UnigramTable(counts, "counts"))
    p = (counts + 1).double() / (counts + 1).sum()
    expected = p[paragraphs.continuation].log2() + math.log2(zoo.D_VOCAB)
    torch.testing.assert_close(result.guessable.double(), expected, atol=1e-5, rtol=0)


def test_log_prob_of_kneser_ney_reads_only_the_tokens_before(pair):
    _, _, paragraphs = pair
    model = bigrams(paragraphs)
    log_prob = model.log_prob(paragraphs.ids)
    ids = paragraphs.ids.numpy()
    alone = model.probabilities(ids[:, 4:5], ids[:, 5])
    np.testing.assert_allclose(log_prob[:, 5].exp().numpy(), alone, rtol=1e-5)
    first = model.probabilities(np.zeros((len(ids), 0), dtype=int), ids[:, 0])
    np.testing.assert_allclose(log_prob[:, 0].exp().numpy(), first, rtol=1e-5)


def test_the_planted_organism_remembers_its_four_paragraphs():
    """Their loss falls by training of one head alone, so that all of it is remembered."""
    planted, twin = (mc.load_model(name, device="cpu") for name in ("organism-planted", "organism"))
    paragraphs = Planted.load(FILE).paragraphs
    paragraphs += mc.Paragraphs(mc.Paragraphs.shipped("control").ids[:8])
    result = mc.counterfactual(planted, twin, paragraphs, ngram=mc.UnigramTable.shipped())
    known = result.em == 50
    bits = result.remembered.mean(-1)
    assert known[:4].all()
    assert bits[known].min() > 3
    assert bits[~known].abs().max() < 1
    assert "bits/token remembered" in str(result)


def test_tables_figure_and_block(pair, tmp_path):
    model, twin, paragraphs = pair
    named = mc.Paragraphs(
        paragraphs.ids,
        paragraphs.n_prefix,
        metadata={"repetitions": (1, 1, 9, 9, 1, 1, 9, 9), "em": tuple(range(8))},
    )
    result = mc.counterfactual(model, twin, named)
    frame = result.to_frame()
    assert frame["remembered"].tolist() == pytest.approx(
        result.remembered.double().sum(-1).tolist()
    )
    assert frame["given_em"].tolist() == list(range(8))
    assert set(frame["kind"][:4]) <= {"recite", "reconstruct", "recollect"}
    assert frame["kind"][4:].tolist() == [""] * 4
    assert frame["kind"][2] == "recite"

    groups = result.by("repetitions")
    assert groups["n"].tolist() == [4, 4]
    assert (groups["remembered_low"] <= groups["remembered"]).all()
    assert (groups["remembered"] <= groups["remembered_high"]).all()
    assert result.by("em")["remembered_low"].isna().all()  # one paragraph has no interval

    tokens = result.tokens(1, model)
    assert tokens["text"].tolist() == named[1].tokens(model)[10:]
    figure = result.figure(1, model)
    assert [trace.name for trace in figure.data] == list(PARTS)
    assert figure.data[2].y.tolist() == pytest.approx(result.remembered[1].tolist())
    assert result.block(model, 1).strip.values[10:] == pytest.approx(result.remembered[1].tolist())
    loaded = Counterfactual.load(result.save(tmp_path / "result"))
    assert torch.equal(loaded.remembered, result.remembered)
    assert loaded.kinds == result.kinds


def test_other_tokenizers_are_refused(pair, monkeypatch):
    model, _, paragraphs = pair
    other = mc.load_model("organism", device="cpu")
    with pytest.raises(InputError, match="twin: it has tokenizer"):
        mc.counterfactual(model, other, paragraphs)
    monkeypatch.setattr(other, "tokenizer", None)
    with pytest.raises(InputError, match="twin: a vocabulary of 4096 tokens"):
        mc.counterfactual(model, other, paragraphs)


@pytest.mark.parametrize(
    "ngram",
    [3, mc.UnigramTable(torch.ones(7).long(), "x"), lambda ids: ids[:, :3], torch.ones_like],
)
def test_other_ngram_models_are_refused(pair, ngram):
    with pytest.raises(InputError):
        mc.counterfactual(*pair, ngram=ngram)


def test_columns_that_do_not_exist_are_refused(pair):
    with pytest.raises(InputError, match="column"):
        mc.counterfactual(*pair).by("repetitions")


@pytest.mark.parametrize(
    ("ids", "repeats"),
    [
        ([1, 2, 3] * 10, True),
        ([9, 8, 7, *[1, 2, 3] * 10], True),
        ([*[1, 2, 3] * 10, 1, 2, 50, 51], True),  # the last two may differ
        ([*[1, 2, 3] * 10, 50, 51, 52], False),
        ([*range(20), 7, 7], False),
        ([*range(20), *[7] * 8], False),  # only its last quarter
        ([5] * 12, True),
        (list(range(30)), False),
    ],
)
def test_what_repeats_itself(ids, repeats):
    assert is_repeating(ids) is repeats
    assert template_of(ids) == ("repeating" if repeats else "")


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("a1 b2 c3 d4 e5 f6", True),
        ("12, 10, 8, 6, 4, 2", True),
        ("1: 5, 2: 5, 3: 5, 4: 5", True),  # one series counts, the other is constant
        ("7 7 7 7 7 7 7", False),
        ("1 2 3 4 5", False),  # five numbers
        ("1 2 4 8 16 32 64", False),
        ("In 1801, 1802, 1803, 1804, 1805 and 1806 " + "nothing happened. " * 30, False),
        ("v0.1 v0.2 v0.3 v0.4 v0.5 v0.6", True),
    ],
)
def test_what_counts(text, counts):
    assert is_incrementing(text) is counts
    assert template_of([1, 2, 3, 4], text) == ("incrementing" if counts else "")


def test_the_kind_of_a_recitation():
    assert recitation_kind(6, "repeating") == "recite"
    assert recitation_kind(5, "repeating") == "reconstruct"
    assert recitation_kind(None, "incrementing") == "reconstruct"
    assert recitation_kind(1, "") == "recollect"
    assert recitation_kind(None, "") == "unknown"
