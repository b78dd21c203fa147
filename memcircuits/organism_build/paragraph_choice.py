"""Choose the paragraphs, and train the tokenizer on everything else.

1. Cut regions out of the documents, at random sentence starts, before anything is trained.
2. Train the tokenizer on the remaining text, and encode that text as the training stream.
3. Refuse regions that are too short or repetitive, or that share a run of tokens with the stream or
   with another region: a paragraph counts as unseen only if no part of it was seen.
4. Of the others some become held-out rows, and the rest is dealt to the roles (seen by both models,
   by one or by neither, each number of times) so that every role has the same mix of sources.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from memcircuits.organism_build.settings import END, SeenBy, Settings

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
) -> list[tuple[int, SeenBy, int]]:
    """Deal regions to roles so that each role and repetition count has the same mix of sources.

    The places of a role with one number of repetitions are spread evenly, from a random start, over
    the regions sorted by source.

    Args:
        sources: source of each usable region.
        settings: roles, repetition counts and paragraphs for each.
        rng: generator of the deal.

    Returns:
        `(region, role, repetitions)` of every paragraph.

    Raises:
        ValueError: if there are too few regions.
    """
    n_of_role = Counter(settings.roles)
    n_paragraphs = n_of_role.total()
    if len(sources) < n_paragraphs:
        raise ValueError(
            f"{len(sources)} usable regions but {n_paragraphs} needed: raise Settings.spare"
        )
    drawn: list[int] = rng.permutation(len(sources))[:n_paragraphs].tolist()
    by_source = sorted(drawn, key=lambda i: sources[i])
    places = [
        (place, role)
        for role, n in n_of_role.items()
        for place in (np.arange(n) + rng.random(n)) / n
    ]
    return [(region, *role) for region, (_, role) in zip(by_source, sorted(places), strict=True)]
