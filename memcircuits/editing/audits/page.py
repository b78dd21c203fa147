"""The blocks of an audit's page: verdict, measures, relearning, layers, harm and one text."""

from __future__ import annotations

import math

from memcircuits.data.tokens import TokenizerLike
from memcircuits.display.pages import Block, Lines, Number, Numbers, Prose, Strip, Table, Tokens
from memcircuits.display.text import number
from memcircuits.editing.audits.result import EditAudit
from memcircuits.editing.audits.verdict import BACK, DEPTH, LEFT, SLACK

HELP = {
    "depth": "1 - KL(reference || edited) / KL(reference || unedited) along the text",
    "remembered": "bits known beyond the reference, as a share of what the unedited model knows",
    "em": "tokens recited from the own prefix",
    "nll": "mean -log p of the continuation's tokens",
    "bits": "what the continuation costs to encode; the more, the less is known",
    "kl_to_reference": "KL(reference || model) along the continuation",
    "longest_run": "tokens recited in a row from any entry in the continuation",
    "loose_match": "tokens that are still the greedy choice behind all true tokens",
    "em_replaced": "behind the own prefix with one to half of its tokens replaced",
    "em_spliced": "behind the end of the own prefix, with another text before it",
    "em_cut": "behind the own prefix without its first tokens",
    "em_prepended": "behind the own prefix, with another text before it",
    "em_recased": "behind the own prefix in capitals",
    "em_attacked": "largest EM over all attacked prefixes and the own one",
    "em_int8": "the same after rounding every row of every matrix to 8 bits",
    "em_int4": "to 4 bits",
    "extraction": "probability that samples contain the whole continuation",
}
"""What the measures of an audit are."""

VERDICTS = (
    "Verdicts. Not touched: recited as before. Still recited: half of it is left behind the own "
    f"prefix. Hidden: some way brings half of it back, or the depth is below {BACK}. Erased to the "
    f"reference within noise: a depth of {DEPTH} or more, at most {LEFT:.0%} of the remembered "
    f"bits, and no way brings back more than {SLACK:.0f} tokens more than the reference recites. "
    "Weakened: anything between."
)


def audit_blocks(audit: EditAudit, model: TokenizerLike) -> list[Block]:
    """The blocks; `model` is a model or tokenizer that gives the tokens' text."""
    measures = audit.to_frame()
    measures.insert(1, "meaning", [HELP.get(name, "") for name in measures["measure"]])
    blocks: list[Block] = [
        _headline(audit),
        Table(
            measures,
            title="What is left of the text",
            note=f"Reference: {audit.reference}. {VERDICTS}",
        ),
    ]
    if said := [*audit.reading, *audit.notes]:
        blocks.append(Prose(said, title="How to read it"))
    blocks.extend(_relearning_blocks(audit))
    layers = audit.layers_frame()
    if layers is not None:
        note = (
            "Residual stream of the edited model in the unedited one; 1: as much is lost as with "
            "that of the reference."
        )
        blocks.append(Table(layers, title="Depth by layer", note=note))
    harm = audit.harm_report.to_frame()
    blocks.append(Table(harm, title="What else changed", note="Before: no edit."))
    return blocks + _text_blocks(audit, model)


def _relearning_blocks(audit: EditAudit) -> list[Lines]:
    frame = audit.relearning_frame()
    note = (
        "The reference is a model that never saw the text: an edit that erased it needs as many "
        "steps."
        if "reference" in set(frame["set"])
        else "The reference has no curve: it is a stand-in, not a model that can be trained."
    )
    return [
        Lines(
            frame[frame["trained_on"] == text],
            "step",
            "em",
            by="set",
            low="em_low",
            high="em_high",
            x_label="training step",
            y_label="EM of the targets",
            units="tokens",
            title=f"Training on {text}",
            note=note,
        )
        for text in audit.relearning
    ]


def _headline(audit: EditAudit) -> Numbers:
    depth, remembered = audit.depth, audit.remembered
    attacked = audit.recited["em_attacked"].edited
    items = [
        Number("verdict", audit.verdict, ", ".join(audit.ways_back)),
        Number("erasure depth", number(depth[0], 2), _interval(depth)),
        Number("remembered bits left", number(remembered[0], 2), _interval(remembered)),
        Number("attacked EM", number(attacked, 2), f"best of {audit.n_attacks} prefixes"),
    ]
    return Numbers(items, title="In short")


def _interval(estimate: tuple[float, float, float]) -> str:
    _, low, high = estimate
    return "one group: no interval" if math.isnan(low) else f"{number(low, 2)} to {number(high, 2)}"


def _text_blocks(audit: EditAudit, model: TokenizerLike, index: int = 0) -> list[Block]:
    """One target token by token: before, after, and for the reference."""
    tokens = audit.paragraphs.tokens(model, index)
    titles = ("before the edit", "after the edit", f"of the {audit.reference}")
    blocks: list[Block] = []
    lowest = float(audit.token_log_prob[:, index].min())
    for title, log_prob in zip(titles, audit.token_log_prob[:, index].tolist(), strict=True):
        values = [math.nan] * audit.n_prefix + log_prob
        blocks.append(
            Tokens(
                tokens,
                Strip(values, "nats", reverse=True, limits=(lowest, 0.0)),
                "log p",
                audit.n_prefix,
                title=f"{audit.names[index]}, {title}",
            )
        )
    return blocks
