"""How much worse is the continuation predicted without one head? Zero, mean, resample ablation.

Ablating a head replaces its z, the output before W_O, at all positions by

* zeros (`zero`),
* its mean over reference paragraphs at the same position (`mean`), or
* its z in another paragraph, drawn at random (`resample`).

MLPs, single neurons and whole layers are ablated in the same way
(`memcircuits.evidence.component_edits`), and several components together. The effect is the change
of the continuation's NLL, EM and margin, kept for every paragraph.
Effects are exact: every ablation is run, by a partial forward
(`memcircuits.evidence.interventions`). `mean` and `resample` keep z within its usual range; `zero`
does not, but needs no reference paragraphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.components import Component
from memcircuits.base.errors import InputError, at_least, one_of
from memcircuits.base.heads import Head
from memcircuits.base.progress import bar
from memcircuits.base.statistics import finite_mean, finite_rows, left_out
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.evidence.activation_edits import HeadEdit
from memcircuits.evidence.component_edits import edits_of, replaced_parts
from memcircuits.evidence.interventions import FALLBACK, Measure, ResumableRun
from memcircuits.measure.continuation import read_continuation
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.score_map import ScoreMap

Mode: TypeAlias = Literal["zero", "mean", "resample"]
"""What a head's z is replaced by: zeros, its mean, or its z in another paragraph."""

Part: TypeAlias = Head | Component | Sequence[Component]
"""What is ablated: one component, or several together."""

MEASURES = ("nll", "em", "margin")
"""What ablation changes: nats/token, tokens, logits."""

MAX_PARAGRAPHS = 16
"""Maximum number of paragraphs whose clean run is held at once."""


@plain_torch()
def ablate_heads(
    model: Model,
    paragraphs: ParagraphsLike,
    *,
    mode: Mode = "zero",
    reference: ParagraphsLike | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> ScoreMap:
    """Ablate each head by itself.

    Args:
        model: the model.
        paragraphs: the paragraphs whose continuations are scored.
        mode: `zero`, `mean` (over `reference`, at the same position) or `resample` (the z of a
            random other paragraph of `reference`).
        reference: paragraphs that give the means or samples; by default `paragraphs` themselves.
        seed: seed of the draws of `resample`.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        Mean increase of NLL (nats/token) when the head is ablated; `samples["nll"]` and
        `samples["em"]` (change in tokens, negative when the head helps) keep every paragraph.

    Raises:
        InputError: for a wrong mode, unusable paragraphs, or a reference of other lengths.

    Example:
        >>> effect = mc.ablate_heads(model, memorized[:2])
        >>> print(effect)
        zero ablation [nats/token], 6 layers x 8
        >>> bool(effect[mc.Head(0, 5)] > 0)  # without L0H5 the loss rises
        True
    """
    ablation = Ablation(model, paragraphs, mode=mode, reference=reference, seed=seed)
    adapter = ablation.adapter
    effects = ablation.effects(adapter.heads(), memory_budget=memory_budget, progress=progress)
    nll, em, _ = effects.unflatten(1, (adapter.n_layers, adapter.n_heads)).unbind(-1)
    em = em.where(nll.isfinite(), torch.nan)  # an EM of non-finite logits means nothing
    notes = () if adapter.supports_partial_forward else (FALLBACK,)
    return ScoreMap(
        name=f"{mode} ablation",
        units="nats/token",
        values=finite_mean(nll),
        provenance=Provenance.of(
            adapter,
            {"paragraphs": ablation.paragraphs, "reference": ablation.reference},
            mode=mode,
            seed=seed,
        ),
        samples={"nll": nll.contiguous(), "em": em.contiguous()},
        notes=(*notes, *left_out(finite_rows(nll))),
    )


class Ablation:
    """One way to ablate components on some paragraphs: `effects` measures any of them.

    Args:
        model: the model.
        paragraphs: the paragraphs whose continuations are scored.
        mode: see `Mode`.
        reference: paragraphs that give the means or samples; by default `paragraphs` themselves.
        seed: seed of the draws of `resample`.

    Attributes:
        adapter: the model.
        paragraphs: the paragraphs whose continuations are scored.
        reference: the reference paragraphs, None if none were given.
        mode: see `Mode`.

    Raises:
        InputError: for a wrong mode, unusable paragraphs, or a reference of other lengths.
    """

    def __init__(
        self,
        model: Model,
        paragraphs: ParagraphsLike,
        *,
        mode: Mode,
        reference: ParagraphsLike | None = None,
        seed: int = 0,
    ) -> None:
        one_of("mode", mode, get_args(Mode))
        at_least("seed", seed, 0)
        self.mode = mode
        self.adapter = adapt(model)
        self.paragraphs = Paragraphs.of(paragraphs, self.adapter)
        self.adapter.check_tokens(self.paragraphs.inputs, "paragraphs")
        self.reference: Paragraphs | None = None
        self._source = self.paragraphs
        if reference is not None:
            self._source = self.reference = Paragraphs.of(reference, self.adapter, "reference")
        if self._source.ids.shape[1] != self.paragraphs.ids.shape[1]:
            raise InputError("reference", repr(self._source), "use paragraphs of the same length")
        self.paragraphs.check_same_bos(self._source, "reference")
        self.adapter.check_tokens(self._source.inputs, "reference")
        self._known_means: dict[tuple[str, ...], dict[str, Tensor]] = {}
        if mode == "resample":
            self._partners = self._draw_partners(seed)

    def replacements(
        self, names: Sequence[str], rows: slice | Int[Tensor, " batch"]
    ) -> dict[str, Float[Tensor, "#batch pos *rest"]]:
        """The new values of activations for some of the paragraphs, by name.

        Sizes of 1 are to be broadcast.
        """
        if self.mode == "resample":
            return _read(self.adapter, self._source, self._partners[rows], names)
        if self.mode == "mean":
            return {name: self._means(tuple(names))[name] for name in names}
        return {name: self._zero(name) for name in names}

    def _zero(self, name: str) -> Tensor:
        adapter = self.adapter
        shape = (1, 1, adapter.n_heads, 1) if name.endswith("hook_z") else (1, 1, 1)
        return torch.zeros(shape, device=adapter.device, dtype=adapter.dtype)

    def effects(
        self,
        parts: Sequence[Part],
        rows: Int[Tensor, " row"] | None = None,
        *,
        memory_budget: int | None = None,
        progress: bool = True,
    ) -> Float[Tensor, "row part measure"]:
        """Exact changes without each part of the model.

        Args:
            parts: heads, neurons, MLPs and layers; a list of them is taken out together.
            rows: indices of the paragraphs that are measured; by default all.
            memory_budget: maximum bytes per batch.
            progress: show a bar on stderr.

        Returns:
            Change of the NLL (nats/token), of the EM (tokens) and of the mean margin of the true
            token over the likeliest other one (logits), see `MEASURES`.
        """
        options: dict[str, Any] = {"memory_budget": memory_budget, "progress": progress}
        return effects_of_ways([self], parts, rows, **options)[:, 0]

    def _draw_partners(self, seed: int) -> Int[Tensor, " paragraph"]:
        """For each paragraph the index of the reference whose z it gets, never its own."""
        generator = torch.Generator().manual_seed(seed)
        n = len(self.paragraphs)
        if self.reference is not None:
            return torch.randint(len(self.reference), (n,), generator=generator)
        if n < 2:
            raise InputError(
                "paragraphs", "one paragraph", "resampling needs another one; pass reference="
            )
        shift = torch.randint(1, n, (n,), generator=generator)
        return (torch.arange(n) + shift) % n

    def _means(self, names: tuple[str, ...]) -> dict[str, Float[Tensor, "1 pos *rest"]]:
        """Means of activations over the reference paragraphs where all of them are finite."""
        if names not in self._known_means:
            totals: dict[str, Tensor] = {}
            n = 0
            for start in range(0, len(self._source), MAX_PARAGRAPHS):
                rows = slice(start, start + MAX_PARAGRAPHS)
                values = _read(self.adapter, self._source, rows, names)
                finite = torch.stack([finite_rows(value) for value in values.values()]).all(0)
                for name, value in values.items():
                    totals[name] = totals.get(name, 0) + value[finite].double().sum(0)
                n += int(finite.sum())
            if not n:
                raise InputError(
                    "reference", repr(self._source), "all have non-finite activations: use float32"
                )
            dtype = self.adapter.dtype
            self._known_means[names] = {k: (v / n).to(dtype)[None] for k, v in totals.items()}
        return self._known_means[names]


def effects_of_ways(
    ways: Sequence[Ablation],
    parts: Sequence[Part],
    rows: Int[Tensor, " row"] | None = None,
    *,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Float[Tensor, "row way part measure"]:
    """Exact changes without each part, for several ways to ablate the same paragraphs.

    One clean run of the paragraphs serves all ways and all parts.

    Args:
        ways: ablations of the same paragraphs by the same model, at least one.
        parts: see `Ablation.effects`, as the other arguments.
        rows: indices of the paragraphs that are measured; by default all.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.
    """
    adapter, paragraphs = ways[0].adapter, ways[0].paragraphs
    rows = torch.arange(len(paragraphs)) if rows is None else rows
    plan = _Plan(adapter, [_components(part) for part in parts])
    n_pos, n_logits = paragraphs.inputs.shape[1], paragraphs.n_continuation
    size = rows_that_fit(adapter, n_pos, n_logits, memory_budget)
    shape = (len(ways), len(parts), len(MEASURES))
    n_runs = len(rows) * len(ways) * len(parts)
    with (
        adapter.preserving_state(),
        bar(n_runs, "ablate", unit="run", progress=progress) as progress_bar,
    ):

        def measure_batch(batch: slice) -> Float[Tensor, "batch way part measure"]:
            run = ResumableRun(adapter, paragraphs[rows[batch]], memory_budget)
            measure = partial(_measure, run)
            clean = run.clean(measure)
            effects = torch.empty(len(clean), *shape, dtype=clean.dtype)
            for i, way in enumerate(ways):
                new = way.replacements(plan.names, rows[batch])
                for columns, measured in plan.measure(run, new, measure):
                    effects[:, i, columns] = (measured - clean).transpose(0, 1).cpu()
                    progress_bar.update(len(clean) * len(columns))
            return effects

        return map_batches(len(rows), min(size, MAX_PARAGRAPHS), measure_batch)


def _read(
    adapter: Adapter,
    paragraphs: Paragraphs,
    rows: slice | Int[Tensor, " batch"],
    names: Sequence[str],
) -> dict[str, Float[Tensor, "batch predicting *rest"]]:
    """Activations by name; the last token, which predicts nothing, is not run."""
    inputs = paragraphs.inputs[rows, :-1]
    cache = adapter.run(inputs, positions=slice(-1, None), read=names).cache
    # Some models hand their MLPs all positions in one axis.
    return {
        name: out if len(out) == len(inputs) else out.view(*inputs.shape, -1)
        for name, out in ((name, cache[name]) for name in names)
    }


def _components(part: Part) -> Sequence[Component]:
    if isinstance(part, Head):
        return [Component("head", *part)]
    return [part] if isinstance(part, Component) else part


class _Plan:
    """How parts are taken out: single heads many in a batch, others one by one."""

    def __init__(self, adapter: Adapter, parts: Sequence[Sequence[Component]]) -> None:
        self._adapter = adapter
        self._heads: dict[int, list[tuple[int, int]]] = {}  # layer -> (column, head)
        self._others: list[tuple[int, int, dict[str, list[int]]]] = []  # column, layer, what
        names: set[str] = set()
        for column, components in enumerate(parts):
            replaced = replaced_parts(components, adapter.n_heads)
            names |= replaced.keys()
            if len(components) == 1 and components[0].unit == "head":
                head = (column, components[0].head)
                self._heads.setdefault(components[0].layer, []).append(head)
            else:
                lowest = min(component.layer for component in components)
                self._others.append((column, lowest, replaced))
        self.names = sorted(names)

    def measure(
        self, run: ResumableRun, new: Mapping[str, Tensor], measure: Measure
    ) -> Iterator[tuple[list[int], Float[Tensor, "part batch measure"]]]:
        """Columns, and what is measured without their components."""
        for layer, heads in sorted(self._heads.items()):
            z = new[hook_name("z", layer)]
            edits = [HeadEdit((head,), z[:, :, [head]]) for _, head in heads]
            yield [column for column, _ in heads], run.edited(layer, edits, measure)
        for column, layer, replaced in self._others:
            yield [column], run.hooked(layer, edits_of(replaced, new), measure)[None]


def _measure(
    run: ResumableRun, logits: Float[Tensor, "batch pos d_vocab"], rows: Int[Tensor, " batch"]
) -> Float[Tensor, "batch measure"]:
    """NLL, EM and margin of the true continuation."""
    targets = run.targets[rows]
    scores = read_continuation(logits, targets)
    true = logits.gather(-1, targets[..., None])[..., 0]
    # The likeliest other token is the second one where the true token is the first.
    margin = torch.where(scores.correct, scores.margin, (true - logits.amax(-1)).float())
    return torch.stack([scores.nll, scores.em.float(), margin.mean(-1)], -1)
