"""The training loop: learning-rate schedule, checkpoints, and losses on held-out rows.

A checkpoint holds the weights, the optimizers and the history, and is replaced in one step, so a
stopped run continues from it to the same weights that an uninterrupted run reaches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import GPTNeoForCausalLM

from memcircuits.base.io import atomic_file
from memcircuits.organism_build.model import use_fused_kernels, write_weights
from memcircuits.organism_build.optimizers import make_optimizers
from memcircuits.organism_build.settings import Record, Settings, log

_WARM_UP_STEPS = 40  # at most a tenth of all steps


def token_losses(
    model: GPTNeoForCausalLM, rows: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch predicted"]:
    """Next-token losses in nats, one less than the row has tokens."""
    logits = model(rows, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return losses.view(rows.shape[0], -1)


@torch.no_grad()
def mean_loss(model: GPTNeoForCausalLM, rows: Int[Tensor, "batch pos"], batch: int = 50) -> float:
    """Mean next-token loss in nats/token."""
    parts = rows.to(model.device).split(batch)
    return torch.cat([token_losses(model, part) for part in parts]).mean().item()


@dataclass
class Progress:
    """What has been done, beside the weights: saved with every checkpoint.

    Attributes:
        step: steps done.
        history: losses in nats/token, one entry per checkpoint.
        seconds: time spent.
    """

    step: int = 0
    history: list[Record] = field(default_factory=list)
    seconds: float = 0.0


def train(
    model: GPTNeoForCausalLM,
    rows: Int[np.ndarray, "batch pos"],
    heldout: Int[Tensor, "heldout pos"],
    settings: Settings,
    *,
    schedule: Callable[[float], float],
    checkpoint: Path,
    every: int = 100,
    n_kept: int = 0,
) -> Record:
    """Train on the rows in order; a stopped run continues from its checkpoint.

    Args:
        model: changed in place.
        rows: token ids.
        heldout: held-out rows.
        settings: batch, learning rates, clipping.
        schedule: function from the fraction of the steps done to a multiple of the settings'
            learning rates.
        checkpoint: file of the running state; its name is shown in the log and the progress bar.
        every: steps between checkpoints, which also measure the held-out loss.
        n_kept: number of steps, evenly spaced and the last one included, whose weights are kept as
            files beside the checkpoint, named `<checkpoint>-step-<step>`.

    Returns:
        Steps, tokens, seconds and the history of losses (nats/token).
    """
    name = checkpoint.stem
    optimizers = make_optimizers(model, settings)
    peak_rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    n_steps = math.ceil(len(rows) / settings.batch)
    progress = Progress()
    if checkpoint.exists():
        progress = _resume(checkpoint, model, optimizers)
        log.info("%s: resumed at step %d", name, progress.step)
    use_fused_kernels(model).train()
    recent_losses: list[float] = []
    start = time.monotonic() - progress.seconds
    kept_steps = {round(n_steps * (k + 1) / n_kept) for k in range(n_kept)}
    steps = range(progress.step, n_steps)
    for step in tqdm(steps, desc=name, initial=progress.step, total=n_steps, mininterval=5):
        warm_up = min(1.0, (step + 1) / max(1, min(_WARM_UP_STEPS, n_steps // 10)))
        _set_rates(optimizers, peak_rates, schedule(step / n_steps) * warm_up)
        batch_rows = rows[step * settings.batch : (step + 1) * settings.batch]
        recent_losses.append(_step(model, optimizers, batch_rows, settings.clip))
        progress.step = step + 1
        if progress.step in kept_steps:
            write_weights(
                model, checkpoint.with_name(f"{name}-step-{progress.step:05d}.safetensors")
            )
        if progress.step % every == 0 or progress.step == n_steps:
            heldout_loss = mean_loss(model, heldout)
            progress.seconds = time.monotonic() - start
            progress.history.append(
                {
                    "step": progress.step,
                    "train": round(np.mean(recent_losses).item(), 4),
                    "heldout": round(heldout_loss, 4),
                    "seconds": round(progress.seconds, 1),
                }
            )
            log.info("%s %d/%d: %s", name, progress.step, n_steps, progress.history[-1])
            recent_losses = []
            _save(checkpoint, model, optimizers, progress)
    model.eval()
    return {
        "steps": n_steps,
        "tokens": int(rows.size),
        "seconds": round(progress.seconds, 1),
        "device": model.device.type,
        "heldout_loss": progress.history[-1]["heldout"],
        "history": progress.history,
    }


def _set_rates(
    optimizers: Sequence[torch.optim.Optimizer],
    peak_rates: Sequence[Sequence[float]],
    fraction: float,
) -> None:
    for optimizer, rates in zip(optimizers, peak_rates, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * fraction


def _step(
    model: GPTNeoForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    rows: Int[np.ndarray, "batch pos"],
    clip: float,
) -> float:
    """One update of all weights; returns the mean loss before it."""
    ids = torch.from_numpy(rows.astype(np.int64)).to(model.device)
    loss = token_losses(model, ids).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def _save(
    checkpoint: Path,
    model: GPTNeoForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    progress: Progress,
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": progress.step,
        "history": progress.history,
        "seconds": progress.seconds,
    }
    with atomic_file(checkpoint) as temporary:
        torch.save(state, temporary)


def _resume(
    checkpoint: Path,
    model: GPTNeoForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
) -> Progress:
    """Load weights and optimizers in place."""
    state = torch.load(checkpoint, weights_only=True, map_location=model.device)
    model.load_state_dict(state["model"])
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    return Progress(state["step"], state["history"], state["seconds"])
