"""Is a weight matrix that of the heads and neurons that its name says? It is tried.

Where `memcircuits.models.layout` looks at a module by itself, these checks look at a block:

* `misplaced_gradient`: one coordinate of one head is changed only by the part of W_Q, W_K or W_V
  that is called this head's, and one neuron only by its own weights of the MLP. The derivatives of
  that coordinate by all weights are taken at the hooks, where the analyses read and write; they are
  what a rank-one change of each head would do to it. For W_O, which has z as its input, the whole
  derivative is compared with the product of z and a random output gradient.
* `refuse_lost_wrappers`: TransformerLens splits the fused matrix of queries, keys and values of
  some architectures into three. What a wrapper such as LoRA adds to the fused one is then lost, so
  the three together must give what the fused one gives.
* `refuse_shared`: no two matrices may be the same parameter, as an edit of one would change both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import UnsupportedModel
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import ActivationEdit, Site, hook_name
from memcircuits.models.layout import is_plain, unwrapped
from memcircuits.models.weights import Weight

_SITE_OF: dict[str, Site] = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_gate": "post", "W_in": "post"}
"""The site of which one coordinate is a function of one column of a matrix."""


def refuse_shared(adapter: Adapter, weights: Sequence[Weight]) -> None:
    """Raise `UnsupportedModel` if two matrices are one parameter."""
    owners: dict[int, Weight] = {}
    for weight in weights:
        other = owners.setdefault(id(weight.parameter), weight)
        if adapter.is_bridge and other is not weight:
            raise UnsupportedModel(
                "model",
                adapter.name,
                f"{weight.component} of block {weight.layer} is the same parameter as "
                f"{other.component} of block {other.layer}: an edit of one would change both; "
                "use a model whose blocks have weights of their own",
            )


def refuse_lost_wrappers(adapter: Adapter) -> None:
    """Raise `UnsupportedModel` if TransformerLens left out a part of a fused matrix."""
    if not adapter.is_bridge or adapter.basis == "folded":
        return
    for layer, block in enumerate(adapter.model.blocks):
        parts = [unwrapped(block.attn._modules.get(name)) for name in ("q", "k", "v")]
        _compare(adapter, layer, "attention", unwrapped(block.attn._modules.get("qkv")), parts)
        parts = [unwrapped(block.mlp._modules.get(name)) for name in ("gate", "in")]
        inner = getattr(block.mlp, "original_component", None)
        fused = getattr(inner, "_modules", {}).get("gate_up_proj")
        _compare(adapter, layer, "MLP", unwrapped(fused), parts)


def _compare(adapter: Adapter, layer: int, where: str, fused: Any, parts: list[Any]) -> None:
    """Compare the outputs of a wrapped fused module, in any order, with those of its parts."""
    if fused is None or is_plain(fused) or None in parts:
        return
    x = torch.linspace(-1, 1, adapter.d_model).to(parts[0].weight)[None]
    with torch.no_grad():
        whole = fused(x).flatten().float().sort().values
        split = torch.cat([part(x).flatten() for part in parts]).float().sort().values
    tolerance = 1e-3 if adapter.dtype in (torch.float32, torch.float64) else 5e-2
    same_size = whole.shape == split.shape
    if not same_size or (whole - split).abs().max() > tolerance * whole.abs().max():
        raise UnsupportedModel(
            "model",
            adapter.name,
            f"TransformerLens leaves out what {type(fused).__module__.split('.')[0]}'s "
            f"{type(fused).__name__} adds to the fused matrix of the {where} of block {layer}; "
            "make the Bridge from model.merge_and_unload() or model.dequantize()",
        )


def misplaced_gradient(
    adapter: Adapter, layer: int, resid_pre: Float[Tensor, "batch pos d_model"]
) -> float | None:
    """Largest derivative found where a block's matrices should have none, relative to the others.

    Args:
        adapter: the model.
        layer: the block.
        resid_pre: what enters it.

    Returns:
        None where derivatives cannot be taken: weights made inside `torch.inference_mode()`.
    """
    weights = {component: adapter.weight(layer, component) for component in adapter.components}
    parameters = [weight.parameter for weight in weights.values()]
    if any(parameter.is_inference() for parameter in parameters):
        return None
    sites = dict.fromkeys(["z", *(site for c, site in _SITE_OF.items() if c in weights)])
    names = {site: hook_name(site, layer) for site in sites}
    names = {site: name for site, name in names.items() if name in adapter.hook_names}
    worst = 0.0
    with adapter.preserving_state(grad=parameters):
        cache, attn_out = _run_block(adapter, layer, resid_pre.detach().clone(), names.values())
        for component, weight in weights.items():
            site = _SITE_OF.get(component)
            if component == "W_O":
                worst = max(worst, _output_error(weight, cache[names["z"]], attn_out))
            elif site in names and names[site] in cache:
                worst = max(worst, _column_error(weight, cache[names[site]], layer))
    return worst


def _run_block(
    adapter: Adapter, layer: int, resid_pre: Tensor, names: Iterable[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """The activations of one block by name, and the output of its attention."""
    cache: dict[str, Tensor] = {}

    def keeping(name: str) -> ActivationEdit:
        def keep(activation: Tensor) -> Tensor:
            cache[name] = activation
            return activation

        return keep

    with adapter.recording() as record:
        adapter.run_blocks(layer, resid_pre, layer + 1, edit={n: keeping(n) for n in names})
    return cache, record.attn_out[-1]  # before it, the whole model may have run


def _column_error(weight: Weight, activation: Tensor, layer: int) -> float:
    """Derivatives of one coordinate outside its own column, relative to those inside."""
    heads, d_out = weight.values.shape[0], weight.values.shape[2]
    flat = activation.flatten(-2) if heads > 1 or activation.ndim == 4 else activation
    flat = flat.reshape(-1, flat.shape[-1])
    head = (layer + 1) % heads
    own = flat[:, head * d_out : (head + 1) * d_out].detach().float().square().sum(0)
    column = int(own.argmax())
    value = flat[:, head * d_out + column]
    generator = torch.Generator().manual_seed(layer)
    factors = torch.randn(len(value), generator=generator).to(value)
    (grad,) = torch.autograd.grad((value * factors).sum(), weight.parameter, retain_graph=True)
    split = weight.split(grad).float().abs()
    inside = split[head, :, column].max().clone()
    split[head, :, column] = 0
    return float(split.max() / inside) if inside > 0 else float("inf")


def _output_error(weight: Weight, z: Tensor, attn_out: Tensor) -> float:
    """Difference of the derivative by W_O from z times a random output gradient."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(attn_out.shape, generator=generator).to(attn_out)
    (grad,) = torch.autograd.grad((attn_out * factors).sum(), weight.parameter, retain_graph=True)
    split = weight.split(grad).float().to(z.device)
    expected = torch.einsum("bphd,bpm->hdm", z.detach().float(), factors.float())
    return float((split - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
