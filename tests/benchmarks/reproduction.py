"""How long does the reproduction of the paper take? `python -m tests.benchmarks.reproduction`

Runs `examples/reproduce_paper.py` on a GPT-Neo with random weights of the size of GPT-Neo 125M and
50 + 50 paragraphs of random tokens, taken as memorized and control paragraphs: what the weights are
does not change the cost. Prints the seconds of each experiment; stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from memcircuits.organism import DATA

from .subjects import random_neo, random_paragraphs

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for the model, the paragraphs and the results")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--paragraphs", type=int, default=50)
    given = parser.parse_args()
    import reproduce_paper

    model, files = given.folder / f"random-{given.layers}", []
    if not (model / "config.json").exists():
        random_neo(given.layers).save_pretrained(model)
        AutoTokenizer.from_pretrained(DATA, local_files_only=True).save_pretrained(model)
    for seed, name in enumerate(("memorized", "control")):
        files.append(given.folder / f"{name}-{given.paragraphs}.pt")
        torch.save(random_paragraphs(given.paragraphs, 50257, seed).ids, files[-1])
    options = ["--model", model, "--paragraphs", files[0], "--controls", files[1], "--as-given"]
    out = reproduce_paper.main([*map(str, options), "--out", str(given.folder)])
    found = json.loads(out.read_text(encoding="utf-8"))
    print(f"{'experiment':20} {'seconds':>9} {'of processors':>14}")
    for name, seconds in found["seconds"].items():
        print(f"{name:20} {seconds:9.1f} {found['processor_seconds'][name]:14.1f}")
    for kind in ("seconds", "processor_seconds"):
        print(f"{sum(found[kind].values()) / 60:.1f} minutes in {kind}")
    print(f"{found['peak_memory_gib']} GiB at most, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
