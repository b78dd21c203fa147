"""Where do the weights hold it? Gradients of the continuation's loss, per layer, matrix and head.

Equation 2 of the paper: the score of a component is the largest |dL/dtheta| over its weights, L the
mean NLL over paragraphs of the continuation tokens; W_Q, W_K, W_V and W_O are split by head,
W_in, W_out (and W_gate) are taken per layer. `pool="l2"` gives layerwise gradient norms.
Embeddings, unembedding, norms and biases are left out.

Two routes to a gradient:

* of the mean over paragraphs (the paper): one backward pass per batch (`mean_gradient`);
* of every paragraph by itself (`each_gradient`): a weight matrix sees x and answers y, so paragraph
  p's gradient is the product of its own x and dL/dy over positions, and one forward and backward
  pass of the whole batch gives all of them.

Equation 3 sets memorized paragraphs against controls: KL(original || current) on the controls minus
NLL on the memorized. At the original weights, where the paper takes its mask, the KL is zero and at
its minimum, so its gradient vanishes exactly: the objective's gradient there *is* that of the NLL,
and the controls have no say. What the KL does have there is curvature, KL = 1/2 d^T F d for a small
change d, with F the Fisher information on the controls. Raising the NLL for the least KL means
d_i ~ g_i / F_i, and weight i then contributes g_i^2 / F_i, so `contrastive_gradients` scores a
weight by |g| / sqrt(F + damping) (`curvature=False`: |g|, the paper's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memcircuits.adapter import HEAD_COMPONENTS, Adapter, Weight, adapt
from memcircuits.checks import InputError, at_least, one_of
from memcircuits.measure import read_continuation
from memcircuits.memory import default_budget, each_piece, rows_that_fit
from memcircuits.paragraphs import Paragraphs
from memcircuits.progress import bar
from memcircuits.results import Provenance, Result
from memcircuits.scanning import without_non_finite

if TYPE_CHECKING:
    import pandas as pd

POOLS = ("max", "mean", "l2")
STATISTICS = ("sum", "variance", "max")
DAMPING = 0.1


@dataclass(frozen=True)
class ParameterGradients(Result, kind="parameter-gradients"):
    """Pooled |gradient| of each component.

    Attributes:
        values: component -> [layer, head]; W_in, W_out and W_gate have one column; W_K and W_V of
            grouped-query models one per key-value head.
        pool: how weights were pooled.
        loss: mean NLL of the paragraphs, nats/token.
        provenance: where the numbers come from.
        objective: `nll` or `contrastive`.
        units: units of `values`.
        samples: component -> [paragraph, layer, head], where every paragraph has its own gradient;
            `values` is their mean.
        statistics: component -> [statistic, layer, head], the sum of |g|, the variance of g and the
            maximum of |g| over the component's weights (`STATISTICS`).
        cosine: component -> [layer, head], cosine between the NLL gradients of memorized and
            control paragraphs (contrastive objective only).
        notes: what the reader must know.
    """

    values: Mapping[str, Float[Tensor, "layer head"]]
    pool: str
    loss: float
    provenance: Provenance
    objective: str = "nll"
    units: str = "nats/token per unit of weight"
    samples: Mapping[str, Float[Tensor, "paragraph layer head"]] = field(default_factory=dict)
    statistics: Mapping[str, Float[Tensor, "statistic layer head"]] = field(default_factory=dict)
    cosine: Mapping[str, Float[Tensor, "layer head"]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", tuple(self.notes))

    @property
    def layers(self) -> Float[Tensor, " layer"]:
        """Sum over all components of a layer (for `l2`: the norm over all its weights)."""
        if self.pool == "l2":
            return sum(v.square().sum(-1) for v in self.values.values()).sqrt()  # type: ignore[union-attr]
        return sum(v.sum(-1) for v in self.values.values())  # type: ignore[return-value]

    def layer_share(self) -> float:
        """Share of the lower half of the layers in the sum over layers (paper, figure 4)."""
        layers = self.layers
        return float(layers[: len(layers) // 2].sum() / layers.sum())

    def per_head(self, n_heads: int) -> Float[Tensor, "layer head"]:
        """Largest value over W_Q, W_K, W_V, W_O; key-value heads count for all their heads.

        Raises:
            InputError: if none of them was measured.
        """
        rows = [self.values[name] for name in HEAD_COMPONENTS if name in self.values]
        if not rows:
            raise InputError("components", list(self.values), "measure W_Q, W_K, W_V or W_O")
        return torch.stack([v.repeat_interleave(n_heads // v.shape[1], 1) for v in rows]).amax(0)

    def to_frame(self) -> pd.DataFrame:
        """Columns `component, layer, head, value`, the statistics and, where known, `cosine`.

        `head` is empty for MLP matrices.
        """
        import pandas as pd

        rows = [
            {
                "component": name,
                "layer": layer,
                "head": head if name in HEAD_COMPONENTS else None,
                "value": float(values[layer, head]),
                **{
                    statistic: float(self.statistics[name][i, layer, head])
                    for i, statistic in enumerate(STATISTICS if self.statistics else ())
                },
                **({"cosine": float(self.cosine[name][layer, head])} if self.cosine else {}),
            }
            for name, values in self.values.items()
            for layer in range(values.shape[0])
            for head in range(values.shape[1])
        ]
        frame = pd.DataFrame(rows)
        frame["head"] = frame["head"].astype("Int64")
        return frame

    def figure(self) -> Any:
        """The map of figure 4 (plotly)."""
        from memcircuits import figures

        title = f"{self.pool} |gradient| of the {self.objective} objective"
        return figures.gradient_map(self.to_frame(), title=title, units=self.units)

    def __str__(self) -> str:
        return f"{self.pool} {self.objective} gradients, lower-half share {self.layer_share():.3f}"


def parameter_gradients(
    model: Any,
    paragraphs: Any,
    *,
    pool: str = "max",
    average: str = "batch",
    per_loss: bool = False,
    components: Sequence[str] | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> ParameterGradients:
    """Gradient of the NLL of the continuations, pooled per component.

    Args:
        model: HookedTransformer or TransformerBridge.
        paragraphs: `Paragraphs`, a list of strings or a LongTensor of ids.
        pool: `max`, `mean` or `l2` over the weights of a component.
        average: `batch` pools the gradient of the mean loss (the paper); `paragraph` pools each
            paragraph's own gradient and averages after that, so that paragraphs cannot cancel.
        per_loss: divide by the loss (the paragraph's own with `average="paragraph"`). Gradients
            grow with the loss, and controls have far more of it than memorized paragraphs.
        components: names of the matrices, by default `W_Q`, `W_K`, `W_V`, `W_O` of the heads and
            `W_in`, `W_out` (and `W_gate`) of the MLPs; fewer are quicker.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        `ParameterGradients` in nats/token per unit of weight (with `per_loss` 1 per unit).

    Raises:
        InputError: for a wrong pool, average or component, or unusable paragraphs.

    Example:
        >>> found = mc.parameter_gradients(model, memorized)
        >>> sorted(found.values)
        ['W_K', 'W_O', 'W_Q', 'W_V', 'W_in', 'W_out']
        >>> found.layer_share() > 0.5  # more than half of it in the lower half of the layers
        True
    """
    one_of("pool", pool, POOLS)
    one_of("average", average, ("batch", "paragraph"))
    adapter = adapt(model)
    if components is not None:
        if isinstance(components, str) or not components:
            raise InputError("components", repr(components), "give a list of names")
        for component in components:
            one_of("components", component, adapter.components)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.ids, "paragraphs")
    weights = all_weights(adapter, components)

    def measure() -> tuple[Float[Tensor, " loss"], list[Tensor]]:
        if average == "batch":
            loss, gradients = mean_gradient(adapter, paragraphs, weights, memory_budget, progress)
            summaries = [
                _summary(w.split(g), pool) for w, g in zip(weights, gradients, strict=True)
            ]
            return torch.tensor([loss]), [summary[None] for summary in summaries]
        return each_gradient(
            adapter, paragraphs, weights, lambda _, g: _summary(g, pool), memory_budget, progress
        )

    losses, rows = measure()
    notes: tuple[str, ...] = ()
    if not losses.isfinite().all():
        paragraphs, notes = without_non_finite(adapter, paragraphs, "paragraphs", memory_budget)
        losses, rows = measure()
    if not all(row.isfinite().all() for row in rows):
        raise InputError("model", "non-finite gradients", "load it in float32, check its weights")
    if per_loss:
        power = torch.tensor([1.0, *(2.0 if name == "variance" else 1.0 for name in STATISTICS)])
        scale = losses.clamp_min(1e-12)[:, None] ** power
        rows = [row.cpu() / scale[:, :, None] for row in rows]
    tables = _by_component(weights, rows)
    return ParameterGradients(
        values={name: table[:, 0].mean(0) for name, table in tables.items()},
        pool=pool,
        loss=float(losses.mean()),
        provenance=Provenance.of(
            adapter,
            {"paragraphs": paragraphs},
            pool=pool,
            average=average,
            per_loss=per_loss,
            components=components and list(components),
        ),
        units="1 per unit of weight" if per_loss else "nats/token per unit of weight",
        samples={}
        if average == "batch"
        else {name: table[:, 0].contiguous() for name, table in tables.items()},
        statistics={name: table[:, 1:].mean(0) for name, table in tables.items()},
        notes=notes,
    )


def contrastive_gradients(
    model: Any,
    memorized: Any,
    control: Any,
    *,
    curvature: bool = True,
    n_control: int = 10,
    draws: int = 8,
    pool: str = "max",
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> ParameterGradients:
    """Gradient of the contrastive objective (equation 3), paragraph by paragraph.

    Each memorized paragraph is set against its own random batch of controls. The KL term has no
    gradient at the original weights (see the module's text): it enters by its curvature.

    Args:
        model: HookedTransformer or TransformerBridge.
        memorized: paragraphs to forget.
        control: paragraphs to keep.
        curvature: divide by the root of the controls' Fisher information; False gives the gradient
            of the objective itself, which does not depend on the controls.
        n_control: controls for each memorized paragraph.
        draws: label draws of the Fisher estimate (relative error sqrt(2 / draws) per weight).
        pool: `max`, `mean` or `l2` over the weights of a component.
        seed: of the draws of controls and labels.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        `ParameterGradients` with one sample per memorized paragraph, and `cosine` between the mean
        NLL gradients of memorized and control paragraphs. The constant before the NLL is left out.

    Raises:
        InputError: for unusable paragraphs or controls that are in the memorized set.
    """
    one_of("pool", pool, POOLS)
    at_least("n_control", n_control, 1)
    at_least("draws", draws, 1)
    adapter = adapt(model)
    memorized = Paragraphs.of(memorized, model, "memorized")
    control = Paragraphs.of(control, model, "control")
    adapter.check_tokens(memorized.ids, "memorized")
    adapter.check_tokens(control.ids, "control")
    refuse_overlap(memorized, control)
    memorized, notes = without_non_finite(adapter, memorized, "memorized", memory_budget)
    control, of_those = without_non_finite(adapter, control, "control", memory_budget)
    notes = tuple(f"memorized: {n}" for n in notes) + tuple(f"control: {n}" for n in of_those)
    weights = all_weights(adapter)
    generator = torch.Generator().manual_seed(seed)
    _, of_control = mean_gradient(adapter, control, weights, memory_budget, progress)
    loss = 0.0
    total = [torch.zeros_like(g) for g in of_control]
    tables: list[dict[str, Tensor]] = []
    with bar(len(memorized), "contrast", progress=progress) as shown:
        for paragraph in memorized:
            nll, gradients = mean_gradient(adapter, paragraph, weights, memory_budget, False)
            loss += nll / len(memorized)
            for t, g in zip(total, gradients, strict=True):
                t += g / len(memorized)
            if curvature:
                chosen = torch.randperm(len(control), generator=generator)[:n_control]
                fisher = fisher_diagonal(
                    adapter, control[chosen], weights, draws, generator, memory_budget
                )
                roots = damped_root(fisher)
                gradients = [g / root for g, root in zip(gradients, roots, strict=True)]
            rows = [
                _summary(w.split(g), pool)[None] for w, g in zip(weights, gradients, strict=True)
            ]
            tables.append(_by_component(weights, rows))
            shown.update()
    table = {name: torch.cat([t[name] for t in tables]) for name in tables[0]}
    cosines = [
        _cosine(w.split(a), w.split(b))[None, None]
        for w, a, b in zip(weights, total, of_control, strict=True)
    ]
    return ParameterGradients(
        values={name: t[:, 0].mean(0) for name, t in table.items()},
        pool=pool,
        loss=loss,
        provenance=Provenance.of(
            adapter,
            {"memorized": memorized, "control": control},
            curvature=curvature,
            n_control=n_control,
            draws=draws,
            pool=pool,
            seed=seed,
        ),
        objective="contrastive",
        units="root of nats/token" if curvature else "nats/token per unit of weight",
        samples={name: t[:, 0].contiguous() for name, t in table.items()},
        statistics={name: t[:, 1:].mean(0) for name, t in table.items()},
        cosine={name: t[0, 0] for name, t in _by_component(weights, cosines).items()},
        notes=notes,
    )


def all_weights(adapter: Adapter, components: Sequence[str] | None = None) -> list[Weight]:
    """The weight matrices of every block, or those of some components, layer by layer."""
    return [
        adapter.weight(layer, component)
        for layer in range(adapter.n_layers)
        for component in (adapter.components if components is None else components)
    ]


def mean_gradient(
    adapter: Adapter,
    paragraphs: Paragraphs,
    weights: list[Weight],
    memory_budget: int | None = None,
    progress: bool = True,
) -> tuple[float, list[Tensor]]:
    """Mean NLL over paragraphs, and its gradient for each weight's parameter.

    The caller's `.grad` and `requires_grad` stay as they are.
    """
    parameters = [weight.parameter for weight in weights]
    n = len(paragraphs)
    totals = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    loss = 0.0

    def work(piece: slice) -> tuple[float, tuple[Tensor, ...]]:
        part = _nll(paragraphs, piece, _logits(adapter, paragraphs, piece)).sum() / n
        return float(part.detach()), torch.autograd.grad(part, parameters)

    size = rows_with_gradient(adapter, paragraphs, memory_budget)
    with (
        adapter.untouched(grad=parameters),
        bar(n, "gradients", progress=progress) as shown,
    ):
        for piece, (part, gradients) in each_piece(n, size, work):
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient
            loss += part
            shown.update(piece.stop - piece.start)
    return loss, totals


def each_gradient(
    adapter: Adapter,
    paragraphs: Paragraphs,
    weights: Sequence[Weight],
    reduce: Callable[[int, Float[Tensor, "row head d_in d_out"]], Tensor],
    memory_budget: int | None = None,
    progress: bool = True,
) -> tuple[Float[Tensor, " paragraph"], list[Float[Tensor, "paragraph ..."]]]:
    """Each paragraph's NLL (nats/token), and its own gradient for each weight, reduced.

    Where every weight has its own module this takes one forward and backward pass per batch, else
    (HookedTransformer) one per paragraph.

    Args:
        adapter: the model.
        paragraphs: the paragraphs.
        weights: the matrices.
        reduce: from the index of a weight and the gradients of some paragraphs to what is kept of
            them, [row, ...].
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.
    """
    losses: list[Tensor] = []
    kept: list[list[Tensor]] = [[] for _ in weights]

    def nll(piece: slice, logits: Tensor) -> list[Tensor]:
        return [_nll(paragraphs, piece, logits)]

    with bar(len(paragraphs), "gradients", progress=progress) as shown:
        for values, (found,) in row_gradients(
            adapter, paragraphs, weights, nll, reduce, memory_budget
        ):
            losses.append(values[0])
            for parts, part in zip(kept, found, strict=True):
                parts.append(part)
            shown.update(len(values[0]))
    return torch.cat(losses), [torch.cat(parts) for parts in kept]


def row_gradients(
    adapter: Adapter,
    paragraphs: Paragraphs,
    weights: Sequence[Weight],
    scalars: Callable[[slice, Float[Tensor, "row pos d_vocab"]], Sequence[Float[Tensor, " row"]]],
    reduce: Callable[[int, Float[Tensor, "row head d_in d_out"]], Tensor],
    memory_budget: int | None = None,
) -> Iterator[tuple[list[Tensor], list[list[Tensor]]]]:
    """For each batch some numbers per paragraph, and of each its reduced gradient per weight.

    Args:
        adapter: the model.
        paragraphs: the paragraphs.
        weights: the matrices.
        scalars: from a batch's place and its logits at the continuation to the numbers; a
            paragraph's must depend on its own logits only.
        reduce: see `each_gradient`.
        memory_budget: bytes that one batch may take.

    Yields:
        The numbers, [row] each, and for each of them the reduced gradients of all weights.
    """
    parameters = [weight.parameter for weight in weights]
    together = all(weight.module is not None for weight in weights)
    # Beside the activations, the largest matrix's gradient and a copy of it for every row.
    largest = 2 * max(p.numel() * p.element_size() for p in parameters)
    most = max(1, (memory_budget or default_budget(adapter.device)) // largest)
    size = rows_with_gradient(adapter, paragraphs, memory_budget, most if together else 1)

    def work(piece: slice) -> tuple[list[Tensor], list[list[Tensor]]]:
        if together:
            with _watched(weights) as (inputs, outputs):
                values = scalars(piece, _logits(adapter, paragraphs, piece))
            sources: Sequence[Tensor] = outputs
        else:
            values = scalars(piece, _logits(adapter, paragraphs, piece))
            sources = parameters
        found = []
        for i, value in enumerate(values):
            more = i + 1 < len(values)
            slopes = torch.autograd.grad(value.sum(), sources, retain_graph=more)
            if together:
                rows = piece.stop - piece.start
                gradients = (
                    _per_row(weight, x, slope, rows)
                    for weight, x, slope in zip(weights, inputs, slopes, strict=True)
                )
            else:
                gradients = (w.split(g)[None] for w, g in zip(weights, slopes, strict=True))
            found.append([reduce(j, gradient).detach() for j, gradient in enumerate(gradients)])
        return [value.detach().cpu() for value in values], found

    with adapter.untouched(grad=parameters):
        for _, result in each_piece(len(paragraphs), size, work):
            yield result


def fisher_diagonal(
    adapter: Adapter,
    paragraphs: Paragraphs,
    weights: Sequence[Weight],
    draws: int,
    generator: torch.Generator,
    memory_budget: int | None = None,
) -> list[Tensor]:
    """Diagonal of the Fisher information at the continuations' positions, for each parameter.

    A small change d of the weights costs KL(original || changed) = 1/2 sum_i F_i d_i^2 nats/token
    where the diagonal is all there is. F is the mean over positions of the squared gradient of
    log p(y), y drawn from the model itself; gradients of independently drawn labels are
    uncorrelated, so the square of their sum over a paragraph estimates the sum of the squares
    without bias, and one draw costs one backward pass.
    """
    totals = [torch.zeros_like(w.parameter, dtype=torch.float32) for w in weights]
    n = len(paragraphs) * paragraphs.n_continuation * draws
    for _, found in row_gradients(
        adapter,
        paragraphs,
        weights,
        drawn_labels(paragraphs, draws, generator),
        lambda _, gradient: gradient.float().square().sum(0),
        memory_budget,
    ):
        for squares in found:
            for weight, total, square in zip(weights, totals, squares, strict=True):
                weight.split(total).add_(square / n)
    return totals


def drawn_labels(
    paragraphs: Paragraphs, draws: int, generator: torch.Generator
) -> Callable[[slice, Float[Tensor, "row pos d_vocab"]], list[Float[Tensor, " row"]]]:
    """For `row_gradients`: log p of tokens drawn from the model itself, summed over positions.

    The same tokens are drawn for the same seed, whatever the batches and the device.
    """
    at = torch.rand(draws, len(paragraphs), paragraphs.n_continuation, 1, generator=generator)

    def scalars(piece: slice, logits: Tensor) -> list[Tensor]:
        log_p = logits.float().log_softmax(-1)
        below = log_p.detach().exp().cumsum(-1)
        found = []
        for draw in at[:, piece].to(logits.device):
            labels = (below < draw * below[..., -1:]).sum(-1).clamp_max(log_p.shape[-1] - 1)
            found.append(log_p.gather(-1, labels[..., None]).sum((-2, -1)))
        return found

    return scalars


def damped_root(fisher: Sequence[Tensor]) -> list[Tensor]:
    """sqrt(F + damping), the damping a tenth of the mean F of all the weights."""
    mean = sum(float(f.sum()) for f in fisher) / sum(f.numel() for f in fisher)
    floor = max(DAMPING * mean, torch.finfo(torch.float32).tiny)
    return [(f + floor).sqrt() for f in fisher]


def refuse_overlap(memorized: Paragraphs, control: Paragraphs, argument: str = "control") -> None:
    """Raise `InputError` if a control has the token ids of a memorized paragraph's prefix."""
    known = set(map(tuple, memorized.prefix.tolist()))
    shared = sum(tuple(row) in known for row in control.prefix.tolist())
    if shared:
        raise InputError(
            argument,
            f"{shared} of its paragraphs have the prefix of a memorized one",
            "controls must be other paragraphs",
        )


def rows_with_gradient(
    adapter: Adapter, paragraphs: Paragraphs, memory_budget: int | None, most: int | None = None
) -> int:
    """Rows whose activations, of all layers, fit: a backward pass needs them."""
    n_pos, n_logits = paragraphs.ids.shape[1], paragraphs.n_continuation
    fit = rows_that_fit(adapter, n_pos, n_logits, memory_budget, backward=True)
    return fit if most is None else min(fit, most)


def _logits(
    adapter: Adapter, paragraphs: Paragraphs, piece: slice
) -> Float[Tensor, "row pos d_vocab"]:
    ids = paragraphs.ids[piece, :-1]
    return adapter.run(ids, positions=slice(paragraphs.n_prefix - 1, None)).logits


def _nll(paragraphs: Paragraphs, piece: slice, logits: Tensor) -> Float[Tensor, " row"]:
    return read_continuation(logits, paragraphs.continuation[piece].to(logits.device)).nll


@contextmanager
def _watched(weights: Sequence[Weight]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """What each weight's module is given and what it answers, in the weights' order."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    handles = []

    def watch(index: int, module: nn.Module) -> None:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            assert index not in seen, "a weight was used twice in one forward pass"
            seen[index] = (arguments[0].detach(), output)

        handles.append(module.register_forward_hook(hook))

    try:
        for i, weight in enumerate(weights):
            assert weight.module is not None
            watch(i, weight.module)
        yield inputs, outputs
        inputs += [seen[i][0] for i in range(len(weights))]
        outputs += [seen[i][1] for i in range(len(weights))]
    finally:
        for handle in handles:
            handle.remove()


def _per_row(
    weight: Weight, x: Tensor, slope: Tensor, rows: int
) -> Float[Tensor, "row head d_in d_out"]:
    """Each paragraph's gradient: the product of its inputs and output gradients over positions."""
    x, slope = x.reshape(rows, -1, x.shape[-1]), slope.reshape(rows, -1, slope.shape[-1])
    # Linear stores [out, in], Conv1D [in, out].
    first, second = (slope, x) if isinstance(weight.module, nn.Linear) else (x, slope)
    return torch.vmap(weight.split)(torch.bmm(first.transpose(1, 2), second))


def _summary(gradient: Float[Tensor, "... d_in d_out"], pool: str) -> Float[Tensor, "... k head"]:
    """The pooled value and the statistics, stacked before the head axis.

    Sums over a whole matrix run at the speed of memory, so the variance is that of mean squares.
    """
    gradient, matrix = gradient.float(), (-2, -1)
    size = gradient.abs()
    largest, mean = size.amax(matrix), size.mean(matrix)
    power = gradient.square().mean(matrix)
    n = gradient.shape[-2] * gradient.shape[-1]
    pooled = {"max": largest, "mean": mean, "l2": (n * power).sqrt()}[pool]
    variance = (power - gradient.mean(matrix).square()).clamp_min(0.0)
    return torch.stack([pooled, n * mean, variance, largest], dim=-2)


def _by_component(
    weights: Sequence[Weight], rows: Sequence[Tensor]
) -> dict[str, Float[Tensor, "sample k layer head"]]:
    tables: dict[str, list[Tensor]] = {}
    for weight, row in zip(weights, rows, strict=True):
        tables.setdefault(weight.component, []).append(row.float().cpu())
    return {name: torch.stack(parts, dim=2) for name, parts in tables.items()}


def _cosine(a: Tensor, b: Tensor) -> Float[Tensor, " head"]:
    """Cosine of two gradients, 0 where one vanishes."""
    scale = a.square().sum((-2, -1)).sqrt() * b.square().sum((-2, -1)).sqrt()
    return (a * b).sum((-2, -1)) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
