"""Write docs/twin.md and docs/twin.json: python docs/make_twin.py.

python docs/make_twin.py --noise FOLDER --checkpoints FOLDER --keep FOLDER

What training wrote, by comparing the organism with its twin. The noise twin and the checkpoints are
not shipped: they are in the folder in which `python -m memcircuits.organism_build` worked. Without
them their parts of the page are left out. Results are kept in --keep and not computed again;
`--page` only writes the page again, from the numbers in docs/twin.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from twin_page.measure import Study
from twin_page.summary import summary
from twin_page.text import text

DOCS = Path(__file__).parent


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="organism")
    parser.add_argument("--twin", default="organism-twin")
    parser.add_argument("--noise", type=Path, help="folder of the noise twin")
    parser.add_argument(
        "--checkpoints", type=Path, help="folder of organism-step-* and twin-step-*"
    )
    parser.add_argument("--paragraphs", type=Path, help="with a column role; default: the shipped")
    parser.add_argument("--n-prefix", type=int, default=50)
    parser.add_argument("--n-continuation", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the results")
    parser.add_argument("--out", type=Path, default=DOCS, help="where the page is written")
    parser.add_argument("--quick", action="store_true", help="a few paragraphs of everything")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    given = parser.parse_args(arguments)
    path = given.out / "twin.json"
    if not given.page:
        with tempfile.TemporaryDirectory() as folder:
            given.keep = given.keep or Path(folder)
            numbers = Study(given).numbers()
        path.write_text(json.dumps(numbers), encoding="utf-8")
    numbers = json.loads(path.read_text(encoding="utf-8"))
    numbers["summary"] = summary(numbers)
    path.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    page = text(numbers)
    (given.out / "twin.md").write_text(page, encoding="utf-8")
    print(f"wrote {given.out / 'twin.md'}")


if __name__ == "__main__":
    main()
