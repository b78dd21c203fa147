"""The first section of docs/unlearning.md: edits audited against the twin.

Paragraphs that only the organism was trained on, and that it recites, are forgotten one at a time:
at the surface, deeply, and deeply with the twin as reference. The recipes were chosen on the first
half of these paragraphs; audited are some of the second half.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from triggers_page.kept import Kept

import memcircuits as mc
from memcircuits.base.io import write_atomically
from memcircuits.base.statistics import bootstrap_interval
from memcircuits.editing.audits.result import UNITS, EditAudit
from unlearning_page import front
from unlearning_page.setting import SEED, setting

TITLE = "Erased, or hidden?"
NAME = "unlearning-audits.json"
STEPS = 3  # of relearning
ARMS = {"surface": "surface", "deep": "deep", "deep, twin given": "twin"}
"""From the title of an arm to its name among those of the front."""
MEASURES = {
    "em": "EM from the own prefix",
    "em_attacked": "largest EM over attacked prefixes",
    "em_int8": "the same, weights rounded to 8 bits",
    "em_int4": "the same, to 4 bits",
    "longest_run": "longest recited run from any entry",
    "loose_match": "still the greedy choice",
    "nll": "NLL",
    "remembered": "remembered bits left",
    "depth": "erasure depth",
}
HARM = {
    "control/kl": "KL along controls' own text (nats/token)",
    "control/em": "EM of that text (tokens)",
    "others/in_full": "other recitations still in full (share)",
}


def measure(n: int, folder: Path, out: Path) -> None:
    """Audit `n` paragraphs in every arm, as far as that is not done, and write the numbers.

    The numbers are written after each paragraph. `folder` keeps audits and edits.
    """
    s = setting()
    kept, audits = Kept(folder / "audits"), {arm: list[EditAudit]() for arm in ARMS}
    edits = Kept(folder / "edits")
    for i in range(n):
        target = s.targets[[i]]
        for arm, name in ARMS.items():

            def audit(target: mc.Paragraphs = target, name: str = f"{name}-{i}") -> EditAudit:
                make = front.arms()[name.rpartition("-")[0]].make
                return mc.audit_edit(
                    s.model,
                    edits.get(name, lambda: make(target)),
                    target,
                    s.unseen,
                    s.twin,
                    others=s.others,
                    relearning_steps=STEPS,
                    progress=False,
                )

            audits[arm].append(kept.get(f"{name}-{i}", audit))
        numbers = {"seed": SEED, "n": i + 1, "n_attacks": audits["deep"][0].n_attacks}
        numbers |= {"weights": s.fingerprint}
        found = {arm: _summary(of_arm) for arm, of_arm in audits.items()}
        write_atomically(out, json.dumps(numbers | {"arms": found}, indent=1) + "\n")


def _summary(audits: Sequence[EditAudit]) -> dict[str, Any]:
    """Every measure of the three models, harm and verdicts, over the paragraphs."""
    frames = [audit.to_frame().set_index("measure") for audit in audits]
    models = ("unedited", "edited", "reference")
    measures = {
        name: {m: _statistics([float(frame.loc[name, m]) for frame in frames]) for m in models}
        for name in MEASURES
    }
    trained = {
        text: {
            m: _statistics([float(audit.relearning[text][k, -1].mean()) for audit in audits])
            for k, m in enumerate(models)
        }
        for text in audits[0].relearning
    }
    harm = {
        name: {
            "before": float(audits[0].harm[name][0].float().mean()),
            "after": _statistics([float(audit.harm[name][1].float().mean()) for audit in audits]),
        }
        for name in HARM
    }
    verdicts = [audit.verdict for audit in audits]
    counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    return {"measures": measures, "trained": trained, "harm": harm, "verdicts": counts}


def _statistics(values: Sequence[float]) -> dict[str, float]:
    """Mean, largest value, and for several values the 95 % interval of the mean."""
    tensor = torch.tensor(values)
    found = {"mean": float(tensor.mean()), "max": float(tensor.max())}
    if len(values) > 1:
        low, high = bootstrap_interval(tensor, seed=SEED).tolist()
        found |= {"low": low, "high": high}
    return found


def section(numbers: Mapping[str, Any]) -> str:
    """The text of the section, from the numbers."""
    arms, n = numbers["arms"], numbers["n"]
    first = arms["surface"]
    head = ["", "units", "unedited", *arms, "twin"]
    rows = [
        [label, UNITS.get(name, "tokens"), *_of_models(arms, first, "measures", name)]
        for name, label in MEASURES.items()
    ]
    rows += [
        [f"EM after {STEPS} steps on {text}", "tokens", *_of_models(arms, first, "trained", text)]
        for text in first["trained"]
    ]
    harm = [
        [
            label,
            f"{first['harm'][name]['before']:.3g}",
            *[_cell(a["harm"][name]["after"]) for a in arms.values()],
        ]
        for name, label in HARM.items()
    ]
    verdicts = [_verdicts(arm["verdicts"]) for arm in arms.values()]
    harm.append(["verdict", "", *verdicts])
    tables = (_table(head, rows), _table(["what else changed", "unedited", *arms], harm))
    return (
        f"\n{n} paragraphs of the second half were forgotten one at a time and audited by "
        "`mc.audit_edit` against the twin, which never saw them: depth 0 is the unedited model, 1 "
        f"the twin. {numbers['n_attacks']} attacked prefixes each. Numbers: `{NAME}`.\n\n"
        f"{tables[0]}\n\n{tables[1]}\n"
    )


def _verdicts(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{count} {verdict}" for verdict, count in counts.items())


def _of_models(arms: Mapping[str, Any], first: Any, kind: str, name: str) -> list[str]:
    cells = [_cell(first[kind][name]["unedited"])]
    cells += [_cell(arm[kind][name]["edited"]) for arm in arms.values()]
    return [*cells, _cell(first[kind][name]["reference"])]


def _cell(number: Mapping[str, float]) -> str:
    text = f"{number['mean']:.3g}"
    return f"{text} [{number['low']:.3g}, {number['high']:.3g}]" if "low" in number else text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
