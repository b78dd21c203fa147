"""A change of few weights as an object: apply it, take it back, save it, export it as a model.

An `Edit` stores for each weight matrix the positions that changed and by how much. Inside
`with edit.apply(model):` the model is the edited one. On leaving, also by an exception or Ctrl-C,
the original values are written back, so that the model is bit for bit what it was. An edit fits
only the weights that it was made for, and checks their fingerprint.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.editing.masks import Mask, named_mask
from memcircuits.models.adapter import Model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

AnyModel = TypeVar("AnyModel", bound=Model)


Stopped = Literal["em", "kl", "steps"]
"""Why a search ended: EM as wanted, a KL budget that a step would pass, or no further step."""


@dataclass(frozen=True)
class Edit(Result, kind="edit"):
    """A change of some weights of one model.

    Attributes:
        indices: matrix (`3.W_in`) -> positions of the masked weights in its `[head, d_in, d_out]`.
        deltas: matrix -> change of each, in units of weight; 0 for a masked weight that did not
            change.
        norms: matrix -> Euclidean norm of the whole unedited matrix, [1].
        n_candidates: number of weights that the mask was chosen from.
        provenance: where the edit comes from; it identifies the weights that the edit fits.
        history: measure -> [step], measured before each step: `em` and `em_max` (recited tokens,
            mean and largest over the targets), `nll` (nats/token), `kl` (nats/token, on controls
            held out from the optimisation; NaN where no budget needs it) and `forget` (the
            objective's first term); for `edit` also `em_new`. A last row may be that of the change
            scaled back.
        kept: the row of the history that was kept.
        stopped: why the steps ended: `em`, `kl` or `steps`.
    """

    indices: Mapping[str, Int[Tensor, " weight"]]
    deltas: Mapping[str, Float[Tensor, " weight"]]
    norms: Mapping[str, Float[Tensor, "1"]]
    n_candidates: int
    provenance: Provenance
    history: Mapping[str, Float[Tensor, " step"]] = field(default_factory=dict)
    kept: int = 0
    stopped: Stopped = "steps"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.indices or set(self.indices) != set(self.deltas):
            raise InputError("deltas", sorted(self.deltas), "give one vector per matrix of indices")
        for name, index in self.indices.items():
            delta = self.deltas[name]
            if index.is_floating_point() or index.shape != delta.shape or index.ndim != 1:
                raise InputError(
                    f"indices of {name}", tuple(index.shape), "give one position per delta"
                )
            if len(index.unique()) != len(index):
                raise InputError(f"indices of {name}", "repeated", "name each weight once")
            if not delta.isfinite().all():
                raise InputError(f"deltas of {name}", "not finite", "make the edit again")

    @classmethod
    def of(
        cls,
        mask: Mask,
        before: list[Tensor],
        after: list[Tensor],
        provenance: Provenance,
        **fields: Any,
    ) -> Self:
        """The difference between two values of a mask's weights, while the model holds `before`.

        Args:
            mask: the weights.
            before: their original values, see `Mask.read`.
            after: their edited values.
            provenance: where the edit comes from.
            **fields: the remaining fields.
        """
        # In the type of the weights, at least float32: an edit of all weights is as large as they.
        changes = [
            (a.double() - b.double()).to(torch.promote_types(a.dtype, torch.float32)).cpu()
            for a, b in zip(after, before, strict=True)
        ]
        return cls(
            indices=mask.by_matrix(torch.cat(mask.indices).int()),
            deltas=mask.by_matrix(torch.cat(changes)),
            norms={k: w.values.double().norm().view(1).cpu() for k, w in mask.named.items()},
            n_candidates=mask.n_candidates,
            provenance=provenance,
            **fields,
        )

    @property
    def n_masked(self) -> int:
        """Number of weights that the mask allowed to change."""
        return sum(len(index) for index in self.indices.values())

    @property
    def n_changed(self) -> int:
        """Number of weights that changed."""
        return sum(int((delta != 0).sum()) for delta in self.deltas.values())

    @property
    def norm(self) -> float:
        """Euclidean norm of the change."""
        return float(torch.cat(list(self.deltas.values())).norm())

    @contextlib.contextmanager
    def apply(self, model: AnyModel) -> Iterator[AnyModel]:
        """Inside, `model` is the edited model; afterwards it is bit for bit what it was.

        Raises:
            InputError: if the model has other weights than those that the edit was made for, or
                the same ones in another basis (LayerNorm folded into them).
        """
        adapter = adapt(model)
        if adapter.basis != self.provenance.basis:
            raise InputError(
                "model",
                f"{adapter.name} in the {adapter.basis} basis",
                f"this edit was made in the {self.provenance.basis} basis, where a weight means "
                "something else; apply it to the model as it was then",
            )
        expected, fingerprint = self.provenance.model["fingerprint"], adapter.fingerprint()
        if fingerprint != expected:
            raise InputError(
                "model",
                f"weights {fingerprint}",
                f"this edit was made for weights {expected} of {self.provenance.model['name']}; "
                "apply it to those, one edit at a time",
            )
        mask = named_mask(adapter, self.indices, self.n_candidates)
        with mask.restored() as original:
            mask.add(original, torch.cat(list(self.deltas.values())))
            yield model

    def export(
        self, folder: str | os.PathLike[str], source: str | Path = "organism", **options: Any
    ) -> Path:
        """Write the edited model as a Hugging Face folder; arguments as `export_edit`."""
        from memcircuits.editing.export import export_edit

        return export_edit(self, folder, source, **options)

    def to_frame(self) -> pd.DataFrame:
        """Per matrix: `layer, component, masked, changed, norm, relative_norm, largest`."""
        import pandas as pd

        rows = []
        for name, delta in self.deltas.items():
            layer, _, component = name.partition(".")
            rows.append(
                {
                    "layer": int(layer),
                    "component": component,
                    "masked": len(delta),
                    "changed": int((delta != 0).sum()),
                    "norm": float(delta.norm()),
                    "relative_norm": float(delta.norm() / self.norms[name]),
                    "largest": float(delta.abs().max()),
                }
            )
        return pd.DataFrame(rows)

    def steps(self) -> pd.DataFrame:
        """The history, one row per step."""
        import pandas as pd

        frame = pd.DataFrame({name: values.numpy() for name, values in self.history.items()})
        frame.insert(0, "step", range(len(frame)))
        return frame

    def figure(self) -> Any:
        """EM and KL at each step (plotly), or without a history the change of each matrix."""
        if not self.history:
            return self._figure_of_changes()
        from memcircuits.display import figures

        steps = self.steps()
        panels = {"em": "exact match (tokens)", "kl": "KL of controls (nats/token)"}
        figure = figures.curves(steps, "step", panels, title="Steps of the edit", x_label="step")
        if len(steps) <= 12:
            figure.update_xaxes(dtick=1)
        # Mark the kept step in both panels; its label stands beside the curve's longer side.
        line = {"dash": "dash", "color": "#6b7280"}
        figure.add_vline(x=self.kept, line=line, row=2, col=1)
        return figure.add_vline(
            x=self.kept,
            line=line,
            row=1,
            col=1,
            annotation_text=f"kept: step {self.kept}",
            annotation_position="top left" if 2 * self.kept > len(steps) else "top right",
        )

    def _figure_of_changes(self) -> Any:
        """Heatmap of the norm of the change, a row per layer and a column per matrix."""
        from memcircuits.display import figures

        table = self.to_frame().pivot(index="layer", columns="component", values="norm")
        return figures.heatmap(
            table.to_numpy(),
            title="Norm of the change",
            name="norm",
            units="of weights",
            col_label="matrix",
            row_names=[str(layer) for layer in table.index],
            col_names=[str(component) for component in table.columns],
        )

    def __str__(self) -> str:
        text = (
            f"{self.n_changed:,} of {self.n_candidates:,} weights changed in {len(self.indices)} "
            f"matrices, norm {self.norm:.3g}"
        )
        if not self.history:
            return text
        em, kl = self.history["em"].tolist(), self.history["kl"].tolist()
        return (
            f"{text}; EM {em[0]:.1f} -> {em[self.kept]:.1f} tokens, "
            f"KL of held-out controls {kl[self.kept]:.2g} nats/token"
        )
