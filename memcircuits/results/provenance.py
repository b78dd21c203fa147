"""Provenance: which model, paragraphs, options and versions a result comes from.

Two results may be compared if they were measured on the same weights, paragraphs and options; every
result therefore carries fingerprints of the first two and a copy of the third. Names of models and
versions of packages are kept, paths and other properties of the user's computer are not.

The `basis` matters most: folding LayerNorm into the matrices behind it leaves the model's function
unchanged but not its parameters, so that gradients, weights and a head output of zero mean
something else. `same_basis` refuses to compare across it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.models.adapter import Adapter
from memcircuits.results.bos_notes import bos_notes, bos_of_model, bos_of_paragraphs

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from memcircuits.data.paragraphs import Paragraphs

PACKAGES = ("memcircuits", "transformer-lens", "torch", "transformers")
"""The packages whose versions decide the numbers."""


@dataclass(frozen=True)
class Provenance:
    """What a result was computed from: enough to repeat it, nothing of the user's computer.

    Attributes:
        model: name and fingerprint of the weights, class, architecture, basis, dtype, device kind,
            the caller's hooks that were active, tokens in front.
        paragraphs: name of the set -> number, lengths, tokens in front, hash of its ids, and how
            its texts were read where that was not by the defaults (`Paragraphs.reading_options`).
        options: the call's options, the seed among them.
        versions: memcircuits, transformer-lens, torch, transformers.
    """

    model: Mapping[str, Any]
    paragraphs: Mapping[str, Any]
    options: Mapping[str, Any]
    versions: Mapping[str, str]

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    @classmethod
    def of(
        cls, adapter: Adapter, paragraphs: Mapping[str, Paragraphs | None], **options: Any
    ) -> Provenance:
        """Collect the provenance of one call; sets of paragraphs that are None are left out."""
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
                "hooks": adapter.foreign_hooks,
                **bos_of_model(adapter),
            },
            paragraphs={
                name: {
                    "n": len(group),
                    "n_prefix": group.n_prefix,
                    "n_continuation": group.n_continuation,
                    "hash": group.hash,
                    **bos_of_paragraphs(adapter, group),
                    **({"reading": dict(group.reading_options)} if group.reading_options else {}),
                }
                for name, group in paragraphs.items()
                if group is not None
            },
            options=options,
            versions=versions(),
        )

    @classmethod
    def decode(cls, value: Any) -> Provenance:
        """The provenance that a saved file holds as JSON.

        Raises:
            ValueError: if a part is missing, unknown or of another type; one line that names it.
        """
        from pydantic import ValidationError

        try:
            return _schema().validate_python(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            part = ".".join(map(str, ("provenance", *first["loc"])))
            raise ValueError(f"{part}: {first['msg']}") from None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader of any number must know about the model and the paragraphs."""
        of_bos = bos_notes(self.model, self.paragraphs)
        hooks = self.model.get("hooks") or []
        if not hooks:
            return of_bos
        named = ", ".join(hooks[:3]) + (f" and {len(hooks) - 3} more" if len(hooks) > 3 else "")
        return (f"the numbers are the model's with hooks of the caller on it ({named})", *of_bos)

    def reading_options(self, name: str) -> dict[str, Any]:
        """How a set was read, where not by the defaults (`Paragraphs.reading_options`)."""
        return dict(self.paragraphs.get(name, {}).get("reading", {}))

    @property
    def basis(self) -> str:
        """`raw` or `folded` (see `memcircuits.models.adapter`)."""
        return str(self.model["basis"])


@functools.cache
def _schema() -> TypeAdapter[Provenance]:
    from pydantic import TypeAdapter

    return TypeAdapter(Provenance)


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
    """Package -> installed version, of the packages that decide the numbers."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def sha256_of(fields: str, tensors: Mapping[str, Tensor]) -> str:
    """Checksum of what a saved result holds: without it a flipped bit would go unnoticed."""
    digest = hashlib.sha256(fields.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten())
        digest.update(flat.view(torch.uint8).numpy().tobytes())  # numpy knows no bfloat16
    return digest.hexdigest()
