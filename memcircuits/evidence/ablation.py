"""How much worse is the continuation predicted without one head? Zero, mean, resample ablation.

Ablating a head replaces its z, the output before W_O, at all positions by

* zeros (`zero`),
* its mean over reference paragraphs at the same position (`mean`), or
* its z in another paragraph, drawn at random (`resample`).

The effect of the head is the change of the continuation's NLL and EM, kept for every paragraph.
Effects are exact: every ablation is run, by a partial forward
(`memcircuits.evidence.interventions`). `mean` and `resample` keep z within its usual range; `zero`
does not, but needs no reference paragraphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, at_least, one_of
from memcircuits.base.heads import Head
from memcircuits.base.progress import bar
from memcircuits.base.statistics import finite_mean, finite_rows, left_out
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.evidence.interventions import FALLBACK, HeadEdit, ResumableRun
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.score_map import ScoreMap

Mode: TypeAlias = Literal["zero", "mean", "resample"]
"""What a head's z is replaced by: zeros, its mean, or its z in another paragraph."""

_MAX_PARAGRAPHS = 16  # maximum number of paragraphs whose clean run is held at once


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
    nll, em = effects.unflatten(1, (adapter.n_layers, adapter.n_heads)).unbind(-1)
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
    """One way to ablate heads on some paragraphs: `effects` measures any of the heads.

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
        if mode == "resample":
            self._partners = self._draw_partners(seed)

    def replacements(self, rows: slice) -> list[Float[Tensor, "batch pos head d_head"]]:
        """The new z of each layer for some of the paragraphs; sizes of 1 are to be broadcast."""
        adapter = self.adapter
        if self.mode == "resample":
            return _read_z(adapter, self._source, self._partners[rows])
        if self.mode == "mean":
            return self._mean_z
        zero = torch.zeros(
            1, 1, adapter.n_heads, adapter.d_head, device=adapter.device, dtype=adapter.dtype
        )
        return [zero] * adapter.n_layers

    def effects(
        self, heads: Sequence[Head], *, memory_budget: int | None = None, progress: bool = True
    ) -> Float[Tensor, "paragraph head measure"]:
        """Exact change of NLL (nats/token) and EM (tokens) when one of `heads` is ablated."""
        adapter, paragraphs = self.adapter, self.paragraphs
        columns_of_layer: dict[int, list[int]] = {}
        for column, head in enumerate(heads):
            columns_of_layer.setdefault(head.layer, []).append(column)
        n_pos, n_logits = paragraphs.inputs.shape[1], paragraphs.n_continuation
        size = rows_that_fit(adapter, n_pos, n_logits, memory_budget)
        n_runs = len(paragraphs) * len(heads)
        with (
            adapter.preserving_state(),
            bar(n_runs, "ablate", unit="head", progress=progress) as progress_bar,
        ):

            def measure_batch(rows: slice) -> Tensor:
                # One clean run of these paragraphs serves all heads.
                run = ResumableRun(adapter, paragraphs[rows], memory_budget)
                clean, new_z = run.clean(), self.replacements(rows)
                effects = torch.empty(len(clean), len(heads), clean.shape[-1])
                for layer, columns in sorted(columns_of_layer.items()):
                    layer_heads = [heads[column].head for column in columns]
                    edits = [HeadEdit((head,), new_z[layer][:, :, [head]]) for head in layer_heads]
                    changes = run.edited(layer, edits) - clean
                    effects[:, columns] = changes.transpose(0, 1).float().cpu()
                    progress_bar.update(len(clean) * len(columns))
                return effects

            return map_batches(len(paragraphs), min(size, _MAX_PARAGRAPHS), measure_batch)

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

    @cached_property
    def _mean_z(self) -> list[Float[Tensor, "1 pos head d_head"]]:
        """Mean z of each layer over the reference paragraphs whose z are all finite."""
        totals: list[Tensor] = []
        n = 0
        for start in range(0, len(self._source), _MAX_PARAGRAPHS):
            z = _read_z(self.adapter, self._source, slice(start, start + _MAX_PARAGRAPHS))
            finite = torch.stack([finite_rows(layer_z) for layer_z in z]).all(0)
            sums = [layer_z[finite].double().sum(0) for layer_z in z]
            totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
            n += int(finite.sum())
        if not n:
            raise InputError(
                "reference", repr(self._source), "all have non-finite activations: use float32"
            )
        return [(total / n).to(self.adapter.dtype)[None] for total in totals]


def _read_z(
    adapter: Adapter, paragraphs: Paragraphs, rows: slice | Int[Tensor, " batch"]
) -> list[Float[Tensor, "batch predicting head d_head"]]:
    """The z of every layer; the last token, which predicts nothing, is not run."""
    names = [hook_name("z", layer) for layer in range(adapter.n_layers)]
    run = adapter.run(paragraphs.inputs[rows, :-1], positions=slice(-1, None), read=names)
    return [run.cache[name] for name in names]
