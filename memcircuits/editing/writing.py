"""TODO."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.core.errors import InputError
from memcircuits.core.progress import bar
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.masks import Mask
from memcircuits.measure.continuation import (
    continuation_logits,
    kl_divergence,
    read_continuation,
    run_to_continuation,
)
from memcircuits.measure.gradients import rows_that_fit_backward
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import iter_batches, map_batches
from memcircuits.models.hooks import hook_name

_BATCH = 3  # anchors in each step


@dataclass(frozen=True)
class BatchRows:
    """Paragraphs, what enters the lowest masked block on them, and the unedited log p."""

    paragraphs: Paragraphs
    resid: Tensor
    log_p: Float[Tensor, "batch pos d_vocab"]

    @classmethod
    def of(
        cls, adapter: Adapter, paragraphs: Paragraphs, low: int, memory_budget: int | None
    ) -> BatchRows:
        name = hook_name("resid_pre", low)
        read = [name] if adapter.supports_partial_forward else []

        def one_piece(piece: slice) -> tuple[Tensor, Tensor]:
            ids = paragraphs.ids[piece]
            run = run_to_continuation(adapter, ids, paragraphs.n_prefix, read=read)
            return run.cache.get(name, ids[:, :-1]), run.logits.float().log_softmax(-1)

        size = rows_that_fit_backward(adapter, paragraphs, memory_budget)
        with adapter.preserving_state():
            parts = [part for _, part in iter_batches(len(paragraphs), size, one_piece)]
        return cls(paragraphs, *(torch.cat(found) for found in zip(*parts, strict=True)))

    def logits(self, adapter: Adapter, low: int, rows: Tensor | slice) -> Tensor:
        if not adapter.supports_partial_forward:
            return continuation_logits(adapter, self.paragraphs, rows)
        positions = slice(self.paragraphs.n_prefix - 1, None)
        return adapter.unembed(adapter.run_blocks(low, self.resid[rows])[:, positions])

    def kl(self, adapter: Adapter, low: int, rows: Tensor | slice) -> Float[Tensor, " batch"]:
        """KL(original || current), nats/token."""
        new = self.logits(adapter, low, rows).float().log_softmax(-1)
        return kl_divergence(self.log_p[rows], new).mean(-1)


@dataclass(frozen=True)
class Writer:
    """Adam on the masked weights, from the lowest masked layer upwards."""

    adapter: Adapter
    mask: Mask
    low: int
    aim: BatchRows
    seen: BatchRows
    held: BatchRows
    memory_budget: int | None

    def run(
        self,
        original: list[Tensor],
        steps: int,
        learning_rate: float,
        kl_weight: float,
        kl_budget: float,
        generator: torch.Generator,
        progress: bool,
    ) -> tuple[Float[Tensor, " weight"] | None, dict[str, Any]]:
        """The change kept (None if the paragraphs were never recited) and how it was found."""
        unit = torch.cat(
            [
                w.values.float().square().mean().sqrt().expand(len(index))
                for w, index in zip(self.mask.weights, self.mask.indices, strict=True)
            ]
        )
        moved = torch.nn.Parameter(torch.zeros_like(unit))
        adam = torch.optim.Adam([moved], lr=learning_rate, betas=(0.9, 0.99))
        full = self.aim.paragraphs.n_continuation
        rows: list[dict[str, float]] = []
        best, kept, stopped = None, 0, "steps"
        with bar(steps, "plant", unit="step", progress=progress) as shown:
            for step in range(steps + 1):
                delta = moved.detach() * unit
                self.mask.add(original, delta)
                row, gradient = self._at(kl_weight, generator)
                if not all(math.isfinite(row[key]) for key in ("nll", "kl_seen")):
                    raise InputError(
                        "learning_rate",
                        learning_rate,
                        f"the loss was not finite at step {step}; the model is restored; "
                        "use a smaller learning rate",
                    )
                if not step and row["em_min"] == full:
                    raise InputError(
                        "paragraphs",
                        f"{len(self.aim.paragraphs)}, all recited already",
                        "give some that the model does not recite",
                    )
                if row["em_min"] == full:
                    row["kl"] = self._held_kl()
                    if best is None or row["kl"] < rows[kept]["kl"]:
                        best, kept = delta, step
                rows.append(row)
                if row["kl"] <= kl_budget:
                    stopped = "em"
                    break
                if step == steps:
                    break
                moved.grad = gradient * unit
                adam.step()
                shown.update()
        history = {
            key: torch.tensor([row[key] for row in rows]) for key in ("em", "em_min", "nll", "kl")
        }
        return best, {"history": history, "kept": kept, "stopped": stopped}

    def _at(
        self, kl_weight: float, generator: torch.Generator
    ) -> tuple[dict[str, float], Float[Tensor, " weight"]]:
        """What the weights written now do, and the gradient of the objective in them."""
        adapter, parameters = self.adapter, self.mask.parameters
        aim, n_seen = self.aim.paragraphs, len(self.seen.paragraphs)
        total = torch.zeros(len(self.mask), device=parameters[0].device)
        drawn = torch.randperm(n_seen, generator=generator)[:_BATCH]
        em: list[Tensor] = []
        nll = kl = 0.0

        def written(piece: slice) -> tuple[Tensor, Tensor, float]:
            logits = self.aim.logits(adapter, self.low, piece)
            found = read_continuation(logits, aim.continuation[piece].to(logits.device))
            part = found.nll.sum() / len(aim)
            gradient = self.mask.gather(torch.autograd.grad(part, parameters))
            return gradient, found.em.cpu(), float(part.detach())

        def moved(piece: slice) -> tuple[Tensor, float]:
            part = self.seen.kl(adapter, self.low, drawn[piece]).sum() / len(drawn)
            return self.mask.gather(torch.autograd.grad(part, parameters)), float(part.detach())

        size = rows_that_fit_backward(adapter, aim, self.memory_budget)
        with adapter.preserving_state(grad=parameters):
            for _, (gradient, recited, loss) in iter_batches(len(aim), size, written):
                total += gradient
                em.append(recited)
                nll += loss
            for _, (gradient, loss) in iter_batches(len(drawn) if kl_weight else 0, size, moved):
                total += kl_weight * gradient
                kl += loss
        every = torch.cat(em).float()
        row = {
            "em": float(every.mean()),
            "em_min": float(every.min()),
            "nll": nll,
            "kl_seen": kl,
            "kl": math.nan,
        }
        return row, total

    def _held_kl(self) -> float:
        held = self.held
        size = rows_that_fit_backward(self.adapter, held.paragraphs, self.memory_budget)
        with self.adapter.preserving_state():
            kl = map_batches(
                len(held.paragraphs), size, lambda piece: held.kl(self.adapter, self.low, piece)
            )
        return float(kl.mean())


def written_weights(
    adapter: Adapter,
    paragraphs: Paragraphs,
    generator: torch.Generator,
    n: int = 10,
) -> Paragraphs:
    """Text that the model writes itself: sampled token by token from one random token."""
    length, n_prefix = paragraphs.ids.shape[1], paragraphs.n_prefix
    ids = torch.randint(adapter.d_vocab, (n, 1), generator=generator)
    with adapter.preserving_state():
        while ids.shape[1] < length:
            logits = adapter.run(ids, positions=slice(-1, None)).logits[:, 0].float().cpu()
            if not logits.isfinite().all():
                raise InputError(
                    "control",
                    "not given, and text that the model writes itself has non-finite logits",
                    "give some, or load the model in float32",
                )
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, drawn], 1)
    return Paragraphs(ids, n_prefix)
