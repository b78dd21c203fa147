"""Two runs that differ in the prefix alone: what activation patching compares.

The clean run reads the clean prefix and the clean continuation, the corrupted run the corrupted
prefix and, too, the clean continuation. Every metric is about the clean continuation; the corrupted
one only says which token is the first to be impacted, and what the model writes in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.core.errors import InputError, UnsupportedModel, one_of
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.evidence.interventions import Measure
from memcircuits.measure.continuation import read_continuation, run_to_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

Metric = Callable[
    [Float[Tensor, "batch pos d_vocab"], Int[Tensor, " batch"]], Float[Tensor, " batch"]
]


HEAD_SITES = ("q", "k", "v", "z", "pattern")


LAYER_SITES = ("resid_pre", "resid_mid", "attn_out", "mlp_out")


DIRECTIONS = ("noising", "denoising")


UNITS = {"nll": "nats/token", "em": "tokens", "first_impacted": "nats", "logit_diff": "logits"}


# The sign of a change after which less is recited.
_LESS = {"nll": 1, "em": -1, "first_impacted": 1, "logit_diff": -1}


GROUP = 16  # pairs whose runs are held at once


def colours(metric: str) -> dict[str, Any]:
    """How figures show a metric's effects: orange where less is recited, whatever the sign."""
    if metric not in _LESS:
        return {"name": "effect"}
    return {"name": "effect (orange: less is recited)", "reverse": _LESS[metric] < 0}


@dataclass(frozen=True)
class Pair:
    """Both runs of every pair, and what is measured on them.

    Attributes:
        base_ids: what the run patched into reads, [batch, pos].
        source_ids: what the run that gives activations reads, [batch, pos].
        first: index of the first impacted token, [batch].
        where: positions patched, [batch, pos], without the last one, which predicts nothing.
        changed: positions where the two runs read different tokens, [batch, pos], likewise.
        names: the metrics, the chosen one first.
    """

    adapter: Adapter
    clean: Paragraphs
    corrupted: Paragraphs
    direction: str
    positions: str | Sequence[int] | None
    base_ids: Int[Tensor, "batch pos"]
    source_ids: Int[Tensor, "batch pos"]
    first: Int[Tensor, " batch"]
    where: Bool[Tensor, "batch pos"]
    changed: Bool[Tensor, "batch pos"]
    names: tuple[str, ...]
    custom: Metric | None

    def __len__(self) -> int:
        return len(self.base_ids)

    @property
    def n_prefix(self) -> int:
        """Tokens of the prefix."""
        return self.clean.n_prefix

    @classmethod
    def of(
        cls,
        model: Any,
        clean: Any,
        corrupted: Any,
        metric: str | Metric,
        direction: str,
        positions: str | Sequence[int] | None,
    ) -> Pair:
        """Check what the user gave; see `memcircuits.evidence.patching.sweeps.patch_heads`."""
        one_of("direction", direction, DIRECTIONS)
        adapter = adapt(model)
        clean = Paragraphs.of(clean, model, "clean")
        corrupted = Paragraphs.of(corrupted, model, "corrupted")
        if clean.ids.shape != corrupted.ids.shape or clean.n_prefix != corrupted.n_prefix:
            raise InputError(
                "corrupted", repr(corrupted), f"it must pair with clean, {clean!r}, row by row"
            )
        for argument, paragraphs in {"clean": clean, "corrupted": corrupted}.items():
            adapter.check_tokens(paragraphs.ids, argument)
        corrupted_ids = torch.cat([corrupted.prefix, clean.continuation], 1)
        runs = [clean.ids, corrupted_ids]
        base_ids, source_ids = runs if direction == "noising" else runs[::-1]
        different = clean.continuation != corrupted.continuation
        names = ["nll", "em"]
        if different.any(-1).all():
            names += ["first_impacted", "logit_diff"]
        if callable(metric):
            chosen = getattr(metric, "__name__", "metric")
            names = [chosen, *(name for name in names if name != chosen)]
        else:
            one_of("metric", metric, UNITS)
            if metric not in names:
                raise InputError(
                    "corrupted",
                    f"pair {int((~different.any(-1)).nonzero()[0])} has equal continuations",
                    f"no token is impacted: {metric} needs Perturbation.pairs(), or use nll",
                )
            names = [metric, *(name for name in names if name != metric)]
        changed = base_ids[:, :-1] != source_ids[:, :-1]
        return cls(
            adapter=adapter,
            clean=clean,
            corrupted=corrupted,
            direction=direction,
            positions=positions
            if isinstance(positions, str) or positions is None
            else [*positions],
            base_ids=base_ids,
            source_ids=source_ids,
            first=different.long().argmax(-1),
            where=_where(positions, changed),
            changed=changed,
            names=tuple(names),
            custom=metric if callable(metric) else None,
        )

    def provenance(self, **options: Any) -> Provenance:
        """Of a result on these pairs."""
        return Provenance.of(
            self.adapter,
            {"clean": self.clean, "corrupted": self.corrupted},
            direction=self.direction,
            positions=self.positions,
            metric=self.names[0],
            **options,
        )

    def groups(self, size: int) -> list[slice]:
        """Pairs whose runs are held at once."""
        return [slice(i, min(len(self), i + size)) for i in range(0, len(self), size)]

    def measure(self, group: slice) -> Measure:
        """All metrics, as the engine takes them; its rows count within the group."""
        device = self.adapter.device
        targets = self.clean.continuation[group].to(device)
        others = self.corrupted.continuation[group].to(device)
        first = self.first[group].to(device)

        def measure(
            logits: Float[Tensor, "batch pos d_vocab"], rows: Int[Tensor, " batch"]
        ) -> Float[Tensor, "batch metric"]:
            found = read_continuation(logits, targets[rows])
            here = torch.arange(len(rows), device=device), first[rows]
            values: dict[str, Tensor] = {"nll": found.nll, "em": found.em.float()}
            if "first_impacted" in self.names:
                values["first_impacted"] = -found.log_prob[here]
            if "logit_diff" in self.names:
                two = torch.stack([targets[rows][here], others[rows][here]], -1)
                two = logits[here].float().gather(-1, two)
                values["logit_diff"] = two[:, 0] - two[:, 1]
            if self.custom is not None:
                values[self.names[0]] = self._customized(logits, rows.cpu() + group.start)
            return torch.stack([values[name] for name in self.names], -1)

        return measure

    def _customized(self, logits: Tensor, rows: Tensor) -> Tensor:
        assert self.custom is not None
        found = self.custom(logits, rows)
        if not isinstance(found, Tensor) or found.shape != (len(logits),):
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError("metric", given, "return a tensor with one number per row of logits")
        return found.float()

    def read(
        self, group: slice, sites: Sequence[str]
    ) -> tuple[dict[str, Tensor], Float[Tensor, "batch metric"]]:
        """Activations of the run that gives them, and its metrics."""
        names = [hook_name(site, layer) for layer in range(self.adapter.n_layers) for site in sites]
        run = run_to_continuation(self.adapter, self.source_ids[group], self.n_prefix, read=names)
        rows = torch.arange(len(run.logits), device=run.logits.device)
        return run.cache, self.measure(group)(run.logits, rows).float().cpu()


def _where(
    positions: str | Sequence[int] | None, changed: Bool[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"]:
    if positions is None:
        return torch.ones_like(changed)
    if isinstance(positions, str):
        one_of("positions", positions, ("changed",))
        return changed
    chosen = [int(position) for position in positions]
    bad = [p for p in chosen if not 0 <= p < changed.shape[1]]
    if bad or not chosen:
        raise InputError("positions", bad or "empty", f"give positions in [0, {changed.shape[1]})")
    where = torch.zeros_like(changed)
    where[:, chosen] = True
    return where


def sites_read(site: str) -> tuple[str, ...]:
    """What has to be read in the run that gives activations."""
    return ("pattern", "v", "z") if site == "pattern" else (site,)


def new_values(
    site: str, layer: int, base: Mapping[str, Tensor], source: Mapping[str, Tensor]
) -> tuple[str, Float[Tensor, "batch pos head d_head"]]:
    """Which activation is replaced for a head site, and by what."""
    if site != "pattern":
        return hook_name(site, layer), source[hook_name(site, layer)]
    pattern = source[hook_name("pattern", layer)]
    known = _mixed(pattern, source[hook_name("v", layer)])
    z = source[hook_name("z", layer)]
    off, size = (known - z).nan_to_num().abs().max(), z.nan_to_num().abs().max()
    if off > (1e-3 if z.dtype == torch.float32 else 5e-2) * size:
        raise UnsupportedModel(
            "site", "'pattern'", "this model's z is not pattern @ v; patch q and k instead"
        )
    return hook_name("z", layer), _mixed(pattern, base[hook_name("v", layer)])


def _mixed(
    pattern: Float[Tensor, "batch head query key"], v: Float[Tensor, "batch key kv_head d_head"]
) -> Float[Tensor, "batch query head d_head"]:
    """Pattern @ v; heads of a group share their values."""
    v = v.repeat_interleave(pattern.shape[1] // v.shape[2], 2)
    return torch.einsum("bhqk,bkhd->bqhd", pattern.to(v.dtype), v)
