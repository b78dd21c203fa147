"""Every run of the page, in chains that a process works off; a finished run is a file."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unlearning_page import front, further
from unlearning_page.numbers import collect, versions_line
from unlearning_page.setting import setting

Job = tuple[str, Callable[[], dict[str, Any]]]


def tuning_jobs() -> list[Job]:
    """What chooses the rivals' learning rates and KL weights."""
    return [
        (f"{name}/{i}", lambda arm=arm, i=i: front.run(arm, setting().tuned_on[[i]]))
        for name, (_, _, arm) in front.tuning().items()
        for i in range(front.N_TUNED)
    ]


def jobs(settings: dict[str, tuple[float, float]], edits: Path) -> list[Job]:
    """Every other run, with the rivals at these rates and weights."""
    found: list[Job] = [("versions", lambda: {"versions": versions_line()})]
    for i in range(front.N_REPORTED):
        found.append((f"never/{i}", lambda i=i: front.never_trained(setting().targets[[i]])))
        found += [
            (
                f"{name}/{i}",
                lambda arm=arm, i=i, kept=edits / f"{name}-{i}.safetensors": front.run(
                    arm, setting().targets[[i]], kept
                ),
            )
            for name, arm in front.arms(settings).items()
        ]
    found += [(f"noise/{mask}", lambda mask=mask: further.noisy(mask)) for mask in further.MASKS]
    found += [
        (f"share/{bucket}", lambda bucket=bucket: further.share(bucket))
        for bucket in further.BUCKETS
    ]
    return found


def perform(chain: str, number: int, work: Path, only: str) -> None:
    """One run of `tuning_jobs` or of `jobs`, unless its file is there."""
    if chain == "tuning":
        name, run = tuning_jobs()[number]
    else:
        name, run = jobs(front.chosen_settings(collect(work)), work.parent / "edits")[number]
    path = work / f"{name}.json"
    if path.exists() or not re.match(only, name):
        return
    start = time.process_time()
    outcome = run()
    outcome |= {"cpu_seconds": time.process_time() - start, "fingerprint": setting().fingerprint}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=work, suffix=".part", delete=False) as file:
        json.dump(outcome, file)
    os.replace(file.name, path)
