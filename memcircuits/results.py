"""Typed results: values with named axes, units and provenance, that save, load, plot and tabulate.

Every measurement returns a frozen dataclass derived from `Result`. `save` writes one safetensors
file: tensors as they are, everything else as JSON in its header, so that nothing is ever unpickled
and a half-written file never stays behind.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
import importlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.adapter import Adapter, Head
from memcircuits.checks import InputError
from memcircuits.statistics import finite_mean

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.paragraphs import Paragraphs

SCHEMA = 1
# Where the kinds of results are defined, imported when a file turns out to hold one.
_HOMES = (
    "activations", "attention", "edits", "evaluation", "gradients", "minimal", "noise", "patching",
    "perturbation", "planting", "ranking", "scanning",
)  # fmt: skip


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
        """`raw` or `folded` (see `memcircuits.adapter`)."""
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


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write a whole file or nothing: a temporary file beside it, then `os.replace`."""
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    if path.is_dir():
        raise InputError("path", path.name, "it is a folder; give a file name")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def largest(values: Float[Tensor, "layer head"], k: int) -> list[Head]:
    """The heads with the `k` largest finite values, largest first; ties by layer and head."""
    flat, n = values.flatten(), values.shape[1]
    order = torch.argsort(flat.nan_to_num(nan=-torch.inf), descending=True, stable=True)
    return [Head(int(i) // n, int(i) % n) for i in order[flat.isfinite()[order]][:k]]


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
        """The result as a plotly figure, see `memcircuits.figures`; nothing is recomputed."""
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
            "sha256": _sha256(fields, tensors),
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
        for home in _HOMES if kind not in Result._kinds else ():
            importlib.import_module(f"memcircuits.{home}")
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
            if header.get("sha256") not in (None, _sha256(header["fields"], tensors)):
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


def _sha256(fields: str, tensors: Mapping[str, Tensor]) -> str:
    """Checksum of what a result holds: a flipped bit in a number would go unnoticed."""
    digest = hashlib.sha256(fields.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten())
        digest.update(flat.view(torch.uint8).numpy().tobytes())  # numpy knows no bfloat16
    return digest.hexdigest()


def safetensors_bytes(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same content: safetensors orders headers anew."""
    from safetensors.torch import save

    raw = save(dict(tensors), metadata=dict(header))
    end = 8 + int.from_bytes(raw[:8], "little")
    text = json.dumps(json.loads(raw[8:end]), sort_keys=True, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data behind it
    return len(text).to_bytes(8, "little") + text + raw[end:]


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        InputError: if the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    name = Path(path).name
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in list(file.keys())}, file.metadata() or {}
    except FileNotFoundError:
        raise InputError("path", name, "there is no such file") from None
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise InputError("path", name, f"not a readable safetensors file ({error})") from None


@dataclass(frozen=True)
class ScoreMap(Result, kind="score-map"):
    """One number per head, kept per paragraph where it was measured so.

    Attributes:
        name: what was measured.
        units: units of `values`.
        values: [layer, head]; for key and value sites of grouped-query models the second axis is
            the key-value head, and `axis` says so.
        provenance: where the numbers come from.
        samples: measure -> [paragraph, layer, head]; the first one is `values` before averaging.
            Paragraphs with non-finite numbers stay here, enter no mean, and `notes` counts them.
        notes: anything the reader must know, such as a fallback taken.
        axis: name of the second axis, `head` or `kv_head`.
    """

    name: str
    units: str
    values: Float[Tensor, "layer head"]
    provenance: Provenance
    samples: Mapping[str, Float[Tensor, "paragraph layer head"]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    axis: str = "head"

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", tuple(self.notes))
        if self.values.ndim != 2:
            raise InputError("values", tuple(self.values.shape), "give one number per layer, head")
        for name, sample in self.samples.items():
            if sample.shape[1:] != self.values.shape:
                raise InputError(name, tuple(sample.shape), "give [paragraph, layer, head]")

    def __getitem__(self, head: Head | tuple[int, int]) -> float:
        return float(self.values[head[0], head[1]])

    def measure(self, name: str) -> ScoreMap:
        """The mean of another measure of the same run, for instance `em`."""
        if name not in self.samples:
            raise InputError("name", repr(name), "choose one of " + ", ".join(self.samples))
        return dataclasses.replace(
            self,
            name=f"{self.name}: {name}",
            units="tokens" if name == "em" else self.units,
            values=finite_mean(self.samples[name]),
            samples={name: self.samples[name]},
        )

    def top(self, k: int = 10) -> list[Head]:
        """The `k` heads with the largest values, largest first; ties by layer and head.

        Heads whose value is not finite are no candidates.
        """
        return largest(self.values, k)

    def correlation(self, other: ScoreMap) -> float:
        """Spearman's rank correlation over heads with another measurement: do the two agree?

        Args:
            other: another `ScoreMap` of a model with the same heads, in the same basis.

        Returns:
            Between -1 and 1 over the heads where both are finite; NaN where one is constant.

        Raises:
            InputError: if one was measured with folded weights and the other with raw ones, where
                the same head means something else, or if the heads are not the same.
        """
        from scipy.stats import spearmanr

        same_basis("other", self.provenance, other.provenance)
        if self.values.shape != other.values.shape or self.axis != other.axis:
            here, there = tuple(self.values.shape), tuple(other.values.shape)
            raise InputError(
                "other", f"{there} by {other.axis}", f"compare with one of {here} by {self.axis}"
            )
        both = self.values.isfinite() & other.values.isfinite()
        a, b = self.values[both], other.values[both]
        if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
            return float("nan")
        return float(spearmanr(a.double().numpy(), b.double().numpy()).statistic)

    def to_frame(self) -> pd.DataFrame:
        """Columns `layer, head, value` and the mean of every further measure."""
        import pandas as pd

        layers, heads = self.values.shape
        grid = torch.cartesian_prod(torch.arange(layers), torch.arange(heads))
        data = {
            "layer": grid[:, 0].numpy(),
            self.axis: grid[:, 1].numpy(),
            "value": self.values.flatten().double().cpu().numpy(),
        }
        for name, sample in list(self.samples.items())[1:]:
            data[name] = finite_mean(sample).flatten().double().cpu().numpy()
        return pd.DataFrame(data)

    def figure(self) -> Any:
        """A layer x head heatmap (plotly)."""
        from memcircuits import figures

        return figures.heatmap(
            self.values,
            title=self.name,
            units=self.units,
            col_label=self.axis.replace("_", "-"),
        )

    def __str__(self) -> str:
        return f"{self.name} [{self.units}], {self.values.shape[0]} layers x {self.values.shape[1]}"
