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
    strong,
)
from memcircuits.report.columns import LABELS, MEANINGS

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.evidence.ranking import Ranking
    from memcircuits.report.measurements import Measurements

BASIS = {"raw": "raw: the weights as they are", "folded": "folded: LayerNorm folded into them"}


def lead(ranking: Ranking) -> str:
    """The result in two sentences without a technical term that is not explained."""
    counts, n = ranking.counts, ranking.memorized.n_continuation
    recited = (
        f"Given the first {ranking.n_prefix} tokens, this model writes the next {n} word for word "
        f"for {counts['memorized']:,} of {counts['given']:,} paragraphs."
    )
    if not ranking.significant.any():
        return f"{recited} No single attention head is significant for them."
    head = next(h for h in ranking.top(ranking.score.numel()) if ranking.significant[h])
    lost = -float(ranking.evidence["em_memorized"][head])
    return (
        f"{recited} It depends most on attention head {head} (layer {head.layer}, head "
        f"{head.head}): without it, {lost:.1f} of the {n} tokens are no longer recited, on average."
    )


def headline_numbers(ranking: Ranking) -> Numbers:
    """How many paragraphs, controls and significant heads, and where the gradient is."""
    counts, n = ranking.counts, ranking.memorized.n_continuation
    return Numbers(
        [
            Number("paragraphs given", f"{counts['given']:,}"),
            Number("recited in full", f"{counts['memorized']:,}", f"all {n} of {n} tokens"),
            Number("controls", f"{counts['control']:,}", "hardly recited"),
            Number(
                "significant heads",
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
                " are paragraphs of which it writes at most a fifth.",
            ],
            [
                "Each attention head was removed by itself. Its ",
                strong("score"),
                " is how much that raises the loss on memorized continuations beyond what it "
                "does to controls, in nats/token: 0.1 means that every token becomes 10 % less "
                "likely. A head is ",
                strong("significant"),
                " when chance alone would hardly give such a score (q < 0.05). The loss of a "
                "recited text is near zero and can rise a lot, so where most heads are "
                "significant, read their order and intervals, not their count.",
            ],
            ranking.summary(),
            *ranking.notes,
        ],
        title="How to read this",
    )


def score_map(ranking: Ranking) -> Heatmap:
    """The score of every head, significant heads framed."""
    return Heatmap(
        ranking.score,
        name="score",
        units="nats/token",
        marks=ranking.significant,
        marks_mean="significant (q < 0.05)",
        title="Every head",
        note="Rows are layers, the first at the bottom; columns are the heads of a layer. "
        "The darker the orange, the more the recitation depends on the head.",
    )


def evidence_table(ranking: Ranking) -> Table:
    """The rows of `Ranking.to_frame`, heads by name; columns without information left out."""
    frame = ranking.to_frame()
    frame.insert(1, "name", [str(head) for head in ranking.top(len(frame))])
    omitted = ["layer", "head", "rank", "p_value", "rare_token_p"]
    if bool(frame["verified"].all()):
        omitted.append("verified")
    return Table(
        frame.drop(columns=omitted).rename(columns={"name": "head"}),
        labels=LABELS,
        help=MEANINGS,
        title="Evidence",
        note="Best head first. Click a heading to sort; the meaning of each column is given below "
        "the table.",
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


def memorized_table(ranking: Ranking, measurements: Measurements) -> Table:
    """The memorized paragraphs with their loss and text."""
    import pandas as pd

    scan_result = measurements.scan
    n_measured, n_listed = len(ranking.memorized), len(scan_result.nll)
    listed = f"; the first {n_listed} are listed." if n_measured > n_listed else "."
    return Table(
        pd.DataFrame(
            {
                "id": scan_result.paragraphs.names,
                "nll": scan_result.nll.double().numpy(),
                "prefix": measurements.prefixes,
                "continuation": measurements.continuations,
            }
        ),
        labels={"nll": "NLL"},
        help={"nll": "mean loss of the continuation, nats/token; 0: certain"},
        title="Memorized paragraphs measured",
        note=f"{n_measured} were measured{listed}",
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
        "resamples and permutations": options["draws"],
        "seed": options["seed"],
        "rarity counted in": options["unigrams"],
        "time": None if ranking.seconds is None else f"{ranking.seconds:.0f} s",
        **{f"{name} (version)": version for name, version in provenance.versions.items()},
    }
    known = {name: value for name, value in items.items() if value is not None}
    return Facts(known, title="What was run")
