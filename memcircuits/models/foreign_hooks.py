"""Which functions of the caller take part in a model's forward pass.

A hook that steers a model, or a `forward` that was replaced, changes every number while the weights
stay as they are. Analyses measure the model as it is, with them; what is found here stands in the
provenance of a result, so that it never looks like one of the model alone. Hooks that the libraries
underneath install for themselves are not counted.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from memcircuits.models.architecture import is_bridge

_LIBRARIES = ("accelerate", "memcircuits", "peft", "torch", "transformer_lens", "transformers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{kind}" for kind in _HOOKS[:3])


def foreign_hooks(model: Any) -> list[str]:
    """Where there are functions of the caller, and their names, in order of the model.

    A function `steer` at the input of block 1 is `blocks.1.hook_in: steer`.
    """
    names: dict[nn.Module, str] = {}
    for root in (model, *((model.original_model,) if is_bridge(model) else ())):
        for name, module in root.named_modules():
            names.setdefault(module, name or type(module).__name__)
    places = [(name, _functions_on(module)) for module, name in names.items()]
    on_all = [f for kind in _GLOBAL_HOOKS for f in getattr(torch_module, kind).values()]
    return [
        f"{place}: {_name(function)}"
        for place, functions in [*places, ("every module", on_all)]
        for function in functions
        if _home(function).split(".")[0] not in _LIBRARIES
    ]


def _functions_on(module: Any) -> list[Any]:
    """Hooks on one module, and its `forward` if it was replaced."""
    # TransformerLens wraps the functions that a hook point is given.
    points = [*getattr(module, "fwd_hooks", ()), *getattr(module, "bwd_hooks", ())]
    functions = [point.user_hook for point in points if getattr(point, "user_hook", None)]
    functions += [hook for kind in _HOOKS for hook in getattr(module, kind).values()]
    return [*functions, vars(module)["forward"]] if "forward" in vars(module) else functions


def _innermost(function: Any) -> Any:
    """The function inside partial functions and bound methods."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__func__", function)


def _home(function: Any) -> str:
    """Name of the module that defines a function; `functools.wraps` does not hide it."""
    function = _innermost(function)
    home = getattr(function, "__globals__", {}).get("__name__")
    return home or getattr(function, "__module__", None) or type(function).__module__


def _name(function: Any) -> str:
    function = _innermost(function)
    return getattr(function, "__qualname__", type(function).__qualname__).split(".")[-1]
