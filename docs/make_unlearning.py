"""Write docs/unlearning.md from runs on the shipped organism: python docs/make_unlearning.py.

Every run leaves a file in --work and is not done again. docs/unlearning.json keeps what the runs
found, and docs/unlearning-audits.json the audits of --audits paragraphs, several minutes of one
core for each: with --page the page is written from these alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from unlearning_page import audits, front, runs
from unlearning_page.numbers import collect, save
from unlearning_page.page import write
from unlearning_page.plot import plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "unlearning")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="only runs whose names match this pattern")
    parser.add_argument("--page", action="store_true", help="only write the page, from the JSON")
    parser.add_argument("--audits", type=int, default=3, help="paragraphs audited; 0: as before")
    given = parser.parse_args()
    numbers = Path(__file__).with_name("unlearning.json")
    if not given.page:
        work = given.work / "runs"
        work.mkdir(parents=True, exist_ok=True)
        finish("tuning", len(runs.tuning_jobs()), work, given)
        n_jobs = len(runs.jobs(front.chosen_settings(collect(work)), given.work / "edits"))
        finish("runs", n_jobs, work, given)
        save(collect(work), numbers)
        plot(collect(work))
        if given.audits:
            audits.measure(given.audits, given.work, numbers.with_name(audits.NAME))
    write(numbers)


def finish(chain: str, n_jobs: int, work: Path, given: argparse.Namespace) -> None:
    """All runs of a chain, in processes of one thread."""
    start = time.monotonic()
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(runs.perform, chain, i, work, given.only) for i in range(n_jobs)]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            print(f"{time.monotonic() - start:6.0f} s, {chain}: {done} of {n_jobs}", flush=True)


if __name__ == "__main__":
    main()
