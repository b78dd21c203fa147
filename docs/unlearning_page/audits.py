"""The first section of docs/unlearning.md: edits audited against the twin.

Paragraphs that only the organism was trained on, and that it recites, are forgotten one at a time:
at the surface, deeply, and deeply with the twin as reference. The recipes were chosen on the first
half of these paragraphs; audited are the first of the second half, more of them where they are
forgotten deeply.
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
from unlearning_page.numbers import collect
from unlearning_page.setting import SEED, setting

TITLE = "Erased, or hidden?"
NAME = "unlearning-audits.json"
STEPS = 3  # of relearning
MODELS = ("unedited", "edited", "reference")
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


def jobs(n: int, n_deep: int) -> list[tuple[str, int]]:
    """Arm and number of every paragraph to audit: `n` in each arm, `n_deep` in that of `deep`."""
    counts = {arm: max(n, n_deep) if arm == "deep" else n for arm in ARMS}
    return [(arm, i) for i in range(max(counts.values())) for arm in ARMS if i < counts[arm]]


def perform(arm: str, i: int, folder: Path) -> None:
    """Audit one paragraph in one arm, unless that is done; `folder` keeps audits and edits."""
    name = ARMS[arm]
    path = folder / "audited" / f"{name}/{i}.json"
    if path.exists():
        return
    s = setting()
    target = s.targets[[i]]

    def audit() -> EditAudit:
        edit = Kept(folder / "edits").get(f"{name}-{i}", lambda: front.arms()[name].make(target))
        return mc.audit_edit(
            s.model,
            edit,
            target,
            s.unseen,
            s.twin,
            others=s.others,
            relearning_steps=STEPS,
            progress=False,
        )

    values = values_of(Kept(folder / "audits").get(f"{name}-{i}", audit))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(values))


def save(folder: Path, out: Path) -> None:
    """Write the numbers of all audits, one audit a line, and their summary."""
    audits = collect(folder / "audited")
    lines = [f"  {json.dumps(name)}: {json.dumps(audit)}" for name, audit in audits.items()]
    head = {"seed": SEED, "weights": setting().fingerprint, "arms": summary(audits)}
    text = json.dumps(head, indent=1).removesuffix("\n}")
    write_atomically(out, text + ',\n "audits": {\n' + ",\n".join(lines) + "\n }\n}\n")


def values_of(audit: EditAudit) -> dict[str, Any]:
    """What the page needs of one audit."""
    frame = audit.to_frame().set_index("measure")
    return {
        "measures": {name: {m: float(frame.loc[name, m]) for m in MODELS} for name in MEASURES},
        "trained": {
            text: {m: float(values[k, -1].mean()) for k, m in enumerate(MODELS)}
            for text, values in audit.relearning.items()
        },
        "harm": {name: [float(side.float().mean()) for side in audit.harm[name]] for name in HARM},
        "verdict": audit.verdict,
        "n_attacks": audit.n_attacks,
    }


def summary(audits: Mapping[str, Any]) -> dict[str, Any]:
    """Every measure of the three models, harm and verdicts, over the paragraphs of each arm."""
    found = {}
    for arm, name in ARMS.items():
        mine = [audit for key, audit in audits.items() if key.rpartition("/")[0] == name]
        verdicts = [audit["verdict"] for audit in mine]
        found[arm] = {
            "n": len(mine),
            "n_attacks": mine[0]["n_attacks"],
            **{
                kind: {
                    key: {m: _statistics([audit[kind][key][m] for audit in mine]) for m in MODELS}
                    for key in mine[0][kind]
                }
                for kind in ("measures", "trained")
            },
            "harm": {
                key: {
                    "before": mine[0]["harm"][key][0],
                    "after": _statistics([audit["harm"][key][1] for audit in mine]),
                }
                for key in HARM
            },
            "verdicts": {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)},
        }
    return found


def _statistics(values: Sequence[float]) -> dict[str, float]:
    """Mean, smallest and largest value, and for several values the 95 % interval of the mean."""
    tensor = torch.tensor(values)
    found = {"mean": float(tensor.mean()), "min": float(tensor.min()), "max": float(tensor.max())}
    if len(values) > 1:
        low, high = bootstrap_interval(tensor, seed=SEED).tolist()
        found |= {"low": low, "high": high}
    return found


def section(numbers: Mapping[str, Any]) -> str:
    """The text of the section, from the numbers."""
    arms = numbers["arms"]
    deep = arms["deep"]
    # The unedited model and the twin are shown on the paragraphs of the arm that has most.
    head = ["", "units", "unedited", *arms, "twin"]
    rows = [["paragraphs", "", *(str(a["n"]) for a in (deep, *arms.values(), deep))]]
    rows += [
        [label, UNITS.get(name, "tokens"), *_of_models(arms, deep, "measures", name)]
        for name, label in MEASURES.items()
    ]
    rows += [
        [f"EM after {STEPS} steps on {text}", "tokens", *_of_models(arms, deep, "trained", text)]
        for text in deep["trained"]
    ]
    harm = [
        [
            label,
            f"{deep['harm'][name]['before']:.3g}",
            *[_cell(a["harm"][name]["after"]) for a in arms.values()],
        ]
        for name, label in HARM.items()
    ]
    harm.append(["verdict", "", *(_verdicts(arm["verdicts"]) for arm in arms.values())])
    tables = (_table(head, rows), _table(["what else changed", "unedited", *arms], harm))
    return (
        "\nThe first paragraphs of the second half, as many as the table says, were forgotten one "
        "at a time and audited by `mc.audit_edit` against the twin, which never saw them: depth 0 "
        f"is the unedited model, 1 the twin. {deep['n_attacks']} attacked prefixes each. Numbers, "
        f"of each paragraph too: `{NAME}`.\n\n{tables[0]}\n{_extremes(deep)}\n\n{tables[1]}\n"
    )


def _extremes(deep: Mapping[str, Any]) -> str:
    """The worst of the paragraphs that were forgotten deeply, which means hide."""
    measures = deep["measures"]
    worst = [f"{measures[m]['edited']['max']:.0f}" for m in ("em_attacked", "em_int8")]
    longest = f"{measures['longest_run']['edited']['max']:.0f}"
    least = f"{measures['depth']['edited']['min']:.2f}"
    return (
        f"\nThe worst of the {deep['n']} paragraphs that were forgotten deeply: {worst[0]} tokens "
        f"from an attacked prefix, {worst[1]} with weights of 8 bits, a run of {longest} tokens "
        f"from some entry, a depth of {least}."
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
