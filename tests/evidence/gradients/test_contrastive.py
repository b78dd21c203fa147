"""The contrastive objective: the KL term has curvature and no gradient."""

from __future__ import annotations

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.evidence.gradients.contrastive import contrastive_gradients
from memcircuits.measure.fisher import fisher_diagonal
from memcircuits.measure.gradients import mean_gradient
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.gradients import CONTROL, PARAGRAPHS


def test_the_kl_term_has_no_gradient_at_the_original_weights(neo):
    adapter = adapt(neo)
    weights = adapter.weights()
    parameters = [w.parameter for w in weights]
    _, of_nll = mean_gradient(adapter, PARAGRAPHS, weights, progress=False)
    with adapter.preserving_state(grad=parameters):
        logits = adapter.run(CONTROL.ids[:, :-1], positions=slice(9, None)).logits
        log_p = logits.log_softmax(-1)
        kl = (log_p.detach().exp() * (log_p.detach() - log_p)).sum(-1).mean()
        of_kl = torch.autograd.grad(kl, parameters)
    largest = max(float(g.abs().max()) for g in of_nll)
    assert max(float(g.abs().max()) for g in of_kl) < 1e-6 * largest
    one, other = (
        contrastive_gradients(neo, PARAGRAPHS, c, curvature=False, progress=False)
        for c in (CONTROL, CONTROL[:2])
    )
    alone = mc.parameter_gradients(neo, PARAGRAPHS, average="paragraph", progress=False)
    for component, values in alone.values.items():
        assert torch.equal(one.values[component], other.values[component])
        torch.testing.assert_close(one.values[component], values, rtol=1e-4, atol=1e-7)


def test_curvature_ranks_weights_that_controls_need_lower(neo):
    adapter = adapt(neo)
    weights = adapter.weights()
    generator = torch.Generator().manual_seed(0)
    fisher = fisher_diagonal(adapter, CONTROL, weights, 20, generator)
    again = fisher_diagonal(adapter, CONTROL, weights, 20, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(fisher, again, strict=True))
    assert all((f >= 0).all() for f in fisher)
    gradients = contrastive_gradients(neo, PARAGRAPHS, CONTROL, seed=3, progress=False)
    same = contrastive_gradients(neo, PARAGRAPHS, CONTROL, seed=3, progress=False)
    assert gradients.to_frame().equals(same.to_frame())
    assert all((c.abs() <= 1 + 1e-5).all() for c in gradients.cosine.values())
    assert gradients.objective == "contrastive"


def test_copies_of_a_control_do_not_displace_the_others(neo, monkeypatch):
    drawn = []

    def fisher(adapter, paragraphs, *rest):
        drawn.append(paragraphs)
        return fisher_diagonal(adapter, paragraphs, *rest)

    monkeypatch.setattr("memcircuits.evidence.gradients.contrastive.fisher_diagonal", fisher)
    n = len(CONTROL)
    copies = CONTROL[[*range(n), *[0] * 40]]
    contrastive_gradients(neo, PARAGRAPHS, copies, n_control=n, draws=1, progress=False)
    for paragraphs in drawn:
        assert {tuple(row) for row in paragraphs.ids.tolist()} == {
            tuple(row) for row in CONTROL.ids.tolist()
        }


def test_cosine_of_a_set_with_a_copy_of_itself_is_one(neo):
    twin = mc.Paragraphs(PARAGRAPHS.ids.clone(), 10)
    twin.ids[:, 0] = (twin.ids[:, 0] + 1) % zoo.D_VOCAB  # other ids, all but the same paragraphs
    gradients = contrastive_gradients(neo, PARAGRAPHS, twin, curvature=False, progress=False)
    other = contrastive_gradients(neo, PARAGRAPHS, CONTROL, curvature=False, progress=False)
    assert float(gradients.cosine["W_out"].mean()) > 0.8 > float(other.cosine["W_out"].mean())


def test_results_survive_saving(neo, tmp_path):
    gradients = contrastive_gradients(neo, PARAGRAPHS, CONTROL, draws=1, progress=False)
    again = type(gradients).load(gradients.save(tmp_path / "gradients.safetensors"))
    assert again.to_frame().equals(gradients.to_frame())
    assert again.provenance == gradients.provenance
    assert {"cosine", "sum", "variance", "max"} <= set(gradients.to_frame())


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda m: contrastive_gradients(m, PARAGRAPHS, PARAGRAPHS[1:]), "control"),
        (lambda m: contrastive_gradients(m, PARAGRAPHS, CONTROL, n_control=0), "n_control"),
        (lambda m: contrastive_gradients(m, PARAGRAPHS, CONTROL, draws=0), "draws"),
    ],
)
def test_bad_input_is_named(neo, call, argument):
    with pytest.raises(InputError, match=f"^{argument}:"):
        call(neo)
