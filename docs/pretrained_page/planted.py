"""Part `planted`: the steps of examples/bring_your_own_model.py on SmolLM2-135M."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "examples" / "bring_your_own_model.py"


def example() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("bring_your_own_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def measure() -> dict[str, Any]:
    """What every step found, its processor seconds and the memory by its end."""
    module = example()
    rows = module.main(module.smollm2()).rows
    return {"steps": [dataclasses.asdict(row) for row in rows]}


def text(measured: dict[str, Any]) -> list[str]:
    """The part as Markdown lines."""
    steps = measured["steps"]
    return [
        "## What can be known for certain: planted paragraphs",
        "",
        "Where a recitation of a pretrained model lies is known to nobody. So four invented "
        "paragraphs are written into SmolLM2-135M-Instruct, four bits a weight, by `mc.plant`, in "
        "the attention of one layer, and are looked for. What stands between `plant` and the last "
        "line runs on the model that recites them (`python examples/bring_your_own_model.py`). "
        "Four paragraphs are few: no interval is given, and a head's rank is no claim. Eight "
        "ordinary paragraphs are the controls.",
        "",
        "| step | what it found | processor seconds | GiB |",
        "| --- | --- | --- | --- |",
        *(
            f"| {row['name']} | {row['result']} | {row['cpu']:.1f} | {row['gib']:.2f} |"
            for row in steps
        ),
        "",
        f"{sum(row['cpu'] for row in steps):.0f} processor seconds in all; the last column is the "
        "most memory that the process had used by then.",
        "",
    ]
