"""Run the stages of a build: `python -m memcircuits.organism_build [--out DIR] [--work DIR]`.

Every stage leaves its result in the work folder, so a stopped build continues where it stopped:

| stage | what it does |
| --- | --- |
| corpus | fetch and clean the sources |
| text | cut out regions, train the tokenizer on the rest, choose the paragraphs and their roles |
| base | train the model on the rest (checkpoint every 100 steps) |
| organism | train the base on with the organism's paragraphs, each an exact number of times |
| twin | the same with the twin's paragraphs; all other rows and the order are the organism's |
| noise | the rows of the organism in another order |
| baseline | an interpolated Kneser-Ney trigram model of the same training tokens |
| export | write models, tokenizer, paragraphs and unigram counts, and measure them |
| card | write the model card from the numbers of all stages |

Every random choice comes from generators seeded by `Settings.seed`.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from memcircuits.base.errors import one_of
from memcircuits.base.io import write_atomically
from memcircuits.organism import DATA
from memcircuits.organism_build.card import write_card
from memcircuits.organism_build.export import stage_export
from memcircuits.organism_build.formation import recitation_over_steps
from memcircuits.organism_build.kneser_ney import stage_baseline
from memcircuits.organism_build.model import new_model, read_weights, write_weights
from memcircuits.organism_build.records import read_records, read_rows
from memcircuits.organism_build.rows import base_rows, planting_rows
from memcircuits.organism_build.settings import STAGES, Planting, Record, Settings, Stage, log
from memcircuits.organism_build.text import stage_text
from memcircuits.organism_build.training import train


def stage_base(work: Path, settings: Settings, device: str) -> Record:
    """Base training: full learning rate, over the last 40 % of the steps down to a tenth."""
    rng = np.random.default_rng([settings.seed, 2])
    stream = np.load(work / "stream.npy")
    model = new_model(settings, device)
    record = train(
        model,
        base_rows(stream, settings.base_steps * settings.batch, settings.context, rng),
        read_rows(work / "heldout.jsonl"),
        settings,
        schedule=lambda done: min(1.0, 0.1 + 0.9 * (1 - done) / 0.4),
        checkpoint=work / "base.pt",
    )
    write_weights(model, work / "base.safetensors")
    return record


def stage_planting(work: Path, settings: Settings, name: Planting, device: str) -> Record:
    """Planting from the base weights, the learning rate falling linearly to zero."""
    paragraphs = read_records(work / "paragraphs.jsonl")
    column: Literal["repetitions", "twin_repetitions"]
    column = "twin_repetitions" if name == "twin" else "repetitions"
    rows = planting_rows(
        [(p["ids"], p[column]) for p in paragraphs],
        np.load(work / "stream.npy"),
        np.load(work / "openings.npy"),
        settings,
        order=int(name == "noise"),
    )
    model = read_weights(settings, work / "base.safetensors", device)
    record = train(
        model,
        rows,
        read_rows(work / "heldout.jsonl"),
        settings,
        schedule=lambda done: settings.plant_factor * (1 - done),
        checkpoint=work / f"{name}.pt",
        n_kept=settings.checkpoints,
    )
    write_weights(model, work / f"{name}.safetensors")
    checkpoints = sorted(work.glob(f"{name}-step-*.safetensors"))
    return record | {
        "planted_rows": sum(p[column] for p in paragraphs),
        "formation": recitation_over_steps(checkpoints, paragraphs, settings, device),
    }


def stage_corpus(work: Path, documents: dict[str, list[str]] | None) -> Record:
    """Fetch and clean the sources, or take the documents that are given."""
    records: list[Record] = []
    if documents is None:
        from memcircuits.organism_build.corpus import fetch

        documents, records = fetch(work / "sources")
    write_atomically(work / "documents.json", json.dumps(documents, ensure_ascii=False))
    return {"sources": records}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "tokenizers", "numpy", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def build(
    out: Path,
    work: Path,
    settings: Settings | None = None,
    *,
    documents: dict[str, list[str]] | None = None,
    stage: Stage | None = None,
    device: str = "cpu",
) -> Record:
    """Run all stages that have no result in the work folder yet.

    Args:
        out: folder of the files that ship.
        work: folder of downloads, checkpoints and results of the stages.
        settings: settings of the build; the shipped organism's by default.
        documents: documents of each source, instead of the corpus.
        stage: run this stage and all later ones again.
        device: where the models are trained.

    Returns:
        The contents of `training.json`.

    Raises:
        ValueError: if the work folder belongs to a build with other settings, or there is no such
            stage.
    """
    settings = settings or Settings()
    if stage is not None:
        one_of("stage", stage, STAGES)
    settings_record = json.loads(json.dumps(asdict(settings)))
    _prepare(work, settings_record, stage)
    stages: dict[Stage, Callable[[], Record]] = {
        "corpus": lambda: stage_corpus(work, documents),
        "text": lambda: stage_text(
            work, settings, json.loads((work / "documents.json").read_text("utf-8"))
        ),
        "base": lambda: stage_base(work, settings, device),
        "organism": lambda: stage_planting(work, settings, "organism", device),
        "twin": lambda: stage_planting(work, settings, "twin", device),
        "noise": lambda: stage_planting(work, settings, "noise", device),
        "baseline": lambda: stage_baseline(work, settings),
        "export": lambda: stage_export(work, settings, out),
    }
    training: Record = {"settings": settings_record, "versions": _versions()}
    n_threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        for name, run in stages.items():
            result = work / f"{name}.json"
            if not result.exists():
                log.info("stage %s", name)
                start = time.monotonic()
                record = run()
                wall_seconds = round(time.monotonic() - start, 1)
                _write_json(result, record | {"wall_seconds": wall_seconds})
                (work / f"{name}.pt").unlink(missing_ok=True)
            training[name] = json.loads(result.read_text("utf-8"))
    finally:
        torch.set_num_threads(n_threads)
    _write_json(out / "training.json", training)
    write_card(out)
    return training


def _prepare(work: Path, settings: Record, stage: Stage | None) -> None:
    """Remove the results that are to be made again, and note the settings in the work folder."""
    work.mkdir(parents=True, exist_ok=True)
    note = work / "settings.json"
    if stage is not None:
        for name in STAGES[STAGES.index(stage) :]:
            for file in (f"{name}.json", f"{name}.pt", f"{name}-step-*.safetensors"):
                for stale in work.glob(file):
                    stale.unlink()
    elif note.exists() and json.loads(note.read_text("utf-8")) != settings:
        raise ValueError(
            f"work={str(work)!r} holds a build with other settings: name the first stage to run "
            "again, or choose another folder"
        )
    _write_json(note, settings)


def _write_json(path: Path, value: object) -> None:
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the build."""
    parser = argparse.ArgumentParser(
        prog="python -m memcircuits.organism_build", description="Rebuild the organism."
    )
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the files that ship")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("organism-work"),
        help="folder of downloads, checkpoints and the log; a stopped build goes on from it",
    )
    parser.add_argument("--stage", choices=STAGES, help="run this stage and all later ones again")
    parser.add_argument("--device", default="cpu", help="where the models are trained")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(options.work / "build.log")],
    )
    try:
        training = build(options.out, options.work, stage=options.stage, device=options.device)
    except (ValueError, RuntimeError) as error:
        log.error("%s", error)
        return 2
    for name, curve in training["export"]["curves"].items():
        for level in curve:
            log.info("%s: %s", name, level)
    return 0
