"""The paper's experiments on any model: its numbers beside yours, on one page and in one JSON.

    python examples/reproduce_paper.py
    python examples/reproduce_paper.py --model EleutherAI/gpt-neo-125m --paragraphs 50_50_preds.pt \
        --controls controls.jsonl

Stoehr, Gordon, Zhang, Lewis 2024, "Localizing Paragraph Memorization in Language Models", arXiv
2403.19851. Without `--model` it runs on six paragraphs of each kind of the shipped organism. The
paper's numbers are those of GPT-Neo 125M and of nothing else: on another model they say what is
measured, not what should come out.

Norms are folded into the weights, as in the authors' code; gradients are stated in the raw basis
too. The page begins with its contents: every figure and table of the paper, and what shows it.

Each experiment's result is saved as it ends, under a key made of the weights, the paragraphs and
all options; the same command goes on where it was stopped. A row that cannot be had stays in the
table and says why.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from reproduction.experiments import run
from reproduction.filters import Filters
from reproduction.page import page, plain, shown, span, table
from reproduction.study import (
    EDITS,
    EDITS_ON_GPU,
    EXPERIMENTS,
    SCHEMA,
    SMALL,
    USUAL,
    Study,
    is_papers,
)

import memcircuits as mc
from memcircuits.base.io import write_atomically
from memcircuits.models.registry import adapt


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", default="organism", help="name on the hub, folder or .gguf file")
    add("--paragraphs", help="file of paragraphs; those with EM 50 are the memorized ones")
    add("--controls", help="file of paragraphs that are not memorized")
    add("--perturbed", help="file of perturbed memorized paragraphs; else searched for")
    add("--as-given", action="store_true", help="--paragraphs are memorized, --controls are not")
    add("--unigrams", help="table of token counts (memcircuits unigrams); else counted here")
    add("--max-paragraphs", type=int, help=f"of each kind; {USUAL}, {SMALL} on the organism")
    add("--min-unique", type=float, default=0.5, help="a larger share of tokens must differ")
    add("--drop-keywords", nargs="+", default=[], help="drop paragraphs with one of these words")
    add("--per-count", type=int, help="so many paragraphs of each number of occurrences")
    edits = f"paragraphs edited, one at a time; {EDITS}, {EDITS_ON_GPU} on a GPU"
    add("--edits", type=int, help=edits)
    basis = "folded: norms in the weights, as in the authors' code; raw: the weights of the file"
    add("--basis", choices=("folded", "raw"), default="folded", help=basis)
    add("--patching", choices=("attribution", "exact"), default="attribution")
    add("--n-prefix", type=int, default=50, help="tokens")
    add("--n-continuation", type=int, default=50, help="tokens")
    add("--only", nargs="+", choices=EXPERIMENTS, metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    add("--device", default="auto")
    add("--dtype", default="float32")
    add("--seed", type=int, default=0)
    add("--memory-budget", type=int, help="bytes that one batch may take")
    add("--out", type=Path, default=Path("reproduction"), help="folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Path:
    given = arguments(argv)
    shipped = given.model in ("organism", "organism-planted")
    if given.paragraphs is None and not shipped:
        raise mc.InputError("--paragraphs", "not given", "the shipped ones are the organism's")
    if given.as_given and (given.paragraphs is None or given.controls is None):
        raise mc.InputError("--as-given", "set", "it needs --paragraphs and --controls")
    folded = given.basis == "folded"

    def load(*, fold_ln: bool) -> Any:
        options = {"device": given.device, "dtype": given.dtype, "fold_ln": fold_ln}
        return mc.load_model(given.model, **options)

    model = load(fold_ln=folded)
    filters = Filters(given.min_unique, given.drop_keywords, given.per_count)

    def read(path: str | None) -> mc.Paragraphs | None:
        lengths = {"n_prefix": given.n_prefix, "n_continuation": given.n_continuation}
        return None if path is None else mc.Paragraphs.read(path, model, **lengths)

    unfiltered = [read(given.paragraphs) or mc.Paragraphs.shipped(), read(given.controls)]
    passed = [None if some is None else filters.apply(some, model) for some in unfiltered]
    n_given, n_passed = (sum(map(len, filter(None, sets))) for sets in (unfiltered, passed))
    on_gpu = adapt(model).device.type == "cuda"
    table_of = mc.UnigramTable.read(given.unigrams) if given.unigrams else None
    study = Study(
        model=model,
        given=passed[0],
        controls=passed[1],
        perturbed_given=read(given.perturbed),
        filters=filters,
        n_dropped=n_given - n_passed,
        unigrams=table_of or (mc.UnigramTable.shipped() if shipped else None),
        as_given=given.as_given,
        limit=given.max_paragraphs or (SMALL if shipped else USUAL),
        edits=given.edits or (EDITS_ON_GPU if on_gpu else EDITS),
        patching=given.patching,
        seed=given.seed,
        memory_budget=given.memory_budget,
        folder=given.out,
        other_model=lambda: load(fold_ln=not folded),
    )
    command = " ".join(["python examples/reproduce_paper.py", *asked(given)])
    return write(study, given.only or EXPERIMENTS, command)


def asked(given: argparse.Namespace) -> list[str]:
    """The options that were given, without the folders of this machine."""
    words = []
    for name, value in vars(given).items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, list) and name != "only":
            words += [flag, *value] if value else []
        elif value not in (None, False) and name not in ("only", "out"):
            words += [flag, Path(value).name if Path(str(value)).exists() else str(value)]
    return words


def write(study: Study, names: Iterable[str], command: str) -> Path:
    """Run, write `reproduction.html` and `reproduction.json`, print the table."""
    done = run(study, names)
    rows = table(done, command, study.seed)
    data = {
        "schema": SCHEMA,
        "papers_model": is_papers(study),
        "rows": rows,
        "not_had": [
            f"{row['experiment']}: {row['measure']}: {row['note']}"
            for row in rows
            if row["ours"] is None
        ],
        "seconds": {part["name"]: part["seconds"] for part in done},
        "processor_seconds": {part["name"]: part["processor_seconds"] for part in done},
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "settings": study.settings,
    }
    path = study.folder / "reproduction.json"
    write_atomically(path, json.dumps(plain(data), indent=1, allow_nan=False) + "\n")
    page(study, done, rows).save(study.folder / "reproduction.html")
    frame = pd.DataFrame(rows)
    frame["ours"] = [shown(value) for value in frame["ours"]]
    frame["95 %"] = [span(row) for row in rows]
    print(frame[["measure", "paper", "ours", "95 %", "n"]].to_string(index=False))
    print(f"\n{sum(data['seconds'].values()):.0f} s, {len(data['not_had'])} rows not had")
    print(f"wrote {path} and reproduction.html beside it")
    return path


if __name__ == "__main__":
    try:
        main()
    except (mc.InputError, OSError, MemoryError) as error:
        sys.exit(f"reproduce_paper: {error}")
