"""`python -m tests.benchmarks`: measure, print the table, write docs/benchmarks.*."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from tests.benchmarks import growth, memory, page, screens, variants
from tests.benchmarks.jobs import all_jobs
from tests.benchmarks.subjects import subject
from tests.benchmarks.timing import matrix_product_rate, measure

ROUNDS = 5
DOCS = Path(__file__).parents[2] / "docs"
DESCRIPTIONS = {
    "organism": "The shipped model: half of the paragraphs are recited, half are controls.",
    "random-125m": "GPT-Neo 125M with random weights and tokens (12 layers of 12 heads, d_model "
    "768, vocabulary 50,257): what it costs does not depend on the weights.",
    "random-tiny": "A toy to try the benchmark out.",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of ours and the rivals")
    parser.add_argument("--only", help="only jobs with this text in their name")
    parser.add_argument("--subjects", nargs="+", choices=DESCRIPTIONS)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder to write to")
    parser.add_argument("--resume", action="store_true", help="keep what OUT holds, measure more")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    names = options.subjects or (["random-tiny"] if options.quick else ["organism", "random-125m"])
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    here = machine(options.quick)
    data: dict[str, Any] = {
        "quick": options.quick,
        "rounds": rounds,
        "machine": here,
        "subjects": {},
        "memory": {},
        "growth": [],
        "variants": {},
        "screens": [],
        "seconds": 0.0,
        "complete": False,
    }
    if options.resume:
        data = json.loads((options.out / page.NUMBERS).read_text(encoding="utf-8"))
        if data["machine"]["versions"] != here["versions"] or data["rounds"] != rounds:
            parser.error("--resume: other versions or rounds were measured there")
    last = time.perf_counter()

    def keep() -> None:
        """Save after every step: a run that was cut off is resumed."""
        nonlocal last
        now = time.perf_counter()
        data["seconds"] += now - last
        last = now
        page.write(data, options.out)

    for name in names:
        small = name == "random-125m"
        one = subject(name, 16)
        jobs = data["subjects"].setdefault(
            name,
            {"description": DESCRIPTIONS[name], "n_paragraphs": len(one.paragraphs), "jobs": {}},
        )["jobs"]
        for job in all_jobs(one, whole=not small):
            if job.name in jobs or (options.only and options.only not in job.name):
                continue
            say(f"{data['seconds']:5.0f} s  {name}: {job.name}")
            jobs[job.name] = described(measure(job, rounds, say, warm_up=not small))
            keep()
        if not (small or options.only or name in data["variants"]):
            say(f"{data['seconds']:5.0f} s  {name}: variants of the scan")
            data["variants"][name] = variants.measure(one, rounds)
            keep()
        if name == "organism" and not options.only and not data["screens"]:
            say(f"{data['seconds']:5.0f} s  screens")
            data["screens"] = screens.measure(one.bridge)
            keep()
        if name == names[-1] and not options.only and not data["growth"]:
            say(f"{data['seconds']:5.0f} s  growth")
            data["growth"] = growth.measure(one.bridge.tokenizer, rounds, quick=options.quick)
            keep()
        del one
    if not options.only and not data["memory"] and sys.platform == "linux":
        say(f"{data['seconds']:5.0f} s  memory")
        data["memory"] = {"subject": names[-1], "peaks": memory.measure(names[-1])}
        keep()
    data["complete"] = not options.only and set(data["subjects"]) == {"organism", "random-125m"}
    keep()
    print(page.markdown(data))
    say(f"measured for {data['seconds']:.0f} s; in {options.out / page.PAGE}")


def described(job: dict[str, Any]) -> dict[str, Any]:
    """Settings as text: models do not fit into JSON."""
    for row in job["rows"]:
        setting = row["setting"]
        if isinstance(setting, tuple):
            setting = f"{setting[0]}, batch {setting[2]}"
        elif setting is not None:
            setting = f"batch {setting}"
        row["setting"] = setting or "default"
    return job


def machine(quick: bool) -> dict[str, Any]:
    """What it ran on; no names of machines or users."""
    packages = ("memcircuits", "transformer-lens", "transformers", "nnsight", "torch")
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "matrix_product_gflops": matrix_product_rate(256 if quick else 4096),
        "versions": {p: importlib.metadata.version(p) for p in packages if has(p)},
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "?")


def has(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
