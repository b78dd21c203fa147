"""How precisely must the weights be kept? Gaussian noise on chosen weights, of growing size.

Noise of relative size s adds to each chosen weight s times the root mean square of its matrix times
a standard normal number. If the recitation hangs on few weights, noise on those with the largest
gradients harms it sooner than noise on as many random ones, and sooner than it harms controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.core.errors import InputError, at_least, one_of
from memcircuits.core.errors import fraction as check_fraction
from memcircuits.core.heads import Head
from memcircuits.core.progress import bar
from memcircuits.core.statistics import bootstrap_interval
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.masks import CHOICES, Candidates
from memcircuits.measure.gradients import mean_gradient
from memcircuits.measure.scanning import has_finite_scores, scan
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class NoiseCurve(Result, kind="noise-curve"):
    """EM and NLL against the size of the noise.

    Attributes:
        sizes: relative sizes, [size].
        em: set (`memorized`, `control`) -> tokens, [size, draw, paragraph].
        nll: set -> nats/token, [size, draw, paragraph].
        n_weights: weights that got noise.
        n_candidates: weights they were chosen from.
        provenance: where the numbers come from.
    """

    sizes: Float[Tensor, " size"]
    em: Mapping[str, Float[Tensor, "size draw paragraph"]]
    nll: Mapping[str, Float[Tensor, "size draw paragraph"]]
    n_weights: int
    n_candidates: int
    provenance: Provenance

    def to_frame(self) -> pd.DataFrame:
        """Columns `set, size, em, em_low, em_high, nll, nll_low, nll_high`.

        Means over draws; 95 % intervals over paragraphs.
        """
        import pandas as pd

        rows = []
        for name in self.em:
            row: dict[str, Tensor] = {}
            for measure, values in {"em": self.em[name], "nll": self.nll[name]}.items():
                per_paragraph = values.float().mean(1)
                low, high = bootstrap_interval(per_paragraph.T)
                row |= {measure: per_paragraph.mean(-1)}
                row |= {f"{measure}_low": low, f"{measure}_high": high}
            rows.append(
                pd.DataFrame(
                    {"set": name, "size": self.sizes.numpy()}
                    | {key: value.double().numpy() for key, value in row.items()}
                )
            )
        return pd.concat(rows, ignore_index=True)

    def figure(self) -> Any:
        """EM and NLL against the size of the noise (plotly)."""
        from memcircuits.display import figures

        return figures.noise_curves(self.to_frame(), title=str(self).capitalize())

    def __str__(self) -> str:
        return f"noise on {self.n_weights:,} of {self.n_candidates:,} weights"


def weight_noise(
    model: Any,
    memorized: Any,
    control: Any,
    *,
    sizes: Sequence[float] = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0),
    fraction: float = 0.001,
    mask: str = "top",
    heads: Sequence[Head | str] | None = None,
    layers: Sequence[int] | None = None,
    components: Sequence[str] | None = None,
    draws: int = 3,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> NoiseCurve:
    """Add noise to weights and measure what is still recited.

    Args:
        model: HookedTransformer or TransformerBridge.
        memorized: paragraphs that the model recites; their gradient chooses the weights.
        control: other paragraphs.
        sizes: noise relative to the root mean square of each matrix.
        fraction: how many of the candidate weights get noise.
        mask: `top` by |gradient| of the memorized paragraphs' NLL, `random`, `random-per-tensor`
            or `all`.
        heads: candidates are only these heads' matrices.
        layers: candidates are only in these layers.
        components: candidates are only these, such as `W_V`.
        draws: noise draws for each size, the same ones for every size.
        seed: of noise and random masks.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        A `NoiseCurve`; the model is as before.

    Raises:
        InputError: for unusable paragraphs, sizes or masks.
    """
    check_fraction("fraction", fraction)
    one_of("mask", mask, CHOICES)
    at_least("draws", draws, 1)
    if not len(sizes) or not all(0 <= size < float("inf") for size in sizes):
        raise InputError("sizes", list(sizes), "give finite numbers from 0 upwards")
    adapter = adapt(model)
    groups = {
        "memorized": Paragraphs.of(memorized, model, "memorized"),
        "control": Paragraphs.of(control, model, "control"),
    }
    groups = {
        name: group[has_finite_scores(adapter, group, name, memory_budget)]
        for name, group in groups.items()
    }
    candidates = Candidates.of(adapter, heads=heads, layers=layers, components=components)
    provenance = Provenance.of(
        adapter, dict(groups), sizes=list(sizes), fraction=fraction, mask=mask, seed=seed
    )
    scores = None
    if mask in ("top", "random-per-tensor"):
        _, scores = mean_gradient(
            adapter, groups["memorized"], list(candidates.weights), memory_budget, progress
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = candidates.choose(fraction, scores, mask, generator)
    unit = torch.cat(
        [
            w.values.float().square().mean().sqrt().cpu().expand(len(index))
            for w, index in zip(chosen.weights, chosen.indices, strict=True)
        ]
    )
    noise = torch.randn(draws, len(chosen), generator=generator) * unit
    shape = (len(sizes), draws)
    em = {name: torch.empty(*shape, len(group)) for name, group in groups.items()}
    nll = {name: torch.empty(*shape, len(group)) for name, group in groups.items()}
    with (
        chosen.restored() as original,
        bar(len(sizes) * draws, "noise", unit="draw", progress=progress) as shown,
    ):
        for i, size in enumerate(sizes):
            for draw in range(draws):
                chosen.add(original, size * noise[draw])
                for name, group in groups.items():
                    found = scan(model, group, memory_budget=memory_budget, progress=False)
                    em[name][i, draw], nll[name][i, draw] = found.em.float(), found.nll
                shown.update()
    return NoiseCurve(
        sizes=torch.tensor(list(sizes), dtype=torch.float32),
        em=em,
        nll=nll,
        n_weights=len(chosen),
        n_candidates=chosen.n_candidates,
        provenance=provenance,
    )
