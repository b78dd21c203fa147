"""The text stage: from documents to the token rows of training, and paragraphs with roles.

`paragraph_choice` cuts regions out of the documents and decides which of them may be used; `rows`
finds the places where the other text can open a row. What this stage writes is all that training
needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from memcircuits.base.io import write_atomically
from memcircuits.organism_build.paragraph_choice import (
    assign_roles,
    choose_rows,
    cut_regions,
    remaining_text,
    train_tokenizer,
)
from memcircuits.organism_build.records import TextRecord, write_array, write_records
from memcircuits.organism_build.rows import opening_rows
from memcircuits.organism_build.settings import END_ID, Record, SeenBy, Settings


def stage_text(work: Path, settings: Settings, documents: dict[str, list[str]]) -> Record:
    """Cut out regions, train the tokenizer on the other text and choose the paragraphs.

    Writes `paragraphs.jsonl`, `heldout.jsonl`, `stream.npy`, `openings.npy` and `tokenizer.json` to
    the work folder.
    """
    rng = np.random.default_rng([settings.seed, 1])
    # Cut.
    n_regions = round(settings.spare * (len(settings.roles) + settings.heldout_rows))
    size = max(settings.region, round(settings.region * settings.context / settings.length))
    regions = cut_regions(documents, n_regions, size, rng)
    pieces = remaining_text(documents, regions)
    # Encode.
    tokenizer = train_tokenizer(pieces, settings.vocab_size)
    encoded = [[END_ID, *encoding.ids] for encoding in tokenizer.encode_batch(pieces)]
    stream = np.concatenate([np.array(ids, dtype=np.uint16) for ids in encoded])
    openings_rng = np.random.default_rng([settings.seed, 4])
    openings = opening_rows(pieces, tokenizer, settings.n_openings, settings.context, openings_rng)
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
    write_array(work / "stream.npy", stream)
    write_array(work / "openings.npy", openings)
    write_atomically(work / "tokenizer.json", tokenizer.to_str())
    return {
        "training_tokens": int(stream.size),
        "training_pieces": len(pieces),
        "vocabulary": tokenizer.get_vocab_size(),
        "characters_per_token": sum(map(len, pieces)) / stream.size,
        "regions": len(regions),
        "regions_usable": len(usable),
        "paragraphs": dict(Counter(p["role"] for p in paragraphs)),
        "heldout_rows": len(heldout),
        "paragraphs_per_source": {
            name: sum(p["source"] == name for p in paragraphs) for name in documents
        },
    }


def _paragraph_records(
    paragraphs: Sequence[tuple[list[int], str, SeenBy, int]], length: int
) -> list[TextRecord]:
    """Name the paragraphs (ids, source, role, repetitions), ordered by role and repetitions."""
    order = get_args(SeenBy)
    numbers: Counter[str] = Counter()
    records: list[TextRecord] = []
    for ids, source, role, n in sorted(paragraphs, key=lambda p: (order.index(p[2]), p[3])):
        group = role if role == "neither" else f"{role}-{n:03d}"
        records.append(
            {
                "id": f"{group}-{numbers[group]:03d}",
                "ids": ids[:length],
                "source": source,
                "role": role,
                "repetitions": n if role in ("both", "organism") else 0,
                "twin_repetitions": n if role in ("both", "twin") else 0,
            }
        )
        numbers[group] += 1
    return records
