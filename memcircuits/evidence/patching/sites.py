"""Activations that can be patched: their names, what must be read, and what is written.

Sites are named as in TransformerLens. A head's query, key, value and output z are vectors per
position, [batch, pos, head, d_head], and are patched where they are computed; in models with
grouped queries there is one key and one value per group of heads. An attention pattern,
[batch, head, query, key], is patched through the z that it yields, z = pattern @ v, because a
TransformerBridge ignores writes to the pattern on several architectures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import UnsupportedModel
from memcircuits.models.hooks import hook_name

PatchHeadSite = Literal["q", "k", "v", "z", "pattern"]
LayerSite = Literal["resid_pre", "resid_mid", "attn_out", "mlp_out"]

PATCH_HEAD_SITES: tuple[PatchHeadSite, ...] = get_args(PatchHeadSite)
LAYER_SITES: tuple[LayerSite, ...] = get_args(LayerSite)


def sites_to_read(site: PatchHeadSite) -> tuple[PatchHeadSite, ...]:
    """Sites of the source run that patching a head site needs."""
    return ("pattern", "v", "z") if site == "pattern" else (site,)


def values_to_patch(
    site: PatchHeadSite,
    layer: int,
    base_cache: Mapping[str, Tensor],
    source_cache: Mapping[str, Tensor],
) -> tuple[str, Float[Tensor, "batch pos head d_head"]]:
    """Name of the activation that is overwritten for a head site, and its new values.

    Args:
        site: the head site.
        layer: its layer.
        base_cache: activations of the run patched into; `v` is needed for `pattern`.
        source_cache: activations of the other run, those of `sites_to_read`.

    Raises:
        UnsupportedModel: for `pattern`, if the model's z is not pattern @ v.
    """
    if site != "pattern":
        return hook_name(site, layer), source_cache[hook_name(site, layer)]
    pattern, z = source_cache[hook_name("pattern", layer)], source_cache[hook_name("z", layer)]
    product = attention_weighted_values(pattern, source_cache[hook_name("v", layer)])
    error = (product - z).nan_to_num().abs().max()
    tolerance = 1e-3 if z.dtype == torch.float32 else 5e-2
    if error > tolerance * z.nan_to_num().abs().max():
        raise UnsupportedModel(
            "site", "'pattern'", "this model's z is not pattern @ v; patch q and k instead"
        )
    base_values = base_cache[hook_name("v", layer)]
    return hook_name("z", layer), attention_weighted_values(pattern, base_values)


def attention_weighted_values(
    pattern: Float[Tensor, "batch head query key"], v: Float[Tensor, "batch key kv_head d_head"]
) -> Float[Tensor, "batch query head d_head"]:
    """Pattern @ v: each head's z. The heads of a group share one value vector."""
    group = pattern.shape[1] // v.shape[2]
    v = repeat(v, "batch key kv_head d_head -> batch key (kv_head group) d_head", group=group)
    return torch.einsum("bhqk,bkhd->bqhd", pattern.to(v.dtype), v)
