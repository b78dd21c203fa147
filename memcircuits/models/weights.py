"""Weight matrices as `[head, d_in, d_out]`, whatever the architecture calls and stores them.

A `HookedTransformer` holds `W_Q` as [head, d_model, d_head], or as `_W_K` with one head per group
where heads share keys. A `TransformerBridge` holds the modules of transformers, which store
[out, in] (Linear) or [in, out] (Conv1D) with all heads side by side. `find_weight` finds the
parameter and a `split` from its shape to `[head, d_in, d_out]`. A split only ever makes views: what
is written into `Weight.values` is written into the model, and the gradient of the parameter is
split in the same way. So gradients, masks and edits have the same coordinates for every model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from memcircuits.core.errors import UnsupportedModel
from memcircuits.models.architecture import architecture_of, is_bridge

HEAD_COMPONENTS = ("W_Q", "W_K", "W_V", "W_O")
"""Matrices of attention, which have a head axis."""

MLP_COMPONENTS = ("W_in", "W_out")
"""Matrices of every MLP; gated ones also have `W_gate`."""


@dataclass(frozen=True)
class Weight:
    """One weight matrix of one layer, seen the same way in every architecture.

    Attributes:
        layer: index of the block.
        component: `W_Q`, `W_K`, `W_V`, `W_O`, `W_in`, `W_out` or (gated MLPs) `W_gate`.
        parameter: the leaf parameter that holds it; may hold other heads too.
        split: maps a tensor of the parameter's shape (values or gradient) to a view
            `[head, d_in, d_out]`; MLP matrices have a single "head".
        module: the Linear or Conv1D that applies it and nothing else; None where there is none.
    """

    layer: int
    component: str
    parameter: nn.Parameter
    split: Callable[[Tensor], Tensor]
    module: nn.Module | None = None

    @property
    def values(self) -> Float[Tensor, "head d_in d_out"]:
        """The weights themselves, detached; writing into the view writes into the model."""
        return self.split(self.parameter.detach())


def component_names(model: Any) -> tuple[str, ...]:
    """Names of the weight matrices that every block of a TransformerLens model has."""
    if is_bridge(model):
        gated = _bridge_module(model, 0, "W_gate") is not None
    else:
        gated = "W_gate" in getattr(model.blocks[0].mlp, "_parameters", {})
    return (*HEAD_COMPONENTS, *(("W_gate",) if gated else ()), *MLP_COMPONENTS)


def find_weight(model: Any, layer: int, component: str, *, heads: int, bypassed: bool) -> Weight:
    """The weight matrix `component` of block `layer`.

    Args:
        model: a TransformerLens model.
        layer: index of the block.
        component: name of the matrix.
        heads: number of heads that it is split into, 1 for matrices of the MLP.
        bypassed: whether the model computes with the matrix without calling its module.

    Raises:
        UnsupportedModel: if the architecture stores it in a form not understood here.
    """
    if not is_bridge(model):
        held = _hooked_parameter(model, layer, component)
        return Weight(layer, component, held, lambda t: t.view(heads, *t.shape[-2:]))
    module = _bridge_module(model, layer, component)
    parameter = getattr(module, "weight", None)
    if module is None or not isinstance(parameter, nn.Parameter):
        raise UnsupportedModel(
            "model", architecture_of(model), f"its block {layer} has no separate {component}"
        )
    split = partial(rearrange, pattern=_split_pattern(module, component), head=heads)
    return Weight(layer, component, parameter, split, None if bypassed else module)


def _split_pattern(module: nn.Module, component: str) -> str:
    """From a module's weight, where the heads lie side by side, to a view of each head.

    Torch's Linear stores [out, in], transformers' Conv1D [in, out]. The heads of W_O share its
    input axis, those of the other matrices of attention their output axis.
    """
    if isinstance(module, nn.Linear):
        if component == "W_O":
            return "d_out (head d_in) -> head d_in d_out"
        return "(head d_out) d_in -> head d_in d_out"
    if component == "W_O":
        return "(head d_in) d_out -> head d_in d_out"
    return "d_in (head d_out) -> head d_in d_out"


def _hooked_parameter(model: Any, layer: int, component: str) -> nn.Parameter:
    """The parameter of a `HookedTransformer`; `_W_K` and `_W_V` hold one head per group."""
    parameters = _owner(model, layer, component)._parameters
    parameter = parameters.get("_" + component)
    if parameter is None:
        parameter = parameters.get(component)
    if parameter is None:
        name = str(getattr(model.cfg, "model_name", "model"))
        raise UnsupportedModel("model", name, f"block {layer} has no {component}")
    return parameter


def _bridge_module(model: Any, layer: int, component: str) -> nn.Module | None:
    """The module of transformers inside a `TransformerBridge` that applies a matrix."""
    module = _owner(model, layer, component)._modules.get(component.removeprefix("W_").lower())
    while module is not None and getattr(module, "original_component", None) is not None:
        module = module.original_component
    return module


def _owner(model: Any, layer: int, component: str) -> Any:
    block = model.blocks[layer]
    return block.attn if component in HEAD_COMPONENTS else block.mlp
