"""Peak memory of each job, in a process of its own: the most it ever held beyond the model.

`python -m tests.benchmarks.memory JOB SUBJECT` does one job and prints the bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

N_PARAGRAPHS = 8


def rival(subject: Any) -> None:
    with torch.no_grad():
        subject.bridge.run_with_cache(subject.paragraphs.ids)


def scan(subject: Any) -> None:
    from memcircuits.measure.scanning import scan

    scan(subject.bridge, subject.paragraphs, progress=False)


def ablate(subject: Any) -> None:
    from memcircuits.base.heads import Head
    from memcircuits.evidence.ablation import Ablation

    heads = [Head(0, 0), Head(subject.n_layers // 2, 0), Head(subject.n_layers - 1, 0)]
    Ablation(subject.bridge, subject.paragraphs, mode="zero").effects(heads, progress=False)


def patch(subject: Any) -> None:
    from memcircuits.evidence.patching.sweeps import patch_heads

    paragraphs = subject.paragraphs
    ids = torch.cat([paragraphs.prefix.roll(1, 0), paragraphs.continuation], 1)
    # Two heads of each layer would do, but it has no such option: one pair, all heads.
    patch_heads(subject.bridge, paragraphs[:1], ids[:1], site="z", progress=False)


def screen(subject: Any) -> None:
    from memcircuits.evidence.ablation import Ablation
    from memcircuits.evidence.screening import attributions

    attributions(Ablation(subject.bridge, subject.paragraphs, mode="zero"), progress=False)


def perturb(subject: Any) -> None:
    from memcircuits.evidence.triggers.perturbation import perturb_prefix

    perturb_prefix(subject.bridge, subject.paragraphs[:1], progress=False)


def gradients(subject: Any) -> None:
    from memcircuits.evidence.gradients.parameters import parameter_gradients

    parameter_gradients(
        subject.bridge,
        subject.paragraphs,
        average="paragraph",
        components=("W_Q", "W_K", "W_V", "W_O"),
        progress=False,
    )


JOBS: dict[str, Callable[[Any], None]] = {
    "run_with_cache": rival,
    "scan": scan,
    "ablate": ablate,
    "patch": patch,
    "screen": screen,
    "perturb": perturb,
    "gradients": gradients,
}


def measure(subject: str, jobs: tuple[str, ...] = tuple(JOBS)) -> dict[str, float]:
    """Peak bytes of each job beyond what the process held before it."""
    peaks = {}
    for job in jobs:
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.memory", job, subject],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[job] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def main() -> None:
    from tests.benchmarks.subjects import subject as make

    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("subject")
    options = parser.parse_args()
    subject = make(options.subject, N_PARAGRAPHS)
    object.__setattr__(subject, "hooked", None)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # Linux: this sets the peak back to what is held now.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = held("VmRSS")
    JOBS[options.job](subject)
    print(held("VmHWM") - before)


def held(what: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {what}: memory is measured on Linux only")


if __name__ == "__main__":
    main()
