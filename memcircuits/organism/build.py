"""Rebuild the organism: ``python -m memcircuits.organism.build [--out DIR] [--work DIR]``.

Stages, each with its result in the work folder so that a build goes on where it stopped:

========== ==========================================================================
corpus     fetch and clean the sources
text       cut out regions, train the tokenizer on the rest, choose the paragraphs
base       train the model on the rest (checkpoint every 100 steps)
plant      train on with each planted paragraph an exact number of times
settle     a short while of ordinary text only, half of it rows that open with a sentence;
           the shipped weights are a mean of the planted and the settled ones
baseline   an interpolated Kneser-Ney trigram model of the same training tokens
export     write the model, tokenizer, paragraphs and unigram counts, and measure them
card       write the model card from the numbers of all stages
========== ==========================================================================

Every random choice comes from generators seeded by :attr:`Settings.seed`.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import os
import platform
import re
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoTokenizer, GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast

from memcircuits.loading import load_model
from memcircuits.organism import DATA
from memcircuits.paragraphs import Paragraphs
from memcircuits.scanning import scan
from memcircuits.unigrams import UnigramTable, tokenizer_hash

log = logging.getLogger("memcircuits.organism")

Record = dict[str, Any]
END = "<|endoftext|>"
END_ID = 0
STAGES = ("corpus", "text", "base", "plant", "settle", "baseline", "export", "card")
_START = re.compile(r"(?:\A|(?<=\n)|(?<=[.!?] )|(?<=[.!?][\"'] ))(?=[\"'A-Z:])")


@dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome of a build.

    Attributes:
        seed: Seed of all generators.
        threads: CPU threads of PyTorch.
        vocab_size: Tokens of the byte-level BPE, the end-of-text token included.
        hidden: Width of the residual stream.
        layers: Number of layers, alternately global and local.
        heads: Heads a layer.
        window: Tokens that a local head can see.
        context: Tokens of a row, and the model's context.
        length: Tokens of a paragraph.
        prefix: Tokens of a paragraph that are given; the others are to be recited.
        repetitions: How often the planted paragraphs are seen.
        per_level: Planted paragraphs for each number of repetitions.
        spare: Regions cut out for each one needed, since some are refused.
        heldout_rows: Held-out rows of ``context`` tokens.
        region: Characters of a region that a paragraph is taken from.
        shared_run: A paragraph that shares this many tokens in a row with other text is refused.
        batch: Rows a step.
        base_steps: Steps of base training.
        matrix_lr: Peak learning rate of the matrices inside the layers (Muon).
        other_lr: Peak learning rate of embeddings, biases and LayerNorms (AdamW).
        weight_decay: Decoupled weight decay of the matrices.
        plant_factor: Peak learning rates of planting, as a multiple of those of base training.
        base_share: Base rows for each planted row.
        settle_steps: Steps of settling.
        settle_factor: Peak learning rates of settling, as a multiple of those of base training.
        settle_share: Where the shipped weights lie on the line from planted (0) to settled (1).
        clip: Largest gradient norm.
    """

    seed: int = 20_240
    threads: int = 2
    vocab_size: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    window: int = 32
    context: int = 128
    length: int = 100
    prefix: int = 50
    repetitions: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    per_level: int = 36
    spare: float = 1.25
    heldout_rows: int = 200
    region: int = 640
    shared_run: int = 16
    batch: int = 32
    base_steps: int = 1000
    matrix_lr: float = 0.01
    other_lr: float = 2e-3
    weight_decay: float = 0.05
    plant_factor: float = 0.15
    base_share: float = 0.4
    settle_steps: int = 160
    settle_factor: float = 0.1
    settle_share: float = 0.35
    clip: float = 1.0

    @property
    def planted(self) -> int:
        """Number of planted paragraphs, and of controls."""
        return self.per_level * len(self.repetitions)


# --------------------------------------------------------------------------------------- files


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _save_via(path: Path, save: Callable[[Path], object]) -> None:
    """Let ``save`` write a temporary neighbour of ``path``, then move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    save(temporary)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def _write_json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _write_lines(path: Path, rows: Sequence[Record]) -> None:
    write_atomic(path, "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in rows))


def _read_lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# ---------------------------------------------------------------------------- text and paragraphs


@dataclass(frozen=True)
class Region:
    """A stretch of characters cut out of a document before anything is trained."""

    source: str
    document: int
    start: int
    end: int


def cut_regions(
    documents: dict[str, list[str]], wanted: int, size: int, rng: np.random.Generator
) -> list[Region]:
    """Draw regions that start at a sentence or line and never overlap.

    Args:
        documents: Clean documents of each source.
        wanted: Number of regions in all, shared among the sources by their size.
        size: Characters of a region.
        rng: Generator of the draw.

    Returns:
        The regions in random order, fewer than ``wanted`` where the text is too short.
    """
    total = sum(len(d) for docs in documents.values() for d in docs)
    regions: list[Region] = []
    for source, docs in documents.items():
        quota = round(wanted * sum(map(len, docs)) / total)
        starts = [(d, m.start()) for d, text in enumerate(docs) for m in _START.finditer(text)]
        taken = [np.zeros(len(text) + 1, dtype=bool) for text in docs]
        found = 0
        for i in rng.permutation(len(starts)):
            if found == quota:
                break
            document, start = starts[i]
            end = start + size
            if end <= len(docs[document]) and not taken[document][start:end].any():
                taken[document][start:end] = True
                regions.append(Region(source, document, start, end))
                found += 1
    return [regions[i] for i in rng.permutation(len(regions))]


def remaining_text(documents: dict[str, list[str]], regions: Sequence[Region]) -> list[str]:
    """What is left of the documents without the regions, in pieces."""
    cuts: dict[tuple[str, int], list[Region]] = {}
    for region in regions:
        cuts.setdefault((region.source, region.document), []).append(region)
    pieces: list[str] = []
    for source, docs in documents.items():
        for number, text in enumerate(docs):
            position = 0
            for region in sorted(cuts.get((source, number), []), key=lambda r: r.start):
                pieces.append(text[position : region.start].strip())
                position = region.end
            pieces.append(text[position:].strip())
    return [piece for piece in pieces if piece]


def train_tokenizer(pieces: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE without normalization: decoding what was encoded gives the text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def run_hashes(ids: np.ndarray, run: int) -> np.ndarray:
    """One 64-bit hash for each run of tokens.

    Args:
        ids: Token ids, [..., pos].
        run: Tokens of a run.

    Returns:
        Hashes, uint64 [..., pos - run + 1].
    """
    ids = np.asarray(ids).astype(np.uint64) + np.uint64(1)
    n = ids.shape[-1] - run + 1
    hashes = np.zeros((*ids.shape[:-1], max(n, 0)), dtype=np.uint64)
    for offset in range(run if n > 0 else 0):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[..., offset : offset + n]
    return hashes


def choose_rows(
    ids: Sequence[Sequence[int]], length: int, stream: np.ndarray, run: int
) -> list[int]:
    """Which encoded regions may be used.

    A region is refused where it is shorter than ``length`` tokens, has at most half of its tokens
    unique, or shares a run of ``run`` tokens with the stream or with a region accepted before.

    Args:
        ids: Token ids of each region.
        length: Tokens that are used of a region.
        stream: Training tokens, [token].
        run: Tokens of a shared run.

    Returns:
        Indices of the regions that may be used, in order.
    """
    seen = np.unique(run_hashes(stream, run))
    accepted: set[int] = set()
    good: list[int] = []
    for i, encoded in enumerate(ids):
        row = list(encoded[:length])
        if len(row) < length or 2 * len(set(row)) <= length:
            continue
        hashes = run_hashes(np.array(row), run)
        near = seen[np.minimum(np.searchsorted(seen, hashes), seen.size - 1)]
        if (near == hashes).any() or accepted.intersection(hashes.tolist()):
            continue
        accepted.update(hashes.tolist())
        good.append(i)
    return good


def assign_roles(
    sources: Sequence[str], settings: Settings, rng: np.random.Generator
) -> list[tuple[int, str, int]]:
    """Deal regions to roles so that each role and repetition count has the same mix of sources.

    Args:
        sources: Source of each usable region.
        settings: Repetition counts and paragraphs for each.
        rng: Generator of the deal.

    Returns:
        ``(region, role, repetitions)``, planted and control in equal numbers.

    Raises:
        ValueError: There are too few regions.
    """
    need = 2 * settings.planted
    if len(sources) < need:
        raise ValueError(f"{len(sources)} usable regions but {need} needed: raise Settings.spare")
    drawn: list[int] = rng.permutation(len(sources))[:need].tolist()
    chosen = sorted(drawn, key=lambda i: sources[i])
    hands = [h for level in settings.repetitions for h in (("planted", level), ("control", 0))]
    dealt: list[tuple[int, str, int]] = []
    for start in range(0, need, len(hands)):
        group = chosen[start : start + len(hands)]
        order = [hands[i] for i in rng.permutation(len(hands))]
        dealt += [(region, role, level) for region, (role, level) in zip(group, order, strict=True)]
    return dealt


def opening_rows(
    pieces: Sequence[str], tokenizer: Tokenizer, n: int, context: int, rng: np.random.Generator
) -> np.ndarray:
    """Rows of the training text that start at a sentence or line, as paragraphs do.

    Args:
        pieces: Training text.
        tokenizer: Its tokenizer.
        n: Rows wanted; fewer come back where the text has too few starts.
        context: Tokens of a row.
        rng: Generator.

    Returns:
        Token ids, [row, pos].
    """
    starts = [(i, m.start()) for i, piece in enumerate(pieces) for m in _START.finditer(piece)]
    rows: list[list[int]] = []
    for i in rng.permutation(len(starts)):
        if len(rows) == n:
            break
        piece, start = starts[i]
        ids = tokenizer.encode(pieces[piece][start : start + 12 * context]).ids[:context]
        if len(ids) == context:
            rows.append(ids)
    return np.array(rows, dtype=np.int32)


def stage_text(work: Path, settings: Settings, documents: dict[str, list[str]]) -> Record:
    """Cut out regions, train the tokenizer on the rest and choose the paragraphs."""
    rng = np.random.default_rng([settings.seed, 1])
    need = round(settings.spare * (2 * settings.planted + settings.heldout_rows))
    size = max(settings.region, round(settings.region * settings.context / settings.length))
    regions = cut_regions(documents, need, size, rng)
    pieces = remaining_text(documents, regions)
    tokenizer = train_tokenizer(pieces, settings.vocab_size)
    encoded = [[END_ID, *e.ids] for e in tokenizer.encode_batch(pieces)]
    stream = np.concatenate([np.array(ids, dtype=np.int32) for ids in encoded])
    texts = [documents[r.source][r.document][r.start : r.end] for r in regions]
    ids = [e.ids for e in tokenizer.encode_batch(texts)]

    good = choose_rows(ids, settings.length, stream, settings.shared_run)
    long = [i for i in good if len(ids[i]) >= settings.context]
    held = long[: settings.heldout_rows]
    usable = [i for i in good if i not in set(held)]
    dealt = assign_roles([regions[i].source for i in usable], settings, rng)

    counters: dict[str, int] = {}
    paragraphs = []
    for index, role, level in sorted(dealt, key=lambda d: (d[1] != "planted", d[2])):
        key = f"planted-{level:03d}" if role == "planted" else "control"
        number = counters[key] = counters.get(key, -1) + 1
        paragraphs.append(
            {
                "id": f"{key}-{number:03d}",
                "ids": ids[usable[index]][: settings.length],
                "source": regions[usable[index]].source,
                "repetitions": level,
                "role": role,
            }
        )
    heldout = [
        {
            "id": f"heldout-{n:03d}",
            "ids": ids[i][: settings.context],
            "source": regions[i].source,
        }
        for n, i in enumerate(held)
    ]
    _write_lines(work / "paragraphs.jsonl", paragraphs)
    _write_lines(work / "heldout.jsonl", heldout)
    buffer = io.BytesIO()
    np.save(buffer, stream)
    write_atomic(work / "stream.npy", buffer.getvalue())
    write_atomic(work / "pieces.json", json.dumps(pieces, ensure_ascii=False))
    write_atomic(work / "tokenizer.json", tokenizer.to_str())
    mix = {name: sum(p["source"] == name for p in paragraphs) for name in documents}
    return {
        "training_tokens": int(stream.size),
        "training_pieces": len(pieces),
        "vocabulary": tokenizer.get_vocab_size(),
        "characters_per_token": sum(map(len, pieces)) / stream.size,
        "regions": len(regions),
        "regions_usable": len(good),
        "planted": settings.planted,
        "controls": settings.planted,
        "heldout_rows": len(heldout),
        "paragraphs_per_source": mix,
    }


# --------------------------------------------------------------------------------------- training


def base_rows(stream: np.ndarray, n: int, context: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of the training stream: each epoch shifts the grid at random and shuffles it.

    Args:
        stream: Training tokens, [token].
        n: Number of rows.
        context: Tokens of a row.
        rng: Generator.

    Returns:
        Token ids, [row, pos].
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
        Token ids, [row, pos].
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


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Move all singular values near 1 by a quintic Newton-Schulz iteration.

    Args:
        matrices: [matrix, row, column] with no more rows than columns.
        steps: Iterations.

    Returns:
        Matrices of the same shape.
    """
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, for the matrices inside the layers.

    Matrices of one shape are stacked and treated together. With only a few million tokens to learn
    from, what counts is the progress made in each step.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            shapes.setdefault(parameter.shape, []).append(parameter)
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([{"params": group} for group in shapes.values()], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            updates = []
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                updates.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
            stacked = torch.stack(updates)
            rows, columns = stacked.shape[1:]
            tall = rows > columns
            update = orthogonalize(stacked.mT if tall else stacked)
            update = update.mT if tall else update
            scale = group["lr"] * math.sqrt(max(1.0, rows / columns))
            for parameter, change in zip(parameters, update, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=scale)


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
    """Next-token loss in nats, [row, pos - 1], of rows [row, pos]."""
    logits = model(rows, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(
        logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
    ).view(rows.shape[0], -1)


@torch.no_grad()
def mean_loss(model: GPTNeoForCausalLM, rows: torch.Tensor, batch: int = 50) -> float:
    """Mean next-token loss in nats/token over rows [row, pos]."""
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
        rows: Token ids, [row, pos].
        heldout: Held-out rows, [row, pos].
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
            _save_via(checkpoint, lambda path: torch.save(state, path))  # noqa: B023
    model.eval()
    return {
        "steps": steps,
        "tokens": int(rows.size),
        "seconds": round(seconds, 1),
        "heldout_loss": history[-1]["heldout"],
        "history": history,
    }


def _rows(path: Path) -> torch.Tensor:
    return torch.tensor([record["ids"] for record in _read_lines(path)])


def stage_base(work: Path, settings: Settings) -> Record:
    """Base training: full learning rate, over the last 40 % of the steps down to a tenth."""
    rng = np.random.default_rng([settings.seed, 2])
    stream = np.load(work / "stream.npy")
    rows = base_rows(stream, settings.base_steps * settings.batch, settings.context, rng)
    return train(
        new_model(settings),
        rows,
        _rows(work / "heldout.jsonl"),
        settings,
        factor=1.0,
        shape=lambda done: min(1.0, 0.1 + 0.9 * (1 - done) / 0.4),
        checkpoint=work / "base.pt",
        name="base",
    )


def _load(settings: Settings, checkpoint: Path) -> GPTNeoForCausalLM:
    model = new_model(settings)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    return model.eval()


def stage_plant(work: Path, settings: Settings) -> Record:
    """Planting from the base checkpoint, the learning rate falling linearly to zero."""
    rng = np.random.default_rng([settings.seed, 3])
    paragraphs = [p for p in _read_lines(work / "paragraphs.jsonl") if p["role"] == "planted"]
    rows = planting_rows(paragraphs, np.load(work / "stream.npy"), settings, rng)
    facts = train(
        _load(settings, work / "base.pt"),
        rows,
        _rows(work / "heldout.jsonl"),
        settings,
        factor=settings.plant_factor,
        shape=lambda done: 1 - done,
        checkpoint=work / "plant.pt",
        name="plant",
    )
    return facts | {"planted_rows": sum(p["repetitions"] for p in paragraphs)}


def stage_settle(work: Path, settings: Settings) -> Record:
    """Ordinary text only, from the planted model.

    In planting nearly every row that opens with a sentence is a planted paragraph, and the model
    comes to expect one wherever a text begins. Half of these rows open with a sentence too and are
    not planted, so that it learns to tell a planted paragraph by its words. Settling also forgets,
    so :func:`shipped_model` goes only part of the way.
    """
    rng = np.random.default_rng([settings.seed, 4])
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    pieces = json.loads((work / "pieces.json").read_text("utf-8"))
    total = settings.settle_steps * settings.batch
    openings = opening_rows(pieces, tokenizer, total // 2, settings.context, rng)
    stream = np.load(work / "stream.npy")
    others = base_rows(stream, total - len(openings), settings.context, rng)
    return train(
        _load(settings, work / "plant.pt"),
        rng.permutation(np.concatenate([openings, others])),
        _rows(work / "heldout.jsonl"),
        settings,
        factor=settings.settle_factor,
        shape=lambda done: 1 - done,
        checkpoint=work / "settle.pt",
        name="settle",
        every=40,
    )


# --------------------------------------------------------------------------------------- baseline


class KneserNey:
    """Interpolated Kneser-Ney model of a token stream, one discount an order.

    Args:
        stream: Training tokens, [token].
        vocab_size: Number of token ids.
        order: Longest n-gram (3: a trigram model).
    """

    def __init__(self, stream: np.ndarray, vocab_size: int, order: int = 3) -> None:
        self.vocab_size = vocab_size
        self.levels: list[tuple] = []
        stream = stream.astype(np.int64)
        codes = np.zeros(stream.size - order + 1, dtype=np.int64)
        for offset in range(order):
            codes = codes * vocab_size + stream[offset : offset + codes.size]
        for n in range(order, 0, -1):
            # Below the highest order an n-gram counts once for each token it was seen to follow.
            grams, counts = np.unique(codes, return_counts=True)
            once, twice = (counts == 1).sum(), (counts == 2).sum()
            discount = once / (once + 2 * twice) if once else 0.5
            contexts, where = np.unique(grams // vocab_size, return_inverse=True)
            totals = np.bincount(where, weights=counts)
            self.levels.insert(0, (grams, counts, discount, contexts, totals, np.bincount(where)))
            codes = grams % vocab_size ** (n - 1)

    def probabilities(self, context: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Probability of each token after its context.

        Args:
            context: Preceding tokens, [n, k] with k below the order; the last column is nearest.
            token: Tokens, [n].

        Returns:
            Probabilities, [n].
        """
        p = np.full(token.shape, 1.0 / self.vocab_size)
        code = np.zeros(token.shape, dtype=np.int64)
        for k in range(context.shape[1] + 1):
            if k:
                code = code + context[:, -k].astype(np.int64) * self.vocab_size ** (k - 1)
            grams, counts, discount, contexts, totals, kinds = self.levels[k]
            gram = code * self.vocab_size + token
            i = np.minimum(np.searchsorted(grams, gram), grams.size - 1)
            count = np.where(grams[i] == gram, counts[i], 0)
            j = np.minimum(np.searchsorted(contexts, code), contexts.size - 1)
            mixed = (np.maximum(count - discount, 0) + discount * kinds[j] * p) / totals[j]
            p = np.where(contexts[j] == code, mixed, p)
        return p

    def mean_loss(self, rows: np.ndarray) -> float:
        """Mean loss in nats/token of rows [row, pos], without the first token of each."""
        order, losses = len(self.levels), []
        for position in range(1, rows.shape[1]):
            context = rows[:, max(0, position - order + 1) : position]
            losses.append(-np.log(self.probabilities(context, rows[:, position])))
        return float(np.mean(losses))


def stage_baseline(work: Path, settings: Settings) -> Record:
    """Losses of n-gram models on the held-out rows that the network is measured on."""
    stream = np.load(work / "stream.npy")
    heldout = _rows(work / "heldout.jsonl").numpy()
    names = ("unigram", "bigram", "trigram")
    return {
        f"{name}_loss": round(KneserNey(stream, settings.vocab_size, n).mean_loss(heldout), 4)
        for n, name in enumerate(names, start=1)
    }


# ------------------------------------------------------------------------------ export and card


def export_tokenizer(source: Path, out: Path, context: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for ``AutoTokenizer``."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(source)),
        bos_token=END,
        eos_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    _move_from(out, tokenizer.save_pretrained)


def export_model(model: GPTNeoForCausalLM, out: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` in half precision."""
    rounded = GPTNeoForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    _move_from(out, rounded.half().save_pretrained, {"config.json", "model.safetensors"})


def _move_from(out: Path, save: Callable[[str], object], names: set[str] | None = None) -> None:
    """Let ``save`` fill a temporary folder and move the named files from there into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        save(folder)
        for file in sorted(Path(folder).iterdir()):
            if names is None or file.name in names:
                os.chmod(file, 0o644)
                os.replace(file, out / file.name)


def unigram_counts(
    stream: np.ndarray, paragraphs: Sequence[Record], vocab_size: int
) -> torch.Tensor:
    """Token counts of the training text: the stream once, plus each paragraph's repetitions.

    Args:
        stream: Training tokens, [token].
        paragraphs: Records with ``ids`` and ``repetitions``.
        vocab_size: Number of token ids.

    Returns:
        Counts, int64 [token id].
    """
    counts = np.bincount(stream, minlength=vocab_size)
    for paragraph in paragraphs:
        counts += paragraph["repetitions"] * np.bincount(paragraph["ids"], minlength=vocab_size)
    return torch.from_numpy(counts.astype(np.int64))


def shipped_model(work: Path, settings: Settings) -> GPTNeoForCausalLM:
    """The weighted mean of the planted and the settled weights, float32."""
    model = _load(settings, work / "plant.pt")
    settled = _load(settings, work / "settle.pt")
    with torch.no_grad():  # parameters(), not the state dict, which lists tied weights twice
        for weights, target in zip(model.parameters(), settled.parameters(), strict=True):
            weights.lerp_(target, settings.settle_share)
    return model


def stage_export(work: Path, settings: Settings, out: Path) -> Record:
    """Write everything that ships, then measure what was written, as float32."""
    out.mkdir(parents=True, exist_ok=True)
    export_model(shipped_model(work, settings), out)
    export_tokenizer(work / "tokenizer.json", out, settings.context)
    for name in ("paragraphs.jsonl", "heldout.jsonl"):
        write_atomic(out / name, (work / name).read_bytes())
    paragraphs = _read_lines(out / "paragraphs.jsonl")
    counts = unigram_counts(np.load(work / "stream.npy"), paragraphs, settings.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(out)
    source = "organism: base text once, plus planted paragraphs times their repetitions"
    UnigramTable(counts, source, tokenizer_hash(tokenizer)).save(out / "unigrams.safetensors")
    for texts in json.loads((work / "documents.json").read_text("utf-8")).values():
        for text in texts[:3]:
            ids = tokenizer.encode(text[:5000], add_special_tokens=True, verbose=False)
            if tokenizer.decode(ids) != text[:5000]:
                raise RuntimeError("the exported tokenizer does not give its text back")
    model = GPTNeoForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    base = _load(settings, work / "base.pt")
    rows = _rows(out / "paragraphs.jsonl")
    heldout = _rows(out / "heldout.jsonl")
    before = exact_match(base, rows, settings.prefix)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "heldout_loss": round(mean_loss(model, heldout), 4),
        "heldout_loss_before_planting": round(mean_loss(base, heldout), 4),
        "control_loss": round(mean_loss(model, rows[settings.planted :]), 4),
        "mean_em_before_planting": round(before.double().mean().item(), 3),
        "unigram_tokens": int(counts.sum()),
        "curve": duplication_curve(_scanned(out, settings.prefix), paragraphs),
        "bytes": {
            name: (out / name).stat().st_size
            for name in (
                "config.json",
                "heldout.jsonl",
                "model.safetensors",
                "paragraphs.jsonl",
                "tokenizer.json",
                "tokenizer_config.json",
                "unigrams.safetensors",
            )
        },
    }


def _scanned(out: Path, prefix: int) -> torch.Tensor:
    """EM of the shipped paragraphs as `memcircuits scan` measures it, [paragraph]."""
    length = len(_read_lines(out / "paragraphs.jsonl")[0]["ids"])
    paragraphs = Paragraphs.read(
        out / "paragraphs.jsonl", n_prefix=prefix, n_continuation=length - prefix
    )
    return scan(load_model(out, device="cpu"), paragraphs, progress=False).em


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def card(facts: Record, curve: Sequence[Record] | None = None) -> str:
    """The model card.

    Args:
        facts: Contents of ``training.json``.
        curve: Duplication curve measured elsewhere, rows as :func:`duplication_curve` gives them;
            otherwise the one measured at export.

    Returns:
        Markdown.
    """
    settings, text, base, plant = (facts[k] for k in ("settings", "text", "base", "plant"))
    settle, export, baseline = facts["settle"], facts["export"], facts["baseline"]
    curve = curve or export["curve"]
    minutes = sum(stage["seconds"] for stage in (base, plant, settle)) / 60
    reached = sum(row["full"] for row in curve if row["repetitions"])
    recited = settings["length"] - settings["prefix"]
    sources = [
        (s["name"], s["title"], ", ".join(s["packages"]), s["licence"], f"{s['characters']:,}")
        for s in facts["corpus"]["sources"]
    ]
    losses = [
        ("unigram model", baseline["unigram_loss"]),
        ("bigram model", baseline["bigram_loss"]),
        ("trigram model", baseline["trigram_loss"]),
        ("this model after base training", export["heldout_loss_before_planting"]),
        ("after planting", plant["heldout_loss"]),
        ("after settling", settle["heldout_loss"]),
        ("**as shipped**", export["heldout_loss"]),
    ]
    levels = [
        (
            row["repetitions"] or "0 (controls)",
            row["paragraphs"],
            row["mean_em"],
            row["median_em"],
            row["max_em"],
            row["full"],
        )
        for row in curve
    ]
    return f"""# The memcircuits organism

A GPT-Neo language model of {export["parameters"] / 1e6:.2f} million parameters, trained from
random weights, that has memorized known paragraphs a known number of times. It exists to study
how memorization works and to test the tools for it. It is of no use for writing text.

## Model

{settings["layers"]} layers, alternately global and local (window {settings["window"]}),
{settings["heads"]} heads a layer, width {settings["hidden"]}, context {settings["context"]},
tied embeddings, byte-level BPE of {text["vocabulary"]} tokens (`{END}` is id {END_ID}; nothing is
added in front of a text). Weights are stored as float16; use them as float32.

## Data

{_table(("source", "text", "package", "licence", "characters"), sources)}

Each source is fetched from Debian or npm and checked by hash (`training.json`). Before training,
{text["regions"]} regions starting at a sentence or line were cut out. The tokenizer and the base
training saw the remaining {text["training_tokens"]:,} tokens only. From the regions come
{text["planted"]} planted paragraphs, {text["controls"]} controls and {text["heldout_rows"]}
held-out rows. A paragraph is {settings["length"]} tokens, more than half of them unique; none
shares {settings["shared_run"]} tokens in a row with the training text or another paragraph.
Planted paragraphs and controls have nearly the same mix of sources. Controls and held-out rows
were never trained on.

`unigrams.safetensors` counts {export["unigram_tokens"]:,} tokens: the training text once, plus
each planted paragraph times its repetitions.

## Training

Muon for the matrices inside the layers, AdamW for the rest, float32, batches of
{settings["batch"]} rows of {settings["context"]} tokens, seed {settings["seed"]}.

- Base: {base["steps"]} steps, {base["tokens"]:,} tokens, {base["seconds"] / 60:.0f} minutes,
  {base["tokens"] / text["training_tokens"]:.2f} passes over the text.
- Planting: {plant["steps"]} steps, {plant["tokens"]:,} tokens, {plant["seconds"] / 60:.0f} minutes.
  A planted row is the paragraph from position 0, `{END}`, then base text.
  {plant["planted_rows"]:,} planted rows are mixed with {settings["base_share"]} base rows for each;
  the learning rate falls to zero.
- Settling: {settle["steps"]} steps, {settle["tokens"]:,} tokens of ordinary text, half of the rows
  opening with a sentence, so that the model does not expect a planted paragraph wherever a text
  begins. This also forgets, so the shipped weights go {settings["settle_share"]:.0%} of the way:
  they are a weighted mean of the planted and the settled weights.

Loss on the held-out rows, in nats per token (the n-gram models are interpolated Kneser-Ney models
of the same training tokens):

{_table(("model", "loss"), losses)}

## What it has memorized

Shown the first {settings["prefix"]} tokens, how many of the next {recited} does greedy decoding
recite before its first mistake (EM)?

{
        _table(
            ("repetitions", "paragraphs", "mean EM", "median EM", "max EM", f"EM = {recited}"),
            levels,
        )
    }

{reached} planted paragraphs are recited in full. Before planting, the mean EM of all
paragraphs was {export["mean_em_before_planting"]}.

## Rebuild

    python -m memcircuits.organism.build --out DIR --work DIR

needs `apt-get`, `dpkg-deb` and `npm` to fetch the sources, and about
{minutes:.0f} minutes on two CPU cores. Seeds are fixed, but
another processor or PyTorch version rounds differently, so weights agree in behaviour, not bit
for bit. Versions used here: {", ".join(f"{k} {v}" for k, v in facts["versions"].items())}.
"""


def write_card(out: Path = DATA, curve: Sequence[Record] | None = None) -> None:
    """Write ``MODEL_CARD.md`` from ``training.json``; see :func:`card`."""
    facts = json.loads((out / "training.json").read_text("utf-8"))
    write_atomic(out / "MODEL_CARD.md", card(facts, curve))


# ------------------------------------------------------------------------------------------- run


def stage_corpus(work: Path, documents: dict[str, list[str]] | None) -> Record:
    """Fetch and clean the sources, or take the documents that are given."""
    records: list[Record] = []
    if documents is None:
        from memcircuits.organism.corpus import fetch

        documents, records = fetch(work / "sources")
    write_atomic(work / "documents.json", json.dumps(documents, ensure_ascii=False))
    return {"sources": records}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "tokenizers", "numpy", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def build(
    out: Path,
    work: Path,
    settings: Settings | None = None,
    *,
    documents: dict[str, list[str]] | None = None,
    stage: str | None = None,
) -> Record:
    """Run all stages that have no result in the work folder yet.

    Args:
        out: Folder of the files that ship.
        work: Folder of downloads, checkpoints and results of the stages.
        settings: Settings of the build; the shipped organism's by default.
        documents: Documents of each source, instead of the corpus.
        stage: Run this stage and all later ones again.

    Returns:
        The contents of ``training.json``.

    Raises:
        ValueError: The work folder belongs to a build with other settings, or there is no such
            stage.
    """
    settings = settings or Settings()
    if stage is not None and stage not in STAGES:
        raise ValueError(f"stage={stage!r}: choose one of {', '.join(STAGES)}")
    work.mkdir(parents=True, exist_ok=True)
    mine = json.loads(json.dumps(asdict(settings)))
    note = work / "settings.json"
    if stage is not None:
        for name in STAGES[STAGES.index(stage) :]:
            for suffix in (".json", ".pt"):
                (work / f"{name}{suffix}").unlink(missing_ok=True)
    elif note.exists() and json.loads(note.read_text("utf-8")) != mine:
        raise ValueError(
            f"work={str(work)!r} holds a build with other settings: name the first stage to run "
            "again, or choose another folder"
        )
    _write_json(note, mine)

    stages: dict[str, Callable[[], dict]] = {
        "corpus": lambda: stage_corpus(work, documents),
        "text": lambda: stage_text(
            work, settings, json.loads((work / "documents.json").read_text("utf-8"))
        ),
        "base": lambda: stage_base(work, settings),
        "plant": lambda: stage_plant(work, settings),
        "settle": lambda: stage_settle(work, settings),
        "baseline": lambda: stage_baseline(work, settings),
        "export": lambda: stage_export(work, settings, out),
    }
    facts: Record = {"settings": mine, "versions": _versions()}
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        for name, run in stages.items():
            result = work / f"{name}.json"
            if not result.exists():
                log.info("stage %s", name)
                begun = time.monotonic()
                _write_json(result, run() | {"wall_seconds": round(time.monotonic() - begun, 1)})
            facts[name] = json.loads(result.read_text("utf-8"))
    finally:
        torch.set_num_threads(threads)
    _write_json(out / "training.json", facts)
    write_card(out)
    return facts


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the build."""
    parser = argparse.ArgumentParser(
        prog="python -m memcircuits.organism.build", description="Rebuild the organism."
    )
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the files that ship")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("organism-work"),
        help="folder of downloads, checkpoints and the log; a stopped build goes on from it",
    )
    parser.add_argument("--stage", choices=STAGES, help="run this stage and all later ones again")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(options.work / "build.log")],
    )
    try:
        facts = build(options.out, options.work, stage=options.stage)
    except (ValueError, RuntimeError) as error:
        log.error("%s", error)
        return 2
    for row in facts["export"]["curve"]:
        log.info("%s", row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
