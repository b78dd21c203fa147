"""Which text teaches which? One gradient step on each row, and what it changes on every other.

From Chen et al. 2024, "Parallel Structures in Pre-training Data Yield In-Context Learning"
(arXiv 2402.12530, equations 1 and 2):

1. A row is *trained*: w' = w + eta * grad log p(continuation | prefix; w), one plain gradient step.
2. Its influence on a *tested* row is alpha = log p(tested; w') - log p(tested; w), in nats for the
   whole continuation.
3. The weights are put back exactly, and the next row is trained.

For small steps alpha is eta times the dot product of the two gradients. A negative `eta` is a step
of unlearning: alpha is then the harm to other texts. Candidate documents as trained rows name
the teacher of a recitation.

A text that the model is sure of has a small gradient, so a step on it is short. To compare trained
rows with each other, divide by the length of their steps (`Influence.per_step_length`).

With `within=True` the trained rows are pieces of a paragraph's own prefix, each given the tokens
before it, and the tested ones the tokens of its continuation (the paper's latter segments): what
the continuation could have been copied from, rather than remembered.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memcircuits.base.errors import InputError, at_least
from memcircuits.base.heads import HeadLike
from memcircuits.base.progress import bar
from memcircuits.base.statistics import count_groups, group_notes
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.evidence.influence_results import Influence
from memcircuits.measure.continuation import continuation_logits
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.registry import adapt
from memcircuits.models.weights import HEAD_COMPONENTS
from memcircuits.results.provenance import Provenance

_LAYER_PART = re.compile(r"L(\d+)\.(attn|mlp)")


@plain_torch()
def influence(  # noqa: PLR0913
    model: Model,
    trained: ParagraphsLike,
    tested: ParagraphsLike | None = None,
    eta: float = 1e-6,
    *,
    where: HeadLike | Sequence[HeadLike] | None = None,
    within: bool = False,
    piece: int = 12,
    stride: int = 6,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Influence:
    """Take one gradient step on each trained row, and measure every tested row after it.

    Args:
        model: the model; its weights are the same afterwards, bit for bit.
        trained: paragraphs whose continuation is learned, one at a time.
        tested: paragraphs whose continuation is measured; by default the trained ones.
        eta: size of the step on the log-probability of the whole continuation; negative to unlearn.
        where: weights that change: heads (`L1H2`; of grouped-query models with the keys and values
            of their group) or parts of a layer (`L1.attn`, `L1.mlp`). By default all weight
            matrices of all layers. Embeddings, norms and biases never change.
        within: train on pieces of each paragraph's own prefix, test the tokens of its continuation.
        piece: tokens of a piece (12 in the paper).
        stride: tokens between the beginnings of pieces (6 in the paper).
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        An `Influence`.

    Raises:
        InputError: for an `eta` of 0, unknown weights, unusable paragraphs, `tested` together with
            `within`, or prefixes shorter than a piece.

    Example:
        >>> result = mc.influence(model, memorized)
        >>> bool((result.values.diagonal() > 0).all())  # a step on a text helps this text
        True
    """
    _check_step(eta)
    adapter = adapt(model)
    trained = Paragraphs.of(trained, model, "trained")
    adapter.check_tokens(trained.inputs, "trained")
    steps = _Steps(adapter, where, eta, memory_budget)
    options: dict[str, Any] = {"eta": eta, "where": steps.where, "within": within}
    if within:
        if tested is not None:
            raise InputError("tested", "given", "leave it out with within=True")
        options |= {"piece": piece, "stride": stride}
        pieces = _pieces(trained, piece, stride)
        samples, norms = _within(steps, trained, pieces, progress)
        provenance = Provenance.of(adapter, {"trained": trained}, **options)
        return Influence(
            values=samples.mean(0),
            gradient_norms=norms.mean(0),
            eta=eta,
            trained=tuple(f"{p.start}-{p.stop - 1}" for p in pieces),
            tested=tuple(map(str, range(trained.n_prefix, trained.ids.shape[1]))),
            provenance=provenance,
            samples={"influence": samples},
        )
    rows = trained if tested is None else Paragraphs.of(tested, model, "tested")
    adapter.check_tokens(rows.inputs, "tested")
    values, norms = _between(steps, trained, rows, progress)
    groups = _groups_of(trained, rows)
    return Influence(
        values=values,
        gradient_norms=norms,
        eta=eta,
        trained=trained.names,
        tested=rows.names,
        provenance=Provenance.of(adapter, {"trained": trained, "tested": rows}, **options),
        groups=groups,
        notes=tuple(
            note
            for name, numbers in groups.items()
            if count_groups(numbers) < len(numbers)
            for note in group_notes({name: numbers})
        ),
    )


def _groups_of(trained: Paragraphs, tested: Paragraphs) -> dict[str, Int[Tensor, " row"]]:
    """The groups of both sets, numbered together; rows of other lengths are in other groups."""
    n = len(trained)
    if trained is tested:
        return {"trained": trained.groups, "tested": trained.groups}
    if trained.ids.shape[1] == tested.ids.shape[1]:
        both = replace(trained, bos=()) + replace(tested, bos=(), n_prefix=trained.n_prefix)
        return {"trained": both.groups[:n], "tested": both.groups[n:]}
    return {"trained": trained.groups, "tested": tested.groups + n}


def _check_step(eta: Any) -> None:
    is_number = isinstance(eta, (int, float)) and not isinstance(eta, bool)
    if not is_number or not 0 < abs(eta) < float("inf"):
        raise InputError("eta", eta, "give a finite number other than 0; negative to unlearn")


class _Steps:
    """Gradient steps in chosen weights of a model, each taken back exactly.

    Args:
        adapter: the model.
        where: places of the weights; all weight matrices if None.
        eta: size of a step.
        memory_budget: maximum bytes per batch.
    """

    def __init__(self, adapter: Adapter, where: Any, eta: float, memory_budget: int | None) -> None:
        self.adapter, self.eta, self.memory_budget = adapter, eta, memory_budget
        self.where, masks = _places(adapter, where)
        self.parameters = [parameter for parameter, _ in masks]
        self._masks = [mask for _, mask in masks]

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, steps may be taken; afterwards the model is as it was, also after Ctrl-C."""
        self._original = [parameter.detach().clone() for parameter in self.parameters]
        with self.adapter.preserving_state(grad=self.parameters):
            try:
                yield
            finally:
                self._restore()

    @contextlib.contextmanager
    def on(self, row: Paragraphs) -> Iterator[float]:
        """Inside, the weights are one step on a paragraph further; gives the gradient's length."""
        log_p = self.log_probs(row, slice(None)).sum()
        gradients = torch.autograd.grad(log_p, self.parameters)
        squares = 0.0
        with torch.no_grad():
            for parameter, gradient, mask in zip(
                self.parameters, gradients, self._masks, strict=True
            ):
                step = gradient if mask is None else gradient * mask
                squares += float(step.double().square().sum())
                parameter.add_(step, alpha=self.eta)
            try:
                yield squares**0.5
            finally:
                self._restore()

    def log_probs(self, rows: Paragraphs, batch: slice) -> Float[Tensor, "batch pos"]:
        """Log p of continuation tokens, nats, in float32 or the model's higher precision."""
        logits = continuation_logits(self.adapter, rows, batch)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = rows.continuation[batch].to(logits.device)
        return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    def all_log_probs(self, rows: Paragraphs) -> Float[Tensor, "row pos"]:
        """The same of all rows, without gradients, in float64 on the CPU."""
        size = rows_that_fit(
            self.adapter, rows.inputs.shape[1], rows.n_continuation, self.memory_budget
        )
        with torch.no_grad():
            return map_batches(
                len(rows), size, lambda batch: self.log_probs(rows, batch).double().cpu()
            )

    @torch.no_grad()
    def _restore(self) -> None:
        for parameter, original in zip(self.parameters, self._original, strict=True):
            parameter.copy_(original)


def _between(
    steps: _Steps, trained: Paragraphs, tested: Paragraphs, progress: bool
) -> tuple[Float[Tensor, "trained tested"], Float[Tensor, " trained"]]:
    """Influence of paragraphs on paragraphs, and the lengths of the gradients."""
    values, norms = [], []
    with steps.ready(), bar(len(trained), "influence", progress=progress) as progress_bar:
        before = _finite(steps.all_log_probs(tested), "tested")
        for row in trained:
            with steps.on(row) as norm:
                values.append((steps.all_log_probs(tested) - before).sum(-1))
            norms.append(norm)
            progress_bar.update()
    return torch.stack(values).float(), _finite(torch.tensor(norms), "trained")


def _within(
    steps: _Steps, paragraphs: Paragraphs, pieces: Sequence[slice], progress: bool
) -> tuple[Float[Tensor, "paragraph piece pos"], Float[Tensor, "paragraph piece"]]:
    """Influence of pieces of each prefix on its continuation tokens, and of the gradients."""
    values, norms = [], []
    total = len(paragraphs) * len(pieces)
    with steps.ready(), bar(total, "influence", progress=progress) as progress_bar:
        for paragraph in paragraphs:
            before = _finite(steps.all_log_probs(paragraph), "trained")
            for piece in pieces:
                row = Paragraphs(
                    paragraph.ids[:, : piece.stop], n_prefix=piece.start, bos=paragraph.bos
                )
                with steps.on(row) as norm:
                    values.append((steps.all_log_probs(paragraph) - before)[0])
                norms.append(norm)
                progress_bar.update()
    shape = len(paragraphs), len(pieces)
    return torch.stack(values).view(*shape, -1).float(), torch.tensor(norms).view(shape)


def _finite(values: Tensor, argument: str) -> Tensor:
    if not values.isfinite().all():
        raise InputError(argument, "non-finite logits", "load the model in float32")
    return values


def _pieces(paragraphs: Paragraphs, piece: int, stride: int) -> list[slice]:
    """Positions of the pieces of a prefix; its first token, which has no prefix, is in none."""
    at_least("piece", piece, 1)
    at_least("stride", stride, 1)
    if paragraphs.n_prefix <= piece:
        raise InputError(
            "trained",
            f"prefixes of {paragraphs.n_prefix} tokens",
            f"they must be longer than a piece of {piece}; give a smaller piece",
        )
    return [
        slice(start, start + piece) for start in range(1, paragraphs.n_prefix - piece + 1, stride)
    ]


def _places(
    adapter: Adapter, where: Any
) -> tuple[list[str] | None, list[tuple[nn.Parameter, Tensor | None]]]:
    """The places as text, the parameters that hold them, and 1 where a parameter may change."""
    if where is None:
        return None, [(weight.parameter, None) for weight in adapter.weights()]
    is_one = isinstance(where, str) or (isinstance(where, tuple) and _is_head(where))
    listed = [where] if is_one else where
    if not isinstance(listed, Sequence) or not listed:
        raise InputError("where", repr(where), "name a head or a part of a layer, such as L1H2")
    masks: dict[int, tuple[nn.Parameter, Tensor]] = {}
    texts = []
    for place in listed:
        text, chosen = _weights_at(adapter, place)
        texts.append(text)
        for layer, component, head in chosen:
            weight = adapter.weight(layer, component)
            parameter = weight.parameter
            _, mask = masks.setdefault(
                id(parameter), (parameter, torch.zeros_like(parameter, requires_grad=False))
            )
            weight.split(mask)[slice(None) if head is None else head] = 1
    return texts, list(masks.values())


def _is_head(value: tuple[Any, ...]) -> bool:
    return len(value) == 2 and all(isinstance(part, int) for part in value)


def _weights_at(adapter: Adapter, place: Any) -> tuple[str, list[tuple[int, str, int | None]]]:
    """A place as text, and the layer, component and head (None: all) of each of its matrices."""
    match = _LAYER_PART.fullmatch(place.strip()) if isinstance(place, str) else None
    if match is None:
        head = adapter.check_head(place, "where")
        group = head.head * adapter.n_kv_heads // adapter.n_heads
        indices = {"W_Q": head.head, "W_K": group, "W_V": group, "W_O": head.head}
        return str(head), [(head.layer, name, index) for name, index in indices.items()]
    layer = int(match[1])
    if layer >= adapter.n_layers:
        raise InputError("where", place, f"the model has {adapter.n_layers} layers")
    is_attention = match[2] == "attn"
    names = [name for name in adapter.components if (name in HEAD_COMPONENTS) == is_attention]
    return match[0], [(layer, name, None) for name in names]
