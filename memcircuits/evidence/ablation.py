"""What breaks when one head is removed? Zero, mean and resample ablation of every head.

A head's z is replaced at all positions: by zeros, by its mean over paragraphs (per position), or by
its z in another paragraph (`Ablation`). The effect is the change of the continuation's NLL and EM,
kept per paragraph. Exact, by restarted forwards (`memcircuits.evidence.interventions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.core.errors import InputError, at_least, one_of
from memcircuits.core.heads import Head
from memcircuits.core.progress import bar
from memcircuits.core.statistics import finite_mean, finite_rows, left_out
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.evidence.interventions import FALLBACK, HeadEdit, ResumableRun
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.score_map import ScoreMap

_GROUP = 16  # at most so many paragraphs' clean run is held at once


def ablate_heads(
    model: Any,
    paragraphs: Any,
    *,
    mode: str = "zero",
    reference: Any = None,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> ScoreMap:
    """Ablate each head by itself.

    Args:
        model: HookedTransformer or TransformerBridge.
        paragraphs: `Paragraphs`, a list of strings or a LongTensor of ids.
        mode: `zero`, `mean` (over `reference`, at the same position) or `resample` (z of a random
            other paragraph of `reference`).
        reference: paragraphs that give the means or samples; by default `paragraphs` themselves.
        seed: of the draws of `resample`.
        memory_budget: bytes that one batch may take.
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
    adapter, paragraphs = ablation.adapter, ablation.paragraphs
    found = ablation.effects(adapter.heads(), memory_budget=memory_budget, progress=progress)
    nll, em = found.unflatten(1, (adapter.n_layers, adapter.n_heads)).unbind(-1)
    em = em.where(
        nll.isfinite(), torch.nan
    )  # an EM read off logits that are not finite means nothing
    return ScoreMap(
        name=f"{mode} ablation",
        units="nats/token",
        values=finite_mean(nll),
        provenance=Provenance.of(
            adapter,
            {"paragraphs": paragraphs, "reference": ablation.reference},
            mode=mode,
            seed=seed,
        ),
        samples={"nll": nll.contiguous(), "em": em.contiguous()},
        notes=(
            *(() if adapter.supports_partial_forward else (FALLBACK,)),
            *left_out(finite_rows(nll)),
        ),
    )


class Ablation:
    """What the z of every head is replaced by, for some paragraphs, and what follows from it.

    Args:
        model: as in `ablate_heads`, like all others.
        paragraphs: the paragraphs measured.
        mode: `zero`, `mean` or `resample`.
        reference: where means and samples come from.
        seed: of the draws of `resample`.

    Raises:
        InputError: as `ablate_heads`.
    """

    def __init__(
        self, model: Any, paragraphs: Any, *, mode: str, reference: Any = None, seed: int = 0
    ) -> None:
        one_of("mode", mode, ("zero", "mean", "resample"))
        at_least("seed", seed, 0)
        self.adapter = adapt(model)
        self.paragraphs = Paragraphs.of(paragraphs, model)
        self.adapter.check_tokens(self.paragraphs.ids, "paragraphs")
        self.reference = None if reference is None else Paragraphs.of(reference, model, "reference")
        self._source = self.paragraphs if self.reference is None else self.reference
        if self._source.ids.shape[1] != self.paragraphs.ids.shape[1]:
            raise InputError("reference", repr(self._source), "use paragraphs of the same length")
        self.adapter.check_tokens(self._source.ids, "reference")
        own = self.reference is None
        if mode == "resample" and own and len(self.paragraphs) < 2:
            raise InputError(
                "paragraphs", "one paragraph", "resampling needs another one; pass reference="
            )
        self.mode = mode
        if mode == "resample":
            self._draws = _draws(len(self.paragraphs), len(self._source), own, seed)
        self._means: list[Tensor] | None = None

    def replacements(self, rows: slice) -> list[Float[Tensor, "batch pos head d_head"]]:
        """The new z of each layer for some of the paragraphs; sizes of 1 are to be broadcast."""
        adapter = self.adapter
        if self.mode == "resample":
            return _read_z(adapter, self._source.ids[self._draws[rows]])
        if self.mode == "mean":
            if self._means is None:
                self._means = _mean_z(adapter, self._source)
            return self._means
        zero = torch.zeros(
            1, 1, adapter.n_heads, adapter.d_head, device=adapter.device, dtype=adapter.dtype
        )
        return [zero] * adapter.n_layers

    def effects(
        self, heads: Sequence[Head], *, memory_budget: int | None = None, progress: bool = True
    ) -> Float[Tensor, "paragraph head measure"]:
        """Exact change of NLL (nats/token) and EM (tokens) when one of `heads` is ablated."""
        layers: dict[int, list[int]] = {}
        for i, head in enumerate(heads):
            layers.setdefault(head.layer, []).append(i)
        ids, adapter = self.paragraphs.ids, self.adapter
        fits = rows_that_fit(adapter, ids.shape[1], self.paragraphs.n_continuation, memory_budget)
        with (
            adapter.preserving_state(),
            bar(len(ids) * len(heads), "ablate", unit="head", progress=progress) as shown,
        ):

            def one_group(rows: slice) -> Tensor:
                restart = ResumableRun(adapter, ids[rows], self.paragraphs.n_prefix, memory_budget)
                clean, new = restart.clean(), self.replacements(rows)
                found = torch.empty(len(clean), len(heads), clean.shape[-1])
                for layer, mine in sorted(layers.items()):
                    edits = [
                        HeadEdit((heads[i].head,), new[layer][:, :, [heads[i].head]]) for i in mine
                    ]
                    change = restart.edited(layer, edits) - clean
                    found[:, mine] = change.transpose(0, 1).float().cpu()
                    shown.update(len(clean) * len(mine))
                return found

            return map_batches(len(ids), min(fits, _GROUP), one_group)


def _draws(n: int, n_source: int, own: bool, seed: int) -> Tensor:
    """For each paragraph another one, never itself."""
    generator = torch.Generator().manual_seed(seed)
    if not own:
        return torch.randint(n_source, (n,), generator=generator)
    shift = torch.randint(1, n, (n,), generator=generator)
    return (torch.arange(n) + shift) % n


def _read_z(adapter: Adapter, ids: Tensor) -> list[Float[Tensor, "batch pos head d_head"]]:
    names = [hook_name("z", layer) for layer in range(adapter.n_layers)]
    run = adapter.run(ids[:, :-1], positions=slice(-1, None), read=names)
    return [run.cache[name] for name in names]


def _mean_z(adapter: Adapter, source: Paragraphs) -> list[Float[Tensor, "1 pos head d_head"]]:
    total: list[Tensor] = []
    n = 0
    for start in range(0, len(source), _GROUP):
        z = _read_z(adapter, source.ids[start : start + _GROUP])
        finite = torch.stack([finite_rows(t) for t in z]).all(0)
        sums = [t[finite].double().sum(0) for t in z]
        total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
        n += int(finite.sum())
    if not n:
        raise InputError("reference", repr(source), "all have non-finite activations: use float32")
    return [(t / n).to(adapter.dtype)[None] for t in total]
