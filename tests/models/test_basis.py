"""Raw and folded weights are told apart, and results of the two are not compared."""

from __future__ import annotations

import math

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.editing.evaluation import edit_divergence, evaluate_edit
from memcircuits.editing.recipe import Recipe
from memcircuits.editing.relearning import recovery_curve
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.score_map import ScoreMap
from tests import matrix
from tests.helpers import models as zoo
from tests.helpers.variants import EVERY_MODEL, model, needs_hooked_transformer, own_bridge


@pytest.mark.parametrize(("name", "variant"), EVERY_MODEL)
def test_basis_is_recognized(name, variant):
    result = model(name, variant)
    assert adapt(result).basis == variant.split()[1]
    paragraphs = matrix.paragraphs(name)
    assert mc.scan(result, paragraphs, progress=False).provenance.basis == variant.split()[1]


@needs_hooked_transformer
@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "llama"])
def test_folded_value_biases_are_another_basis(name):
    """`HookedTransformer.from_pretrained(name, fold_ln=False)` folds them: z loses b_V."""
    result = zoo.hooked(name, zoo.shaken(zoo.hf_model(name)))
    assert adapt(result).basis == "raw"
    weights = {key: value.clone() for key, value in result.state_dict().items()}
    result.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False
    )
    assert adapt(result).basis == (
        "folded" if name == "gpt2" else "raw"
    )  # it alone has such biases


def test_basis_without_processing_is_raw():
    result = own_bridge()
    result.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    assert adapt(result).basis == "raw"


def test_results_of_two_bases_are_not_compared(neo):
    """Folding LayerNorm into the weights changes what ablating a head or editing a weight means."""
    paragraphs = zoo.mixed(neo)
    quiet = {"progress": False}
    raw = mc.ablate_heads(neo, paragraphs, **quiet)
    assert raw.correlation(raw) == pytest.approx(1)
    assert -1 <= raw.correlation(mc.ablate_heads(neo, paragraphs, mode="mean", **quiet)) <= 1
    made = mc.unlearn(
        neo, paragraphs[:3], paragraphs[4:], recipe=Recipe(steps=1), kl_budget=math.inf, **quiet
    )
    folded_model = zoo.bridge("gpt_neo")
    folded_model.enable_compatibility_mode(disable_warnings=True)
    folded = mc.ablate_heads(folded_model, paragraphs, **quiet)
    for pair in ((raw, folded), (folded, raw)):
        with pytest.raises(InputError, match=r"^other: measured in the (raw|folded) basis; the"):
            pair[0].correlation(pair[1])
    with (
        pytest.raises(InputError, match=r"in the folded basis; this edit was made in the raw"),
        made.apply(folded_model),
    ):
        pass
    for call in (
        lambda: edit_divergence(folded_model, made, paragraphs),
        lambda: evaluate_edit(folded_model, made, paragraphs[:3], paragraphs[4:], **quiet),
        lambda: recovery_curve(folded_model, made, paragraphs[:3], paragraphs[4:], **quiet),
    ):
        with pytest.raises(InputError, match="in the folded basis"):
            call()


def test_rank_correlation():
    provenance = Provenance({"basis": "raw"}, {}, {}, {})

    def score(*rows):
        return ScoreMap("x", "nats/token", torch.tensor(rows), provenance)

    first = score([1.0, 2.0], [3.0, 4.0])
    assert first.correlation(score([1.0, 4.0], [9.0, 16.0])) == pytest.approx(1)
    assert first.correlation(score([4.0, 3.0], [2.0, 1.0])) == pytest.approx(-1)
    # Spearman's 1 - 6 sum(d^2) / (n (n^2 - 1)) by hand: d = 1, 1, 0, 0
    assert first.correlation(score([2.0, 1.0], [3.0, 4.0])) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert first.correlation(score([float("nan"), 1.0], [2.0, 3.0])) == pytest.approx(1)
    assert math.isnan(first.correlation(score([1.0, 1.0], [1.0, 1.0])))
    with pytest.raises(InputError, match=r"^other: \(1, 2\) by head; compare with one of \(2, 2\)"):
        first.correlation(score([1.0, 2.0]))
