"""The n-gram baseline."""

from __future__ import annotations

import numpy as np
import pytest

from memcircuits.organism_build.kneser_ney import KneserNey


def test_kneser_ney_sums_to_one_and_prefers_what_it_saw() -> None:
    stream = np.array([1, 2, 3, 1, 2, 3, 1, 2, 4, 5, 1, 2, 3, 0])
    model = KneserNey(stream, 7)
    for context in ([1, 2], [2, 3], [6, 6], [6, 2], [2], []):
        history = np.tile(np.array(context, dtype=np.int64), (7, 1))
        p = model.probabilities(history, np.arange(7))
        assert p.sum() == pytest.approx(1.0)
        assert (p > 0).all()
    p = model.probabilities(np.array([[1, 2], [1, 2], [1, 2]]), np.array([3, 4, 5]))
    assert p[0] > p[1] > p[2]


@pytest.mark.parametrize("order", [2, 3])
def test_probabilities_equal_those_of_nltk(order: int) -> None:
    """With its fixed discount, and without one for unigrams, as NLTK has it."""
    nltk_lm = pytest.importorskip("nltk.lm")
    from nltk.util import everygrams

    vocab_size, discount = 5, 0.1
    # The n-grams at the start occur again: NLTK counts also those that follow nothing.
    stream = np.random.default_rng(0).integers(vocab_size, size=400)
    theirs = nltk_lm.KneserNeyInterpolated(order, discount=discount)
    words = [str(token) for token in stream]
    theirs.fit([everygrams(words, max_len=order)], vocabulary_text=words)
    ours = KneserNey(stream, vocab_size, order, discounts=[0.0] + [discount] * (order - 1))
    for context in np.ndindex(*[vocab_size] * (order - 1)):
        history = np.tile(np.array(context), (vocab_size, 1))
        words_before = [str(token) for token in context]
        expected = [theirs.score(str(token), words_before) for token in range(vocab_size)]
        np.testing.assert_allclose(
            ours.probabilities(history, np.arange(vocab_size)), expected, rtol=1e-9
        )
