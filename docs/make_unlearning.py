"""Write docs/unlearning.md from runs on the shipped organism: python docs/make_unlearning.py.

Every run leaves a small file in --work and is not done again. docs/unlearning.json keeps what the
runs found: with --page the page is written from that alone. With --only some are run, and sections
that need others stay as they are. Everything takes two hours of one core. The first section is an
audit of --audits paragraphs, several minutes of one core for each, with its numbers in
docs/unlearning-audits.json; with --page it is not run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from unlearning_page import audits
from unlearning_page.numbers import collect, save
from unlearning_page.runs import jobs, perform
from unlearning_page.sections import write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "unlearning")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="only runs whose names match this pattern")
    parser.add_argument("--page", action="store_true", help="only write the page, from the JSON")
    parser.add_argument("--audits", type=int, default=3, help="paragraphs of the first section")
    parser.add_argument("--only-audits", action="store_true", help="run the first section alone")
    given = parser.parse_args()
    numbers = Path(__file__).with_name("unlearning.json")
    if not given.page and given.audits:
        audits.measure(given.audits, given.work / "audits", numbers.with_name(audits.NAME))
    if not given.page and not given.only_audits:
        given.work.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
            chains = range(len(jobs()))
            for future in as_completed(
                [pool.submit(perform, i, given.work, given.only) for i in chains]
            ):
                future.result()
                done = len(list(given.work.rglob("*.json")))
                print(f"{time.monotonic() - start:6.0f} s, {done} runs done", flush=True)
        save(collect(given.work), numbers)
    write(json.loads(numbers.read_text(encoding="utf-8")), numbers.with_suffix(".md"))


if __name__ == "__main__":
    main()
