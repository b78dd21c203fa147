"""The Fisher diagonal is the curvature of the KL divergence."""

from __future__ import annotations

import pytest
import torch

from memcircuits.measure.fisher import fisher_diagonal
from memcircuits.models.registry import adapt
from tests.helpers.gradients import CONTROL, double_bridge


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "llama"])
def test_the_fisher_diagonal_predicts_the_kl_of_a_changed_weight(name):
    adapter = adapt(double_bridge(name))
    weights = adapter.weights()
    generator = torch.Generator().manual_seed(0)
    fisher = fisher_diagonal(adapter, CONTROL, weights, 200, generator)

    def log_p():
        with adapter.preserving_state():
            logits = adapter.run(CONTROL.ids[:, :-1], positions=slice(9, None)).logits
        return logits.log_softmax(-1)

    original = log_p()
    for weight, curvature in list(zip(weights, fisher, strict=True))[::5]:
        information = weight.split(curvature)
        place = torch.unravel_index(information.argmax(), information.shape)
        kept = weight.values[place].clone()
        step = 0.02 / float(information[place]) ** 0.5
        measured = 0.0
        for sign in (1, -1):  # the cubic term cancels
            weight.values[place] = kept + sign * step
            measured += float((original.exp() * (original - log_p())).sum(-1).mean()) / 2
        weight.values[place] = kept
        # The largest of many estimates is biased upwards: hence the wide bounds.
        assert measured == pytest.approx(0.5 * 0.02**2, rel=0.35)
