"""A token in front is a first prefix token that is not counted: every analysis gives its numbers.

Each analysis measures the same input twice: once with the token in `bos`, once as the first token
of ids and prefix. Results without positions are equal; those with positions lack the first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

import memcircuits as mc
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.evaluation import edit_divergence
from memcircuits.editing.recipe import Recipe
from memcircuits.editing.relearning import recovery_curve
from memcircuits.evidence.ablation import Ablation
from memcircuits.evidence.patching.sweeps import patch_layers
from memcircuits.evidence.screening import attributions
from memcircuits.evidence.triggers.minimal_sets import minimal_sets
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo

QUIET = {"progress": False}
FRONT = (7, 3)
N_PREFIX, N_CONTINUATION = 8, 10
NAMES = ["gpt2", "gpt_neo", "neox", "opt", "llama", "gemma2", "qwen3"]


def in_front(model: object, n: int = 6) -> Paragraphs:
    """Paragraphs behind `FRONT`; half of them are recited."""
    ids = zoo.random_ids(n, N_PREFIX + N_CONTINUATION, seed=4)
    paragraphs = Paragraphs(ids, N_PREFIX, bos=FRONT)
    recited = greedy_continuations(model, paragraphs[: n // 2], **QUIET)
    return recited + paragraphs[n // 2 :]


def other(model: object) -> object:
    """A model of the same class and architecture with other weights."""
    name = adapt(model).name.removeprefix("tiny-")
    if adapt(model).is_bridge:
        return zoo.bridge(name, seed=1)
    return zoo.hooked(name, zoo.hf_model(name, seed=1))


def as_prefix(paragraphs: Paragraphs) -> Paragraphs:
    """The same input, with the tokens in front counted as part of the prefix."""
    return Paragraphs(paragraphs.inputs, paragraphs.n_given, paragraphs.names, paragraphs.metadata)


def corrupted(p: Paragraphs) -> Paragraphs:
    ids = p.ids.clone()
    ids[:, 4 - p.n_bos] = (ids[:, 4 - p.n_bos] + 1) % zoo.D_VOCAB
    ids[:, -3] = (ids[:, -3] + 5) % zoo.D_VOCAB
    return dataclasses.replace(p, ids=ids)


def patch(model, p, **options) -> Mapping[str, Tensor]:
    # As the caller counts them: the positions 2 and 5 of the input.
    positions = [position - p.n_bos for position in (2, 5)]
    patches = mc.patch_heads(
        model, p, corrupted(p), positions=positions, check=4, **options, **QUIET
    )
    return {"nll": patches.samples["nll"]}


def unlearned(model, p) -> mc.Edit:
    recipe = Recipe(steps=2, kl_weight=1.0)
    options = {"fraction": 0.01, "recipe": recipe, "kl_budget": math.inf, "seed": 1}
    return mc.unlearn(model, p[:3], p[3:], **options, **QUIET)


def edited(model, p) -> Mapping[str, Tensor]:
    edit = unlearned(model, p)
    return {
        **{f"history {key}": torch.as_tensor(values) for key, values in edit.history.items()},
        "divergence": edit_divergence(model, edit, p[3:]),
        "relearned": recovery_curve(model, edit, p[:3], p[3:], steps=2, **QUIET).em,
    }


def planted(model, p) -> Mapping[str, Tensor]:
    short = dataclasses.replace(p[3:4], ids=p.ids[3:4, : p.n_prefix + 4])
    options = {"steps": 60, "learning_rate": 0.03, "kl_budget": 10.0}
    plan = mc.plant(model, short, where=["L0.mlp", "L1.mlp"], control=p[:3], **options, **QUIET)
    assert plan.paragraphs.hash == short.hash
    return {"nll": plan.history["nll"], "em": plan.history["em"]}


# Results without positions.
WITHOUT_POSITIONS: dict[str, Callable[..., Mapping[str, Tensor]]] = {
    "scan": lambda m, p: {
        "log_prob": mc.scan(m, p, **QUIET).token_log_prob,
        "em": mc.scan(m, p, **QUIET).em,
    },
    "greedy_continuations": lambda m, p: {"ids": greedy_continuations(m, p, **QUIET).continuation},
    "parameter_gradients": lambda m, p: mc.parameter_gradients(m, p, **QUIET).values,
    "parameter_gradients, each": lambda m, p: (
        mc.parameter_gradients(m, p, average="paragraph", **QUIET).values
    ),
    "contrastive_gradients": lambda m, p: (
        mc.contrastive_gradients(m, p[:3], p[3:], draws=2, **QUIET).values
    ),
    "ablate_heads, zero": lambda m, p: mc.ablate_heads(m, p, **QUIET).samples,
    "ablate_heads, mean": lambda m, p: mc.ablate_heads(m, p, mode="mean", **QUIET).samples,
    "ablate_heads, resample": lambda m, p: (
        mc.ablate_heads(m, p[:3], mode="resample", reference=p[3:], **QUIET).samples
    ),
    "attributions": lambda m, p: {"nll": attributions(Ablation(m, p, mode="mean"), **QUIET)},
    "patch_heads, z": lambda m, p: patch(m, p),
    "patch_heads, denoising k": lambda m, p: patch(m, p, site="k", direction="denoising"),
    "patch_heads, estimated": lambda m, p: patch(m, p, site="q", method="attribution"),
    "transplant": lambda m, p: mc.transplant(m, other(m), p, units=["attn"], **QUIET).samples,
    "minimal_sets": lambda m, p: {
        "em": minimal_sets(m, p, max_tokens=2, replacement="neighbor", **QUIET).baseline_em
    },
    "edits": edited,
    "plant": planted,
}

# Results with one number per position, on the axis given.
WITH_POSITIONS: dict[str, tuple[int, Callable[..., Mapping[str, Tensor]]]] = {
    "activation_gradients": (2, lambda m, p: mc.activation_gradients(m, p, **QUIET).values),
    "patch_layers": (2, lambda m, p: patch_layers(m, p, corrupted(p), **QUIET).samples),
    "rare_token_attention": (
        3,
        lambda m, p: {
            "attention": mc.rare_token_attention(m, p, permutations=1, **QUIET).attention
        },
    ),
    "perturb_prefix": (
        1,
        lambda m, p: {
            key: getattr(mc.perturb_prefix(m, p, replacement="neighbor", **QUIET), key)
            for key in ("em", "nll", "replacements", "surprisal")
        },
    ),
    "perturb_prefix, second": (
        1,
        lambda m, p: {
            key: getattr(mc.perturb_prefix(m, p, replacement="second", **QUIET), key)
            for key in ("em", "nll", "replacements", "surprisal")
        },
    ),
}


HOOKED = ["hooked gpt2"] if zoo.has_hooked() else []


def model_of(name: str):
    kind, _, architecture = name.rpartition(" ")
    return zoo.hooked(architecture) if kind else zoo.bridge(architecture)


@pytest.mark.parametrize("call", sorted(WITHOUT_POSITIONS))
@pytest.mark.parametrize("name", ["gemma2", "opt", *HOOKED])
def test_numbers_are_those_of_an_uncounted_first_token(name, call):
    model = model_of(name)
    paragraphs = in_front(model)
    measure = WITHOUT_POSITIONS[call]
    assert_equal(measure(model, paragraphs), measure(model, as_prefix(paragraphs)))


@pytest.mark.parametrize("call", sorted(WITH_POSITIONS))
@pytest.mark.parametrize("name", ["gpt_neo", "llama", *HOOKED])
def test_positions_count_from_the_first_token_of_the_paragraph(name, call):
    model = model_of(name)
    paragraphs = in_front(model)
    axis, measure = WITH_POSITIONS[call]
    counted = {
        key: value.narrow(axis, len(FRONT), value.shape[axis] - len(FRONT))
        for key, value in measure(model, as_prefix(paragraphs)).items()
    }
    assert_equal(measure(model, paragraphs), counted)


@pytest.mark.parametrize("name", NAMES)
def test_scan_is_that_of_plain_transformers(name):
    """In float64, on the input that transformers would be given."""
    model = zoo.bridge(name).double()
    plain = zoo.hf_model(name).double()
    paragraphs = in_front(model)
    with torch.no_grad():
        log_p = plain(paragraphs.inputs).logits.log_softmax(-1)[:, len(FRONT) + N_PREFIX - 1 : -1]
    expected = -log_p.gather(-1, paragraphs.continuation[..., None])[..., 0].mean(-1)
    result = mc.scan(model, paragraphs, **QUIET)
    torch.testing.assert_close(result.nll.double(), expected, atol=1e-5, rtol=0)
    assert result.em[:3].tolist() == [N_CONTINUATION] * 3
    alone = mc.scan(model, dataclasses.replace(paragraphs, bos=()), **QUIET)
    assert (alone.nll - result.nll).abs().max() > 1e-3  # the tokens in front matter


def test_the_view_shows_tokens_in_front_as_columns_of_their_own():
    model = zoo.bridge("llama")
    paragraphs = in_front(model)
    view = mc.attention_view(model, paragraphs[0])
    counted = mc.attention_view(model, as_prefix(paragraphs[0]))
    torch.testing.assert_close(view.patterns, counted.patterns)
    assert view.tokens == ["BOS <7>", "BOS <3>", *counted.tokens[2:]]
    assert view.n_prefix == counted.n_prefix
    strip = view.strips["log-probability"].values
    assert [value != value for value in strip] == [True] * 2 + [False] * (len(strip) - 2)


def test_a_shorter_prefix_still_stands_behind_the_tokens_in_front():
    model = zoo.bridge("gemma2")
    paragraphs = in_front(model)
    suffix_em = minimal_sets(model, paragraphs, max_tokens=1, **QUIET).suffix_em
    for length in (3, N_PREFIX):
        ids = paragraphs.ids[:, N_PREFIX - length :]
        short = dataclasses.replace(paragraphs, ids=ids, n_prefix=length)
        assert suffix_em[:, length - 1].tolist() == mc.scan(model, short, **QUIET).em.tolist()


def test_context_length_includes_the_tokens_in_front():
    model = zoo.bridge("gpt2")
    ids = zoo.random_ids(2, zoo.N_CTX)
    mc.scan(model, Paragraphs(ids), **QUIET)
    with pytest.raises(mc.InputError, match=f"{zoo.N_CTX + 1} tokens per paragraph"):
        mc.scan(model, Paragraphs(ids, bos=(1,)), **QUIET)


def test_sets_with_other_tokens_in_front_are_not_compared():
    model = zoo.bridge("gpt_neo")
    paragraphs = in_front(model)
    bare = dataclasses.replace(paragraphs, bos=())
    calls = [
        lambda: paragraphs[:3] + bare[3:],
        lambda: mc.contrastive_gradients(model, paragraphs[:3], bare[3:], **QUIET),
        lambda: mc.find_memorization_heads(model, paragraphs[:3], control=bare[3:], **QUIET),
        lambda: mc.ablate_heads(model, paragraphs, mode="mean", reference=bare, **QUIET),
        lambda: mc.patch_heads(model, paragraphs, corrupted(bare), **QUIET),
        lambda: mc.unlearn(model, paragraphs[:3], bare[3:], **QUIET),
        lambda: mc.plant(model, paragraphs[3:], where=["L0H1"], control=bare[:3], **QUIET),
    ]
    for call in calls:
        with pytest.raises(mc.InputError, match="behind"):
            call()


def test_ids_that_pair_with_paragraphs_stand_behind_the_same_tokens():
    model = zoo.bridge("gpt_neo")
    ids = zoo.random_ids(4, 60)
    paragraphs = Paragraphs(ids, bos=FRONT)
    other = corrupted(paragraphs)
    by_ids = mc.patch_heads(model, paragraphs, other.ids, **QUIET)
    torch.testing.assert_close(
        by_ids.values, mc.patch_heads(model, paragraphs, other, **QUIET).values
    )


def test_results_keep_the_tokens_in_front(tmp_path):
    model = zoo.bridge("gpt_neo")
    paragraphs = in_front(model)
    scan = mc.scan(model, paragraphs, **QUIET)
    loaded = type(scan).load(scan.save(tmp_path / "scan.safetensors"))
    assert loaded.paragraphs.hash == scan.paragraphs.hash == paragraphs.hash
    assert scan.memorized.bos == scan.control.bos == FRONT
    assert scan.provenance.paragraphs["paragraphs"]["bos"] == list(FRONT)
    perturbation = mc.perturb_prefix(model, paragraphs, **QUIET)
    assert perturbation.paragraphs.bos == FRONT
    assert perturbation.pairs().corrupted.bos == FRONT
    ranking = mc.find_memorization_heads(model, paragraphs, draws=5, **QUIET)
    assert ranking.memorized.bos == ranking.control.bos == FRONT


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, values in one.items():
        torch.testing.assert_close(values, other[key], equal_nan=True)
