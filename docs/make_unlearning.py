"""Write docs/unlearning.md from runs on the shipped organism: python docs/make_unlearning.py.

Every run leaves a file in --work and is not done again. docs/unlearning.json keeps what the runs
found, and docs/unlearning-audits.json the audits, several minutes of one core for each: of --audits
paragraphs in each arm, and of --deep paragraphs in that of deep unlearning. With --keep, what these
files hold is not done again; with --page the page is written from them alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from unlearning_page import audits, front, runs
from unlearning_page.numbers import collect, save, unpack
from unlearning_page.page import write
from unlearning_page.plot import plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "unlearning")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="only runs whose names match this pattern")
    parser.add_argument("--keep", action="store_true", help="only do what the JSON lacks")
    parser.add_argument("--page", action="store_true", help="only write the page, from the JSON")
    parser.add_argument("--audits", type=int, default=3, help="paragraphs audited in each arm")
    parser.add_argument("--deep", type=int, default=22, help="paragraphs forgotten deeply")
    given = parser.parse_args()
    numbers = Path(__file__).with_name("unlearning.json")
    if not given.page:
        work = given.work / "runs"
        work.mkdir(parents=True, exist_ok=True)
        out = numbers.with_name(audits.NAME)
        if given.keep:
            unpack(json.loads(numbers.read_text(encoding="utf-8")), work)
            unpack(json.loads(out.read_text(encoding="utf-8"))["audits"], given.work / "audited")
        only, workers = given.only, given.workers
        tuning = [("tuning", i, work, only) for i in range(len(runs.tuning_jobs()))]
        finish("tuning", runs.perform, tuning, workers)
        jobs = runs.jobs(front.chosen_settings(collect(work)), given.work / "edits")
        finish("runs", runs.perform, [("runs", i, work, only) for i in range(len(jobs))], workers)
        save(collect(work), numbers)
        plot(collect(work))
        audited = [(*job, given.work) for job in audits.jobs(given.audits, given.deep)]
        if audited:
            finish("audits", audits.perform, audited, workers)
            audits.save(given.work, out)
    write(numbers)


def finish(
    what: str, perform: Callable[..., None], jobs: Sequence[tuple[Any, ...]], workers: int
) -> None:
    """All jobs, in processes of one thread."""
    start = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(perform, *job) for job in jobs]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            print(f"{time.monotonic() - start:6.0f} s, {what}: {done} of {len(jobs)}", flush=True)


if __name__ == "__main__":
    main()
