"""A scan in a process of its own, for tests that kill it: `python -m tests.helpers.corpus_job`."""

import sys

from memcircuits.data.windows import Windows
from memcircuits.measure.corpus.scan import scan_to_disk
from tests.helpers import models as zoo

WINDOWS = Windows(10, 12, stride=22)
PART_RECORDS = 8


def load():
    return zoo.bridge("gpt_neo")


def write_corpus(path, rows, length=220):
    """A corpus of `rows` documents of `length` tokens, a few of them unusable."""
    ids = zoo.random_ids(rows, length, seed=3).tolist()
    with path.open("w") as file:
        for i, row in enumerate(ids):
            text = "nonsense" if i % 50 == 7 else str(row[:5] if i % 50 == 9 else row)
            file.write(f'{{"id": "d{i}", "ids": {text}, "i": {i}}}\n')


if __name__ == "__main__":
    scan_to_disk(
        load(),
        sys.argv[1],
        sys.argv[2],
        windows=WINDOWS,
        part_records=PART_RECORDS,
        batch_size=32,
        resume=True,
    )
