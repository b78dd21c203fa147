"""Where in the computation does it happen? Gradients of the loss for activations.

|dL/dh| of the queries, keys, values and outputs z of every head and of the hidden layer of the MLP
before and after its nonlinearity, per layer, head and position, the largest over the hidden
dimension (figures 6 and 10 of the paper). L is the mean NLL of the continuation, or the NLL of one
token of it per paragraph, for instance the first one that a perturbed prefix changes.

Every activation is captured on its way through the forward pass; where nothing below it needs a
gradient it becomes a leaf. One backward pass then gives all sites of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.core.errors import InputError, one_of
from memcircuits.core.progress import bar
from memcircuits.core.statistics import finite_rows, left_out
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.measure.continuation import score_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.hooks import HEAD_SITES, hook_name
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd


SITES = (*HEAD_SITES, "pre", "post")


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
            layers, heads, length = values.shape
            grid = torch.cartesian_prod(
                torch.arange(layers), torch.arange(heads), torch.arange(length)
            )
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

    def figure(self, site: str = "z") -> Any:
        """Layer x head, the largest value over positions (plotly)."""
        from memcircuits.display import figures

        one_of("site", site, self.values)
        return figures.heatmap(self.values[site].amax(-1), title=f"|dL/d{site}|", units=self.units)

    def __str__(self) -> str:
        return f"activation gradients at {', '.join(self.values)} [{self.units}]"


def activation_gradients(
    model: Any,
    paragraphs: Any,
    *,
    sites: Sequence[str] = SITES,
    token: int | Sequence[int] | Tensor | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> ActivationGradients:
    """Gradient of the loss for activations, per layer, head and position.

    Args:
        model: HookedTransformer or TransformerBridge.
        paragraphs: `Paragraphs`, a list of strings or a LongTensor of ids.
        sites: of `q`, `k`, `v`, `z`, `pre`, `post`.
        token: index of the continuation token whose NLL is the loss, one for all or one per
            paragraph; None: the mean NLL over the continuation.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        `ActivationGradients`.

    Raises:
        InputError: for a wrong site or token or unusable paragraphs.

    Example:
        >>> found = mc.activation_gradients(model, memorized[:2], sites=("z",))
        >>> found.values["z"].shape  # layer, head, position
        torch.Size([6, 8, 99])
    """
    if isinstance(sites, str) or not sites:
        raise InputError("sites", repr(sites), "give a sequence such as ('q', 'z')")
    for site in sites:
        one_of("sites", site, SITES)
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.ids, "paragraphs")
    tokens = _tokens(token, paragraphs)
    names = {
        (site, layer): hook_name(site, layer)
        for site in dict.fromkeys(sites)
        for layer in range(adapter.n_layers)
    }
    for name in names.values():
        if name not in adapter.hook_names:
            raise InputError("sites", name, f"{adapter.name} has no such activation")
    n_pos = paragraphs.ids.shape[1]
    fit = rows_that_fit(adapter, n_pos, paragraphs.n_continuation, memory_budget, backward=True)
    shapes: dict[str, int] = {}

    def one_batch(piece: slice) -> Tensor:
        chosen = None if tokens is None else tokens[piece]
        loss, slopes = _slopes(adapter, paragraphs, piece, list(names.values()), chosen)
        flat = [loss[:, None]]
        for (site, _), slope in zip(names, slopes, strict=True):
            largest = slope.abs().amax(-1).float()  # [batch, pos, head] or [batch, pos]
            if site not in HEAD_SITES:
                largest = largest.view(len(loss), -1, 1)
            shapes[site] = largest.shape[-1]
            flat.append(largest.transpose(1, 2).flatten(1))
        return torch.cat(flat, dim=1).cpu()

    with (
        adapter.preserving_state(),
        bar(len(paragraphs), "activations", progress=progress) as shown,
    ):
        found = map_batches(len(paragraphs), fit, one_batch, shown.update).double()
    finite = finite_rows(found)
    n, found = int(finite.sum()), found[finite]
    if not n:
        raise InputError(
            "model",
            "non-finite gradients of every paragraph",
            "load it in float32, check its weights",
        )
    mean = found.mean(0)
    error = found.std(0) / n**0.5 if n > 1 else torch.full_like(mean, torch.nan)
    values, errors = {}, {}
    start = 1
    for site, heads in shapes.items():
        shape = (adapter.n_layers, heads, n_pos - 1)
        stop = start + adapter.n_layers * heads * (n_pos - 1)
        values[site] = mean[start:stop].view(shape).float()
        errors[site] = error[start:stop].view(shape).float()
        start = stop
    return ActivationGradients(
        values=values,
        error=errors,
        n_prefix=paragraphs.n_prefix,
        loss=float(mean[0]),
        provenance=Provenance.of(
            adapter,
            {"paragraphs": paragraphs},
            sites=list(shapes),
            token=None if tokens is None else tokens.tolist(),
        ),
        notes=left_out(finite),
    )


def _tokens(token: Any, paragraphs: Paragraphs) -> Tensor | None:
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


def _slopes(
    adapter: Adapter,
    paragraphs: Paragraphs,
    piece: slice,
    names: Sequence[str],
    tokens: Tensor | None,
) -> tuple[Float[Tensor, " batch"], list[Tensor]]:
    """The loss of each paragraph and its gradient for each activation."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def hook(activation: Tensor) -> Tensor:
            # The tensor returned is the one that the rest of the pass is computed from.
            kept[name] = (
                activation.view_as(activation)
                if activation.requires_grad
                else activation.detach().requires_grad_()
            )
            return kept[name]

        return hook

    with torch.enable_grad():
        edits = {name: keep(name) for name in names}
        scores = score_continuation(adapter, paragraphs, piece, edit=edits)
        loss = scores.nll
        if tokens is not None:
            loss = -scores.log_prob.gather(1, tokens[:, None].to(adapter.device))[:, 0]
        absent = [name for name in names if name not in kept]
        if absent:
            raise InputError("sites", absent[0], f"it never fired in {adapter.name}")
        slopes = torch.autograd.grad(loss.sum(), [kept[name] for name in names])
    return loss.detach(), list(slopes)
