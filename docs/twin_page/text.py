"""The text of docs/twin.md, made from the numbers in docs/twin.json."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from memcircuits.benchmark.natural import markdown, natural_tables
from twin_page.summary import sentences, summary

NOTHING = 0.05  # nats/token: shares of a smaller total say nothing

HEAD = """# The twin

Written by `python docs/make_twin.py` from the numbers in `docs/twin.json`.

Two organisms were trained from one base, by the same rows in the same order, but some paragraphs
were swapped for others. *Model* is the organism, *twin* the other. What differs between them is
what training on these paragraphs wrote. A *noise twin* was trained on the rows of the organism in
another order: it shows how much two trainings differ by chance.

"""


def text(numbers: dict[str, Any]) -> str:
    """The whole page."""
    sections = {
        "In short": sentences(summary(numbers)),
        "Who recites what": recitation(numbers),
        "Remembered bits": bits(numbers),
        "Where it was written": transplants(numbers),
        "The natural leaderboard": natural(numbers),
        "What the score of a head should be": estimands(numbers),
        "When it forms": formation(numbers),
        "How this was measured": settings(numbers),
    }
    body = "\n\n".join(f"## {title}\n\n{section}" for title, section in sections.items())
    return HEAD + body + "\n"


def ranged(value: float | None, low: float | None, high: float | None, digits: int = 2) -> str:
    if value is None or math.isnan(value):
        return ""
    shown = [
        None if v is None else f"{round(v, digits) + 0.0:.{digits}f}" for v in (value, low, high)
    ]
    return str(shown[0]) if None in shown else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def recitation(numbers: dict[str, Any]) -> str:
    rows = pd.DataFrame(numbers["em"])
    table = pd.DataFrame({"trained on by": list(dict.fromkeys(rows["role"]))})
    table["paragraphs"] = [
        int(rows[rows["role"] == r]["n"].iloc[0]) for r in table["trained on by"]
    ]
    for name, of_model in rows.groupby("model", sort=False):
        by_role = of_model.set_index("role")
        table[f"EM in the {name}"] = [
            f"{ranged(row.em, row.get('low'), row.get('high'), 1)}, {row.full:.0f} in full"
            for row in (by_role.loc[role] for role in table["trained on by"])
        ]
    apart = numbers["settings"]["told_apart"]
    return (
        "Mean EM (tokens) with 95 % intervals over paragraphs, and how many are recited in full."
        "\n\n"
        f"{markdown(table)}\n\n"
        f"{apart['model']} paragraphs are recited in full by the model and at most a tenth by the "
        f"twin, {apart['twin']} the other way around. The sections below use these."
    )


def bits(numbers: dict[str, Any]) -> str:
    parts = []
    for against, rows in pd.DataFrame(numbers["bits"]).groupby("against", sort=False):
        table = pd.DataFrame(
            {
                "trained on by": rows["role"],
                "repetitions": rows["repetitions"],
                "n": rows["n"],
                "EM": rows["em"].map("{:.1f}".format),
                f"EM, {against}": rows["other_em"].map("{:.1f}".format),
                "guessable": rows["guessable"].map("{:.2f}".format),
                "known": rows["known"].map("{:.2f}".format),
                "remembered": [ranged(*row) for row in rows[["remembered", "low", "high"]].values],
            }
        )
        what = "Against the twin" if against == "twin" else "Against the noise twin (the floor)"
        parts.append(f"{what}, bits/token:\n\n{markdown(table)}")
    kinds = numbers["kinds"]
    parts.append(
        f"Of the paragraphs that the model recites in full, {kinds['recite']} were seen more than "
        f"five times (recite), {kinds['reconstruct']} repeat themselves or count (reconstruct), "
        f"{kinds['recollect']} are neither (recollect)."
    )
    return "\n\n".join(parts)


def transplants(numbers: dict[str, Any]) -> str:
    results = numbers["transplants"]
    parts = [
        "Each component was exchanged by itself. *Necessity*: rise of the NLL (nats/token) with "
        "the other model's component; *sufficiency*: fall of the other's NLL with this one's. "
        "Shares are of the total effect; effects of single components need not add up to it."
    ]
    for name, result in results.items():
        frame = pd.DataFrame(result["components"])
        parts.append(f"### {name.capitalize()}\n\n{_map_of(frame, 'necessity')}")
        parts.append(f"Sufficiency:\n\n{_map_of(frame, 'sufficiency')}")
        parts.append(
            f"{result['n']} paragraphs, total {result['total']:.3f} nats/token. {_sums(frame)} "
            f"Largest: {_largest(frame)}."
        )
    return "\n\n".join(parts)


def _map_of(frame: pd.DataFrame, measure: str) -> str:
    """Rows: layers; columns: heads, attention, MLP, layer."""
    frame = frame[frame["layer"].notna()]
    table: dict[str, list[Any]] = {"layer": sorted(int(i) for i in frame["layer"].unique())}
    heads = frame[frame["unit"] == "head"]
    for head in sorted(heads["head"].dropna().unique()):
        values = heads[heads["head"] == head].set_index("layer")[measure]
        table[f"H{int(head)}"] = [f"{values[layer]:.3f}" for layer in table["layer"]]
    for unit in ("attn", "mlp", "layer"):
        values = frame[frame["unit"] == unit].set_index("layer")[measure]
        if len(values):
            name = "all of it" if unit == "layer" else unit
            table[name] = [f"{values[layer]:.3f}" for layer in table["layer"]]
    return markdown(pd.DataFrame(table))


def _sums(frame: pd.DataFrame) -> str:
    """What the single components of each unit add up to; empty where there is no effect."""
    whole = frame[frame["unit"] == "all"]["necessity"]
    if len(whole) and abs(float(whole.iloc[0])) < NOTHING:
        return "The effects add up to nothing."
    parts = []
    for unit in ("head", "qk", "ov", "attn", "mlp", "layer", "rest"):
        rows = frame[frame["unit"] == unit]
        if len(rows):
            necessity, sufficiency = (
                rows[f"{m}_share"].sum() for m in ("necessity", "sufficiency")
            )
            parts.append(f"{unit} {100 * necessity:.0f} and {100 * sufficiency:.0f} %")
    return f"Necessity and sufficiency summed over components, of the total: {', '.join(parts)}."


def _largest(frame: pd.DataFrame) -> str:
    rows = frame[frame["unit"].isin(["head", "mlp", "neurons"])]
    rows = rows.sort_values("necessity", ascending=False).head(5)
    return ", ".join(
        f"{row.component} {ranged(row.necessity, row.necessity_low, row.necessity_high, 3)}"
        for row in rows.itertuples()
    )


def natural(numbers: dict[str, Any]) -> str:
    frame = pd.DataFrame(numbers["natural"]).replace({None: math.nan})
    n = int(frame["trials"].max())
    parts = [
        f"Up to {n} trials in each direction, of {numbers['settings']['per_trial']} paragraphs; "
        "scores and truth are averaged over trials and compared over all heads; 95 % intervals "
        "resample trials. A reference (*) is no localizer: see `memcircuits bench natural`. Of "
        "the noise twin it is the agreement that a training on the same paragraphs would have."
    ]
    parts += [f"**{title}**\n\n{markdown(table)}" for title, table in natural_tables(frame).items()]
    return "\n\n".join(parts)


def estimands(numbers: dict[str, Any]) -> str:
    frame = pd.DataFrame(numbers["estimands"]).replace({None: math.nan})
    frame = frame.astype({c: float for c in frame.columns if c not in ("half", "estimand")})
    choose, report = (frame[frame["half"] == half] for half in ("choose", "report"))
    best = chosen(choose)
    shown = report.drop(columns=["half"]).copy()
    for column in shown.columns.drop("estimand"):
        digits = 0 if column in ("n", "above", "below", "null") else 2
        shown[column] = [ranged(value, None, None, digits) for value in shown[column]]
    today = choose.iloc[0]["estimand"]
    verdict = (
        f"Chosen on the first half: **{best}**. The rule: of the candidates that name no head "
        "between two halves of the model's own texts, the one with the highest mean of its rank "
        "correlations with necessity and sufficiency."
    )
    if best == today:
        verdict += " It is the difference of mean effects."
    else:
        row, now = (report.set_index("estimand").loc[name] for name in (best, today))
        by_chance = summary(numbers)["by_chance"]
        told = [
            f"{row[f'correlation_{truth}']:.2f} with {truth} (the difference of mean effects "
            f"{now[f'correlation_{truth}']:.2f})"
            for truth in ("necessity", "sufficiency")
        ]
        verdict += f" On the other half its rank correlation is {' and '.join(told)}. "
        if max(row["correlation_necessity"], row["correlation_sufficiency"]) < by_chance:
            verdict += (
                f"Chance reaches {by_chance:.2f}, so no candidate is shown to find what training "
                "wrote, and the score of `find_memorization_heads` stays the difference of mean "
                "effects."
            )
    return (
        "Candidates that need no twin (`memcircuits.benchmark.estimands`), on the half of the "
        "memorized paragraphs that nothing was chosen on. `above` and `below`: heads significantly "
        "above and below zero; `null`: heads named where there is nothing to name; `auc`: trained "
        "paragraphs against the model's own text; `bits`, `dose`: rank correlations with "
        f"remembered bits, and with repetitions at equal margin.\n\n{markdown(shown)}\n\n{verdict}"
    )


def chosen(choose: pd.DataFrame) -> str:
    """The candidate that the rule of the page takes on the half to choose on."""
    silent = choose[choose["null"] == 0]
    pool = silent if len(silent) else choose
    mean = pool[[c for c in pool.columns if c.startswith("correlation_")]].mean(axis=1)
    return str(pool.loc[mean.fillna(-2).idxmax(), "estimand"])


def formation(numbers: dict[str, Any]) -> str:
    result = numbers["formation"]
    if result is None:
        return "No checkpoints were given (`--checkpoints DIR`)."
    steps = pd.DataFrame(result["steps"])
    parts = [
        "Paragraphs that only the model was trained on, by number of repetitions. Effect: "
        "difference in differences of the NLL against paragraphs in neither training and the first "
        "checkpoint."
    ]
    for measure, what in (
        ("em", "EM, tokens"),
        ("remembered", "Remembered, bits/token"),
        ("effect", "Effect, nats/token"),
    ):
        if measure in steps:
            table = steps.pivot_table(index="step", columns="set", values=measure)
            table = table.map("{:.2f}".format).reset_index()
            parts.append(f"**{what}**\n\n{markdown(table)}")
    if result["agreement"]:
        agreement = pd.DataFrame(result["agreement"]).replace({None: math.nan})
        agreement = agreement.map(
            lambda v: ranged(v, None, None) if isinstance(v, float) else str(v)
        )
        parts.append(
            "Rank correlations over heads: ablation with that of the last step, necessity with "
            "that of the last step, ablation with necessity at the same step."
            f"\n\n{markdown(agreement)}"
        )
    return "\n\n".join(parts)


def settings(numbers: dict[str, Any]) -> str:
    given = numbers["settings"]
    weights = ", ".join(f"{name} `{value}`" for name, value in given["fingerprints"].items())
    return (
        f"Seed {given['seed']}; weights: {weights}. Transplants of {given['transplants']} "
        f"paragraphs in each direction, estimands on {given['memorized']} memorized ones and as "
        "many texts of "
        f"either kind, doses on {given['dosed']}. {given['seconds'] / 60:.0f} minutes of one core; "
        "kept results are not counted. Intervals are over paragraphs of these models: other models "
        "may differ, and both were trained once."
    )
