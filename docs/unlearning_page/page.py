"""docs/unlearning.md from the numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlearning_page import audits, front, further
from unlearning_page.setting import N_CONTROL, N_KEPT, N_OTHERS, N_UNSEEN, SEED

HEAD = """# Unlearning on the organism

Written by `python docs/make_unlearning.py`. Model: the shipped organism, weights
`{weights}`, float32, CPU, {versions}.
{minutes} minutes of one core, audits not counted.

The paragraphs that only the organism was trained on, and that it recites in full, were shuffled
with seed {seed}: the recipe was chosen on the first half, and the numbers here are of paragraphs of
the second. Edits are given {control} controls and {kept} other recitations, of which they draw 80
and hold a fifth out. Harm is measured on {unseen} other controls and {others} other recitations:
the KL along the unedited model's own continuations of these controls, how many of their 50 tokens
the edited model repeats, and how many of the recitations are still recited in full. Brackets are
95 % bootstrap intervals over the edited paragraphs (2,000 draws, seed {seed}), which few paragraphs
make too narrow; what harm is measured on is the same for all lines and is not resampled.
"""


def page(runs: Mapping[str, Any], audited: Mapping[str, Any]) -> str:
    """The whole page."""
    fingerprints = {run["fingerprint"] for run in runs.values()}
    assert len(fingerprints) == 1, "runs of different weights"
    head = HEAD.format(
        weights=fingerprints.pop(),
        versions=runs["versions"]["versions"],
        minutes=round(sum(run["cpu_seconds"] for run in runs.values()) / 60),
        seed=SEED,
        control=N_CONTROL,
        kept=N_KEPT,
        unseen=N_UNSEEN,
        others=N_OTHERS,
    )
    sections = {
        audits.TITLE: audits.section(audited),
        front.TITLE: front.section(runs),
        further.NOISE: further.noise_section(runs),
        further.SHARE: further.share_section(runs),
    }
    return head + "".join(f"\n## {title}\n{text}" for title, text in sections.items())


def write(numbers: Path) -> None:
    """The page beside its numbers, and the picture."""
    runs = json.loads(numbers.read_text(encoding="utf-8"))
    audited = json.loads(numbers.with_name(audits.NAME).read_text(encoding="utf-8"))
    numbers.with_suffix(".md").write_text(page(runs, audited), encoding="utf-8")
