"""What the columns of `Ranking.to_frame` are called in the report, and what they mean.

A column without an entry (`score`, `verified`) is shown under its own name.
"""

from __future__ import annotations

LABELS = {
    "component": "part",
    "ci_low": "95 % CI low",
    "ci_high": "95 % CI high",
    "rank_low": "rank from",
    "rank_high": "rank to",
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
"""Column -> heading."""

MEANINGS = {
    "score": "how much more the head's ablation raises the loss of memorized paragraphs than of "
    "controls, nats/token; heads are ranked by it",
    "ci_low": "95 % interval of the score, from resampling paragraphs",
    "rank": "place in the order of the scores",
    "rank_low": "the ranks that it may have, those of all rows together at 95 % probability: rows "
    "whose ranks overlap are in no certain order",
    "q_value": "how often chance alone gives a score this large: share of random relabellings of "
    "the paragraphs (p), after Benjamini-Hochberg correction for testing all heads; how small it "
    "can get depends on how many relabellings there were",
    "significant": "q below 0.05",
    "ablation_memorized": "rise of the loss of memorized continuations without the head, "
    "nats/token",
    "ablation_control": "the same for controls",
    "em_memorized": "change of exact match without the head, tokens; negative: the recitation "
    "breaks off",
    "em_control": "the same for controls",
    "gradient": "largest |gradient| of the loss over the head's four matrices, memorized "
    "paragraphs",
    "gradient_control": "the same for controls, whose loss is larger",
    "rare_token_tau": "rank correlation of attention with token counts; negative: rare tokens get "
    "more attention",
    "rare_token_p": "its one-sided permutation p-value",
}
"""Column -> meaning in a sentence."""
