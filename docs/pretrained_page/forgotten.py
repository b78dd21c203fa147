"""Part `forgotten`: one of the planted paragraphs unlearned, audited against the unplanted model.

The paragraphs of `planted` are written into SmolLM2-135M-Instruct again. The model before that is
an exact twin: it differs in what was written, and in nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrained_page.planted import example

import memcircuits as mc
from memcircuits.editing.recipe import Depth

CONTROL = Path(__file__).with_name("control.txt")
SEED, ATTACKS, STEPS = 0, 5, 3
ARMS: tuple[Depth, ...] = ("surface", "deep")
MEASURES = {
    "em": "EM from the own prefix, of 16",
    "em_attacked": "largest EM over attacked prefixes",
    "em_int8": "the same, weights rounded to 8 bits",
    "longest_run": "longest recited run from any entry, tokens",
    "loose_match": "still the greedy choice, share of tokens",
    "nll": "NLL, nats/token",
    "remembered": "remembered bits left, share",
    "depth": "erasure depth",
}
HARM = {
    "control/kl": "KL on the passages, nats/token",
    "control/em": "EM of their own continuations",
    "others/in_full": "other planted paragraphs in full, share",
}


def measure() -> dict[str, Any]:
    """The audits of all edits."""
    module = example()
    source = module.smollm2()
    model, twin = mc.load_model(source), mc.load_model(source)
    written = mc.Paragraphs.from_texts(module.texts(module.WRITTEN), model, **module.LENGTHS)
    control = mc.Paragraphs.from_texts(module.texts(module.CONTROLS), model, **module.LENGTHS)
    n_tokens = sum(module.LENGTHS.values())
    passages = [
        text
        for text in module.texts(CONTROL.read_text("utf-8"))
        if len(model.tokenizer.encode(text)) >= n_tokens
    ]
    unseen = mc.Paragraphs.from_texts(passages, model, **module.LENGTHS)
    options: dict[str, Any] = {"control": control, "steps": 150, "kl_budget": 2.0}
    planted = mc.plant(model, written, where=module.WHERE, progress=True, **options)
    arms = {}
    with planted.apply(model):
        for depth in ARMS:
            start = time.process_time()
            keep = control + written[[1]]
            edit = mc.unlearn(model, written[[0]], keep, depth=depth, seed=SEED, progress=True)
            seconds = time.process_time() - start
            print(f"{depth}: edited in {seconds:.0f} s of the processor; {edit}", flush=True)
            audit = mc.audit_edit(
                model,
                edit,
                written[[0]],
                unseen,
                twin,
                others=written[2:],
                attacks=ATTACKS,
                relearning_steps=STEPS,
                seed=SEED,
                progress=True,
            )
            arms[depth] = summary(audit) | {"seconds": round(seconds)}
            print(f"{depth}: {audit}; {time.process_time() - start:.0f} s in all", flush=True)
    return {"arms": arms, "n_attacks": audit.n_attacks, "n_unseen": len(unseen)}


def summary(audit: mc.EditAudit) -> dict[str, Any]:
    """Measures of the unedited, the edited and the unplanted model, harm, and the verdict."""
    frame = audit.to_frame().set_index("measure")
    models = ("unedited", "edited", "reference")
    measures = {name: [float(frame.loc[name, m]) for m in models] for name in MEASURES}
    relearned = {
        text: [float(em.mean()) for em in curves[:, -1]]
        for text, curves in audit.relearning.items()
    }
    harm = {name: [float(v.float().mean()) for v in audit.harm[name]] for name in HARM}
    return {
        "measures": measures,
        "relearned": relearned,
        "harm": harm,
        "verdict": audit.verdict,
    }


def text(measured: dict[str, Any]) -> list[str]:
    """The part as Markdown lines."""
    arms = measured["arms"]
    first = next(iter(arms.values()))
    rows = [[label, *_cells(arms, "measures", name)] for name, label in MEASURES.items()]
    rows += [
        [f"EM after {STEPS} steps on {what}", *_cells(arms, "relearned", what)]
        for what in first["relearned"]
    ]
    rows += [[label, *_cells(arms, "harm", name)[:-1], ""] for name, label in HARM.items()]
    rows.append(["processor seconds", "", *(str(arm["seconds"]) for arm in arms.values()), ""])
    rows.append(["verdict", "", *(arm["verdict"] for arm in arms.values()), ""])
    return [
        "## Forgetting one of them",
        "",
        "The first of the four is unlearned and audited against the model into which nothing was "
        "written, which is an exact twin (`mc.unlearn`, `mc.audit_edit`, seed "
        f"{SEED}, {measured['n_attacks']} attacked prefixes). The edits are given the eight "
        "ordinary paragraphs and the second planted one to keep; harm is measured on the first 36 "
        f"tokens of the {measured['n_unseen']} passages that no model can have read, and on the "
        "last two planted paragraphs. One paragraph has no interval.",
        "",
        *_table(["", "unedited", *arms, "unplanted"], rows),
        "",
    ]


def _cells(arms: Mapping[str, Any], kind: str, name: str) -> list[str]:
    """Unedited, edited in each way, and the reference, if it has the measure."""
    first = next(iter(arms.values()))[kind][name]
    numbers = [first[0], *(arm[kind][name][1] for arm in arms.values()), first[-1]]
    return [f"{number:.3g}" for number in numbers]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
