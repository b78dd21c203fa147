"""Write docs/triggers.md, its numbers and its pictures: python docs/make_triggers.py.

Perturbation and activation patching on the shipped model. Needs Chromium for the pictures. Results
are kept in --keep and not computed again, so that the page can be rewritten at once.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from triggers_page.kept import (
    BUDGET,
    DOCS,
    LAYER_SITES,
    METRICS,
    SITES,
    Estimates,
    Kept,
    Maps,
    Results,
)
from triggers_page.pictures import pictures
from triggers_page.text import text

import memcircuits as mc
from memcircuits.evidence.patching.context import DIRECTIONS
from memcircuits.evidence.patching.sweeps import patch_heads, patch_layers
from memcircuits.evidence.triggers.minimal_sets import minimal_sets
from memcircuits.evidence.triggers.perturbation import perturb_prefix
from memcircuits.evidence.triggers.replacements import REPLACEMENTS
from memcircuits.measure.decoding import greedy_continuations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--paragraphs", type=int, default=60, help="memorized, and as many controls"
    )
    parser.add_argument("--pairs", type=int, default=12, help="pairs for patching")
    parser.add_argument("--draws", type=int, default=10, help="random draws for the one paragraph")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the results")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kept = Kept(given.keep or Path(folder))
        write(given, kept)


def write(given: argparse.Namespace, kept: Kept) -> None:
    model = mc.load_model()
    unigrams = mc.UnigramTable.shipped()
    memorized = mc.scan(model, mc.Paragraphs.shipped("planted")).memorized
    assert memorized is not None
    memorized = some(memorized, given.paragraphs, given.seed)
    never_seen = some(mc.Paragraphs.shipped("control"), given.paragraphs, given.seed)
    sets = {"memorized": memorized, "control": greedy_continuations(model, never_seen)}
    options = {"unigrams": unigrams, "seed": given.seed, "memory_budget": BUDGET}

    results: Results = {}
    for kind in REPLACEMENTS:
        for name, group in sets.items():
            results[name, kind] = kept.get(
                f"perturb-{name}-{kind}",
                lambda kind=kind, group=group: perturb_prefix(
                    model, group, replacement=kind, **options
                ),
            )
            assert (results[name, kind].baseline_em == group.n_continuation).all()
    one = kept.get(
        "perturb-one", lambda: perturb_prefix(model, memorized[0], draws=given.draws, **options)
    )
    fewest = kept.get("minimal", lambda: minimal_sets(model, memorized[: given.pairs], **options))

    pairs = results["memorized", "random"].pairs(model=model)
    clean, corrupted = (part[: given.pairs] for part in pairs)
    where = pairs.corrupted.metadata["position"]
    first = min((p, i) for i, p in enumerate(where) if p)[1]
    early = type(pairs)(*(part[[first]] for part in pairs))
    last = [i for i in range(given.pairs) if where[i] == clean.n_prefix - 1]
    maps: Maps = {}
    estimates: Estimates = {}
    sweeps, layers = {}, {}
    for way in DIRECTIONS:
        patch = {"metric": "first_impacted", "direction": way, "memory_budget": BUDGET}
        for site in SITES:
            heads = patch | {"site": site, "positions": "changed", "seed": given.seed}
            maps[way, site] = kept.get(
                f"patch-{way}-{site}",
                lambda heads=heads: patch_heads(model, clean, corrupted, **heads),
            )
            for metric in METRICS:
                estimates[way, site, metric] = kept.get(
                    f"attribute-{way}-{site}-{metric}",
                    lambda heads=heads | {"metric": metric}: patch_heads(
                        model, clean, corrupted, method="attribution", **heads
                    ),
                )
        sweeps[way] = kept.get(
            f"sweep-{way}",
            lambda patch=patch: patch_layers(model, early.clean, early.corrupted, **patch),
        )
        for site in LAYER_SITES:
            layers[way, site] = kept.get(
                f"layers-{way}-{site}",
                lambda patch=patch | {"site": site}: patch_layers(
                    model, clean[last], corrupted[last], positions=[clean.n_prefix - 1], **patch
                ),
            )
    pictures(results, one, maps, sweeps, early, model)
    page = text(given, kept, model, sets, results, one, fewest, pairs, maps, estimates, layers)
    (DOCS / "triggers.md").write_text(page, encoding="utf-8")
    print(f"wrote {DOCS / 'triggers.md'}")


def some(paragraphs: mc.Paragraphs, n: int, seed: int) -> mc.Paragraphs:
    """`n` of the paragraphs by the seed, in their order."""
    return paragraphs.sample(n, torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    main()
