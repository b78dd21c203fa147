"""How precisely must the weights be kept? Gaussian noise of growing size on chosen weights.

Noise of relative size s adds to each chosen weight s times the root mean square of its matrix times
a standard normal number. If the recitation depends on few weights, noise on those with the largest
gradients harms it at smaller sizes than noise on as many random ones, and before it harms controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, at_least, one_of
from memcircuits.base.errors import fraction as check_fraction
from memcircuits.base.heads import HeadLike
from memcircuits.base.progress import bar
from memcircuits.base.statistics import bootstrap_interval, group_means, group_notes
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.editing.masks import MASK_STRATEGIES, Candidates, Mask, MaskStrategy
from memcircuits.measure.gradients import mean_gradient
from memcircuits.measure.scanning import has_finite_scores, scan
from memcircuits.models.adapter import Adapter, Model
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
        n_weights: number of weights with noise.
        n_candidates: number of weights that they were chosen from.
        provenance: where the numbers come from.
        groups: set -> number of each paragraph's independent group; of a set that is not there,
            each paragraph is its own group.
        notes: what the reader must know.
    """

    sizes: Float[Tensor, " size"]
    em: Mapping[str, Float[Tensor, "size draw paragraph"]]
    nll: Mapping[str, Float[Tensor, "size draw paragraph"]]
    n_weights: int
    n_candidates: int
    provenance: Provenance
    groups: Mapping[str, Int[Tensor, " paragraph"]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """Columns `set, size, em, em_low, em_high, nll, nll_low, nll_high`.

        Means over draws; 95 % intervals over independent groups of paragraphs.
        """
        import pandas as pd

        frames = []
        for name in self.em:
            columns = {"set": name, "size": self.sizes.numpy()}
            for measure, values in {"em": self.em[name], "nll": self.nll[name]}.items():
                per_group = group_means(values.float().mean(1).T, self.groups.get(name)).T
                low, high = bootstrap_interval(per_group.T)
                columns[measure] = per_group.mean(-1).double().numpy()
                columns[f"{measure}_low"] = low.double().numpy()
                columns[f"{measure}_high"] = high.double().numpy()
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)

    def figure(self) -> Any:
        """EM and NLL against the size of the noise (plotly)."""
        from memcircuits.display import figures

        return figures.noise_curves(self.to_frame(), title=str(self).capitalize())

    def __str__(self) -> str:
        return f"noise on {self.n_weights:,} of {self.n_candidates:,} weights"


@plain_torch()
def weight_noise(  # noqa: PLR0913
    model: Model,
    memorized: ParagraphsLike,
    control: ParagraphsLike,
    *,
    sizes: Sequence[float] = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0),
    fraction: float = 0.001,
    mask: MaskStrategy = "top",
    heads: Sequence[HeadLike] | None = None,
    layers: Sequence[int] | None = None,
    components: Sequence[str] | None = None,
    draws: int = 3,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> NoiseCurve:
    """Add noise to weights and measure what is still recited; the model is unchanged afterwards.

    Args:
        model: the model.
        memorized: paragraphs that the model recites; their gradient chooses the weights.
        control: other paragraphs.
        sizes: noise relative to the root mean square of each matrix.
        fraction: fraction of the candidate weights that gets noise.
        mask: `top` by |gradient| of the memorized paragraphs' NLL, `top-per-component` (the same
            fraction of each component), `random`, `random-per-tensor` or `all`.
        heads: candidates are only these heads' matrices.
        layers: candidates are only in these layers.
        components: candidates are only these, such as `W_V`.
        draws: noise draws for each size, the same ones for every size.
        seed: of noise and random masks.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        A `NoiseCurve`.

    Raises:
        InputError: for unusable paragraphs, sizes or masks.
    """
    check_fraction("fraction", fraction)
    one_of("mask", mask, MASK_STRATEGIES)
    at_least("draws", draws, 1)
    if not len(sizes) or not all(0 <= size < float("inf") for size in sizes):
        raise InputError("sizes", list(sizes), "give finite numbers from 0 upwards")
    adapter = adapt(model)
    given = {
        "memorized": Paragraphs.of(memorized, model, "memorized"),
        "control": Paragraphs.of(control, model, "control"),
    }
    groups = {
        name: group[has_finite_scores(adapter, group, name, memory_budget)]
        for name, group in given.items()
    }
    candidates = Candidates.of(adapter, heads=heads, layers=layers, components=components)
    provenance = Provenance.of(
        adapter, dict(groups), sizes=list(sizes), fraction=fraction, mask=mask, seed=seed
    )
    # Choose the weights, and draw the noise of size 1.
    scores = None
    if mask not in ("random", "all"):
        weights = list(candidates.weights)
        _, scores = mean_gradient(adapter, groups["memorized"], weights, memory_budget, progress)
    generator = torch.Generator().manual_seed(seed)
    chosen = candidates.choose(fraction, scores, mask, generator)
    noise = torch.randn(draws, len(chosen), generator=generator)
    noise *= chosen.root_mean_squares().cpu()
    groups_of = {name: group.groups for name, group in groups.items()}
    em, nll = _scans_under_noise(adapter, groups, chosen, sizes, noise, memory_budget, progress)
    return NoiseCurve(
        sizes=torch.tensor(list(sizes), dtype=torch.float32),
        em=em,
        nll=nll,
        n_weights=len(chosen),
        n_candidates=chosen.n_candidates,
        provenance=provenance,
        groups=groups_of,
        notes=group_notes(groups_of),
    )


def _scans_under_noise(
    adapter: Adapter,
    groups: Mapping[str, Paragraphs],
    chosen: Mask,
    sizes: Sequence[float],
    noise: Float[Tensor, "draw weight"],
    memory_budget: int | None,
    progress: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """EM (tokens) and NLL (nats/token) of each group, [size, draw, paragraph]."""
    shape = (len(sizes), len(noise))
    em = {name: torch.empty(*shape, len(group)) for name, group in groups.items()}
    nll = {name: torch.empty(*shape, len(group)) for name, group in groups.items()}
    with (
        chosen.restored() as original,
        bar(len(sizes) * len(noise), "noise", unit="draw", progress=progress) as draws_bar,
    ):
        for i, size in enumerate(sizes):
            for draw, noise_draw in enumerate(noise):
                chosen.add(original, size * noise_draw)
                for name, group in groups.items():
                    result = scan(adapter, group, memory_budget=memory_budget, progress=False)
                    em[name][i, draw], nll[name][i, draw] = result.em.float(), result.nll
                draws_bar.update()
    return em, nll
