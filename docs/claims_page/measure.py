"""What README says of the shipped model and no other page measures, on default settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import memcircuits as mc
from memcircuits.base.heads import Head
from memcircuits.base.statistics import bootstrap_interval
from memcircuits.benchmark.estimands import (
    ESTIMANDS,
    HeadEffects,
    head_effects,
    score_heads,
    significant_heads,
)
from memcircuits.measure.decoding import greedy_continuations

SEED = 0
N = 40  # paragraphs of each set of `readings`
QUIET: Mapping[str, Any] = {"progress": False}


def paragraphs() -> dict[str, Any]:
    """How many paragraphs the organism was trained on, and how many it recites."""
    scan = mc.scan(mc.load_model(), mc.Paragraphs.shipped(), **QUIET)
    frame = scan.to_frame()
    control = frame[scan.is_control.numpy()]
    return {
        "shipped": len(frame),
        "seen": int((frame["repetitions"] > 0).sum()),
        "most": int(frame["repetitions"].max()),
        "recited": int(frame["memorized"].sum()),
        "control": len(control),
        "never_seen": int((control["repetitions"] == 0).sum()),
        "roles": frame["role"].value_counts().to_dict(),
    }


def heads() -> dict[str, Any]:
    """What `memcircuits heads` prints, and the gradients of both batches."""
    shipped = mc.Paragraphs.shipped()
    doses = dict(zip(shipped.names, shipped.metadata["repetitions"], strict=True))
    ranking = mc.find_memorization_heads(
        mc.load_model(), shipped, unigrams=mc.UnigramTable.shipped(), **QUIET
    )
    top = ranking.top(5)
    rarest = min(top, key=lambda head: float(ranking.evidence["rare_token_tau"][head]))
    frame = ranking.to_frame()
    return {
        "seed": SEED,
        "memorized": ranking.counts["measured"],
        "controls": ranking.counts["measured_control"],
        "controls_trained": sum(doses[name] > 0 for name in ranking.names["control"]),
        "n_heads": len(frame),
        "significant": int(ranking.significant.sum()),
        "order": [str(head) for head in top],
        "first": frame.iloc[0].to_dict(),
        "lowest": {"head": str(ranking.top(len(frame))[-1]), "score": frame["score"].iloc[-1]},
        "tau": {"first": frame["rare_token_tau"].iloc[0], "head": str(rarest)}
        | {"lowest": float(ranking.evidence["rare_token_tau"][rarest])},
        "gradient": {k: float(v.sum()) for k, v in ranking.layer_gradients.items()},
        "lower_half": dict(ranking.layer_share),
    }


def readings() -> dict[str, Any]:
    """One ablation, three readings: recitations, the model's own text, text it does not know."""
    model = mc.load_model()
    memorized = mc.scan(model, mc.Paragraphs.shipped("planted"), **QUIET).memorized
    assert memorized is not None
    generator = torch.Generator().manual_seed(SEED)
    unknown = mc.Paragraphs.shipped("control").sample(N, generator)
    sets = {
        "memorized": memorized.sample(N, generator),
        "own": greedy_continuations(model, unknown, **QUIET),
        "text": unknown,
    }
    effects = {name: head_effects(model, group, **QUIET) for name, group in sets.items()}
    by_set = {}
    for name, group in sets.items():
        nll = mc.scan(model, group, **QUIET).nll
        values = effects[name].values.mean(0)  # [head, scale]
        by_set[name] = {
            "n": len(group),
            "nll": float(nll.mean()),
            "first": _name(model, values[:, 0]),
            "mean_effect": _with_interval(effects[name].values[..., 0].mean(1)),
            "em_lost": _with_interval(effects[name].values[..., 2].mean(1)),
        }
    table = {e.name: _estimand(model, effects, e) for e in ESTIMANDS}
    return {"seed": SEED, "sets": by_set, "estimands": table}


def _estimand(model: Any, effects: Mapping[str, HeadEffects], estimand: Any) -> dict[str, Any]:
    """The first head of a way to score heads, and how many are significant."""
    trained, untrained = effects["memorized"], effects[estimand.against]
    above, below = significant_heads(trained, untrained, estimand, seed=SEED)
    first = _name(model, score_heads(trained, untrained, estimand))
    return {"first": first, "above": above, "below": below}


def _name(model: Any, scores: Tensor) -> str | None:
    if scores.isnan().any():
        return None
    return str(Head(*divmod(int(scores.argmax()), model.cfg.n_heads)))


def _with_interval(samples: Tensor) -> dict[str, float]:
    low, high = bootstrap_interval(samples, seed=SEED).tolist()
    return {"mean": float(samples.mean()), "low": low, "high": high}


SECTIONS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "paragraphs": paragraphs,
    "heads": heads,
    "readings": readings,
}
"""Section of `claims.json` -> its measurement."""
