"""Typed results: values with named axes, units and provenance, that save, load, plot and tabulate.

Every measurement returns a frozen dataclass derived from `Result`. `save` writes one safetensors
file: tensors as they are, everything else as JSON in its header, so that nothing is ever unpickled
and a half-written file never stays behind.
"""

from __future__ import annotations

import dataclasses
import html
import importlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from memcircuits.core.errors import InputError
from memcircuits.core.io import read_safetensors, safetensors_bytes, write_atomically
from memcircuits.results.provenance import Provenance, sha256_of

if TYPE_CHECKING:
    import pandas as pd


SCHEMA = 1


# Where the kinds of results are defined, imported when a file turns out to hold one.
# Where the kinds of result are defined: loading a file imports the one module that it needs.
_MODULE_OF_KIND = {
    "activation-gradients": "evidence.gradients.activations",
    "edit": "editing.edit",
    "edit-report": "editing.evaluation",
    "layer-patches": "evidence.patching.results",
    "minimal-sets": "evidence.triggers.minimal_sets",
    "noise-curve": "editing.noise",
    "parameter-gradients": "evidence.gradients.parameters",
    "patch-map": "evidence.patching.results",
    "perturbation": "evidence.triggers.perturbation",
    "planted": "editing.planting",
    "ranking": "evidence.ranking",
    "rare-token-attention": "evidence.rare_tokens",
    "recovery": "editing.relearning",
    "scan": "measure.scanning",
    "score-map": "results.score_map",
}


class Result:
    """Base of all results: `save`, `load`, `to_frame`, `figure`, `_repr_html_`.

    Subclasses are frozen dataclasses; their tensor fields (and dicts of tensors) are stored as
    tensors, their other fields as JSON.
    """

    kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls, kind: str) -> None:
        cls.kind = kind
        cls.__repr__ = Result.__repr__  # type: ignore[method-assign] # not a dataclass's, of all tensors
        Result._kinds[kind] = cls

    def to_frame(self) -> pd.DataFrame:
        """The result as a pandas table."""
        raise NotImplementedError

    def figure(self) -> Any:
        """The result as a plotly figure, see `memcircuits.display.figures.curves`; nothing is recomputed."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        more = f"<p>The first 20 of {len(frame):,} rows.</p>" * (len(frame) > 20)
        table = frame.head(20).to_html(index=False, escape=True)
        return f"<p>{html.escape(str(self))}</p>{table}{more}"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result to one `.safetensors` file, atomically."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            if not entry.metadata.get("saved", True):
                continue
            if isinstance(value, Tensor):
                tensors[entry.name] = value.detach().cpu().contiguous().clone()
            elif isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values()):
                for key, tensor in value.items():
                    tensors[f"{entry.name}/{key}"] = tensor.detach().cpu().contiguous().clone()
                plain[entry.name] = {"__tensors__": list(value)}
            elif isinstance(value, Provenance):
                plain[entry.name] = dataclasses.asdict(value)
            else:
                plain[entry.name] = value
        fields = json.dumps(plain, sort_keys=True)
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
        tensors, header = read_safetensors(path)
        kind, _, schema = header.get("schema", "").removeprefix("memcircuits.").partition("/")
        if kind in _MODULE_OF_KIND:
            importlib.import_module(f"memcircuits.{_MODULE_OF_KIND[kind]}")
        found = Result._kinds.get(kind)
        if found is None or not issubclass(found, cls):
            raise InputError("path", Path(path).name, f"it holds no {cls.__name__}")
        if schema != str(SCHEMA):
            raise InputError(
                "path",
                Path(path).name,
                f"its schema is {schema}, this version reads {SCHEMA}; recompute it",
            )
        try:
            if header.get("sha256") not in (None, sha256_of(header["fields"], tensors)):
                raise ValueError("its content is not what was written")
            values: dict[str, Any] = json.loads(header["fields"])
            for name, value in values.items():
                if isinstance(value, dict) and "__tensors__" in value:
                    values[name] = {key: tensors[f"{name}/{key}"] for key in value["__tensors__"]}
            values.update({name: tensor for name, tensor in tensors.items() if "/" not in name})
            if "provenance" in values:
                values["provenance"] = Provenance(**values["provenance"])
            return found(**values)
        except (
            KeyError,
            TypeError,
            AttributeError,
            ValueError,
            IndexError,
            RecursionError,
        ) as error:
            reason = f"it is damaged ({type(error).__name__}: {error})"
            raise InputError("path", Path(path).name, reason) from error
