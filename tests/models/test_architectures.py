"""Architectures beside those of the matrix: some load and are ranked, others are refused."""

from __future__ import annotations

import re

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import UnsupportedModel
from memcircuits.measure.continuation import read_continuation
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import validate_model
from tests.helpers import models as zoo


@pytest.mark.parametrize("name", zoo.OTHERS)
def test_it_loads_and_is_ranked(name):
    source = zoo.other(name)
    ids = zoo.random_ids(4, 22)
    with torch.no_grad():
        logits = source(input_ids=ids[:, :-1], use_cache=False).logits[:, 9:]
    expected = read_continuation(logits, ids[:, 10:])
    if name in zoo.WRONG:
        with pytest.raises(
            UnsupportedModel, match=r"its log-probabilities are off by .* try another version"
        ):
            as_bridge(source, zoo.tokenizer(), name="tiny")
        return
    model = as_bridge(source, zoo.tokenizer(), name=f"tiny-{name}")
    report = validate_model(model)
    assert max(value for value in report.checks.values() if value is not None) < 1e-5
    assert {"q", "k", "v", "z"} <= set(report.writable)
    scan_result = mc.scan(model, mc.Paragraphs.from_tokens(ids, n_prefix=10), progress=False)
    assert torch.allclose(scan_result.nll, expected.nll, atol=1e-5)
    assert torch.equal(scan_result.em, expected.em)
    ranking = mc.find_memorization_heads(model, zoo.mixed(model), draws=20, progress=False)
    assert ranking.counts["memorized"] == 4
    assert ranking.score.isfinite().all()
    assert ranking.score.std() > 0


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_it_is_refused_at_load_with_its_reason(name):
    with pytest.raises(UnsupportedModel, match=rf"^model: .*{zoo.REFUSED[name][1]}") as caught:
        as_bridge(zoo.other(name), zoo.tokenizer(), name="tiny")
    assert len(str(caught.value)) < 500
    assert not re.search(r"\n", str(caught.value))
