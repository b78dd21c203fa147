"""Tables of docs/triggers.md."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import torch

import memcircuits as mc
from memcircuits.base.statistics import bootstrap_means, finite_mean
from memcircuits.evidence.patching.context import DIRECTIONS
from memcircuits.evidence.triggers.perturbation import Perturbation
from memcircuits.evidence.triggers.replacements import REPLACEMENTS
from triggers_page.kept import RESAMPLES, SITES, Estimates, Kept, Layers, Maps, Results


def carried(maps: Maps, layers: Layers) -> dict[str, str]:
    """How much of the difference between the runs heads and layers carry, %, and EM regained."""
    result = {}
    for way in DIRECTIONS:
        whole = layers[way, "mlp_out"].source["first_impacted"].mean()
        whole = whole - layers[way, "mlp_out"].base["first_impacted"].mean()
        shares = {
            "share": max(maps[way, site].share.abs().max() for site in SITES),
            "mlp": layers[way, "mlp_out"].values[0, 0] / whole,
            "attention": (layers[way, "attn_out"].values / whole).max(),
        }
        result |= {f"{name}_{way}": f"{100 * float(share):.1f}" for name, share in shares.items()}
    heads = max(float(maps["denoising", site].samples["em"].max()) for site in SITES)
    mlp = float(layers["denoising", "mlp_out"].samples["em"][:, 0].mean())
    return result | {"restored": f"{heads:.0f}", "mlp_em": f"{mlp:.0f}"}


def share_unique(ids: torch.Tensor) -> float:
    """Mean share of different tokens."""
    return sum(len(set(row)) / len(row) for row in ids.tolist()) / len(ids)


def interval(samples: torch.Tensor, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    means = bootstrap_means(samples.float(), RESAMPLES, generator)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    return f"{low:.2f} to {high:.2f}"


def drop_rows(results: Results, seed: int) -> pd.DataFrame:
    rows = []
    for kind in REPLACEMENTS:
        row: dict[str, Any] = {"replacement": kind}
        means = {}
        for name in ("memorized", "control"):
            drops = results[name, kind].em_drop.mean(-1)
            generator = torch.Generator().manual_seed(seed)
            means[name] = bootstrap_means(drops, RESAMPLES, generator)
            row[name] = float(drops.mean())
            row[f"{name}, 95 %"] = interval(drops, seed)
            seed += 1
        low, high = torch.quantile(
            means["control"] - means["memorized"], torch.tensor([0.025, 0.975])
        ).tolist()
        row["difference"] = row["control"] - row["memorized"]
        row["difference, 95 %"] = f"{low:.2f} to {high:.2f}"
        row["n"] = f"{len(results['memorized', kind].names)} + {len(drops)}"
        rows.append(row)
    return pd.DataFrame(rows)


def token_rows(
    model: Any, memorized: mc.Paragraphs, results: Results, one: Perturbation
) -> pd.DataFrame:
    frame = one.to_frame().sort_values("drop", ascending=False).head(6)
    tokens = memorized.tokens(model)
    return pd.DataFrame(
        {
            "position": frame["position"],
            "token": [code(tokens[p]) for p in frame["position"]],
            "EM left": frame["em"],
            "standard error": frame["em_se"],
            "NLL": frame["nll"],
            "surprisal (nats)": frame["surprisal"],
        }
    )


def story(model: Any, pairs: Any) -> str:
    """One pair as text."""
    clean, corrupted = pairs.clean[0], pairs.corrupted[0]
    old, new = clean.tokens(model), corrupted.tokens(model)
    (position,) = corrupted.metadata["position"]
    (em,) = corrupted.metadata["em"]
    n = clean.n_prefix
    return (
        f"Replacing {code(old[position])} at position {position} of `{clean.names[0]}` by "
        f"{code(new[position])} leaves {em} of {clean.n_continuation} tokens. It goes on\n\n"
        f"> {flat(old[n:])}\n\nwith the token, and without it\n\n> {flat(new[n:])}"
    )


def flat(tokens: list[str]) -> str:
    return " ".join("".join(tokens).split()).replace("*", r"\*").replace("_", r"\_")


def code(token: str) -> str:
    return f"`{token!r}`".replace("|", r"\|")


def cause_rows(results: Results, kept: Kept, seed: int) -> pd.DataFrame:
    unigrams = mc.UnigramTable.shipped()
    rows = []
    for (name, kind), result in results.items():
        path = kept.folder / f"causes-{name}-{kind}.json"
        if not path.exists():
            outcome = result.causes(unigrams, resamples=RESAMPLES, seed=seed)
            path.write_text(outcome.to_json(orient="records"))
        rows += [
            {
                "replacement": kind,
                "set": name,
                "cause": cause["cause"],
                "coefficient": cause["coefficient"],
                "95 %": f"{cause['ci_low']:.2f} to {cause['ci_high']:.2f}",
                "Spearman": cause["spearman"],
                "its 95 %": f"{cause['spearman_low']:.2f} to {cause['spearman_high']:.2f}",
                "Kendall": cause["kendall"],
            }
            for cause in json.loads(path.read_text())
        ]
    return pd.DataFrame(rows)


def end_rows(maps: Maps) -> pd.DataFrame:
    rows = []
    for way in DIRECTIONS:
        result = maps[way, "z"]
        for metric in ("first_impacted", "nll", "em"):
            base, source = float(result.base[metric].mean()), float(result.source[metric].mean())
            rows.append(
                {
                    "direction": way,
                    "metric": metric,
                    "run patched into": base,
                    "other run": source,
                }
            )
    return pd.DataFrame(rows)


def head_rows(maps: Maps, seed: int, top: int = 3) -> pd.DataFrame:
    rows = []
    for (way, site), result in maps.items():
        samples = result.samples["first_impacted"]
        order = result.values.abs().flatten().argsort(descending=True)[:top].tolist()
        for flat_index in order:
            layer, head = divmod(flat_index, result.values.shape[1])
            rows.append(
                {
                    "direction": way,
                    "site": site,
                    "head": f"L{layer}H{head}",
                    "effect (nats)": float(result.values[layer, head]),
                    "95 %": interval(samples[:, layer, head], seed),
                    "share of the difference": float(result.share[layer, head]),
                    "EM changes by": float(result.samples["em"][:, layer, head].mean()),
                }
            )
    return pd.DataFrame(rows)


def layer_rows(layers: Layers) -> pd.DataFrame:
    rows = []
    for (way, site), result in layers.items():
        effects = {f"layer {i}": float(v) for i, v in enumerate(result.values[:, 0])}
        em = [float(v) for v in result.samples["em"][..., 0].mean(0)]
        best = max(range(len(em)), key=lambda i: abs(em[i]))
        changed = f"{em[best]:.1f} (layer {best})"
        rows.append({"direction": way, "site": site, **effects, "EM changes most by": changed})
    return pd.DataFrame(rows)


def agreement_rows(maps: Maps, estimates: Estimates) -> pd.DataFrame:
    rows = []
    for (way, site, metric), estimate in estimates.items():
        exact = finite_mean(maps[way, site].samples[metric])
        top = exact.abs().argmax()
        rows.append(
            {
                "direction": way,
                "site": site,
                "metric": metric,
                "correlation": correlation(estimate.values, exact),
                "share of exact, top head": float(
                    estimate.values.flatten()[top] / exact.flatten()[top]
                ),
                "reported (10 heads)": estimate.agreement["all"],
            }
        )
    return pd.DataFrame(rows)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def table(frame: pd.DataFrame, digits: int) -> str:
    """A table in Markdown; floats are rounded to `digits` decimals."""

    def cell(value: Any) -> str:
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    lines = [list(map(str, frame.columns)), ["---"] * frame.shape[1]]
    lines += [[cell(v) for v in row] for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
