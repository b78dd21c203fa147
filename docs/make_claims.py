"""Measure what sentences of README and the docs say, and put the numbers into them.

python docs/make_claims.py [SECTION ...]   measure all sections, or some, and update the sentences
python docs/make_claims.py --text          update the sentences only

`claims.toml` is the list of claims; `claims_page.sentences` says how it is read. Numbers that no
other page measures are measured here, into `claims.json`. Run this after the other `make_*.py`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from claims_page.measure import SECTIONS
from claims_page.sentences import check, update

from memcircuits.base.io import write_atomically

NUMBERS = Path(__file__).parent / "claims.json"


def main(*arguments: str) -> int:
    measured: dict[str, Any] = json.loads(NUMBERS.read_text("utf-8")) if NUMBERS.exists() else {}
    if "--text" not in arguments:
        for name in arguments or SECTIONS:
            start = time.process_time()
            section = SECTIONS[name]()
            measured[name] = section | {"cpu_seconds": round(time.process_time() - start)}
            print(f"{name}: {measured[name]['cpu_seconds']} s", flush=True)
            write_atomically(NUMBERS, json.dumps(measured, indent=1, default=float) + "\n")
    for path in update():
        print(f"updated {path}")
    problems = check()
    print("\n".join(problems) or "every claim agrees with its numbers")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
