"""Recitations with slips: measures by hand and by brute force, on models that slip."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import memcircuits as mc
from memcircuits.data.windows import Windows
from memcircuits.measure.corpus.scan import scan_to_disk
from memcircuits.measure.near_verbatim import extraction_strength, longest_matches, similarities
from tests.helpers import models as zoo
from tests.helpers.decoding import PlainModel


def longest_by_brute_force(a, b):
    return max(
        (
            n
            for n in range(1, len(a) + 1)
            for i in range(len(a) - n + 1)
            for j in range(len(b) - n + 1)
            if a[i : i + n] == b[j : j + n]
        ),
        default=0,
    )


def distance_by_hand(a, b):
    """Levenshtein distance by its recursion, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 4, (30, 9), generator=generator)
    other = torch.randint(0, 4, (30, 9), generator=generator)
    other[:10] = truth[:10].roll(1, -1)
    other[0] = truth[0]
    other[1] = 9
    return truth, other


def each(pairs):
    return zip(*(ids.tolist() for ids in pairs), strict=True)


def test_longest_match_by_brute_force(pairs):
    expected = [longest_by_brute_force(*pair) for pair in each(pairs)]
    assert longest_matches(*pairs).tolist() == expected
    assert expected[:2] == [9, 0]


def test_similarity_by_hand(pairs):
    expected = [1 - distance_by_hand(*pair) / 9 for pair in each(pairs)]
    assert similarities(*pairs).tolist() == pytest.approx(expected)
    assert expected[:2] == [1, 0]


def test_extraction_strength_by_hand():
    correct = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 1, 1]])
    assert extraction_strength(correct.bool()).tolist() == [1, 0.25, 0, 0.5, 0.75]


def test_extraction_strength_is_that_of_open_unlearning_but_for_its_last_step():
    """Their loop over k, which gives 1 / L where no suffix is right."""
    correct = torch.rand(200, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    for row, strength in zip(correct, extraction_strength(correct).tolist(), strict=True):
        for k in range(5):
            if row[k:].all():
                break
        assert strength == pytest.approx(1 - k / 5 if row[-1] else 0)


@pytest.mark.parametrize("name", ["gpt_neo", "llama"])
def test_the_greedy_continuation_is_transformers_own(name):
    model = zoo.bridge(name)
    paragraphs = zoo.mixed(model)
    scan_result = mc.scan(model, paragraphs, near_verbatim=True, progress=False)
    assert torch.equal(scan_result.greedy, PlainModel(name).decode(paragraphs.prefix, 12))
    assert scan_result.is_near_verbatim.tolist() == [True] * 4 + [False] * 4
    assert scan_result.similarity[:4].tolist() == [1] * 4
    assert scan_result.longest_match[:4].tolist() == [12] * 4


def test_a_slip_is_no_clean_bill(neo):
    """The model recites all but the first token: EM is 0, and it is no control."""
    scan_result = mc.scan(neo, zoo.reciting(neo, n=2), near_verbatim=True, progress=False)
    greedy = scan_result.greedy.clone()
    greedy[0, 0] += 1
    correct = scan_result.token_correct.clone()
    correct[0, 0] = False
    slipped = dataclasses.replace(scan_result, greedy=greedy, token_correct=correct)
    assert slipped.em.tolist() == [0, 12]
    assert slipped.similarity.tolist() == [pytest.approx(11 / 12), 1]
    assert slipped.longest_match.tolist() == [11, 12]
    assert slipped.is_near_verbatim.tolist() == [True, True]
    assert slipped.extraction_strength.tolist() == [pytest.approx(11 / 12), 1]
    assert slipped.is_control.tolist() == [False, False]
    assert str(slipped) == "2 paragraphs, 1 memorized, 1 nearly, 0 controls"
    without = dataclasses.replace(slipped, greedy=None)
    assert without.is_control.tolist() == [True, False]
    assert without.similarity is None
    columns = set(slipped.to_frame()) - set(without.to_frame())
    assert columns == {"longest_match", "similarity", "near_verbatim"}


def test_a_scan_to_disk_has_the_same_numbers(neo, tmp_path):
    paragraphs = zoo.mixed(neo)
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"ids": row}) + "\n" for row in paragraphs.ids.tolist()))
    options = {"sampler": mc.Sampler(top_k=5), "near_verbatim": True, "progress": False}
    windows = Windows(n_prefix=10, n_continuation=12)
    frame = scan_to_disk(neo, source, tmp_path / "scan", windows=windows, **options).to_frame()
    expected = mc.scan(neo, paragraphs, **options).to_frame()
    for name in ("em", "longest_match", "similarity", "near_verbatim", "extraction_strength"):
        assert frame[name].tolist() == pytest.approx(expected[name].tolist())
    for name in ("sampled_log_prob", "samples"):
        np.testing.assert_allclose(frame[name], expected[name], rtol=1e-4)
    with pytest.raises(mc.InputError, match="other measures, sampler"):
        scan_to_disk(neo, source, tmp_path / "scan", windows=windows, resume=True, progress=False)
