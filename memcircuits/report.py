"""The report of a ranking: one page that tells the story to someone who has not seen the project.

Which paragraphs were recited, which heads stand out and how surely, the evidence beside the score,
gradients by layer, the attention of the best heads, what was run and how to run it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from memcircuits.adapter import adapt
from memcircuits.pages import (
    Attention,
    Bars,
    Facts,
    Heatmap,
    Number,
    Numbers,
    Page,
    Prose,
    Table,
)
from memcircuits.views import attention_view

if TYPE_CHECKING:
    from memcircuits.ranking import Ranking

_LABELS = {
    "ci_low": "95 % low",
    "ci_high": "95 % high",
    "p_value": "p",
    "q_value": "q",
    "stands_out": "stands out",
    "ablation_memorized": "ΔNLL memorized",
    "ablation_control": "ΔNLL control",
    "em_memorized": "ΔEM memorized",
    "em_control": "ΔEM control",
    "gradient": "gradient memorized",
    "gradient_control": "gradient control",
    "rare_token_tau": "rare-token τ",
    "rare_token_p": "rare-token p",
}
_HELP = {
    "score": "how much more the head's ablation raises the loss of memorized paragraphs than of "
    "controls, nats/token; the ranking goes by it",
    "ci_low": "95 % interval of the score, from resampling paragraphs",
    "p_value": "share of random relabellings of the paragraphs with a score this large",
    "q_value": "p after Benjamini-Hochberg correction over all heads; below 0.05 a head stands out",
    "ablation_memorized": "rise of the loss of memorized continuations without the head, "
    "nats/token",
    "ablation_control": "the same for controls",
    "em_memorized": "change of exact match without the head, tokens; negative: recitation breaks",
    "em_control": "the same for controls",
    "gradient": "largest |gradient| of the loss over the head's four matrices, memorized "
    "paragraphs",
    "gradient_control": "the same for controls, whose loss is larger",
    "rare_token_tau": "rank correlation of attention with token counts; negative: rare tokens get "
    "more attention",
    "rare_token_p": "its one-sided permutation p-value",
}


def ranking_page(ranking: Ranking, model: Any, *, heads: int = 6) -> Page:
    """Compose the report of a ranking.

    Args:
        ranking: what `find_memorization_heads` returned.
        model: the model it was computed from, for the attention views.
        heads: how many of the best heads to show attention of.
    """
    adapter = adapt(model)
    counts = ranking.counts
    example = ranking.memorized[0]
    best = ranking.top(min(heads, ranking.score.numel()))
    view = attention_view(model, example, heads=best, unigrams=ranking.unigrams)
    return Page(
        title=f"Memorization heads of {ranking.provenance.model['name']}",
        lead=ranking.summary(),
        blocks=[
            Numbers(
                [
                    Number("paragraphs given", str(counts["given"])),
                    Number(
                        "recited in full",
                        str(counts["memorized"]),
                        f"EM {example.n_continuation} of {example.n_continuation}",
                    ),
                    Number("controls", str(counts["control"]), "hardly recited"),
                    Number(
                        "heads that stand out",
                        f"{int(ranking.stands_out.sum())} of {ranking.score.numel()}",
                        "q < 0.05",
                    ),
                    Number(
                        "gradient in the lower half",
                        f"{100 * ranking.layer_share['memorized']:.0f} %",
                        f"controls {100 * ranking.layer_share['control']:.0f} %",
                    ),
                ]
            ),
            Prose(
                [
                    f"Each paragraph is {ranking.n_prefix} tokens of prefix and "
                    f"{example.n_continuation} of continuation. A paragraph is memorized when the "
                    "model, given the prefix, greedily writes the whole continuation. Each head "
                    "was removed by itself; its score is how much that raises the loss on "
                    "memorized paragraphs beyond what it does to controls.",
                    *ranking.notes,
                ],
                title="How to read this",
            ),
            Heatmap(
                ranking.score,
                name="score",
                units="nats/token",
                marks=ranking.stands_out,
                marks_mean="stands out (q < 0.05)",
                title="Every head",
                note="Framed heads stand out after correction for testing all heads.",
            ),
            Table(
                ranking.to_frame(),
                labels=_LABELS,
                help=_HELP,
                title="Evidence",
                note="Click a heading to sort.",
            ),
            Bars(
                _gradient_frame(ranking),
                x="layer",
                y="share",
                by="paragraphs",
                y_label="share of the gradient",
                units="%",
                title="Gradients by layer",
                note="Share of each layer in the sum of the largest |gradient| of every component. "
                "The paper found the gradients of memorized paragraphs in lower layers.",
            ),
            Attention(
                view,
                title="Attention of the top heads",
                note=f"On {example.names[0]}, one of the memorized paragraphs.",
            ),
            Table(
                _texts_frame(ranking, model),
                title="Memorized paragraphs measured",
                page_size=10,
                max_rows=200,
            ),
            Facts(
                {
                    **{f"model: {k}": v for k, v in ranking.provenance.model.items()},
                    **{k: v for k, v in ranking.provenance.options.items() if v is not None},
                    "paragraphs hash": ranking.provenance.paragraphs["paragraphs"]["hash"],
                    **ranking.provenance.versions,
                },
                commands=[_command(ranking, adapter.name)],
                title="What was run",
            ),
        ],
        footer="Made by memcircuits. Method: Stoehr et al. 2024, arXiv 2403.19851.",
    )


def _gradient_frame(ranking: Ranking) -> Any:
    import pandas as pd

    rows = []
    for name, layers in ranking.layer_gradients.items():
        share = 100 * layers / layers.sum()
        rows += [{"layer": i, "share": float(v), "paragraphs": name} for i, v in enumerate(share)]
    return pd.DataFrame(rows)


def _texts_frame(ranking: Ranking, model: Any) -> Any:
    import pandas as pd

    paragraphs = ranking.memorized
    if getattr(model, "tokenizer", None) is None:
        prefix = [str(row) for row in paragraphs.prefix.tolist()]
        continuation = [str(row) for row in paragraphs.continuation.tolist()]
    else:
        prefix = _decode(model, paragraphs.prefix)
        continuation = _decode(model, paragraphs.continuation)
    return pd.DataFrame({"id": paragraphs.names, "prefix": prefix, "continuation": continuation})


def _decode(model: Any, ids: torch.Tensor) -> list[str]:
    return [model.tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids.tolist()]


def _command(ranking: Ranking, name: str) -> str:
    options = ranking.provenance.options
    paragraphs = "" if name == "organism" else " --paragraphs FILE"
    model = "" if name == "organism" else f" --model {name}"
    return f"memcircuits heads{model}{paragraphs} --mode {options['mode']} --seed {options['seed']}"
