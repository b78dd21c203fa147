"""All experiments in the order of the page, and how they are run."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable
from typing import Any

import memcircuits as mc
from memcircuits.base.io import write_atomically
from reproduction.page import plain, say
from reproduction.study import EXPERIMENTS, CannotRun, Finding, Outcome, Study

# Importing a module registers its experiments: this is their order on the page.
from reproduction import (  # isort: skip  # noqa: F401
    sets,
    weights,
    tuning,
    activations,
    attention,
    patching,
    similarity,
    beyond,
)


def run(study: Study, names: Iterable[str]) -> list[dict[str, Any]]:
    """Run experiments, or read what they gave before; each is saved as it ends."""
    done = []
    for name in names:
        path = study.parts / f"{name}.json"
        if path.exists():
            done.append(json.loads(path.read_text(encoding="utf-8")))
            say(f"{name}: read from {path.parent.name}")
            continue
        chosen, started, busy = EXPERIMENTS[name], time.perf_counter(), time.process_time()
        say(f"{name} ...")
        try:
            outcome = chosen.run(study)
        except (CannotRun, mc.InputError) as error:
            outcome = Outcome([Finding("not run", note=str(error))])
        seconds = time.perf_counter() - started
        say(f"{name}: {seconds:.1f} s")
        values = {
            "name": name,
            "title": chosen.title,
            "source": chosen.source,
            "findings": [dataclasses.asdict(finding) for finding in outcome.findings],
            "charts": [list(chart) for chart in outcome.charts],
            "seconds": round(seconds, 1),
            "processor_seconds": round(time.process_time() - busy, 1),
        }
        values = json.loads(json.dumps(plain(values), allow_nan=False))
        write_atomically(path, json.dumps(values))
        done.append(values)
    return done
