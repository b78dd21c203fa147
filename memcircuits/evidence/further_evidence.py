"""What stands beside the score of a component: effects of both sets, gradients, attention.

Gradients are the largest |dL/dw| over the matrices of a head or of an MLP (equation 2), attention
is that of heads to rare prefix tokens (section 5.4). Where a component has no such number, it is
NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.data.unigrams import UnigramTable
from memcircuits.evidence.component_effects import ComponentEffects
from memcircuits.evidence.component_grid import ComponentGrid
from memcircuits.evidence.gradients.parameters import ParameterGradients, parameter_gradients
from memcircuits.evidence.groups import Groups
from memcircuits.evidence.rare_tokens import rare_token_attention
from memcircuits.models.adapter import Adapter
from memcircuits.models.weights import HEAD_COMPONENTS


@dataclass(frozen=True)
class Evidence:
    """What stands beside the score.

    Attributes:
        columns: name -> [layer, column].
        layer_share: set -> share of the lower half of the layers in the gradient.
        layer_gradients: set -> gradient sum per layer.
    """

    columns: Mapping[str, Float[Tensor, "layer column"]]
    layer_share: Mapping[str, float]
    layer_gradients: Mapping[str, Float[Tensor, " layer"]]


def gather_evidence(
    adapter: Adapter,
    groups: Groups,
    effects: ComponentEffects,
    unigrams: UnigramTable,
    seed: int,
    *,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Evidence:
    """Effects of both sets, their gradients, and attention to rare tokens."""
    gradients = {
        name: parameter_gradients(
            adapter, paragraphs, memory_budget=memory_budget, progress=progress
        )
        for name, paragraphs in {"memorized": groups.memorized, "control": groups.control}.items()
    }
    rare = rare_token_attention(adapter, groups.memorized, unigrams, seed=seed, progress=progress)
    grid, means = effects.grid, {name: effects.means(name) for name in gradients}
    return Evidence(
        columns={
            "ablation_memorized": means["memorized"]["nll"],
            "ablation_control": means["control"]["nll"],
            "em_memorized": means["memorized"]["em"],
            "em_control": means["control"]["em"],
            "margin_memorized": means["memorized"]["margin"],
            "margin_control": means["control"]["margin"],
            "gradient": _of_components(gradients["memorized"], grid),
            "gradient_control": _of_components(gradients["control"], grid),
            "rare_token_tau": _of_heads(rare.values, grid),
            "rare_token_p": _of_heads(rare.p_value, grid),
            "verified": effects.verified,
        },
        layer_share={name: result.layer_share() for name, result in gradients.items()},
        layer_gradients={name: result.layers for name, result in gradients.items()},
    )


def _of_heads(
    values: Float[Tensor, "layer head"], grid: ComponentGrid
) -> Float[Tensor, "layer column"]:
    """A number of each head as a grid, NaN for other components."""
    columns = torch.full((grid.n_layers, grid.width), torch.nan)
    if "head" in grid.units:
        columns[:, grid.columns("head")] = values.float()
    return columns


def _of_components(
    gradients: ParameterGradients, grid: ComponentGrid
) -> Float[Tensor, "layer column"]:
    """The largest gradient of the matrices of each head and MLP."""
    columns = _of_heads(gradients.per_head(grid.n_heads), grid)
    if "mlp" in grid.units:
        of_mlps = [v[:, 0] for name, v in gradients.values.items() if name not in HEAD_COMPONENTS]
        columns[:, grid.columns("mlp")] = torch.stack(of_mlps).amax(0)[:, None].float()
    return columns
