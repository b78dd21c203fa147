"""How far the result can be trusted: intervals, other choices, and what the controls are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memcircuits.display.pages import Bars, Block, Prose, Scatter, Table, code
from memcircuits.display.text import number
from memcircuits.report.component_rows import named_rows

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.evidence.ranking import Ranking
    from memcircuits.measure.scanning import Scan
    from memcircuits.report.measurements import Measurements

N_INTERVALS = 8
"""Components whose interval is drawn."""

MAX_POINTS = 1500
"""Components whose effects are drawn against each other, the best ones."""


FAR = 3.0
"""A mark at least this multiple as far from the origin as the next one is named, not drawn."""


def interval_bars(ranking: Ranking) -> Bars:
    """The best scores with their intervals."""
    return Bars(
        named_rows(ranking).head(N_INTERVALS),
        x="component",
        y="score",
        low="ci_low",
        high="ci_high",
        x_label="part",
        units=ranking.score_units,
        title="Scores with intervals",
        note="The best ones, with their 95 % intervals from resampling paragraphs. An interval "
        "that reaches below zero leaves open whether recitation needs the part more than other "
        "text does. Parts with overlapping intervals have no certain order.",
    )


def effect_scatter(ranking: Ranking) -> Scatter:
    """The effect of each part on memorized paragraphs against that on controls."""
    rows, outside = _within_reach(named_rows(ranking).head(MAX_POINTS))
    rows["href"] = "#" + rows["component"]
    rows["significance"] = rows["significant"].map({True: "significant", False: "not significant"})
    return Scatter(
        rows.sort_values("significant", kind="stable"),
        x="ablation_control",
        y="ablation_memorized",
        by="significance",
        label="component",
        href="href",
        x_label="effect on controls (nats/token)",
        y_label="effect on memorized (nats/token)",
        title="Memorized against control",
        diagonal=True,
        note="How much the loss rises without each part. The score is the height of a mark above "
        "the dashed line of equal effects; a part that all text needs lies far to the right. A "
        f"mark opens its part.{outside}",
    )


def _within_reach(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The rows without one or two whose effects would press all other marks together."""
    reach = rows[["ablation_control", "ablation_memorized"]].abs().max(axis=1)
    order = reach.sort_values(ascending=False).index
    for n in (2, 1):
        if len(rows) > n + 2 and reach[order[n - 1]] > FAR * reach[order[n]]:
            far = rows.loc[order[:n]]
            names = " and ".join(
                f"{part} ({number(control)} on controls, {number(memorized)} on memorized)"
                for part, control, memorized in zip(
                    far["component"],
                    far["ablation_control"],
                    far["ablation_memorized"],
                    strict=True,
                )
            )
            return rows.drop(far.index), f" Beyond the frame: {names}."
    return rows, ""


def robustness_bars(measurements: Measurements) -> list[Block]:
    """The scores of the best heads under other ablations and other controls."""
    if not measurements.choices:
        return []
    losses = "; ".join(
        f"{choice.name}: {choice.n_control} controls with a loss of {choice.control_loss:.2f}"
        for choice in measurements.choices
    )
    return [
        Bars(
            choices_frame(measurements),
            x="head",
            y="score",
            by="choice",
            low="ci_low",
            high="ci_high",
            units="nats/token",
            title="Other ablations, other controls",
            note="Does the score depend on how a head is removed, and on what it is compared with? "
            "A head that memorization needs keeps a score above zero in each bar. "
            f"Losses in nats/token: {losses}; recitations "
            f"{float(measurements.scans['memorized'].nll.mean()):.2f}.",
        )
    ]


def choices_frame(measurements: Measurements) -> pd.DataFrame:
    """Columns `head, choice, score, ci_low, ci_high`."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "head": str(head),
                "choice": choice.name,
                "score": float(choice.score[i]),
                "ci_low": float(choice.ci[0, i]),
                "ci_high": float(choice.ci[1, i]),
            }
            for i, head in enumerate(measurements.heads)
            for choice in measurements.choices
        ]
    )


def control_table(measurements: Measurements) -> Table:
    """What the two sets are: how well they are recited, their loss, how often they were trained."""
    import pandas as pd

    scans = measurements.scans
    sets = {"memorized": scans["memorized"], "controls": scans["control"]}
    rows = [
        {"set": name, **_composition(scan), **measurements.repetitions.get(name, {})}
        for name, scan in sets.items()
    ]
    return Table(
        pd.DataFrame(rows),
        labels={"nll": "mean NLL", "nll_low": "lowest NLL", "em": "mean EM"},
        help={
            "em": "continuation tokens reproduced before the first mistake",
            "EM above 2": "paragraphs of which more than two tokens are reproduced before the "
            "first mistake",
            "greedy tokens": "share of continuation tokens that are the model's first choice, "
            "given the true tokens before them; a high share means half-memorized text",
            "nll": "mean loss of the continuations, nats/token",
            "trained on": "paragraphs that were in the training data, where that is known",
            "most repetitions": "how often the most repeated one of them was in it",
        },
        title="What is compared",
        note="Scores are differences between these two sets. Controls that were trained on, or are "
        "partly recited, make a score too small; controls with a much larger loss leave open "
        "whether a head serves recitation or any text of which the model is certain.",
    )


def _composition(scan: Scan) -> dict[str, float]:
    return {
        "paragraphs": len(scan.nll),
        "em": float(scan.em.float().mean()),
        "EM above 2": int((scan.em > 2).sum()),
        "greedy tokens": float(scan.loose_match.mean()),
        "nll": float(scan.nll.mean()),
        "nll_low": float(scan.nll.min()),
    }


def next_steps(ranking: Ranking) -> list[Block]:
    """What to try where nothing is significant."""
    if ranking.significant.any():
        return []
    return [
        Prose(
            [
                "No part is significant, so the order below may be chance. This does not show that "
                "recitation needs no part: an effect may be spread over many parts, lie in parts "
                "that were not ranked, or be too small for so few paragraphs.",
                [
                    "More paragraphs: ",
                    code("memcircuits scan"),
                    " finds what the model reproduces in a corpus, and ",
                    code("memcircuits heads --paragraphs FOLDER"),
                    " reads it.",
                ],
                [
                    "MLPs and layers, which often carry more than heads: ",
                    code("memcircuits heads --units head,mlp,layer"),
                    ".",
                ],
                [
                    "The prefix tokens that a recitation depends on: ",
                    code("memcircuits perturb"),
                    "; weights with the largest gradients: ",
                    code("memcircuits gradients"),
                    ".",
                ],
                [
                    "Effects of a whole layer at a time: ",
                    code("memcircuits patch"),
                    "; differences from a model that never saw the text: ",
                    code("memcircuits transplant"),
                    ".",
                ],
            ],
            title="Nothing is significant: what to try next",
        )
    ]
