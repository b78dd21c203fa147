"""TODO."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from memcircuits.organism_build.files import write_atomic, write_lines
from memcircuits.organism_build.settings import END, END_ID, Record, Settings

_START = re.compile(r"(?:\A|(?<=\n)|(?<=[.!?] )|(?<=[.!?][\"'] ))(?=[\"'A-Z:])")


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
        Token ids, [batch, pos].
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
    write_lines(work / "paragraphs.jsonl", paragraphs)
    write_lines(work / "heldout.jsonl", heldout)
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
