"""TODO."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memcircuits.core.errors import InputError
from memcircuits.models.adapter import Adapter

if TYPE_CHECKING:
    from memcircuits.data.paragraphs import Paragraphs


@dataclass(frozen=True)
class Provenance:
    """What a result was computed from: enough to repeat it, nothing of the user's machine.

    Attributes:
        model: name and fingerprint of the weights, class, architecture, basis, dtype, device kind.
        paragraphs: name of the set -> number of paragraphs, lengths and hash of the ids.
        options: the call's options, the seed among them.
        versions: memcircuits, transformer-lens, torch, transformers.
    """

    model: Mapping[str, Any]
    paragraphs: Mapping[str, Any]
    options: Mapping[str, Any]
    versions: Mapping[str, str]

    @classmethod
    def of(
        cls, adapter: Adapter, paragraphs: Mapping[str, Paragraphs | None], **options: Any
    ) -> Provenance:
        """Collect the provenance of one call."""
        return cls(
            model={
                "name": adapter.label,
                "revision": adapter.revision,
                "fingerprint": adapter.fingerprint(),
                "class": adapter.kind,
                "architecture": adapter.architecture,
                "basis": adapter.basis,
                "dtype": str(adapter.dtype).removeprefix("torch."),
                "device": adapter.device.type,
            },
            paragraphs={
                name: {
                    "n": len(p),
                    "n_prefix": p.n_prefix,
                    "n_continuation": p.n_continuation,
                    "hash": p.hash,
                }
                for name, p in paragraphs.items()
                if p is not None
            },
            options=options,
            versions=versions(),
        )

    @property
    def basis(self) -> str:
        """`raw` or `folded` (see `memcircuits.models.adapter`)."""
        return str(self.model["basis"])


def same_basis(argument: str, ours: Provenance, theirs: Provenance) -> None:
    """Raise `InputError` unless two results were computed in the same parameter basis.

    Folding LayerNorm into the matrices behind it changes gradients, weights and what a z of zero
    means, so that numbers of the two bases differ for the same model.
    """
    if ours.basis != theirs.basis:
        raise InputError(
            argument,
            f"measured in the {theirs.basis} basis",
            f"the other was measured in the {ours.basis} basis: measure both with the same model",
        )


def versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    names = ("memcircuits", "transformer-lens", "torch", "transformers")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def sha256_of(fields: str, tensors: Mapping[str, Tensor]) -> str:
    """Checksum of what a result holds: a flipped bit in a number would go unnoticed."""
    digest = hashlib.sha256(fields.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten())
        digest.update(flat.view(torch.uint8).numpy().tobytes())  # numpy knows no bfloat16
    return digest.hexdigest()
