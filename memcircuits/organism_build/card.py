"""TODO."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from memcircuits.organism import DATA
from memcircuits.organism_build.files import write_atomic
from memcircuits.organism_build.settings import END, END_ID, Record


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

    python -m memcircuits.organism_build.pipeline --out DIR --work DIR

needs `apt-get`, `dpkg-deb` and `npm` to fetch the sources, and about
{minutes:.0f} minutes on two CPU cores. Seeds are fixed, but
another processor or PyTorch version rounds differently, so weights agree in behaviour, not bit
for bit. Versions used here: {", ".join(f"{k} {v}" for k, v in facts["versions"].items())}.
"""


def write_card(out: Path = DATA, curve: Sequence[Record] | None = None) -> None:
    """Write ``MODEL_CARD.md`` from ``training.json``; see :func:`card`."""
    facts = json.loads((out / "training.json").read_text("utf-8"))
    write_atomic(out / "MODEL_CARD.md", card(facts, curve))
