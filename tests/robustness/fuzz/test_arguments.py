"""Odd arguments of the public functions: each is refused by one clear error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.editing.recipe import Recipe
from tests.helpers import models as zoo
from tests.helpers.fuzz import COUNTS, TIMES, TRIED

pytestmark = pytest.mark.any_version

CALLS: dict[str, dict[str, tuple[Any, ...]]] = {
    "scan": {"batch_size": (0, -1, "2", 1.5)},
    "counterfactual": {"ngram": (3, "x", torch.ones_like)},
    "compare": {
        "max_paragraphs": (0, 1, -1, "x"),
        "draws": (0, -1, "x", 1.5),
        "seed": (-1, "x"),
    },
    "transplant": {
        "patched": ("", None, "norms"),
        "units": ([], ["x"], "head", 3, ["neuron", 1]),
        "neuron_groups": (0, -1, "x", 1.5),
    },
    "formation": {
        "twins": ([], {}, {3: 1}, 3),
        "control": (3, [], "x", [[1]]),
        "max_paragraphs": (-1, "x", 1.5),
        "seed": (-1, "x"),
    },
    "ablate_heads": {
        "mode": ("", None, 0, []),
        "reference": (3, [], "x", [[1]]),
        "seed": ("x", 1.5),
    },
    "parameter_gradients": {"pool": ("", None, "sum", [])},
    "rare_token_attention": {
        "query": (0, -1, 22, "x", 1.5),
        "permutations": (0, -1, "x", 1.5),
        "unigrams": (3, "x"),
    },
    "find_memorization_heads": {
        "control": (3, [], [[1]], "x"),
        "mode": ("", None),
        "max_paragraphs": (0, 1, -1, "x", 1.5),
        "draws": (0, -1, "x"),
        "unigrams": (3, "x"),
        "method": ("", None, "fast"),
    },
    "contrastive_gradients": {
        "pool": ("", None),
        "n_control": (0, "x", 1.5),
        "draws": (0, "x"),
    },
    "activation_gradients": {
        "sites": ("z", (), ("x",), None, (1,)),
        "token": (-1, 12, "x", [1, 2], 1.5),
    },
    "patch_heads": {
        "site": ("", "resid_pre", None),
        "positions": ("all", [99], [-1], [], 3, ["x"], [1.5]),
        "metric": ("", "x", 3, None),
        "direction": ("", None, "up"),
        "method": ("", None, "x"),
        "check": (0, 3, "x"),
    },
    "perturb_prefix": {
        "replacement": ("", None, "x", []),
        "draws": (0, -1, "x", 1.5),
        "unigrams": (3, "x"),
    },
    "contrast": {
        "draws": (0, -1, "x", 1.5),
        "replacements": (0, -1, "x"),
        "tagger": (3, "x"),
        "unigrams": (3, "x"),
        "seed": (-1, "x", 1.5),
    },
    "influence": {
        "eta": (0, "x", float("nan"), None, True),
        "where": ("L9H9", "x", [], 3, "L9.mlp", [None]),
        "tested": (3, [], "x", [[1]]),
    },
    "cut_prefix": {
        "cuts": ((), None, "0", 3, [99999], [-999], [1.5], [True]),
        "backtrack": (0, -1, "x"),
        "tolerance": (-1, 2, "x", None),
    },
    "lookups": {
        "neurons": (0, -1, "x", 1.5, 9999),
        "prompts": (0, 1, "x", 1.5),
        "max_paragraphs": (0, 1, "x"),
    },
    "recitation_circuit": {
        "faithfulness": (0, -1, 2, "x", None),
        "draws": (0, -1, "x", 1.5),
        "steps": (0, "x", 1.5),
        "verify": (-1, "x", 1.5),
    },
    "core": {
        "seeds": (0, -1, "x", 1.5),
        "sparsity": (0, 1, -1, 2, "x", None),
        "steps": (0, "x", 1.5),
        "max_paragraphs": (0, "x"),
        "shuffles": (-1, "x", 1.5),
    },
    "unlearn": {
        "depth": ("", None, "deeper"),
        "fraction": (0, -1, 2, "x", float("nan")),
        "mask": ("", None, "most"),
        "heads": (["L9H9"], ["x"], [(1, 99)], 3),
        "layers": ([9], [-1], ["x"], 3),
        "components": (["W_X"], [3], 3),
        "kl_budget": (0, "x", -1),
        "recipe": ("fast", Recipe(steps=0)),
        "seed": ("x", 1.5),
    },
    "edit": {"fraction": (0, "x"), "mask": ("", None), "kl_budget": (0, "x")},
    "plant": {
        "where": ("", "L9H9", "L1.x", [], 3, None, [3], "neurons:2", "weights:x", "weights:0"),
        "components": (["W_X"], 3, "W_Q"),
        "steps": (0, "x", 1.5),
        "learning_rate": (0, "x", float("nan")),
        "kl_weight": (-1, "x", float("inf")),
        "kl_budget": (0, "x", -1),
        "seed": ("x", 1.5),
        "control": (3, "x", [[1]]),
    },
    "attention_view": {
        "layer": (9, -1, "x", 1.5),
        "heads": ([99], ["x"], 3, []),
        "compare": (3, "x", [[1]]),
        "unigrams": (3, "x"),
    },
}
TWO_MODELS = ("compare", "counterfactual", "transplant")
PARAGRAPHS: tuple[Any, ...] = (
    None, 3, 1.5, "text", b"bytes", [], [[]], [[1, 2], [1]], [["a"]], [[1.5] * 60], [None], {}, {1},
    object(), torch.zeros(2, 60), torch.zeros(2, 60, dtype=torch.bool), torch.zeros(0, 60).long(),
    torch.zeros(2, 3, 4).long(), torch.zeros(60).long(), torch.full((2, 60), -1),
    torch.full((2, 60), zoo.D_VOCAB), torch.zeros(2, 500).long(), torch.zeros(2, 50).long(),
    [[2**70] * 60], [[True] * 60], ["<1>"], ["<1> " * 100, 3], [""], np.zeros((2, 60)), (),
    iter([]),
)  # fmt: skip


def call(
    function: str, bridge: Any, good: mc.Paragraphs, value: Any, options: dict[str, Any]
) -> None:
    """Functions of two or three sets of paragraphs get good ones beside the odd one."""
    beside: dict[str, tuple[Any, ...]] = {
        "contrastive_gradients": (good[3:],),
        "contrast": (good[3:],),
        "patch_heads": (good,),
        "unlearn": (good[3:],),
        "core": (good[3:],),
        "edit": (good[3:], good[3:]),
    }
    if function in TWO_MODELS:
        getattr(mc, function)(bridge, bridge, value, **{"progress": False, **options})
        return
    if function == "formation":
        mc.formation([bridge], value, **{"progress": False, **options})
        return
    if function == "attention_view":
        mc.attention_view(bridge, value, **options)
        return
    if function == "plant":
        options = {"where": "L1.mlp", "steps": 2, **options}
    getattr(mc, function)(
        bridge, value, *beside.get(function, ()), **{"progress": False, **options}
    )


def odd_calls(good: mc.Paragraphs) -> list[tuple[str, Any, dict[str, Any]]]:
    """Function, paragraphs and options, one of them odd, for every odd value."""
    calls: list[tuple[str, Any, dict[str, Any]]] = []
    for function, options in CALLS.items():
        calls += [(function, value, {}) for value in PARAGRAPHS]
        if function not in ("rare_token_attention", "attention_view", "recitation_circuit"):
            options = {**options, "memory_budget": (0, -1, "x")}
        usable = good[:1] if function in ("attention_view", "recitation_circuit") else good[:3]
        if function in ("scan", "find_memorization_heads", "ablate_heads"):
            usable = good
        for option, values in options.items():
            calls += [(function, usable, {option: value}) for value in values]
    return calls


def test_odd_arguments(bridge):
    good = zoo.mixed(bridge, n=3)
    calls = odd_calls(good)
    assert len(calls) >= COUNTS["odd arguments"] // TIMES
    wrong = []
    for function, value, options in calls:
        TRIED["odd arguments"] += 1
        try:
            call(function, bridge, good, value, options)
        except InputError:
            continue
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        else:
            outcome = "accepted"
        wrong.append(f"{function}({value!r:.60}, {options}): {outcome}"[:200])
    assert not wrong, "\n".join(wrong)
