"""What a head, MLP or neuron writes, and what it reads when it does (direct logit attribution).

A component adds a vector o to the residual stream: a head z_h W_O^h, an MLP its output, a neuron
its activation times its output weights. With the scale of the final norm held at its value, o adds

    <o, u_t> / scale

to the logit of token t, where u_t is the unembedding with the norm's weight folded in and the mean
over the vocabulary subtracted (`memcircuits.models.norms.unembedding`). These are the *direct*
effects, without any later layer; summed over all components, the embedding and the biases, they are
the logits (Elhage et al. 2021, transformer-circuits.pub/2021/framework).

For every component, `writes` gives what it adds to the logit of each true continuation token, the
places where that is most, what a head attends to at these places, and the tokens of the vocabulary
whose logits it raises most on average over the continuations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.components import Component, ComponentLike, component_columns
from memcircuits.base.errors import InputError, at_least, sequence
from memcircuits.base.progress import bar
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.token_text import token_labels
from memcircuits.evidence.lookups.driving import refuse_other_blocks
from memcircuits.measure.continuation import run_to_continuation
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.hooks import Site, hook_name
from memcircuits.models.norms import final_norm, unembedding
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.display.pages import Block

_SITES: dict[str, tuple[Site, ...]] = {
    "head": ("z", "pattern"),
    "mlp": ("mlp_out",),
    "neuron": ("post",),
}
"""What is read of the components that write."""


@dataclass(frozen=True)
class Writes(Result, kind="writes"):
    """What components add to the logits of the continuation tokens.

    Attributes:
        components: names of the components (`memcircuits.base.components`).
        contribution: what each one adds to the logit of each true continuation token, relative to
            the mean over the vocabulary, [component, paragraph, pos].
        promoted: ids of the tokens whose logits it raises most, averaged over all continuation
            positions of all paragraphs, best first, [component, rank].
        promotion: by how much, logits, [component, rank].
        attended: the position that a head attends to most where a continuation token is predicted,
            [component, paragraph, pos]; counted without tokens in front, which are -1; -2 where the
            component is no head.
        attention: how much it attends there; NaN where the component is no head.
        ids: token ids of the paragraphs, [paragraph, pos].
        texts: token id -> its text, of the tokens of the paragraphs and of those promoted.
        names: the paragraphs' names.
        provenance: where the numbers come from.
    """

    components: tuple[str, ...]
    contribution: Float[Tensor, "component paragraph pos"]
    promoted: Int[Tensor, "component rank"]
    promotion: Float[Tensor, "component rank"]
    attended: Int[Tensor, "component paragraph pos"]
    attention: Float[Tensor, "component paragraph pos"]
    ids: Int[Tensor, "paragraph length"]
    texts: dict[str, str]
    names: tuple[str, ...]
    provenance: Provenance

    @property
    def mean(self) -> Float[Tensor, " component"]:
        """What each component adds to the logit of the true token, averaged over all of them."""
        return self.contribution.flatten(1).mean(1)

    def to_frame(self) -> pd.DataFrame:
        """One row per component and rank, the places where it adds most first.

        Columns `component, unit, layer, head, neuron` (the last two empty where there is none),
        `mean` (logits added to true tokens on average), `rank`; the continuation token `writes`
        that it adds most to, with the paragraph's `id`, the place `pos` in its continuation and the
        `logit` added; what a head `reads` there, the token that it attends to most, and the
        `attention` to it (empty for other components); `promotes`, the token of the vocabulary
        whose logit it raises most on average, and `promotion`, by how much.
        """
        import pandas as pd

        rows = []
        n_pos, n_ranks = self.contribution.shape[-1], self.promoted.shape[1]
        n_prefix = self.ids.shape[1] - n_pos
        order = self.contribution.flatten(1).argsort(dim=-1, descending=True, stable=True)
        for i, name in enumerate(self.components):
            for rank, place in enumerate(order[i, :n_ranks].tolist()):
                row, pos = divmod(place, n_pos)
                rows.append(
                    {
                        "component": name,
                        "mean": float(self.mean[i]),
                        "rank": rank + 1,
                        "writes": self.texts[str(int(self.ids[row, n_prefix + pos]))],
                        "id": self.names[row],
                        "pos": pos,
                        "logit": float(self.contribution[i, row, pos]),
                        "reads": self._read(row, int(self.attended[i, row, pos])),
                        "attention": float(self.attention[i, row, pos]),
                        "promotes": self.texts[str(int(self.promoted[i, rank]))],
                        "promotion": float(self.promotion[i, rank]),
                    }
                )
        frame = pd.DataFrame(rows)
        columns = component_columns([Component.of(name) for name in frame["component"]])
        for place, (column, values) in enumerate(columns.items(), start=1):
            frame.insert(place, column, values)
        return frame

    def _read(self, row: int, position: int) -> str:
        """Text of a token that a head attends to."""
        if position < 0:
            return "in front of the text" if position == _IN_FRONT else ""
        return self.texts[str(int(self.ids[row, position]))]

    def figure(self) -> Any:
        """What each component adds to each continuation token of the first paragraph (plotly)."""
        from memcircuits.display import figures

        n_pos = self.contribution.shape[-1]
        tokens = self.ids[0, -n_pos:].tolist()
        return figures.heatmap(
            self.contribution[:, 0],
            title=f"Added to the logit of each token of {self.names[0]}",
            name="direct effect",
            units="logits",
            row_label="component",
            col_label="token",
            row_names=self.components,
            col_names=[self.texts[str(token)] for token in tokens],
        )

    def blocks(self) -> list[Block]:
        """A table for a page: what each component writes, and what it reads when it does."""
        from memcircuits.display.pages import Table

        frame = self.to_frame().drop(columns=["unit", "layer", "head", "neuron", "id", "pos"])
        return [
            Table(
                frame,
                title="What they write",
                note="What each part of the model adds to the logits by itself, without the layers "
                "above it.",
                help={
                    "mean": "added to the logit of the true token, averaged over all of them",
                    "writes": "a continuation token that it adds much to; rank 1: the most",
                    "logit": "what it adds to the logit of that token",
                    "reads": "the token that the head attends to most while it writes this one",
                    "attention": "how much it attends to it; 1: to nothing else",
                    "promotes": "a token whose logit it raises most on average, true or not",
                    "promotion": "by how much",
                },
            )
        ]

    def __str__(self) -> str:
        best = int(self.mean.argmax())
        return (
            f"{len(self.components)} components; {self.components[best]} adds most to the true "
            f"tokens, {float(self.mean[best]):.2f} logits on average"
        )


_IN_FRONT, _NOT_A_HEAD = -1, -2


@plain_torch()
def writes(
    model: Model,
    paragraphs: ParagraphsLike,
    components: Sequence[ComponentLike],
    *,
    k: int = 5,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Writes:
    """What heads, MLPs and neurons add to the logits of the continuation, by themselves.

    Args:
        model: the model.
        paragraphs: the paragraphs whose continuations are looked at.
        components: heads, MLPs and neurons, such as `["L3H5", "L2.mlp", "L1N17"]`.
        k: number of tokens that `to_frame` names for each component.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        A `Writes`: logits added to every true continuation token, and tokens promoted.

    Raises:
        InputError: for a component that the model does not have, or none.
        UnsupportedModel: if the model's blocks or logits are not sums over components.

    Example:
        >>> result = writes(model, memorized, ["L0H5", "L5.mlp"], progress=False)
        >>> result.contribution.shape  # component, paragraph, continuation token
        torch.Size([2, 4, 50])
    """
    at_least("k", k, 1)
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, adapter)
    adapter.check_tokens(paragraphs.inputs, "paragraphs")
    chosen = _check(adapter, components)
    with adapter.preserving_state():
        refuse_other_blocks(adapter, paragraphs)
        directions = _Directions(adapter, paragraphs, chosen)
        size = rows_that_fit(adapter, paragraphs.inputs.shape[1], 0, memory_budget, backward=True)
        with bar(len(paragraphs), "writes", progress=progress) as progress_bar:
            measured = map_batches(len(paragraphs), size, directions.measure, progress_bar.update)
        promotion, promoted = directions.promoted(min(k, paragraphs.continuation.numel()))
    contribution, attended, attention = measured.permute(3, 2, 0, 1).unbind(0)
    tokens = sorted({*paragraphs.ids.flatten().tolist(), *promoted.flatten().tolist()})
    return Writes(
        components=tuple(str(component) for component in chosen),
        contribution=contribution.contiguous(),
        promoted=promoted,
        promotion=promotion,
        attended=attended.long(),
        attention=attention.contiguous(),
        ids=paragraphs.ids,
        texts=_texts(adapter, tokens),
        names=paragraphs.names,
        provenance=Provenance.of(
            adapter, {"paragraphs": paragraphs}, components=[str(c) for c in chosen], k=k
        ),
    )


def _check(adapter: Adapter, components: Sequence[ComponentLike]) -> list[Component]:
    sequence("components", components)
    chosen = [Component.of(value) for value in components]
    if not chosen:
        raise InputError("components", "empty", "name at least one, such as L3H5 or L2.mlp")
    n_neurons = adapter.weight(0, "W_out").values.shape[1]
    for component in chosen:
        if component.unit not in _SITES:
            raise InputError("components", str(component), "give heads, MLPs and neurons")
        if component.layer >= adapter.n_layers or component.neuron >= n_neurons:
            raise InputError(
                "components", str(component), f"{adapter.n_layers} layers of {n_neurons} neurons"
            )
        if component.unit == "head":
            adapter.check_head((component.layer, component.head), "components")
    return chosen


def _texts(adapter: Adapter, tokens: Sequence[int]) -> dict[str, str]:
    if adapter.tokenizer is None:
        return {str(token): f"<{token}>" for token in tokens}
    return {str(token): token_labels([token], adapter.model)[0] for token in tokens}


class _Directions:
    """The direction of every token in the residual stream, and what components add along it."""

    def __init__(
        self, adapter: Adapter, paragraphs: Paragraphs, components: Sequence[Component]
    ) -> None:
        self._adapter, self._paragraphs, self._components = adapter, paragraphs, components
        self._norm = final_norm(adapter)
        self._unembedding = unembedding(adapter, self._norm)
        self._final = hook_name("resid_post", adapter.n_layers - 1)
        sites = {hook_name(site, c.layer) for c in components for site in _SITES[c.unit]}
        self._reads = sorted({*sites, self._final})
        self._sum = torch.zeros(len(components), adapter.d_model, dtype=torch.float64)

    def measure(self, batch: slice) -> Float[Tensor, "batch pos component measure"]:
        """Contribution, attended position and attention of some of the paragraphs."""
        paragraphs = self._paragraphs
        cache = run_to_continuation(self._adapter, paragraphs, batch, read=self._reads).cache
        predicting = slice(-paragraphs.n_continuation, None)
        scale = self._norm.scale(cache[self._final][:, predicting])
        tokens = paragraphs.continuation[batch].to(self._unembedding.device)
        direction = self._unembedding.T[tokens]
        measured, sums = [], []
        for component in self._components:
            out = self._output(component, cache)[:, predicting] / scale
            sums.append(out.double().sum((0, 1)).cpu())
            contribution = (out * direction).sum(-1)
            measured.append(torch.stack([contribution, *self._attended(component, cache)], -1))
        self._sum += torch.stack(sums)  # last: a batch that does not fit is done again
        return torch.stack(measured, 2).double().cpu()

    def _output(
        self, component: Component, cache: dict[str, Tensor]
    ) -> Float[Tensor, "batch pos d_model"]:
        layer = component.layer
        out = cache[hook_name(_SITES[component.unit][0], layer)]
        if component.unit == "head":
            w_o = self._adapter.weight(layer, "W_O").values[component.head]
            return out[:, :, component.head] @ w_o
        if component.unit == "neuron":
            w_out = self._adapter.weight(layer, "W_out").values[0, component.neuron]
            activation = out.view(*cache[self._final].shape[:2], -1)[..., component.neuron]
            return activation[..., None] * w_out
        return out

    def _attended(
        self, component: Component, cache: dict[str, Tensor]
    ) -> tuple[Float[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
        """The position that a head attends to most, and how much."""
        shape = len(cache[self._final]), self._paragraphs.n_continuation
        if component.unit != "head":
            device = self._adapter.device
            return (
                torch.full(shape, float(_NOT_A_HEAD), device=device),
                torch.full(shape, torch.nan, device=device),
            )
        pattern = cache[hook_name("pattern", component.layer)][:, component.head]
        most = pattern[:, -shape[1] :].max(-1)
        position = (most.indices - self._paragraphs.n_bos).clamp_min(_IN_FRONT)
        return position.to(most.values.dtype), most.values

    def promoted(self, k: int) -> tuple[Float[Tensor, "component k"], Int[Tensor, "component k"]]:
        """The tokens whose logits the components measured so far raise most on average."""
        n = self._paragraphs.continuation.numel()
        mean = (self._sum / n).to(self._unembedding)
        best = (mean @ self._unembedding).topk(min(k, self._adapter.d_vocab), -1)
        return best.values.double().cpu(), best.indices.cpu()
