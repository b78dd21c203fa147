"""The report of a ranking: one page that tells the story to someone who has not seen the project.

Which paragraphs were recited, which heads are significant and how surely, the evidence beside the score,
gradients by layer, the prefix tokens that trigger a recitation, the attention of the best heads,
what was run and how to run it again.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from memcircuits.core.errors import InputError
from memcircuits.display.pages import (
    Attention,
    Bars,
    Block,
    Facts,
    Heatmap,
    Number,
    Numbers,
    Page,
    Prose,
    Strip,
    Table,
    Tokens,
    strong,
)
from memcircuits.display.text import number, visible
from memcircuits.evidence.attention_view import attention_view, token_texts
from memcircuits.evidence.triggers.perturbation import Perturbation, perturb_prefix
from memcircuits.measure.scanning import Scan, scan
from memcircuits.models.adapter import Adapter
from memcircuits.models.registry import adapt
from memcircuits.report.rerun import commands

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.evidence.ranking import Ranking


_SHOWN = 200  # memorized paragraphs listed at most


_DRAWS = 2  # replacements of each prefix token


_LOST = "tokens lost when replaced"


_BASIS = {"raw": "raw: the weights as they are", "folded": "folded: LayerNorm folded into them"}


_LABELS = {
    "ci_low": "95 % from",
    "ci_high": "95 % to",
    "q_value": "q",
    "significant": "significant",
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
    "q_value": "how often chance alone gives a score this large: share of random relabellings of "
    "the paragraphs (p), after Benjamini-Hochberg correction for testing all heads; how small it "
    "can get depends on how many relabellings there were",
    "significant": "q below 0.05",
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


def ranking_page(
    ranking: Ranking, model: Any, *, heads: int = 6, triggers: int = 3, progress: bool = True
) -> Page:
    """Compose the report of a ranking.

    Args:
        ranking: what `find_memorization_heads` returned.
        model: the model it was computed from, for the attention views and trigger tokens.
        heads: how many of the best heads to show attention of.
        triggers: for how many paragraphs to look for trigger tokens; 0 leaves that out.
        progress: show a bar on stderr.

    Raises:
        InputError: if the model's weights are not those of the ranking.
    """
    adapter = adapt(model)
    _refuse_others(ranking, adapter)
    shown = scan(model, ranking.memorized[list(range(min(_SHOWN, len(ranking.memorized))))])
    surest = shown.nll.argsort(stable=True)[: max(1, triggers)]
    examples = shown.paragraphs[surest]
    best = ranking.top(min(heads, ranking.score.numel()))
    view = attention_view(model, examples[0], heads=best, unigrams=ranking.unigrams)
    found: list[Block] = []
    if triggers:
        perturbed = perturb_prefix(
            model,
            examples,
            draws=_DRAWS,
            seed=int(ranking.provenance.options["seed"]),
            progress=progress,
        )
        texts = token_texts(adapter, examples)
        found = _triggers(perturbed, texts)
        strips = {**view.strips, _LOST: _strip(perturbed, 0)}
        view = dataclasses.replace(view, strips=strips)
    return Page(
        title=f"What {ranking.provenance.model['name']} recites, and which heads that hangs on",
        lead=_lead(ranking),
        blocks=[
            _numbers(ranking),
            _how_to_read(ranking),
            Heatmap(
                ranking.score,
                name="score",
                units="nats/token",
                marks=ranking.significant,
                marks_mean="significant (q < 0.05)",
                title="Every head",
                note="Rows are layers, the first at the bottom; columns are the heads of a layer. "
                "The darker the orange, the more the recitation needs the head.",
            ),
            Table(
                _evidence(ranking),
                labels=_LABELS,
                help=_HELP,
                title="Evidence",
                note="Best head first. Click a heading to sort; what the columns mean is told "
                "below the table.",
            ),
            Bars(
                _gradient_frame(ranking),
                x="layer",
                y="share",
                by="paragraphs",
                y_label="share of the gradient",
                units="%",
                title="Gradients by layer",
                note="How strongly the loss pulls at the weights of each layer, as a share of all "
                "layers: sums of the largest |gradient| of every weight matrix. The paper found "
                "memorized paragraphs to pull at lower layers than others.",
            ),
            *found,
            Attention(
                view,
                title="Attention of the top heads",
                note=f"On {examples.names[0]}, one of the memorized paragraphs.",
            ),
            Table(
                _texts_frame(shown, model),
                labels={"nll": "NLL"},
                help={"nll": "mean loss of the continuation, nats/token; 0: certain"},
                title="Memorized paragraphs measured",
                note=f"{len(ranking.memorized)} were measured"
                + (f"; the first {_SHOWN} are listed." if len(ranking.memorized) > _SHOWN else "."),
                page_size=10,
            ),
            Facts(_facts(ranking), title="What was run"),
            Facts({}, commands=commands(ranking), title="Run it again"),
        ],
        footer="Made by memcircuits. Method: Stoehr et al. 2024, arXiv 2403.19851.",
    )


def _refuse_others(ranking: Ranking, adapter: Adapter) -> None:
    fits, found = ranking.provenance.model["fingerprint"], adapter.fingerprint()
    if fits != found:
        raise InputError(
            "model",
            f"weights {found}",
            f"the ranking is of weights {fits} ({ranking.provenance.model['name']}): give those",
        )


def _lead(ranking: Ranking) -> str:
    """The story in two sentences without a technical term that is not explained."""
    counts, n = ranking.counts, ranking.memorized.n_continuation
    recited = (
        f"Given the first {ranking.n_prefix} tokens, this model writes the next {n} word for word "
        f"for {counts['memorized']:,} of {counts['given']:,} paragraphs."
    )
    if not ranking.significant.any():
        return f"{recited} No single attention head is significant for them."
    head = next(h for h in ranking.top(ranking.score.numel()) if ranking.significant[h])
    lost = {name: -float(ranking.evidence[f"em_{name}"][head]) for name in ("memorized", "control")}
    return (
        f"{recited} It depends most on attention head {head} (layer {head.layer}, head "
        f"{head.head}): without it, {lost['memorized']:.1f} of the {n} tokens are no longer "
        f"recited, on average."
    )


def _numbers(ranking: Ranking) -> Numbers:
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


def _how_to_read(ranking: Ranking) -> Prose:
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
                " when chance alone would hardly give such a score (q < 0.05). A recitation "
                "has far to fall, so where most heads are significant, read their order and intervals, "
                "not their count.",
            ],
            ranking.summary(),
            *ranking.notes,
        ],
        title="How to read this",
    )


def _evidence(ranking: Ranking) -> pd.DataFrame:
    frame = ranking.to_frame()
    names = [str(head) for head in ranking.top(len(frame))]
    frame.insert(1, "name", names)
    left_out = ["layer", "head", "rank", "p_value", "rare_token_p"]
    if bool(frame["verified"].all()):
        left_out.append("verified")
    return frame.drop(columns=left_out).rename(columns={"name": "head"})


def _strip(found: Perturbation, index: int) -> Strip:
    """EM lost by replacing each token; the continuation is not replaced and stays uncoloured."""
    rest = found.ids.shape[1] - found.n_prefix
    return Strip([*found.drops[index].clamp_min(0).tolist(), *[float("nan")] * rest], "tokens")


def _triggers(found: Perturbation, texts: list[list[str]]) -> list[Block]:
    import pandas as pd

    n = found.ids.shape[1] - found.n_prefix
    blocks: list[Block] = []
    rows = []
    for index, tokens in enumerate(texts):
        drops = found.drops[index]
        order = drops.argsort(descending=True, stable=True)[:5].tolist()
        rows += [
            {
                "paragraph": found.names[index],
                "token": visible(tokens[i], 24, tell=False),
                "position": i,
                "lost": float(drops[i]),
                "nll": float(found.nll[index, i].mean() - found.baseline_nll[index]),
            }
            for i in order
            if drops[i] > 0
        ]
        worst = order[0]
        blocks.append(
            Tokens(
                tokens,
                _strip(found, index),
                _LOST,
                found.n_prefix,
                title="Trigger tokens" if index == 0 else "",
                note=(
                    "Which tokens of the prefix set the recitation off? Each was replaced by a "
                    f"random other token ({found.em.shape[2]} draws), one at a time; the darker, "
                    "the more of the continuation is lost. "
                    if index == 0
                    else ""
                )
                + f"{found.names[index]}: with another token in the place of "
                f"“{visible(tokens[worst], 24, tell=False)}” (token {worst}) "
                f"{number(float(drops[worst]))} of {n} tokens are lost.",
            )
        )
    columns = ["paragraph", "token", "position", "lost", "nll"]
    table = Table(
        pd.DataFrame(rows, columns=columns),
        labels={"lost": "tokens lost", "nll": "ΔNLL"},
        help={
            "lost": "recited tokens lost when this one is replaced, mean over draws",
            "nll": "rise of the loss of the continuation, nats/token",
        },
        note="The tokens of each paragraph that matter, at most five.",
        page_size=15,
    )
    return [*blocks, table]


def _gradient_frame(ranking: Ranking) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for name, layers in ranking.layer_gradients.items():
        share = 100 * layers / layers.sum()
        rows += [{"layer": i, "share": float(v), "paragraphs": name} for i, v in enumerate(share)]
    return pd.DataFrame(rows)


def _texts_frame(found: Scan, model: Any) -> pd.DataFrame:
    import pandas as pd

    paragraphs = found.paragraphs
    if getattr(model, "tokenizer", None) is None:
        prefix = [str(row) for row in paragraphs.prefix.tolist()]
        continuation = [str(row) for row in paragraphs.continuation.tolist()]
    else:
        prefix = _decode(model, paragraphs.prefix)
        continuation = _decode(model, paragraphs.continuation)
    return pd.DataFrame(
        {
            "id": paragraphs.names,
            "nll": found.nll.double().numpy(),
            "prefix": prefix,
            "continuation": continuation,
        }
    )


def _decode(model: Any, ids: torch.Tensor) -> list[str]:
    return [model.tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids.tolist()]


def _facts(ranking: Ranking) -> dict[str, object]:
    provenance = ranking.provenance
    model, options = provenance.model, provenance.options
    facts = {
        "model": model["name"],
        "revision": model["revision"],
        "weights (fingerprint)": model["fingerprint"],
        "architecture": f"{model['architecture']}, as {model['class']}",
        "basis": _BASIS.get(model["basis"], model["basis"]),
        "precision": f"{model['dtype']} on {model['device']}",
        "paragraphs (hash of their tokens)": provenance.paragraphs["paragraphs"]["hash"],
        "tokens": f"{ranking.n_prefix} of prefix + {ranking.memorized.n_continuation}",
        "ablation": f"{options['mode']}, {options['method']}",
        "measured": f"{ranking.counts['measured']} memorized, "
        f"{ranking.counts['measured_control']} controls",
        "resamples and permutations": options["draws"],
        "seed": options["seed"],
        "rarity counted in": options["unigrams"],
        "time": None if ranking.seconds is None else f"{ranking.seconds:.0f} s",
        **{f"{name} (version)": version for name, version in provenance.versions.items()},
    }
    return {name: value for name, value in facts.items() if value is not None}
