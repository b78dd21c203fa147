"""The fingerprint of a model's weights: 16 hexadecimal digits that name their exact bits.

Every result says which weights it was measured on, and an edit refuses all others. So the
fingerprint must be exact and cheap:

1. of each tensor of the state dict two sums over its 64-bit words are taken, one plain and one
   weighted by position, modulo 2^64. Integer sums do not depend on order, so the sums are the same
   on every device and for every number of threads (hashes from libraries either run on CPUs alone
   or, like `torch.hash_tensor`, do not see the order of the words);
2. SHA-256 of all names, shapes and sums gives the digits.

Reading all weights takes time in proportion to their number, and an analysis asks several times. So
`WeightsFingerprint` keeps the digits until a tensor changes, which it tells from what PyTorch knows
of a tensor: its storage, its layout and `_version`, the number of in-place changes. Changes through
views or under `torch.no_grad` count there, and so do all edits of this package. Two kinds of writes
do not count: those through `.data`, NumPy or other memory, and the steps of fused optimizers.
Therefore evenly spaced numbers of every tensor, some in every row and every column of a matrix, are
compared too. One kind of change is not noticed: a write through `.data` or NumPy to a few single
weights that misses all of these. Write such changes in place under `torch.no_grad()`.

Layers of PEFT add matrices to those of the model, by switches and scales. Where there are such
layers, all of these belong to the digits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from memcircuits.models.architecture import every_module

CHUNK = 2**18  # words of 8 bytes: a chunk stays in the processor's cache
SAMPLE = 4096  # numbers of each tensor that are compared, more for matrices with longer sides


class WeightsFingerprint:
    """The fingerprint of one model, kept until a weight changes."""

    def __init__(self) -> None:
        self._state: Hashable = None
        self._digits = ""

    def of(self, model: nn.Module) -> str:
        """The fingerprint of the weights that `model` has now."""
        adapters, switches = adapters_of(model)
        tensors = model.state_dict() | adapters
        state = weights_state(tensors)
        if state is None or (state, switches) != self._state:
            self._digits = fingerprint(tensors)
            if switches:
                digest = hashlib.sha256(f"{self._digits}{switches}".encode())
                self._digits = digest.hexdigest()[:16]
            self._state = (state, switches)
        return self._digits


def adapters_of(model: nn.Module) -> tuple[dict[str, Tensor], tuple[Hashable, ...]]:
    """The tensors of PEFT's layers, which a Bridge leaves out of its state dict, and the switches.

    Switches are which adapters act, whether they are merged, and their scales, layer by layer.
    """
    tensors: dict[str, Tensor] = {}
    switches: list[Hashable] = []
    layers: list[Any] = [m for m in every_module(model) if hasattr(m, "active_adapters")]
    for layer in layers:
        if not hasattr(layer, "base_layer"):
            continue
        tensors |= {f"adapter {len(switches)}.{k}": v for k, v in layer.state_dict().items()}
        switches.append(
            (
                tuple(layer.active_adapters),
                bool(getattr(layer, "disable_adapters", False)),
                tuple(getattr(layer, "merged_adapters", ())),
                tuple(sorted(getattr(layer, "scaling", {}).items())),
            )
        )
    return tensors, tuple(switches)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Names the exact weights, independent of the device and of the order of summation."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{checksum(tensor)}".encode())
    return digest.hexdigest()[:16]


def checksum(tensor: Tensor, chunk: int = CHUNK) -> tuple[int, ...]:
    """Plain and position-weighted sum of a tensor's 64-bit words, modulo 2^64, and the last bytes.

    Args:
        tensor: of any type, on any device.
        chunk: number of words that are summed at once; the sums do not depend on it.
    """
    octets = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()
    n = octets.numel() // 8 * 8
    words = octets[:n].view(torch.int64)
    position = torch.arange(1, 1 + min(chunk, len(words)), device=words.device)
    plain = weighted = torch.zeros((), dtype=torch.int64, device=words.device)
    for i, part in enumerate(words.split(chunk)):
        total = part.sum()
        plain = plain + total
        weighted = weighted + (part * position[: len(part)]).sum() + i * chunk * total
    return int(plain), int(weighted), *octets[n:].tolist()


def weights_state(tensors: Mapping[str, Tensor]) -> Hashable:
    """Equal at two times only if the weights are the same, as far as PyTorch can tell.

    None where PyTorch cannot tell: tensors made in `torch.inference_mode` count no changes.
    """
    try:
        records = tuple(
            (
                name,
                # Not `data_ptr` alone: memory that is freed may hold other weights later. As long
                # as there is a weak reference, no other storage is taken for this one.
                StorageWeakRef(tensor.untyped_storage()),
                tensor.data_ptr(),
                tensor._version,
                tensor.shape,
                tensor.stride(),
                tensor.dtype,
                tensor.device,
            )
            for name, tensor in tensors.items()
        )
        return records, _sample_digest(tensors)
    except (RuntimeError, NotImplementedError):
        return None


def _sample_digest(tensors: Mapping[str, Tensor]) -> bytes:
    """Hash of evenly spaced numbers of every tensor."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        flat = tensor.detach().reshape(-1)[:: _sample_step(tensor.shape)]
        digest.update(flat.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.digest()


def _sample_step(shape: torch.Size) -> int:
    """Distance of the numbers compared: about four in every row and every column of a matrix."""
    if not shape:
        return 1
    step = shape.numel() // max(SAMPLE, 4 * max(shape)) or 1
    # Steps that share a factor with the length of a row meet only some of the columns.
    while math.gcd(step, shape[-1]) > 1:
        step += 1
    return step
