"""`Result`: the base of what every analysis returns, and the file it is saved in.

A result is a frozen dataclass: values with named axes, their units, and the provenance from which
they can be computed again. The base gives it `save` and `load`, a table (`to_frame`), a figure and
a view in notebooks (`_repr_html_`); none of them computes a measurement.

`save` writes one safetensors file, atomically. Tensor fields, and mappings of tensors, are stored
as tensors; all other fields are JSON in the header (see `core.json_values`), next to the kind of
the result, the version of the schema and a checksum. Nothing is ever unpickled. `load` reads the
kind from the header, imports the module that defines it and builds the dataclass, whose own checks
then refuse what does not fit. A field that was renamed is still found in older files under its
former name.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.io import read_safetensors, safetensors_bytes, write_atomically
from memcircuits.base.json_values import json_value, python_value
from memcircuits.display.html_table import table_html
from memcircuits.results.provenance import Provenance, sha256_of

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1

# Where each kind of result is defined: loading a file imports the one module that it needs.
MODULE_OF_KIND = {
    "activation-gradients": "evidence.gradients.activations",
    "core": "evidence.subnetworks.results",
    "comparison": "evidence.comparisons.result",
    "contrast": "evidence.contrasts.result",
    "counterfactual": "evidence.counterfactual_results",
    "cut-prefix": "evidence.prefix_cuts.result",
    "document-map": "measure.document.document_map",
    "edit": "editing.edit",
    "edit-audit": "editing.audits.result",
    "edit-report": "editing.edit_report",
    "formation": "evidence.formation_results",
    "influence": "evidence.influence_results",
    "layer-patches": "evidence.patching.results",
    "lookups": "evidence.lookups.results",
    "minimal-sets": "evidence.triggers.minimal_sets",
    "noise-curve": "editing.noise",
    "parameter-gradients": "evidence.gradients.parameters",
    "patch-map": "evidence.patching.results",
    "perturbation": "evidence.triggers.perturbation",
    "planted": "editing.planting",
    "ranking": "evidence.ranking",
    "rare-token-attention": "evidence.rare_tokens",
    "recitation-circuit": "evidence.circuits.results",
    "recovery": "editing.relearning",
    "scan": "measure.scanning",
    "score-map": "results.score_map",
    "transplant": "evidence.transplants.results",
    "writes": "evidence.direct_writes",
}

# What building a dataclass from the content of a damaged file can raise.
_DAMAGE = (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError)


class Result:
    """Base of all results: `save`, `load`, `to_frame`, `figure`, `_repr_html_`.

    Subclasses are frozen dataclasses declared with their kind: `class Scan(Result, kind="scan")`.
    A field with `metadata={"saved": False}` is left out of the file.

    Attributes:
        kind: name of the type in the header of saved files.
        former_names: name of a field in older files -> its name now.
        types: kind -> type, of all types defined so far.
    """

    kind: ClassVar[str]
    former_names: ClassVar[Mapping[str, str]] = {}
    types: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls, kind: str) -> None:
        cls.kind = kind
        # Not the one of a dataclass, which would print all tensors.
        cls.__repr__ = Result.__repr__  # type: ignore[method-assign]
        Result.types[kind] = cls

    def __post_init__(self) -> None:
        # Fields declared as tuples are tuples, whatever was given: JSON has only lists.
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            if str(entry.type).startswith("tuple["):
                object.__setattr__(self, entry.name, tuple(getattr(self, entry.name)))
        if hasattr(self, "notes"):
            notes = tuple(dict.fromkeys((*self.notes, *self._provenance_notes)))
            object.__setattr__(self, "notes", notes)

    @property
    def _provenance_notes(self) -> tuple[str, ...]:
        provenance = getattr(self, "provenance", None)
        return provenance.notes if isinstance(provenance, Provenance) else ()

    def to_frame(self) -> pd.DataFrame:
        """The result as a pandas table."""
        raise NotImplementedError

    def figure(self) -> Any:
        """The result as a plotly figure; nothing is recomputed."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {'; '.join((str(self), *self._provenance_notes))}>"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), (str(self), *self._provenance_notes))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result to one `.safetensors` file, atomically."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            if not entry.metadata.get("saved", True):
                continue
            if isinstance(value, Tensor):
                tensors[entry.name] = _storable(value)
            elif isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values()):
                tensors |= {f"{entry.name}/{key}": _storable(v) for key, v in value.items()}
                plain[entry.name] = {"__tensors__": list(value)}
            elif isinstance(value, Provenance):
                plain[entry.name] = dataclasses.asdict(value)
            else:
                plain[entry.name] = value
        fields = json.dumps(json_value(plain), sort_keys=True)
        header = {
            "schema": f"memcircuits.{self.kind}/{SCHEMA}",
            "fields": fields,
            "sha256": sha256_of(fields, tensors),
        }
        return write_atomically(path, safetensors_bytes(tensors, header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a saved result.

        Raises:
            InputError: if the file is missing, damaged, of another kind or of a newer schema.
        """
        name = Path(path).name
        tensors, header = read_safetensors(path)
        kind, _, schema = header.get("schema", "").removeprefix("memcircuits.").partition("/")
        if kind in MODULE_OF_KIND:
            importlib.import_module(f"memcircuits.{MODULE_OF_KIND[kind]}")
        result_type = Result.types.get(kind)
        if result_type is None or not issubclass(result_type, cls):
            raise InputError("path", name, f"it holds no {cls.__name__}")
        if schema != str(SCHEMA):
            remedy = f"its schema is {schema}, this version reads {SCHEMA}; recompute it"
            raise InputError("path", name, remedy)
        try:
            # Files written before there were checksums have none.
            if header.get("sha256") not in (None, sha256_of(header["fields"], tensors)):
                raise ValueError("its content is not what was written")
            return result_type(**result_type._decode(header["fields"], tensors))
        except _DAMAGE as error:
            reason = f"it is damaged ({type(error).__name__}: {error})"
            raise InputError("path", name, reason) from error

    @classmethod
    def _decode(cls, fields: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Field -> value, from the JSON of the header and the tensors of the file."""
        values: dict[str, Any] = json.loads(fields, object_hook=python_value)
        for name, value in values.items():
            if isinstance(value, dict) and "__tensors__" in value:
                values[name] = {key: tensors[f"{name}/{key}"] for key in value["__tensors__"]}
        values.update({name: tensor for name, tensor in tensors.items() if "/" not in name})
        if "provenance" in values:
            values["provenance"] = Provenance.decode(values["provenance"])
        return {cls.former_names.get(name, name): value for name, value in values.items()}


def _storable(tensor: Tensor) -> Tensor:
    """A copy on the CPU with memory of its own, as safetensors requires."""
    return tensor.detach().cpu().contiguous().clone()
