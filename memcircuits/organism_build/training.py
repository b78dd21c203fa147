"""TODO."""

from __future__ import annotations

import math
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from memcircuits.organism_build.files import save_via
from memcircuits.organism_build.muon import Muon
from memcircuits.organism_build.settings import END_ID, Record, Settings, log


def base_rows(stream: np.ndarray, n: int, context: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of the training stream: each epoch shifts the grid at random and shuffles it.

    Args:
        stream: Training tokens, [token].
        n: Number of rows.
        context: Tokens of a row.
        rng: Generator.

    Returns:
        Token ids, [batch, pos].
    """
    starts: list[np.ndarray] = []
    while sum(map(len, starts)) < n:
        grid = np.arange(rng.integers(context), stream.size - context, context)
        starts.append(rng.permutation(grid))
    return stream[np.concatenate(starts)[:n, None] + np.arange(context)]


def planting_rows(
    paragraphs: Sequence[Record], stream: np.ndarray, settings: Settings, rng: np.random.Generator
) -> np.ndarray:
    """Rows for planting, shuffled.

    A planted row is the paragraph from position 0, the end-of-text token, and base text up to the
    row's end; ``base_share`` base rows come with each, and a few more to fill the last batch.

    Args:
        paragraphs: Planted paragraphs with ``ids`` and ``repetitions``; others are left out.
        stream: Training tokens, [token].
        settings: Row length, share of base rows, batch.
        rng: Generator.

    Returns:
        Token ids, [batch, pos].
    """
    planted = [p["ids"] for p in paragraphs for _ in range(p["repetitions"])]
    total = math.ceil(len(planted) * (1 + settings.base_share) / settings.batch) * settings.batch
    rows = base_rows(stream, total, settings.context, rng)
    rows[: len(planted), settings.length + 1 :] = rows[: len(planted), : -settings.length - 1]
    rows[: len(planted), settings.length] = END_ID
    rows[: len(planted), : settings.length] = planted
    return rng.permutation(rows)


def new_model(settings: Settings) -> GPTNeoForCausalLM:
    """The untrained model, its weights drawn from a generator of their own."""
    kinds = [("global", "local")[i % 2] for i in range(settings.layers)]
    config = GPTNeoConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden,
        num_layers=settings.layers,
        num_heads=settings.heads,
        attention_types=[[[kind], 1] for kind in kinds],
        window_size=settings.window,
        max_position_embeddings=settings.context,
        embed_dropout=0.0,
        attention_dropout=0.0,
        resid_dropout=0.0,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )
    with torch.random.fork_rng():
        model = GPTNeoForCausalLM(config)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                into_stream = name.endswith(("out_proj.weight", "c_proj.weight"))
                scale = 0.02 / math.sqrt(2 * settings.layers) if into_stream else 0.02
                parameter.normal_(0.0, scale, generator=generator)
    return model


def quicken(model: GPTNeoForCausalLM) -> GPTNeoForCausalLM:
    """Give the model fused attention and GELU kernels for training; the function is the same."""

    def attend(
        self: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None = None,
    ) -> tuple[torch.Tensor, None]:
        n = query.size(-2)
        options = (
            {"is_causal": True}
            if self.attention_type == "global"
            else {"attn_mask": self.bias[:, :, :n, :n]}
        )
        return functional.scaled_dot_product_attention(
            query, key, value, scale=1.0, **options
        ), None

    blocks: Any = model.transformer.h
    for block in blocks:
        block.attn.attention._attn = types.MethodType(attend, block.attn.attention)
        block.mlp.act = torch.nn.GELU(approximate="tanh")
    return model


def make_optimizers(
    model: GPTNeoForCausalLM, settings: Settings, factor: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest; ``factor`` scales both."""
    inside = {id(p) for p in model.transformer.h.parameters() if p.ndim == 2}
    matrices = [p for p in model.parameters() if id(p) in inside]
    others = [p for p in model.parameters() if id(p) not in inside]
    lr = factor * settings.other_lr
    return [
        Muon(matrices, factor * settings.matrix_lr, settings.weight_decay),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def token_losses(model: GPTNeoForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Next-token loss in nats, [batch, pos - 1], of rows [batch, pos]."""
    logits = model(rows, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(
        logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
    ).view(rows.shape[0], -1)


@torch.no_grad()
def mean_loss(model: GPTNeoForCausalLM, rows: torch.Tensor, batch: int = 50) -> float:
    """Mean next-token loss in nats/token over rows [batch, pos]."""
    return torch.cat([token_losses(model, part) for part in rows.split(batch)]).mean().item()


@torch.no_grad()
def exact_match(
    model: GPTNeoForCausalLM, rows: torch.Tensor, prefix: int, batch: int = 54
) -> torch.Tensor:
    """Tokens that greedy decoding recites before its first mismatch.

    Until that mismatch greedy decoding sees what teacher forcing sees, so one pass is enough.

    Args:
        model: The model.
        rows: Paragraphs, [paragraph, pos].
        prefix: Tokens that are given.
        batch: Paragraphs a pass.

    Returns:
        Counts, int64 [paragraph], at most ``pos - prefix``.
    """
    counts = []
    for part in rows.split(batch):
        guesses = model(part[:, :-1], use_cache=False).logits[:, prefix - 1 :].argmax(-1)
        counts.append((guesses == part[:, prefix:]).long().cumprod(1).sum(1))
    return torch.cat(counts)


def duplication_curve(em: torch.Tensor, paragraphs: Sequence[Record]) -> list[Record]:
    """Exact match by number of repetitions; 0 repetitions are the controls.

    Args:
        em: Exact match of each paragraph, [paragraph].
        paragraphs: Their records.

    Returns:
        One row a repetition count.
    """
    rows = []
    for level in sorted({p["repetitions"] for p in paragraphs}):
        values = em[[i for i, p in enumerate(paragraphs) if p["repetitions"] == level]]
        rows.append(
            {
                "repetitions": level,
                "paragraphs": len(values),
                "mean_em": round(values.double().mean().item(), 2),
                "median_em": int(values.median()),
                "max_em": int(values.max()),
                "full": int((values == len(paragraphs[0]["ids"]) // 2).sum()),
            }
        )
    return rows


def train(
    model: GPTNeoForCausalLM,
    rows: np.ndarray,
    heldout: torch.Tensor,
    settings: Settings,
    *,
    factor: float,
    shape: Callable[[float], float],
    checkpoint: Path,
    name: str,
    every: int = 100,
) -> Record:
    """Train on the rows in order; a stopped run goes on from its checkpoint.

    Args:
        model: Changed in place.
        rows: Token ids, [batch, pos].
        heldout: Held-out rows, [batch, pos].
        settings: Batch, learning rates, clipping.
        factor: Multiple of the settings' learning rates.
        shape: Share of the steps done (0 to 1) -> share of the peak learning rate.
        checkpoint: File of the running state.
        name: Shown in log and progress bar.
        every: Steps between checkpoints and held-out losses.

    Returns:
        Steps, tokens, seconds and the history of losses (nats/token).
    """
    optimizers = make_optimizers(model, settings, factor)
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    steps = math.ceil(len(rows) / settings.batch)
    first, history, seconds = 0, [], 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, history, seconds = state["step"], state["history"], state["seconds"]
        log.info("%s: resumed at step %d", name, first)
    quicken(model).train()
    recent: list[float] = []
    begun = time.monotonic() - seconds
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=5)
    for step in bar:
        share = shape(step / steps) * min(1.0, (step + 1) / max(1, min(40, steps // 10)))
        for optimizer, lrs in zip(optimizers, peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * share
        part = rows[step * settings.batch : (step + 1) * settings.batch]
        loss = token_losses(model, torch.from_numpy(part.astype(np.int64))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.item())
        done = step + 1
        if done % every == 0 or done == steps:
            held = mean_loss(model, heldout)
            seconds = time.monotonic() - begun
            entry = {"step": done, "train": round(np.mean(recent).item(), 4)}
            history.append(entry | {"heldout": round(held, 4), "seconds": round(seconds, 1)})
            log.info("%s %d/%d: %s", name, done, steps, history[-1])
            recent = []
            state = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "step": done,
                "history": history,
                "seconds": seconds,
            }
            save_via(checkpoint, lambda path: torch.save(state, path))  # noqa: B023
    model.eval()
    return {
        "steps": steps,
        "tokens": int(rows.size),
        "seconds": round(seconds, 1),
        "heldout_loss": history[-1]["heldout"],
        "history": history,
    }
