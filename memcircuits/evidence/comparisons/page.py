"""The page of a comparison: passages gained and lost, both models' EM, heads that changed."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from memcircuits.display.pages import (
    Block,
    Facts,
    Heatmap,
    Number,
    Numbers,
    Page,
    Prose,
    Scatter,
    Table,
    code,
    strong,
)
from memcircuits.display.pages.scatter import MAX_POINTS
from memcircuits.display.text import number

if TYPE_CHECKING:
    from memcircuits.evidence.comparisons.result import Comparison

N_BINS = 10
"""Number of bins of EM in the map of both models."""

_PASSAGE_HELP = {
    "passage": "gained: recited in full by b and not by a; lost: the reverse; kept: by both",
    "em_a": "tokens of the continuation that a recites before its first mistake",
    "em_b": "the same for b",
    "em_change": "b minus a, tokens",
    "nll_change": "change of the loss of the continuation, nats/token",
}
_HEAD_HELP = {
    "score_a": "ablation effect on memorized paragraphs minus that on controls in a, nats/token",
    "score_b": "the same in b",
    "change": "b minus a, nats/token",
    "ci": "95 % interval of the change, paired over independent groups of paragraphs",
    "q_value": "two-sided permutation p-value, corrected for the number of heads",
}


def comparison_page(comparison: Comparison, texts: Sequence[str]) -> Page:
    """The page; nothing is measured.

    Args:
        comparison: the comparison.
        texts: the text of each paragraph around the border, empty where it is not known.
    """
    a, b = comparison.labels
    blocks: list[Block] = [_headline_numbers(comparison), _how_to_read(comparison)]
    if comparison.has_passages:
        blocks += [_passages(comparison, texts), _both_em(comparison), _both_nll(comparison)]
    if comparison.has_heads:
        blocks += [_map(comparison), _heads(comparison)]
    return Page(
        title=f"From {a} to {b}",
        lead=_lead(comparison),
        blocks=[*blocks, _what_next(comparison), _facts(comparison)],
        footer="Made by memcircuits.",
    )


def _lead(comparison: Comparison) -> str:
    a, b = comparison.labels
    if not comparison.has_passages:
        n = int(comparison.significant.sum())
        return f"{n} of {comparison.p_value.numel()} heads matter more or less in {b} than in {a}."
    counts = {name: int(getattr(comparison, name).sum()) for name in ("gained", "lost", "kept")}
    return (
        f"Of {len(comparison.names):,} paragraphs, {b} recites {counts['gained']:,} in full that "
        f"{a} does not, and {a} recites {counts['lost']:,} that {b} does not; both recite "
        f"{counts['kept']:,}."
    )


def _headline_numbers(comparison: Comparison) -> Numbers:
    items = []
    if comparison.has_passages:
        for name, meaning in (("gained", "only by b"), ("lost", "only by a"), ("kept", "by both")):
            items.append(Number(name, f"{int(getattr(comparison, name).sum()):,}", meaning))
        for measure, units in (("em", "tokens"), ("nll", "nats/token")):
            mean, low, high = comparison.mean_change("em" if measure == "em" else "nll")
            detail = f"{low:+.2g} to {high:+.2g} {units}"
            items.append(Number(f"mean change of {measure.upper()}", f"{mean:+.2g}", detail))
    if comparison.has_heads:
        n = int(comparison.significant.sum())
        items.append(Number("heads changed", f"{n} of {comparison.p_value.numel()}", "q < 0.05"))
    return Numbers(items)


def _how_to_read(comparison: Comparison) -> Prose:
    a, b = comparison.labels
    paragraphs: list[str | list] = []
    if comparison.has_passages:
        paragraphs.append(
            [
                strong("a"),
                f" is {a}, ",
                strong("b"),
                f" is {b}, and every change is b minus a. A passage is recited in full when the "
                f"model, given its first {comparison.n_prefix} tokens and always writing the "
                f"likeliest next one, writes the other {comparison.n_continuation} exactly. ",
                strong("EM"),
                " counts the tokens before its first mistake.",
            ]
        )
    if comparison.has_heads:
        counts = comparison.n_groups
        paragraphs.append(
            "The score of a head is how much removing it raises the loss of memorized paragraphs "
            f"beyond what it does to controls. Both models were measured on the same paragraphs, "
            f"{counts['memorized']} independent groups that one of them recites and "
            f"{counts['control']} of controls, and the change of each head is paired over groups. "
            "A ranking of one model measures what that model recites, and so has other scores. "
            "The loss of a recited text is near zero and can rise further than that of another: "
            "where only one model recites them, part of every change is that."
        )
    return Prose([*paragraphs, *comparison.notes], title="How to read this")


def _passages(comparison: Comparison, texts: Sequence[str]) -> Table:
    frame = comparison.to_frame()
    if any(texts):
        text_of = dict(zip(comparison.names, texts, strict=True))
        frame["text"] = [text_of[name] for name in frame["id"]]
    changed = pd.concat([frame[frame["passage"] == kind] for kind in ("gained", "lost")])
    n_changed = len(changed)
    shown = pd.concat([changed, frame.drop(changed.index)])
    return Table(
        shown.drop(columns=["nll_a", "nll_b", "group"]),
        labels={"em_a": "EM, a", "em_b": "EM, b", "em_change": "ΔEM", "nll_change": "ΔNLL"},
        help=_PASSAGE_HELP,
        title="Passages",
        note=f"The {n_changed:,} gained and then lost first, then the others by the change of EM.",
        page_size=15,
    )


def _both_em(comparison: Comparison) -> Heatmap:
    """How many paragraphs have which EM under a and under b."""
    length = comparison.n_continuation
    n_bins = min(N_BINS, length)
    edges = np.unique(np.linspace(0, length, n_bins + 1).round().astype(int))
    bins = np.append(edges, length + 1)  # the last bin holds only full recitations
    bin_of = np.digitize(comparison.em.numpy(), bins[1:-1])
    counts = np.zeros((len(bins) - 1, len(bins) - 1))
    np.add.at(counts, (bin_of[1], bin_of[0]), 1)
    names = [
        str(low) if high - low == 1 else f"{low}-{high - 1}"
        for low, high in itertools.pairwise(bins.tolist())
    ]
    return Heatmap(
        counts,
        name="paragraphs",
        diverging=False,
        row_label="b",
        col_label="a",
        row_names=names,
        col_names=names,
        title="Tokens recited by each",
        note="How many paragraphs have which EM in b (rows) and in a (columns). Those above the "
        "diagonal are recited further by b, those below it by a.",
    )


def _both_nll(comparison: Comparison) -> Scatter:
    """The loss of each paragraph under both, as far as there is room for them."""
    frame = comparison.to_frame().head(MAX_POINTS)
    frame["passage"] = frame["passage"].replace("", "neither")
    left_out = len(comparison.names) - len(frame)
    room = f" The {left_out:,} with the smallest change of EM are left out." if left_out else ""
    return Scatter(
        frame,
        x="nll_a",
        y="nll_b",
        by="passage",
        label="id",
        x_label="NLL in a",
        y_label="NLL in b",
        units="nats/token",
        diagonal=True,
        title="Loss under each",
        note=f"One point per paragraph; on the dashed diagonal, nothing changed.{room}",
    )


def _map(comparison: Comparison) -> Heatmap:
    low, high = comparison.ci
    hover = [
        [f"95 % CI {number(bottom)} to {number(top)}" for bottom, top in zip(*row, strict=True)]
        for row in zip(low.tolist(), high.tolist(), strict=True)
    ]
    return Heatmap(
        comparison.head_change.values,
        name="change",
        units="nats/token",
        diverging=True,
        marks=comparison.significant,
        marks_mean="significant (q < 0.05)",
        hover=hover,
        title="Every head",
        note="Rows are layers, the first at the bottom. Orange: the head matters more in b; blue: "
        "it matters more in a; the nearer to an end of the scale, the larger the change."
        + ("" if bool(comparison.significant.any()) else " No change is significant."),
    )


def _heads(comparison: Comparison) -> Table:
    frame = comparison.heads_frame()
    bounds = zip(frame["ci_low"], frame["ci_high"], strict=True)
    frame["ci"] = [
        "" if math.isnan(low) else f"{number(low)} to {number(high)}" for low, high in bounds
    ]
    columns = ["name", "score_a", "score_b", "change", "ci", "q_value", "significant"]
    return Table(
        frame[columns],
        labels={
            "name": "head",
            "score_a": "score, a",
            "score_b": "score, b",
            "ci": "95 % CI",
            "q_value": "q",
        },
        help=_HEAD_HELP,
        title="Heads",
        note="The largest changes first.",
        page_size=15,
    )


def _what_next(comparison: Comparison) -> Prose:
    """The commands that say more about the two models, and the one that made the page."""
    a, b = (shlex.quote(name) for name in comparison.labels)
    paragraphs: list[str | list] = [
        [
            "Where in the weights do they differ? ",
            code(f"memcircuits transplant --model {b} --twin {a} --units head,mlp,layer"),
            " puts each part of one into the other, MLPs and layers too, if they have one shape.",
        ]
    ]
    if comparison.has_passages and comparison.has_heads:
        again = code(f"memcircuits compare {a} {b}")
        paragraphs.append(["This page again, with the options that were given: ", again])
    return Prose(paragraphs, title="What next")


def _facts(comparison: Comparison) -> Facts:
    provenance = comparison.provenance
    models = {"a": provenance.options["a"], "b": provenance.model}
    items: dict[str, object] = {}
    for letter, model in models.items():
        items[letter] = model["name"]
        items[f"{letter}, weights (fingerprint)"] = model["fingerprint"]
        items[f"{letter}, precision and basis"] = f"{model['dtype']}, {model['basis']}"
    for name in ("draws", "seed"):
        if name in provenance.options:
            items[name] = provenance.options[name]
    items |= {f"{name} (version)": version for name, version in provenance.versions.items()}
    return Facts(items, title="What was compared")
