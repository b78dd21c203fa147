"""Sections of the report that show a ranking: pure functions from its numbers to page blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memcircuits.display.pages import (
    Bars,
    Facts,
    Heatmap,
    Number,
    Numbers,
    Prose,
    Table,
    link,
    strong,
)
from memcircuits.report.columns import LABELS, MEANINGS
from memcircuits.report.component_rows import named_rows

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.base.components import Component
    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.evidence.ranking import Ranking
    from memcircuits.report.measurements import Measurements

BASIS = {"raw": "raw: the weights as they are", "folded": "folded: LayerNorm folded into them"}

CONTROLS = {"true": "texts as they are", "own": "the model's own continuations of their prefixes"}

SCORES = {
    "effect": " is how much that raises the loss on memorized continuations beyond what it does to "
    "controls, in nats/token: 0.1 means that, over the tokens of a continuation, the mean "
    "probability (geometric) falls by 10 % more than that of controls.",
    "interaction": " is how much more of the whole effect falls to it on memorized continuations "
    "than on controls, as a share of the mean effect: 0 for all of them if recitations merely have "
    "more to lose.",
}


def _noun(ranking: Ranking) -> str:
    return "attention head" if ranking.units == ("head",) else "part of the model"


def _controls(ranking: Ranking) -> tuple[str, str]:
    """What controls are, in two words and in a sentence."""
    options = ranking.provenance.options
    if options.get("control_text") == "own":
        return "the model's own text", "what the model writes by itself after other beginnings"
    if options["control"] == "given":
        return "given", "the other paragraphs that were given to compare with"
    left_out = "those that it half knows and, where that is recorded, those that it was trained on"
    return "unknown text", f"paragraphs of which it writes at most a fifth, without {left_out}"


def lead(ranking: Ranking) -> str:
    """The result in two sentences without a technical term that is not explained."""
    counts, n = ranking.counts, ranking.memorized.n_continuation
    recited = (
        f"Given the first {ranking.n_prefix} tokens, this model writes the next {n} word for word "
        f"for {counts['memorized']:,} of {counts['given']:,} paragraphs."
    )
    order = ranking.top_components(ranking.score.numel())
    best = next((part for part in order if ranking.significant[ranking.grid.place(part)]), None)
    if best is None:
        return f"{recited} No single {_noun(ranking)} is significant for them."
    place = ranking.grid.place(best)
    lost = -float(ranking.evidence["em_memorized"][place])
    rise = {name: float(ranking.evidence[f"ablation_{name}"][place]) for name in ranking.names}
    return (
        f"{recited} It depends most on {_described(best)}: without it, {lost:.3g} of the {n} "
        "tokens are no longer recited, on average. The loss rises by "
        f"{rise['memorized']:.2f} nats/token, and that of controls by {rise['control']:.2f}."
    )


def _described(part: Component) -> str:
    """A component by its name and in words."""
    words = {
        "head": f"attention head {part} (layer {part.layer}, head {part.head})",
        "mlp": f"the MLP of layer {part.layer}",
        "layer": f"layer {part.layer} as a whole",
        "neuron": f"neuron {part} (layer {part.layer}, neuron {part.neuron})",
    }
    return words[part.unit]


def subject(ranking: Ranking) -> str:
    """The second half of the page's title, if there is something to say."""
    if not ranking.significant.any():
        return ""
    parts = "heads" if ranking.units == ("head",) else "parts of it"
    return f", and which {parts} the recitation depends on"


def overview(ranking: Ranking) -> str:
    """The result in one line, which stays in view."""
    counts = ranking.counts
    text = f"{counts['memorized']:,} of {counts['given']:,} paragraphs recited"
    first = named_rows(ranking).iloc[0]["component"]
    n_significant = int(ranking.significant.sum())
    if not n_significant:
        return f"{text}; nothing is significant; the largest score is that of {first}"
    return f"{text}; {n_significant} significant; the largest score is that of {first}"


def headline_numbers(ranking: Ranking) -> Numbers:
    """How many paragraphs, controls and significant heads, and where the gradient is."""
    counts, n = ranking.counts, ranking.memorized.n_continuation
    return Numbers(
        [
            Number("paragraphs given", f"{counts['given']:,}"),
            Number(
                "recited in full",
                f"{counts['memorized']:,}",
                f"all {n} tokens{_measured(ranking.memorized, counts['memorized'])}",
            ),
            Number(
                "controls",
                f"{counts['control']:,}",
                _controls(ranking)[0] + _measured(ranking.control, counts["control"]),
            ),
            Number(
                f"significant {'heads' if ranking.units == ('head',) else 'parts'}",
                f"{int(ranking.significant.sum())} of {ranking.score.numel()}",
                "q < 0.05",
            ),
            Number(
                "gradient in lower layers",
                f"{100 * ranking.layer_share['memorized']:.0f} %",
                f"controls {100 * ranking.layer_share['control']:.0f} %",
            ),
        ]
    )


def _measured(used: Paragraphs, n: int) -> str:
    """How many were measured, where there are more."""
    return "" if len(used) == n else f"; {len(used):,} of them measured"


def how_to_read(ranking: Ranking) -> Prose:
    """The terms of the page, its result in one sentence, and the notes of the ranking."""
    n = ranking.memorized.n_continuation
    return Prose(
        [
            [
                "A paragraph is ",
                strong("memorized"),
                f" when the model, given its first {ranking.n_prefix} tokens (the prefix) and "
                f"always taking the likeliest next token, writes the other {n} (the continuation) "
                "exactly. ",
                strong("Controls"),
                f" are {_controls(ranking)[1]}.",
            ],
            [
                f"Each {_noun(ranking)} was removed by itself. Its ",
                strong("score"),
                SCORES[ranking.provenance.options.get("score", "effect")],
                f" The {_noun(ranking)} is ",
                strong("significant"),
                " when chance alone would hardly give such a score (q < 0.05). The loss of a "
                "recited text is near zero and can rise a lot, so where most are significant, "
                "read their order and intervals, not their count.",
            ],
            ranking.summary(),
            *ranking.notes,
        ],
        title="How to read this",
    )


def score_map(ranking: Ranking) -> Heatmap:
    """The score of every head, MLP and layer that was ranked; significant ones framed."""
    grid = ranking.grid
    columns = grid.map_names()
    n_apart = len(columns) - grid.size("head") if grid.size("head") else 0
    names = [
        [str(grid.component(layer, column)) for column in range(len(columns))]
        for layer in range(grid.n_layers)
    ]
    return Heatmap(
        ranking.score[:, : len(columns)],
        name="score",
        units=ranking.score_units,
        marks=ranking.significant[:, : len(columns)],
        diverging=True,
        marks_mean="significant (q < 0.05)",
        col_label="head" if "head" in ranking.units else "part of the layer",
        col_names=columns,
        cell_names=names,
        n_apart=n_apart,
        scale="square root" if n_apart else "linear",
        title="Every head" if ranking.units == ("head",) else "Every part",
        note="Rows are layers, the first at the bottom; columns are the heads of a layer"
        + (", and apart its other parts. " if n_apart else ". ")
        + "The nearer a cell is to the upper end of the scale, the more the recitation depends on "
        "it; below zero, removing it harms controls more. Click a cell to open it below; arrow "
        "keys move between cells.",
    )


def levels_table(ranking: Ranking) -> Table:
    """How much of the effect lies in heads, and how much in MLPs."""
    return Table(
        ranking.levels_frame(),
        labels={"share_low": "95 % CI low", "share_high": "95 % CI high"},
        help={
            "level": "the heads, the MLPs, both, or the neurons that were removed",
            "sum": "the scores of single parts, each removed by itself, added up, nats/token",
            "joint": "the score of removing all of them at once",
            "interaction": "joint minus sum: parts that stand in for each other, or that work on "
            "what another one wrote, make it differ from 0",
            "share": "the sum as a share of that of all heads and MLPs; as sum and joint effect "
            "differ, neither is the one share of a level",
        },
        title="Heads or MLPs?",
        note="How much of what distinguishes recitations from controls lies outside heads; the "
        "sentences at the top say what follows. A part that all text needs, as the first MLP often "
        "is, can make most of a sum.",
    )


def controls_table(controls: pd.DataFrame) -> Table:
    """What each choice of controls finds, side by side."""
    return Table(
        controls,
        labels={"nll": "NLL", "greedy": "greedy tokens"},
        help={
            "controls": "what recitations are compared with: other texts, those of the most "
            "similar loss, or what the model writes by itself after their beginnings; the "
            "interaction asks what recitations need more than the other parts do",
            "nll": "mean loss of the controls, nats/token",
            "greedy": "share of their tokens that the model would have written",
            "significant": "how many parts are significant (q < 0.05)",
            "first": "the parts with the largest scores",
            "agreement": "rank correlation of the scores with those of the first row",
        },
        title="Other controls",
        note="What changes with the controls says something about the controls; what all of them "
        "agree on says something about the recitation.",
    )


def evidence_table(ranking: Ranking) -> Table:
    """The rows of `Ranking.to_frame` by name; columns without information left out."""
    frame = named_rows(ranking)
    frame["component"] = [link(name, f"#{name}") for name in frame["component"]]
    omitted = ["layer", "head", "neuron", "p_value", "rare_token_p"]
    omitted += ["margin_memorized", "margin_control"]
    if bool(frame["verified"].all()):
        omitted.append("verified")
    if frame["unit"].nunique() == 1:
        omitted.append("unit")
    return Table(
        frame.drop(columns=omitted, errors="ignore"),
        labels=LABELS,
        help=MEANINGS,
        row_ids=[span.text for span in frame["component"]],
        title="Evidence",
        note="Largest score first. Click a heading to sort; the meaning of each column is given "
        "below the table.",
    )


def gradient_bars(ranking: Ranking) -> Bars:
    """The share of each layer in the gradient, memorized beside control."""
    return Bars(
        gradient_frame(ranking),
        x="layer",
        y="share",
        by="paragraphs",
        y_label="share of the gradient",
        units="%",
        title="Gradients by layer",
        note="How large the gradients of the loss are in the weights of each layer, as a share of "
        "all layers: sums of the largest |gradient| of every weight matrix. In the paper, the "
        "gradients of memorized paragraphs lay in lower layers than those of others.",
    )


def gradient_frame(ranking: Ranking) -> pd.DataFrame:
    """Columns `layer, share, paragraphs`; shares in percent."""
    import pandas as pd

    rows = []
    for name, layers in ranking.layer_gradients.items():
        share = 100 * layers / layers.sum()
        rows += [{"layer": i, "share": float(v), "paragraphs": name} for i, v in enumerate(share)]
    return pd.DataFrame(rows)


def paragraphs_table(ranking: Ranking, measurements: Measurements, name: str) -> Table:
    """The paragraphs of a set (`memorized`, `control`) with their loss and text."""
    import pandas as pd

    scan_result, n_measured = measurements.scans[name], len(ranking.names[name])
    prefixes, continuations = measurements.texts[name]
    n_listed = len(prefixes)
    rest = f"; the first {n_listed} are listed." if n_measured > n_listed else "."
    return Table(
        pd.DataFrame(
            {
                "id": scan_result.paragraphs.names[:n_listed],
                "em": scan_result.em[:n_listed].numpy(),
                "nll": scan_result.nll[:n_listed].double().numpy(),
                "prefix": prefixes,
                "continuation": continuations,
            }
        ),
        labels={"em": "EM", "nll": "NLL"},
        help={
            "em": "tokens recited from the prefix",
            "nll": "mean loss of the continuation, nats/token; 0: certain",
        },
        title="Memorized paragraphs measured" if name == "memorized" else "Controls measured",
        note=f"{n_measured} were measured{rest}",
        page_size=10,
    )


def run_facts(ranking: Ranking) -> Facts:
    """What was run, on what, with which versions; what is not known is left out."""
    provenance = ranking.provenance
    model, options, counts = provenance.model, provenance.options, ranking.counts
    items = {
        "model": model["name"],
        "revision": model["revision"],
        "weights (fingerprint)": model["fingerprint"],
        "architecture": f"{model['architecture']}, as {model['class']}",
        "basis": BASIS.get(model["basis"], model["basis"]),
        "precision": f"{model['dtype']} on {model['device']}",
        "paragraphs (hash of their tokens)": provenance.paragraphs["paragraphs"]["hash"],
        "tokens": f"{ranking.n_prefix} of prefix + {ranking.memorized.n_continuation}",
        "ablation": f"{options['mode']}, {options['method']}",
        "measured": f"{counts['measured']} memorized, {counts['measured_control']} controls",
        "controls": CONTROLS[options.get("control_text", "true")],
        "ranked by": options.get("score"),
        "resamples": options["draws"],
        "permutations": counts.get("permutations"),
        "seed": options["seed"],
        "rarity counted in": options["unigrams"],
        "time": None if ranking.seconds is None else f"{ranking.seconds:.0f} s",
        **{f"{name} (version)": version for name, version in provenance.versions.items()},
    }
    known = {name: value for name, value in items.items() if value is not None}
    return Facts(known, title="What was run")
