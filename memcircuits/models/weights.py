"""Weight matrices as `[head, d_in, d_out]`, whatever the architecture calls and stores them.

A `HookedTransformer` holds `W_Q` as [head, d_model, d_head], or as `_W_K` with one head per group
where heads share keys. A `TransformerBridge` holds the modules of transformers, which store
[out, in] or [in, out] (`memcircuits.models.layout` tries which) with all heads side by side.
`find_weight` finds the parameter and a `split` from its shape to `[head, d_in, d_out]`. A split
only ever makes views: what is written into `Weight.values` is written into the model, and the
gradient of the parameter is split in the same way. So gradients, masks and edits have the same
coordinates for every model.

A wrapper such as LoRA adds a matrix of its own to the one that it wraps. The parameter is then the
wrapped one: the gradient is the same for both terms of a sum, and an edit of either changes the sum
alike. `Weight.matrix` is the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from memcircuits.base.errors import UnsupportedModel
from memcircuits.models.architecture import architecture_of, is_bridge
from memcircuits.models.layout import (
    Layout,
    applied_matrix,
    is_plain,
    stored_matrix,
    tried_layout,
    unwrapped,
)

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
        layout: order of the axes of the parameter, where a module applies it.
        module: what applies it to its input by a matrix product; None where there is none.
        is_wrapped: whether the module may add another matrix to the parameter's.
    """

    layer: int
    component: str
    parameter: nn.Parameter
    split: Callable[[Tensor], Tensor]
    layout: Layout = "in out"
    module: nn.Module | None = None
    is_wrapped: bool = False

    @property
    def values(self) -> Float[Tensor, "head d_in d_out"]:
        """The parameter, detached; writing into the view writes into the model."""
        return self.split(self.parameter.detach())

    @property
    def matrix(self) -> Float[Tensor, "head d_in d_out"]:
        """What the model multiplies by: the values, and what a wrapper adds to them."""
        if not self.is_wrapped or self.module is None:
            return self.values
        _, d_in = self.parameter.shape if self.layout == "out in" else self.parameter.shape[::-1]
        matrix = applied_matrix(self.module, self.parameter, d_in)
        return self.split(matrix.T if self.layout == "out in" else matrix)


def component_names(model: Any) -> tuple[str, ...]:
    """Names of the weight matrices that every block of a TransformerLens model has."""
    if is_bridge(model):
        # A mixture of experts has a router of this name, and no W_in beside it.
        gated = all(_bridge_module(model, 0, name) is not None for name in ("W_gate", "W_in"))
    else:
        gated = "W_gate" in getattr(model.blocks[0].mlp, "_parameters", {})
    return (*HEAD_COMPONENTS, *(("W_gate",) if gated else ()), *MLP_COMPONENTS)


def find_weight(
    model: Any,
    layer: int,
    component: str,
    *,
    heads: int,
    bypassed: bool,
    layouts: dict[Hashable, Layout],
) -> Weight:
    """The weight matrix `component` of block `layer`.

    Args:
        model: a TransformerLens model.
        layer: index of the block.
        component: name of the matrix.
        heads: number of heads that it is split into, 1 for matrices of the MLP.
        bypassed: whether the model computes with the matrix without calling its module.
        layouts: the layouts that were tried before, for modules of the same kind.

    Raises:
        UnsupportedModel: if the architecture stores it in a form not understood here.
    """
    if not is_bridge(model):
        held = _hooked_parameter(model, layer, component)
        return Weight(layer, component, held, lambda t: t.view(heads, *t.shape[-2:]))
    owner = architecture_of(model)
    module = _bridge_module(model, layer, component)
    if module is None:
        raise UnsupportedModel("model", owner, f"its block {layer} has no separate {component}")
    what = f"{component} of block {layer}"
    parameter = stored_matrix(module, owner, what)
    kind = (component, *(type(m) for m in module.modules()), parameter.shape, parameter.dtype)
    if kind not in layouts:
        layouts[kind] = tried_layout(module, parameter, owner, what)
    layout = layouts[kind]
    split = partial(rearrange, pattern=_split_pattern(layout, component), head=heads)
    applied_by = None if bypassed else module
    return Weight(layer, component, parameter, split, layout, applied_by, not is_plain(module))


def _split_pattern(layout: Layout, component: str) -> str:
    """From a stored matrix, where the heads lie side by side, to a view of each head.

    The heads of W_O share its input axis, those of the other matrices of attention their output
    axis.
    """
    d_in, d_out = ("(head d_in)", "d_out") if component == "W_O" else ("d_in", "(head d_out)")
    stored = f"{d_out} {d_in}" if layout == "out in" else f"{d_in} {d_out}"
    return f"{stored} -> head d_in d_out"


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
    name = component.removeprefix("W_").lower()
    return unwrapped(_owner(model, layer, component)._modules.get(name))


def _owner(model: Any, layer: int, component: str) -> Any:
    block = model.blocks[layer]
    return block.attn if component in HEAD_COMPONENTS else block.mlp
