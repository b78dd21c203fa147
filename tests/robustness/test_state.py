"""Whatever happens inside a call, the model leaves it as it came.

Exceptions and Ctrl-C are raised at random firings of hooks on every module, in forward and backward
passes, inside every analysis of the matrix. Everything that can be seen from outside is compared:
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

from memcircuits.models.hooks import hook_name
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt
from tests import matrix
from tests.helpers import models as zoo
from tests.helpers.calls import CALLS, edit_of, public_functions

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


def bits(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return tensor.detach().clone().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a call could leave behind."""
    kept: dict[str, Any] = {
        "torch": bits(torch.get_rng_state()),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
    }
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kept[f"value {name}"] = bits(tensor)
        kept[f"grad {name}"] = bits(tensor.grad), id(tensor.grad)
        kept[f"requires_grad {name}"] = tensor.requires_grad
        kept[f"identity {name}"] = id(tensor), tensor.data_ptr()
    for name, module in model.named_modules():
        kept[f"training {name}"] = module.training
        for key, value in vars(module).items():
            if key.endswith("hooks"):
                hooks = [(k, id(v)) for k, v in value.items()] if hasattr(value, "items") else value
                kept[f"{key} {name}"] = str(hooks)
            elif key != "training" and not key.startswith(("_current_", "_fired_")):
                # TransformerLens keeps notes of its latest forward pass there.
                kept[f"attribute {name}.{key}"] = id(value)
    return kept


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


def test_every_public_function_is_called():
    """Those that take a model; a new one is added to `CALLS`."""
    assert public_functions() - {name.partition(",")[0] for name in CALLS} == set()


@pytest.fixture(scope="module", params=MODELS, ids=" ".join)
def used(request):
    """Such a model, and its name; each test proves that it leaves it as it was."""
    name, variant = request.param
    model = unusual(name, variant)
    adapt(model)
    edit_of(model, name)
    # The twin is made, and TransformerLens's first passes through both are over.
    matrix.ANALYSES["transplant, weights"].measure(model, matrix.paragraphs(name))
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


@pytest.mark.any_version
@pytest.mark.parametrize("analysis", matrix.ANALYSES)
def test_memory_that_runs_out_once_changes_no_number(used, analysis):
    """The batch that did not fit is halved and done again."""
    if analysis in IN_FIXED_BATCHES:
        pytest.skip("runs in batches of a fixed size")
    model, name = used
    measure, paragraphs = matrix.ANALYSES[analysis].measure, matrix.paragraphs(name)
    with pulled_at(model, None, 0) as fired:
        expected = measure(model, paragraphs)
    before = state(model)
    error = torch.OutOfMemoryError("out of memory, as a test")
    with pulled_at(model, error, max(1, fired[0] - 3)):
        halved = measure(model, paragraphs)
    assert matrix.difference(halved, expected, False) < 1e-5
    assert differences(before, state(model)) == []


IN_FIXED_BATCHES = {
    "attention_view",
    "rare_token_attention",
    "parameter_gradients",
    "find_memorization_heads",
    "find_memorization_components",
    "recitation_circuit",
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
