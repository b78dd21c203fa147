"""A change of few weights as an object: make it, take it back, save it, write it out as a model.

An `Edit` stores for each weight matrix the places that were changed and by how much. Inside
`with edit.apply(model):` the model is the edited one; on leaving, also by an exception or Ctrl-C,
the original values are written back, so that the model is bit for bit what it was. An edit fits the
weights it was made for and no others, and checks their fingerprint.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.core.errors import InputError
from memcircuits.editing.masks import Mask, named_mask
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Edit(Result, kind="edit"):
    """A change of some weights of one model.

    Attributes:
        indices: matrix (`3.W_in`) -> places of the masked weights in its `[head, d_in, d_out]`.
        deltas: matrix -> change of each, in units of weight; 0 where a masked weight stayed.
        norms: matrix -> Euclidean norm of the whole unedited matrix, [1].
        n_candidates: weights that the mask was chosen from.
        provenance: where the edit comes from; it names the weights that it fits.
        history: measure -> [step], measured before each step: `em` and `em_max` (recited tokens,
            mean and largest over the targets), `nll` (nats/token), `kl` (nats/token, on controls
            held out from the optimisation; NaN where no budget asks for it) and `forget` (the
            objective's first term); for `edit`
            also `em_new`. A last row may be that of the change scaled back.
        kept: the row of it that was kept.
        stopped: why the steps ended: `em`, `kl` or `steps`.
    """

    indices: Mapping[str, Int[Tensor, " weight"]]
    deltas: Mapping[str, Float[Tensor, " weight"]]
    norms: Mapping[str, Float[Tensor, "1"]]
    n_candidates: int
    provenance: Provenance
    history: Mapping[str, Float[Tensor, " step"]] = field(default_factory=dict)
    kept: int = 0
    stopped: str = "steps"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.indices or set(self.indices) != set(self.deltas):
            raise InputError("deltas", sorted(self.deltas), "give one vector per matrix of indices")
        for name, index in self.indices.items():
            delta = self.deltas[name]
            if index.is_floating_point() or index.shape != delta.shape or index.ndim != 1:
                raise InputError(f"indices of {name}", tuple(index.shape), "one place per delta")
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
        **rest: Any,
    ) -> Self:
        """The difference of a mask's weights, which now hold `before`."""
        changes = [a.double() - b.double() for a, b in zip(after, before, strict=True)]
        return cls(
            indices=mask.by_matrix(torch.cat(mask.indices)),
            deltas=mask.by_matrix(torch.cat([c.cpu() for c in changes])),
            norms={k: w.values.double().norm().view(1).cpu() for k, w in mask.named.items()},
            n_candidates=mask.n_candidates,
            provenance=provenance,
            **rest,
        )

    @property
    def n_masked(self) -> int:
        """Weights that the mask allowed to change."""
        return sum(len(index) for index in self.indices.values())

    @property
    def n_changed(self) -> int:
        """Weights that changed."""
        return sum(int((delta != 0).sum()) for delta in self.deltas.values())

    @property
    def norm(self) -> float:
        """Euclidean norm of the change."""
        return float(torch.cat(list(self.deltas.values())).norm())

    @contextlib.contextmanager
    def apply(self, model: Any) -> Iterator[Any]:
        """Inside, `model` is the edited model; afterwards it is bit for bit what it was.

        Raises:
            InputError: if these are not the weights that the edit was made for, or those with
                LayerNorm folded into them.
        """
        adapter = adapt(model)
        if adapter.basis != self.provenance.basis:
            raise InputError(
                "model",
                f"{adapter.name} in the {adapter.basis} basis",
                f"this edit was made in the {self.provenance.basis} basis, where a weight means "
                "something else; apply it to the model as it was then",
            )
        fits, found = self.provenance.model["fingerprint"], adapter.fingerprint()
        if found != fits:
            raise InputError(
                "model",
                f"weights {found}",
                f"this edit was made for weights {fits} of {self.provenance.model['name']}; "
                "apply it to those, one edit at a time",
            )
        mask = named_mask(adapter, self.indices, self.n_candidates)
        with mask.restored() as original:
            mask.add(original, torch.cat(list(self.deltas.values())))
            yield model

    def export(
        self, folder: str | os.PathLike[str], source: str | Path = "organism", **options: Any
    ) -> Path:
        """Write the edited model as a Hugging Face folder, see `memcircuits.editing.export`."""
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
        """The steps: EM and KL, the kept step marked; without a history the change per matrix."""
        from memcircuits.display import figures

        if not self.history:
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
        panels = {"em": "exact match (tokens)", "kl": "KL of controls (nats/token)"}
        figure = figures.curves(
            self.steps(), "step", panels, title="Steps of the edit", x_label="step"
        )
        if len(self.steps()) <= 12:
            figure.update_xaxes(dtick=1)
        line = {"dash": "dash", "color": "#6b7280"}
        figure.add_vline(x=self.kept, line=line, row=2, col=1)
        return figure.add_vline(
            x=self.kept,
            line=line,
            row=1,
            col=1,
            annotation_text=f"kept: step {self.kept}",
            annotation_position="top left" if 2 * self.kept > len(self.steps()) else "top right",
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
