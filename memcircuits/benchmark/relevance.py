"""The backward rules of AttnLRP, layer-wise relevance propagation for transformers.

Achtibat et al., "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers" (ICML
2024), section 3. With these rules in the backward pass, a unit's relevance is its activation times
its gradient, which is the gradient in a gate on the activation:

* linear layers: the epsilon rule, which the plain gradient follows;
* norms (proposition 3.4) and nonlinearities (identity rule): each number of the output is the
  input's times a constant, the ratio of the two;
* products (uniform rule, proposition 3.3): each factor has half of the relevance. Values get half
  of what comes to pattern @ v, queries and keys half of the pattern's half; so do the two factors
  of a gated MLP;
* the softmax (proposition 3.1): the plain gradient.

Nothing changes in the forward pass but rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import ActivationEdit, HeadSite, hook_name

_SHARES: dict[HeadSite, float] = {"v": 1 / 2, "q": 1 / 4, "k": 1 / 4}


@contextlib.contextmanager
def attn_lrp(adapter: Adapter) -> Iterator[dict[str, ActivationEdit]]:
    """Inside, norms follow their rule in every backward pass.

    Yields:
        Edits for `Adapter.run`, by activation name, that make the rest follow theirs.
    """
    handles = [norm.register_forward_hook(_norm_rule(norm)) for norm in _norms(adapter)]
    try:
        yield {
            name: edit
            for layer in range(adapter.n_layers)
            for name, edit in {**_attention_rules(layer), **_mlp_rules(adapter, layer)}.items()
        }
    finally:
        for handle in handles:
            handle.remove()


def _attention_rules(layer: int) -> dict[str, ActivationEdit]:
    def sharing(share: float) -> ActivationEdit:
        return lambda x: share * x + (1 - share) * x.detach()

    return {hook_name(site, layer): sharing(share) for site, share in _SHARES.items()}


def _mlp_rules(adapter: Adapter, layer: int) -> dict[str, ActivationEdit]:
    """Read the factors of the neurons' activations, and write these as multiples of them."""
    names = [hook_name("pre", layer), f"blocks.{layer}.mlp.hook_pre_linear"]
    names = names if "W_gate" in adapter.components else names[:1]
    factors: dict[str, Float[Tensor, "batch pos d_mlp"]] = {}

    def keeping(name: str) -> ActivationEdit:
        def keep(x: Tensor) -> Tensor:
            factors[name] = x
            return x

        return keep

    def rescale(post: Float[Tensor, "batch pos d_mlp"]) -> Float[Tensor, "batch pos d_mlp"]:
        parts = [_multiple(factors.pop(name), post) for name in names]
        return torch.stack(parts).mean(0)

    return {**{name: keeping(name) for name in names}, hook_name("post", layer): rescale}


def _multiple(x: Tensor, y: Tensor) -> Tensor:
    """`y`, as `x` times a constant; where x is 0, a constant."""
    ratio = torch.where(x == 0, torch.zeros_like(x), y / x).detach()
    return torch.where(x == 0, y.detach(), x * ratio)


def _norms(adapter: Adapter) -> list[nn.Module]:
    """The model's norms, without those inside another one."""
    found: dict[str, nn.Module] = {}
    for name, module in adapter.model.named_modules():
        if "Norm" in type(module).__name__ and not any(
            name.startswith(f"{outer}.") for outer in found
        ):
            found[name] = module
    return list(found.values())


def _norm_rule(norm: nn.Module) -> Callable[..., Tensor]:
    """A hook that writes a norm's output as a multiple of its (centred) input, plus its bias."""
    centres, bias = _centring(norm)

    def rewrite(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = inputs[0]
        x = x - x.mean(-1, keepdim=True) if centres else x
        return _multiple(x, y - bias) + bias

    return rewrite


def _centring(norm: Any) -> tuple[bool, Tensor | float]:
    """Whether a norm takes off the mean of its input, and the bias that it adds.

    An RMS norm has neither. A LayerNorm whose input is a constant returns its bias.
    """
    if "RMS" in type(norm).__name__:
        return False, 0.0
    bias = getattr(norm, "bias", None)
    return True, 0.0 if bias is None else bias.detach()
