"""Which activations would change the loss most? Gradients per layer, head and position.

|dL/dh| of the queries, keys, values and z of every head and of the hidden layer of the MLP before
(`pre`) and after (`post`) its nonlinearity: the largest over the hidden dimension, for every layer,
head and position (figures 6 and 10 of the paper). L is the mean NLL of the continuation, or the NLL
of one token of it per paragraph, for instance the first one that a perturbed prefix changes.

A hook on each activation keeps the tensor from which the rest of the forward pass is computed;
where nothing below it needs a gradient, that tensor is a new leaf. One backward pass then gives the
gradients at all sites of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, one_of
from memcircuits.base.progress import bar
from memcircuits.base.statistics import finite_rows, left_out
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.measure.continuation import score_continuation
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.hooks import HEAD_SITES, hook_name
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

GradientSite: TypeAlias = Literal["q", "k", "v", "z", "pre", "post"]
"""Queries, keys, values and z of heads; the MLP's hidden layer before and after nonlinearity."""

GRADIENT_SITES: tuple[GradientSite, ...] = get_args(GradientSite)


@dataclass(frozen=True)
class ActivationGradients(Result, kind="activation-gradients"):
    """Largest |dL/dh| over the hidden dimension.

    Attributes:
        values: site -> [layer, head, pos], mean over paragraphs; `pre` and `post` have one "head",
            `k` and `v` of grouped-query models one per key-value head. The last token of a
            paragraph predicts nothing and has no column.
        error: site -> [layer, head, pos], standard error of that mean.
        n_prefix: tokens of the prefix.
        loss: mean of the loss, nats/token.
        provenance: where the numbers come from.
        units: units of `values`.
        notes: what the reader must know.
    """

    values: Mapping[str, Float[Tensor, "layer head pos"]]
    error: Mapping[str, Float[Tensor, "layer head pos"]]
    n_prefix: int
    loss: float
    provenance: Provenance
    units: str = "nats/token per unit of activation"
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """Columns `site, layer, head, pos, value, error`; `head` is empty for the MLP."""
        import pandas as pd

        parts = []
        for site, values in self.values.items():
            grid = torch.cartesian_prod(*(torch.arange(size) for size in values.shape))
            part = pd.DataFrame(grid.numpy(), columns=["layer", "head", "pos"])
            part.insert(0, "site", site)
            part["head"] = part["head"].astype("Int64")
            if site not in HEAD_SITES:
                part["head"] = pd.NA
            part["value"] = values.flatten().double().numpy()
            part["error"] = self.error[site].flatten().double().numpy()
            parts.append(part)
        frame = pd.concat(parts, ignore_index=True)
        frame["head"] = frame["head"].astype("Int64")
        return frame

    def figure(self, site: GradientSite = "z") -> Any:
        """Layer x head, the largest value over positions (plotly)."""
        from memcircuits.display import figures

        one_of("site", site, self.values)
        return figures.heatmap(self.values[site].amax(-1), title=f"|dL/d{site}|", units=self.units)

    def __str__(self) -> str:
        return f"activation gradients at {', '.join(self.values)} [{self.units}]"


@plain_torch()
def activation_gradients(
    model: Model,
    paragraphs: ParagraphsLike,
    *,
    sites: Sequence[GradientSite] = GRADIENT_SITES,
    token: int | Sequence[int] | Tensor | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> ActivationGradients:
    """Gradient of the loss for activations, per layer, head and position.

    Args:
        model: the model.
        paragraphs: the paragraphs.
        sites: which activations, of `q`, `k`, `v`, `z`, `pre`, `post`.
        token: index of the continuation token whose NLL is the loss, one for all or one per
            paragraph; None: the mean NLL over the continuation.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        `ActivationGradients`, in nats/token per unit of activation.

    Raises:
        InputError: for a wrong site or token or unusable paragraphs.

    Example:
        >>> gradients = mc.activation_gradients(model, memorized[:2], sites=("z",))
        >>> gradients.values["z"].shape  # layer, head, position
        torch.Size([6, 8, 99])
    """
    if isinstance(sites, str) or not sites:
        raise InputError("sites", repr(sites), "give a sequence such as ('q', 'z')")
    for site in sites:
        one_of("sites", site, GRADIENT_SITES)
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, adapter)
    adapter.check_tokens(paragraphs.inputs, "paragraphs")
    tokens = _token_per_paragraph(token, paragraphs)
    sites = list(dict.fromkeys(sites))

    # Loss and gradients of every paragraph.
    samples, n_heads = _sample_paragraphs(
        adapter, paragraphs, sites, tokens, memory_budget, progress
    )
    finite = finite_rows(samples)
    n = int(finite.sum())
    if not n:
        raise InputError(
            "model",
            "non-finite gradients of every paragraph",
            "load it in float32, check its weights",
        )

    # Mean and standard error over paragraphs; the first column is the loss.
    samples = samples[finite]
    mean = samples.mean(0)
    error = samples.std(0) / n**0.5 if n > 1 else torch.full_like(mean, torch.nan)
    n_pos = paragraphs.ids.shape[1] - 1
    shapes = {site: (adapter.n_layers, n_heads[site], n_pos) for site in sites}
    return ActivationGradients(
        values=_split_sites(mean[1:], shapes),
        error=_split_sites(error[1:], shapes),
        n_prefix=paragraphs.n_prefix,
        loss=float(mean[0]),
        provenance=Provenance.of(
            adapter,
            {"paragraphs": paragraphs},
            sites=sites,
            token=None if tokens is None else tokens.tolist(),
        ),
        notes=left_out(finite),
    )


def _token_per_paragraph(
    token: int | Sequence[int] | Tensor | None, paragraphs: Paragraphs
) -> Int[Tensor, " paragraph"] | None:
    """The index of each paragraph's token, None if the loss is that of the whole continuation."""
    if token is None:
        return None
    try:
        tokens = torch.as_tensor(token)
    except (TypeError, ValueError, RuntimeError):
        raise InputError("token", repr(token), "give one index, or one per paragraph") from None
    if tokens.ndim == 0:
        tokens = tokens.expand(len(paragraphs))
    if tokens.shape != (len(paragraphs),) or tokens.is_floating_point():
        raise InputError("token", tuple(tokens.shape), "give one index, or one per paragraph")
    n = paragraphs.n_continuation
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < n:
        raise InputError("token", tokens.tolist(), f"indices must lie in [0, {n})")
    return tokens


def _sample_paragraphs(
    adapter: Adapter,
    paragraphs: Paragraphs,
    sites: Sequence[GradientSite],
    tokens: Int[Tensor, " paragraph"] | None,
    memory_budget: int | None,
    progress: bool,
) -> tuple[Float[Tensor, "paragraph number"], dict[GradientSite, int]]:
    """For each paragraph its loss and all its gradients in one row; the number of heads by site."""
    places = [(site, layer) for site in sites for layer in range(adapter.n_layers)]
    names = [hook_name(site, layer) for site, layer in places]
    for name in names:
        if name not in adapter.hook_names:
            raise InputError("sites", name, f"{adapter.name} has no such activation")
    n_pos, n_logits = paragraphs.inputs.shape[1], paragraphs.n_continuation
    size = rows_that_fit(adapter, n_pos, n_logits, memory_budget, backward=True)
    n_heads: dict[GradientSite, int] = {}

    def sample_batch(batch: slice) -> Tensor:
        batch_tokens = None if tokens is None else tokens[batch]
        loss, grads = loss_and_gradients(adapter, paragraphs, batch, names, batch_tokens)
        n_inputs = paragraphs.inputs.shape[1] - 1
        columns = [loss[:, None]]
        for (site, _), grad in zip(places, grads, strict=True):
            largest = grad.abs().amax(-1).float()
            if site not in HEAD_SITES:
                largest = largest.view(len(loss), n_inputs, 1)  # the MLP counts as one head
            largest = largest[:, paragraphs.n_bos :]
            n_heads[site] = largest.shape[-1]
            columns.append(rearrange(largest, "batch pos head -> batch (head pos)"))
        return torch.cat(columns, dim=1).cpu()

    with (
        adapter.preserving_state(),
        bar(len(paragraphs), "activations", progress=progress) as progress_bar,
    ):
        samples = map_batches(len(paragraphs), size, sample_batch, progress_bar.update)
    return samples.double(), n_heads


def loss_and_gradients(
    adapter: Adapter,
    paragraphs: Paragraphs,
    batch: slice,
    names: Sequence[str],
    tokens: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, " batch"], list[Tensor]]:
    """The loss of some paragraphs (nats/token) and its gradient for each named activation.

    Args:
        adapter: the model.
        paragraphs: the paragraphs.
        batch: which of them.
        names: names of the activations.
        tokens: for each paragraph the index of the continuation token whose NLL is the loss; None:
            the mean NLL over the continuation.

    Raises:
        InputError: if an activation is not computed in a forward pass.
    """
    activations: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def hook(activation: Tensor) -> Tensor:
            # The tensor returned is the one from which the rest of the pass is computed.
            activations[name] = (
                activation.view_as(activation)
                if activation.requires_grad
                else activation.detach().requires_grad_()
            )
            return activations[name]

        return hook

    with torch.enable_grad():
        edit = {name: keep(name) for name in names}
        scores = score_continuation(adapter, paragraphs, batch, edit=edit)
        loss = scores.nll
        if tokens is not None:
            loss = -scores.log_prob.gather(1, tokens[:, None].to(adapter.device))[:, 0]
        absent = [name for name in names if name not in activations]
        if absent:
            raise InputError("sites", absent[0], f"it never fired in {adapter.name}")
        grads = torch.autograd.grad(loss.sum(), [activations[name] for name in names])
    return loss.detach(), list(grads)


def _split_sites(
    numbers: Float[Tensor, " number"], shapes: Mapping[GradientSite, tuple[int, int, int]]
) -> dict[str, Float[Tensor, "layer head pos"]]:
    """Site -> its part of a row of numbers, [layer, head, pos]."""
    sizes = [layers * heads * positions for layers, heads, positions in shapes.values()]
    parts = numbers.split(sizes)
    return {
        site: part.view(shape).float()
        for (site, shape), part in zip(shapes.items(), parts, strict=True)
    }
