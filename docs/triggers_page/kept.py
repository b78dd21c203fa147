"""Types of the results, and constants that several parts share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memcircuits.evidence.patching.results import LayerPatches, PatchMap
from memcircuits.evidence.triggers.perturbation import Perturbation
from memcircuits.results.result import Result

DOCS = Path(__file__).parents[1]
PICTURES = DOCS / "pictures"
SITES = ("q", "k", "v", "z")
LAYER_SITES = ("attn_out", "mlp_out")
METRICS = ("first_impacted", "logit_diff")
RESAMPLES = 2000
BUDGET = 64 * 2**20  # bytes; batches that stay in the cache of a small processor
Results = dict[tuple[str, str], Perturbation]
Maps = dict[tuple[str, str], PatchMap]
Estimates = dict[tuple[str, str, str], PatchMap]
Layers = dict[tuple[str, str], LayerPatches]


class Kept:
    """Results in a folder, each computed once, and how long that took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.times = folder / "seconds.json"
        known = self.times.exists()
        self.seconds: dict[str, float] = json.loads(self.times.read_text()) if known else {}

    def get(self, name: str, compute: Callable[[], Result]) -> Any:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            print(name, flush=True)
            start = time.process_time()
            compute().save(path)
            known = json.loads(self.times.read_text()) if self.times.exists() else {}
            self.seconds[name] = time.process_time() - start
            self.times.write_text(json.dumps(known | self.seconds))
        return Result.load(path)
