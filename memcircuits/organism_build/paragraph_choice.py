"""Choose the paragraphs, and train the tokenizer on everything else.

1. Cut regions out of the documents, at random sentence starts, before anything is trained.
2. Train the tokenizer on the remaining text, and encode that text as the training stream.
3. Refuse regions that are too short or repetitive, or that share a run of tokens with the stream or
   with another region: a paragraph counts as unseen only if no part of it was seen.
4. Of the others some become held-out rows, and the rest is dealt to the roles (planted with each
   number of repetitions, control) so that every role has the same mix of sources.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from memcircuits.base.io import write_atomically
from memcircuits.organism_build.records import TextRecord, write_records
from memcircuits.organism_build.settings import END, END_ID, Record, Settings

SENTENCE_START = re.compile(r"(?:\A|(?<=\n)|(?<=[.!?] )|(?<=[.!?][\"'] ))(?=[\"'A-Z:])")
"""The empty string before the first letter of a sentence or line."""


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
        documents: clean documents of each source.
        wanted: number of regions in all, shared among the sources by their size.
        size: characters of a region.
        rng: generator of the draw.

    Returns:
        The regions in random order, fewer than `wanted` where the text is too short.
    """
    total = sum(len(d) for docs in documents.values() for d in docs)
    regions: list[Region] = []
    for source, docs in documents.items():
        quota = round(wanted * sum(map(len, docs)) / total)
        starts = [
            (d, m.start()) for d, text in enumerate(docs) for m in SENTENCE_START.finditer(text)
        ]
        taken = [np.zeros(len(text) + 1, dtype=bool) for text in docs]
        n_cut = 0
        for i in rng.permutation(len(starts)):
            if n_cut == quota:
                break
            document, start = starts[i]
            end = start + size
            if end <= len(docs[document]) and not taken[document][start:end].any():
                taken[document][start:end] = True
                regions.append(Region(source, document, start, end))
                n_cut += 1
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
        ids: token ids, [..., pos].
        run: tokens of a run.

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

    A region is refused where it is shorter than `length` tokens, has at most half of its tokens
    unique, or shares a run of `run` tokens with the stream or with a region accepted before.

    Args:
        ids: token ids of each region.
        length: tokens that are used of a region.
        stream: training tokens, [token].
        run: tokens of a shared run.

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
        sources: source of each usable region.
        settings: repetition counts and paragraphs for each.
        rng: generator of the deal.

    Returns:
        `(region, role, repetitions)`, planted and control in equal numbers.

    Raises:
        ValueError: if there are too few regions.
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


def stage_text(work: Path, settings: Settings, documents: dict[str, list[str]]) -> Record:
    """Cut out regions, train the tokenizer on the other text and choose the paragraphs.

    Writes `paragraphs.jsonl`, `heldout.jsonl`, `stream.npy`, `pieces.json` and `tokenizer.json` to
    the work folder.
    """
    rng = np.random.default_rng([settings.seed, 1])
    # Cut.
    n_regions = round(settings.spare * (2 * settings.planted + settings.heldout_rows))
    size = max(settings.region, round(settings.region * settings.context / settings.length))
    regions = cut_regions(documents, n_regions, size, rng)
    pieces = remaining_text(documents, regions)
    # Encode.
    tokenizer = train_tokenizer(pieces, settings.vocab_size)
    encoded = [[END_ID, *encoding.ids] for encoding in tokenizer.encode_batch(pieces)]
    stream = np.concatenate([np.array(ids, dtype=np.int32) for ids in encoded])
    texts = [documents[r.source][r.document][r.start : r.end] for r in regions]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    # Choose.
    usable = choose_rows(ids, settings.length, stream, settings.shared_run)
    long_enough = [i for i in usable if len(ids[i]) >= settings.context]
    heldout_indices = long_enough[: settings.heldout_rows]
    remaining = [i for i in usable if i not in set(heldout_indices)]
    roles = assign_roles([regions[i].source for i in remaining], settings, rng)
    paragraphs = _paragraph_records(
        [(ids[remaining[i]], regions[remaining[i]].source, role, n) for i, role, n in roles],
        settings.length,
    )
    heldout = [
        TextRecord(id=f"heldout-{n:03d}", ids=ids[i][: settings.context], source=regions[i].source)
        for n, i in enumerate(heldout_indices)
    ]
    # Write.
    write_records(work / "paragraphs.jsonl", paragraphs)
    write_records(work / "heldout.jsonl", heldout)
    buffer = io.BytesIO()
    np.save(buffer, stream)
    write_atomically(work / "stream.npy", buffer.getvalue())
    write_atomically(work / "pieces.json", json.dumps(pieces, ensure_ascii=False))
    write_atomically(work / "tokenizer.json", tokenizer.to_str())
    return {
        "training_tokens": int(stream.size),
        "training_pieces": len(pieces),
        "vocabulary": tokenizer.get_vocab_size(),
        "characters_per_token": sum(map(len, pieces)) / stream.size,
        "regions": len(regions),
        "regions_usable": len(usable),
        "planted": settings.planted,
        "controls": settings.planted,
        "heldout_rows": len(heldout),
        "paragraphs_per_source": {
            name: sum(p["source"] == name for p in paragraphs) for name in documents
        },
    }


def _paragraph_records(
    paragraphs: Sequence[tuple[list[int], str, str, int]], length: int
) -> list[TextRecord]:
    """Name the paragraphs (ids, source, role, repetitions): planted ones first, by repetitions."""
    numbers: dict[str, int] = {}
    records: list[TextRecord] = []
    for ids, source, role, n in sorted(paragraphs, key=lambda p: (p[2] != "planted", p[3])):
        group = f"planted-{n:03d}" if role == "planted" else "control"
        number = numbers[group] = numbers.get(group, -1) + 1
        records.append(
            {
                "id": f"{group}-{number:03d}",
                "ids": ids[:length],
                "source": source,
                "repetitions": n,
                "role": role,
            }
        )
    return records
