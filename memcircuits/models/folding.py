"""Norms folded into the matrices that read them: the basis of the paper.

A norm multiplies each dimension of its output by a weight and adds a bias. Both can be moved into
the matrices behind it, whose rows take the weight as a factor and whose biases take the rest. The
model computes the same function, but the gradient of a weight, the size of an edit and a z of zero
mean something else. `HookedTransformer.from_pretrained`, which the paper's code calls, folds by
default; it also makes what LayerNorm subtracts from the residual stream zero in every matrix that
writes to it, and moves the biases of values into that of the attention's output. TransformerLens
does the same to a `TransformerBridge` in `enable_compatibility_mode`. The unembedding is not
centred here, so that logits stay as they are.

Some architectures cannot be folded: a norm behind attention or MLP (OLMo 2) is read by no matrix,
and TransformerLens passes over some others in silence. So the result is tried: log-probabilities
are compared with those before, and every norm of a block must have become plain.
"""

from __future__ import annotations

from typing import Any

import torch

from memcircuits.base.errors import UnsupportedModel
from memcircuits.models.adapter import Adapter
from memcircuits.models.norms import read_norm
from memcircuits.models.registry import adapt

_PROBE = torch.arange(3, 11)[None]  # tokens on which the model is compared before and after


def fold_norms(bridge: Any) -> None:
    """Fold the norms of a `TransformerBridge` in place.

    Raises:
        UnsupportedModel: if TransformerLens cannot fold them, or does so wrongly.
    """
    adapter = adapt(bridge)
    expected = _log_probs(adapter)
    try:
        bridge.enable_compatibility_mode(disable_warnings=True, center_unembed=False)
        bridge.original_model.to(adapter.dtype)  # TransformerLens 3.9 makes biases in float32
        adapter = adapt(bridge)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # every architecture has errors of its own
        reason = " ".join(str(error).split())[:200]
        raise _refused(adapter, f"TransformerLens cannot fold its norms ({reason})") from None
    off = float((_log_probs(adapter) - expected).abs().max())
    if not off < (1e-3 if adapter.dtype in (torch.float32, torch.float64) else 0.25):
        raise _refused(adapter, f"folding moves its log-probabilities by {off:.2g} nats")
    for layer, block in enumerate(bridge.blocks):
        norms = {name: block._modules[name] for name in ("ln1", "ln2") if name in block._modules}
        if not norms:
            raise _refused(adapter, f"no norm is in front of attention or MLP of block {layer}")
        for name, norm in norms.items():
            if not read_norm(norm, adapter).is_plain:
                raise _refused(adapter, f"TransformerLens leaves {name} of block {layer} unfolded")


def _refused(adapter: Adapter, reason: str) -> UnsupportedModel:
    model = f"{adapter.label} ({adapter.architecture})"
    return UnsupportedModel("fold_ln", model, f"{reason}; load it without fold_ln")


def _log_probs(adapter: Adapter) -> torch.Tensor:
    with adapter.preserving_state():
        return adapter.forward(_PROBE % adapter.d_vocab).float().log_softmax(-1)
