"""Scan a corpus with two workers on Ray (extra `ray`). Run: python examples/ray_scan.py

Ray is started on this machine and ended again; with `address=` the same call uses a cluster. The
parts written are those of a scan without Ray, and this compares them. Half a minute on two cores.
"""

import functools
import json
import tempfile
from pathlib import Path

import memcircuits as mc
from memcircuits.measure.corpus.on_ray import scan_with_ray
from memcircuits.measure.corpus.scan import scan_to_disk


def write_corpus(path: Path) -> None:
    """Every eighth of the shipped paragraphs."""
    shipped = mc.Paragraphs.shipped()[::8]
    with path.open("w") as file:
        for name, ids in zip(shipped.names, shipped.ids.tolist(), strict=True):
            print(json.dumps({"id": name, "ids": ids}), file=file)


def main(folder: Path) -> None:
    corpus = folder / "corpus.jsonl"
    write_corpus(corpus)
    load = functools.partial(mc.load_model, device="cpu")  # called once in every worker
    options = {"part_records": 16, "progress": False}
    scanned = scan_with_ray(load, corpus, folder / "ray", workers=2, **options)
    print(f"with Ray: {len(scanned.parts)} parts, {scanned.summary}")

    alone = scan_to_disk(load(), corpus, folder / "alone", **options)
    ours, theirs = (
        scan.to_frame().sort_values("id", ignore_index=True) for scan in (scanned, alone)
    )
    print(
        "the same paragraphs and EM without Ray:", ours[["id", "em"]].equals(theirs[["id", "em"]])
    )
    print(f"largest difference of NLL: {(ours['nll'] - theirs['nll']).abs().max():.1e} nats/token")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
