"""Whatever happens inside a call, the model leaves it as it came; bad numbers stay where they are.

Exceptions and Ctrl-C are raised at random firings of hooks on every module, in forward and backward
passes, inside every analysis of the matrix. Everything that can be told from outside is compared:
weights and gradients bit by bit, flags, hooks, attributes, random generators.
"""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memcircuits as mc
from memcircuits.benchmark.pages import write_leaderboard
from memcircuits.benchmark.schemas import PlantedTrial
from memcircuits.core.errors import InputError
from memcircuits.editing.noise import weight_noise
from memcircuits.evidence.patching.sweeps import patch_layers
from memcircuits.models.hooks import hook_name
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.score_map import ScoreMap
from tests import matrix
from tests.helpers import models as zoo
from tests.helpers.calls import CALLS, made, public

MODELS = [("gpt_neo", "Bridge raw"), ("llama", "Bridge folded")]
MODELS += [("llama", "HookedTransformer raw")] if zoo.has_hooked() else []
FEW = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Pulled(Exception):
    """The plug, pulled."""


# -- what must stay -------------------------------------------------------------------------------


def bits(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return tensor.detach().clone().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a call could leave behind."""
    found: dict[str, Any] = {
        "torch": bits(torch.get_rng_state()),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
    }
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"value {name}"] = bits(tensor)
        found[f"grad {name}"] = bits(tensor.grad), id(tensor.grad)
        found[f"requires_grad {name}"] = tensor.requires_grad
        found[f"identity {name}"] = id(tensor), tensor.data_ptr()
    for name, module in model.named_modules():
        found[f"training {name}"] = module.training
        for key, value in vars(module).items():
            if key.endswith("hooks"):
                inside = (
                    [(k, id(v)) for k, v in value.items()] if hasattr(value, "items") else value
                )
                found[f"{key} {name}"] = str(inside)
            elif key != "training" and not key.startswith(("_current_", "_fired_")):
                # TransformerLens keeps notes of its latest forward pass there.
                found[f"attribute {name}.{key}"] = id(value)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [
        key for key in before.keys() | after.keys() if before.get(key, ...) != after.get(key, ...)
    ]


@contextlib.contextmanager
def pulled_at(model: nn.Module, error: BaseException | None, at: int):
    """Raise at the `at`-th firing of a hook on any module; counts the firings."""
    fired = [0]

    def fire(*_: Any) -> None:
        fired[0] += 1
        if error is not None and fired[0] == at:
            raise error

    def on_forward(module: nn.Module, args: Any, out: Any) -> None:
        fire()
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(fire)

    handles = [module.register_forward_hook(on_forward) for module in model.modules()]
    try:
        yield fired
    finally:
        for handle in handles:
            handle.remove()


def unusual(name: str, variant: str) -> nn.Module:
    """A model in a state that a caller may have: half in training, some gradients, own hooks."""
    source = zoo.shaken(zoo.hf_model(name))
    if variant.startswith("Hooked"):
        model = zoo.hooked(name, source)
    else:
        model = as_bridge(source, zoo.tokenizer(), name=f"tiny-{name}")
        if variant.endswith("folded"):
            model.enable_compatibility_mode(disable_warnings=True)
    model.train()
    model.blocks[0].eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
        if index % 2:
            parameter.grad = torch.full_like(parameter, 0.25)
    model.add_hook(hook_name("z", 1), lambda z, hook: None)
    model.blocks[1].register_forward_hook(lambda module, args, out: None)
    with torch.no_grad():
        model(zoo.random_ids(1, 5))  # TransformerLens itself installs hooks in its first pass
    return model


# -- faults ---------------------------------------------------------------------------------------


def test_every_public_function_is_called():
    """Those that take a model; a new one has to be added above."""
    assert public() - {name.partition(",")[0] for name in CALLS} == set()


@pytest.fixture(scope="module", params=MODELS, ids=" ".join)
def used(request):
    """Such a model, and its name; each test proves that it leaves it as it was."""
    name, variant = request.param
    model = unusual(name, variant)
    adapt(model)
    made(model, name)
    return model, name


@pytest.mark.parametrize("call", CALLS)
def test_a_call_leaves_nothing_behind(used, call):
    model, name = used
    before = state(model)
    CALLS[call](model, name)
    assert differences(before, state(model)) == []


@pytest.mark.parametrize("call", CALLS)
def test_an_exception_anywhere_leaves_nothing_behind(used, call):
    model, name = used
    with pulled_at(model, None, 0) as fired:
        CALLS[call](model, name)
    assert fired[0] > 0

    @FEW
    @given(
        place=st.floats(0, 1),
        error=st.sampled_from([Pulled(), KeyboardInterrupt(), SystemExit(), ValueError("x")]),
    )
    def pull(place: float, error: BaseException) -> None:
        at = 1 + int(place * (fired[0] - 1))
        before = state(model)  # hypothesis seeds Python's generator for each example
        with pulled_at(model, error, at), pytest.raises(type(error)):
            CALLS[call](model, name)
        assert differences(before, state(model)) == []

    pull()


@pytest.mark.parametrize("analysis", matrix.ANALYSES)
def test_memory_that_runs_out_once_changes_no_number(used, analysis):
    """The piece that did not fit is halved and done again."""
    if analysis in NOT_IN_PIECES:
        pytest.skip("runs in batches of a fixed size")
    model, name = used
    measure, paragraphs = matrix.ANALYSES[analysis].measure, matrix.paragraphs(name)
    with pulled_at(model, None, 0) as fired:
        expected = measure(model, paragraphs)
    before = state(model)
    error = torch.OutOfMemoryError("out of memory, as a test")
    with pulled_at(model, error, max(1, fired[0] - 3)):
        found = measure(model, paragraphs)
    assert matrix.difference(found, expected, False) < 1e-5
    assert differences(before, state(model)) == []


NOT_IN_PIECES = {
    "attention_view",
    "rare_token_attention",
    "parameter_gradients",
    "find_memorization_heads",
}


def test_state_sees_changes(neo):
    """The comparison above would notice each kind of thing left behind."""
    model = zoo.bridge("gpt2")
    before = state(model)

    def noticed() -> bool:
        return bool(differences(before, state(model)))

    assert not noticed()
    weight = next(model.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1e-6
    assert noticed()
    with torch.no_grad():
        weight.copy_(kept)
    assert not noticed()
    weight.requires_grad_(not weight.requires_grad)
    assert noticed()
    weight.requires_grad_(not weight.requires_grad)
    model.blocks[0].train()
    assert noticed()
    model.blocks[0].eval()
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    assert noticed()
    handle.remove()
    model.add_hook(hook_name("z", 0), lambda z, hook: None)
    assert noticed()


# -- numbers that are not finite ------------------------------------------------------------------


POISON = 77


@pytest.fixture(scope="module")
def poisoned():
    """A model whose logits are NaN once it has seen token 77 (its embedding is NaN)."""
    source = zoo.hf_model("llama")
    with torch.no_grad():
        source.get_input_embeddings().weight[POISON] = float("nan")
    model = as_bridge(source, zoo.tokenizer(), name="tiny-poisoned")
    ids = zoo.mixed(model, n=4).ids
    ids[ids == POISON] = 5
    recited = zoo.reciting(model, n=8).ids
    recited = recited[(recited != POISON).all(1)][:4]
    ids = torch.cat([recited, ids[4:]])
    bad = ids[[0, 5]].clone()
    bad[:, 3] = POISON
    return (
        model,
        mc.Paragraphs.from_tokens(ids, n_prefix=10),
        mc.Paragraphs.from_tokens(torch.cat([ids[:2], bad, ids[2:]]), n_prefix=10),
    )


GOOD = [0, 1, 4, 5, 6, 7, 8, 9]


def test_scan_quarantines_paragraphs_that_are_not_finite(poisoned):
    model, clean, mixed = poisoned
    found, expected = (mc.scan(model, p, progress=False) for p in (mixed, clean))
    assert found.finite.tolist() == [i in GOOD for i in range(10)]
    assert torch.equal(found.em[GOOD], expected.em)
    assert torch.allclose(found.nll[GOOD], expected.nll, atol=1e-6)
    assert not found.is_memorized[[2, 3]].any()
    assert not found.is_control[[2, 3]].any()


def test_ranking_leaves_them_out_and_says_so(poisoned):
    model, clean, mixed = poisoned
    rankings = [
        mc.find_memorization_heads(model, p, draws=100, progress=False) for p in (mixed, clean)
    ]
    found, expected = rankings
    assert found.counts["not_finite"] == 2
    assert any("non-finite" in note for note in found.notes)
    assert found.score.isfinite().all()
    assert torch.allclose(found.score, expected.score, atol=1e-6)
    assert found.top(3) == expected.top(3)


def same_numbers(found: matrix.Numbers, expected: matrix.Numbers) -> None:
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.allclose(value, expected[key], atol=1e-6), key


NOTE = "2 of 10 paragraphs had non-finite numbers and were left out"
MEANS = {  # result -> the numbers that are means over paragraphs
    "ablate_heads": (lambda m, p: mc.ablate_heads(m, p, progress=False), ("values",)),
    "ablate_heads, mean": (
        lambda m, p: mc.ablate_heads(m, p, mode="mean", progress=False),
        ("values",),
    ),
    "rare_token_attention": (
        lambda m, p: mc.rare_token_attention(
            m, p, matrix.unigrams(), permutations=5, progress=False
        ),
        ("values", "entropy"),
    ),
    "patch_heads": (
        lambda m, p: mc.patch_heads(m, p, matrix.twins(p), progress=False),
        ("values", "share"),
    ),
    "patch_heads, attribution": (
        lambda m, p: mc.patch_heads(m, p, matrix.twins(p), method="attribution", progress=False),
        ("values", "share"),
    ),
    "patch_layers": (
        lambda m, p: patch_layers(m, p, matrix.twins(p), positions=[0, 5], progress=False),
        ("values", "whole"),
    ),
    "parameter_gradients": (
        lambda m, p: mc.parameter_gradients(m, p, progress=False),
        ("values", "layers"),
    ),
    "parameter_gradients, each": (
        lambda m, p: mc.parameter_gradients(m, p, average="paragraph", progress=False),
        ("values", "statistics"),
    ),
    "activation_gradients": (
        lambda m, p: mc.activation_gradients(m, p, progress=False),
        ("values", "error"),
    ),
}


@pytest.mark.parametrize("name", MEANS)
def test_means_are_those_without_them_and_the_note_counts_them(poisoned, name):
    model, clean, mixed = poisoned
    measure, fields = MEANS[name]
    found, expected = measure(model, mixed), measure(model, clean)
    assert NOTE in found.notes
    assert not any("non-finite" in note for note in expected.notes)
    for field in fields:
        values = [getattr(result, field) for result in (found, expected)]
        same_numbers(*(v if isinstance(v, dict) else {field: v} for v in values))
    if isinstance(found, ScoreMap):
        assert found.top(5) == expected.top(5)
        assert found.samples[next(iter(found.samples))].shape[0] == 10


def test_contrast_perturbation_and_noise_leave_them_out(poisoned):
    model, _, mixed = poisoned
    pairs = [(mixed[:5], mixed[5:]), (mixed[[0, 1, 4]], mixed[5:])]
    found, expected = (
        mc.contrastive_gradients(model, *pair, curvature=False, progress=False) for pair in pairs
    )
    same_numbers(found.values, expected.values)
    assert found.notes == ("memorized: 2 of 5 paragraphs had non-finite numbers and were left out",)
    changed = mc.perturb_prefix(model, mixed, seed=1, progress=False)
    assert set(changed.names) <= {mixed.names[i] for i in GOOD}
    assert changed.nll.isfinite().all()
    assert any("left out" in note for note in changed.notes)
    curve = weight_noise(model, mixed[:5], mixed[5:], sizes=(0.0,), progress=False)
    assert curve.nll["memorized"].shape[-1] == 3
    assert curve.nll["memorized"].isfinite().all()


def test_edits_refuse_them_by_name(poisoned):
    model, _, mixed = poisoned
    for call in (
        lambda: mc.unlearn(model, mixed[:4], mixed[5:], progress=False),
        lambda: mc.edit(model, mixed[:2], mixed[7:9], mixed[2:6], progress=False),
        lambda: mc.plant(model, mixed[2:4], where="L1.mlp", control=mixed[:2], progress=False),
        lambda: mc.plant(model, mixed[:2], where="L1.mlp", control=mixed[3:5], progress=False),
    ):
        named = r"^(memorized|paragraphs|control): paragraphs with non-finite"
        with pytest.raises(InputError, match=named):
            call()


def test_anchors_that_a_broken_model_would_write_are_refused():
    source = zoo.hf_model("llama")
    model = as_bridge(source, zoo.tokenizer(), name="tiny-broken")
    paragraphs = zoo.mixed(model)
    with torch.no_grad():
        source.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"^control: not given, and text .* non-finite"):
        mc.plant(model, paragraphs, where="L1.mlp", progress=False)


def test_heads_without_a_finite_value_are_not_ranked():
    provenance = Provenance({"basis": "raw"}, {}, {}, {})
    values = torch.tensor([[1.0, float("nan")], [float("inf"), 3.0]])
    found = ScoreMap("x", "nats", values, provenance)
    assert [str(head) for head in found.top(10)] == ["L1H1", "L0H0"]


# -- half precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt_neo", "llama", "gemma2"])
def test_half_precision_differs_only_at_near_ties(name):
    """Where bf16 decides a token otherwise than float32, float32's own margin was small."""
    full = zoo.bridge(name)
    half = as_bridge(
        zoo.hf_model(name).to(torch.bfloat16), zoo.tokenizer(), name=f"tiny-{name}-bf16"
    )
    paragraphs = zoo.mixed(full, n=16)
    exact, rough = (mc.scan(m, paragraphs, progress=False) for m in (full, half))
    assert rough.provenance.model["dtype"] == "bfloat16"
    assert rough.token_log_prob.dtype == torch.float32
    with adapt(full).preserving_state():
        scale = adapt(full).forward(paragraphs.ids[:, :-1])[:, 9:].abs().amax(-1)
    near_tie = exact.token_margin < scale * 2**-5
    assert near_tie.float().mean() < 0.8  # else the next line says nothing
    assert (exact.token_correct == rough.token_correct)[~near_tie].all()
    decided = exact.em != rough.em
    first = torch.minimum(exact.em, rough.em)[decided]
    assert near_tie[decided].gather(1, first[:, None]).all()


@pytest.mark.slow
def test_half_precision_on_the_organism():
    """Tokens that bf16 decides otherwise are near-ties, which float32's margins point out."""
    paragraphs = mc.Paragraphs.shipped("planted")[::4] + mc.Paragraphs.shipped("control")[::8]
    exact, rough = (
        mc.scan(mc.load_model(dtype=dtype), paragraphs, progress=False)
        for dtype in ("float32", "bfloat16")
    )
    assert exact.is_memorized.sum() >= 20
    near_tie = exact.token_margin < exact.token_margin.median() / 5
    assert near_tie.float().mean() < 0.2
    differs = exact.token_correct != rough.token_correct
    assert differs.any()  # else the next lines say nothing
    assert near_tie[differs].all()
    safe = ~near_tie.any(1)
    assert safe.sum() >= 20
    assert torch.equal(exact.em[safe], rough.em[safe])
    assert (exact.is_memorized == rough.is_memorized).float().mean() > 0.98


def test_a_benchmark_in_which_no_place_held_anything_says_so(tmp_path):
    failed = PlantedTrial(where=["L0H0"], failed="it does not hold the text", seconds=1.0)
    (tmp_path / "run.json").write_text(
        '{"model": {"name": "tiny", "fingerprint": "0"}, "options": {"n": 1, "seed": 0}}'
    )
    *_, markdown, page = write_leaderboard({"head": [failed]}, tmp_path)
    for path in (markdown, page):
        assert "1 of 1 places could not hold the text" in path.read_text()
