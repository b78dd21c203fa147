"""At which depth of the network is a text gone? The Unlearning Depth Score, layer by layer.

The residual stream of another model behind each layer, run on the same text, is put into the
unedited model, which computes the rest. If the layers below still hold the text, the unedited model
still predicts it. The *depth* of an edit at a layer is the rise of the NLL with the edited model's
residual stream, as a share of the rise with that of the reference.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.continuation import read_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import hook_name


def read_residuals(
    adapter: Adapter, paragraphs: Paragraphs
) -> list[Float[Tensor, "paragraph pos d_model"]]:
    """The residual stream in front of layers 1, 2, ... of a model as it is."""
    names = [hook_name("resid_pre", layer) for layer in range(1, adapter.n_layers)]
    last = slice(paragraphs.inputs.shape[1] - 2, None)
    with adapter.preserving_state():
        cache = adapter.run(paragraphs.inputs[:, :-1], positions=last, read=names).cache
    return [cache[name] for name in names]


def patched_nll(
    adapter: Adapter,
    paragraphs: Paragraphs,
    residuals: list[Float[Tensor, "paragraph pos d_model"]],
) -> Float[Tensor, "layer paragraph"]:
    """NLL of the continuations with each residual stream in its place, nats/token."""
    start = paragraphs.n_given - 1
    rows = []
    with adapter.preserving_state():
        for layer, residual in enumerate(residuals, start=1):
            resid_post = adapter.run_blocks(layer, residual.to(adapter.device))
            logits = adapter.unembed(resid_post[:, start:])
            rows.append(read_continuation(logits, paragraphs.continuation.to(logits.device)).nll)
    return torch.stack(rows).cpu()
