"""How long does the reproduction of the paper take? `python -m tests.benchmarks.reproduction DIR`

Runs `examples/reproduce_paper.py` on a GPT-Neo with random weights of the size of GPT-Neo 125M and
paragraphs of random tokens, taken as memorized and control paragraphs: what the weights are does
not change the cost. Prints the seconds of each experiment, which DIR/seconds.json keeps; stopped,
it goes on where it was.

With fewer than 50 + 50 paragraphs or fewer edits it says what the usual number would take: all
experiments do the same to each paragraph, but for `FIXED`, which take a few whatever is given.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from memcircuits.base.io import write_atomically
from memcircuits.organism import DATA
from tests.benchmarks.subjects import random_neo, random_paragraphs

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


FIXED = ("sets", "duplication", "position-patching")
USUAL, EDITS = 50, 2
CONTROLS = 16  # an edit needs as many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for the model, the paragraphs and the results")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--paragraphs", type=int, default=USUAL, help="of each kind")
    parser.add_argument("--edits", type=int, default=EDITS)
    given = parser.parse_args()
    import reproduce_paper

    model = given.folder / f"random-{given.layers}"
    if not (model / "config.json").exists():
        random_neo(given.layers).save_pretrained(model)
        AutoTokenizer.from_pretrained(DATA, local_files_only=True).save_pretrained(model)
    options: list[object] = ["--model", model, "--as-given", "--out", given.folder]
    options += ["--max-paragraphs", given.paragraphs, "--edits", given.edits]
    numbers = {"paragraphs": given.paragraphs, "controls": max(given.paragraphs, CONTROLS)}
    for seed, (name, n) in enumerate(numbers.items()):
        path = given.folder / f"{name}-{n}.pt"
        torch.save(random_paragraphs(n, 50257, seed).ids, path)
        options += [f"--{name}", path]
    out = reproduce_paper.main([*map(str, options)])
    report = json.loads(out.read_text(encoding="utf-8"))
    seconds = {
        "paragraphs": given.paragraphs,
        "edits": given.edits,
        "layers": given.layers,
        "threads": torch.get_num_threads(),
        "peak_memory_gib": report["peak_memory_gib"],
        "minutes": round(sum(report["seconds"].values()) / 60, 1),
        "seconds": report["seconds"],
        "processor_seconds": report["processor_seconds"],
    }
    write_atomically(given.folder / "seconds.json", json.dumps(seconds, indent=1) + "\n")
    print_table(seconds)


def print_table(measured: dict[str, Any]) -> None:
    """Each experiment's seconds, and what it would take with the usual number of paragraphs."""
    total = dict.fromkeys(("seconds", "processor_seconds"), 0.0)
    print(f"\n{'experiment':20} {'seconds':>9} {'of processors':>14} {'as usual':>9}")
    for name in measured["seconds"]:
        scale = {"fine-tuning": EDITS / measured["edits"]} | dict.fromkeys(FIXED, 1.0)
        usual = scale.get(name, USUAL / measured["paragraphs"])
        seconds, busy = (measured[kind][name] for kind in total)
        print(f"{name:20} {seconds:9.1f} {busy:14.1f} {usual * busy:9.1f}")
        for kind in total:
            total[kind] += usual * measured[kind][name]
    minutes = " or ".join(f"{value / 60:.0f} minutes in {kind}" for kind, value in total.items())
    print(f"{USUAL} + {USUAL} paragraphs, {EDITS} edits: {minutes}")
    print(f"{measured['peak_memory_gib']} GiB at most, {measured['threads']} threads")


if __name__ == "__main__":
    main()
