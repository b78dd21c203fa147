"""Sections on noise, and on where the gradient is: two experiments of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import memcircuits as mc
from memcircuits.editing.noise import weight_noise
from memcircuits.measure.gradients import mean_gradient
from unlearning_page.numbers import table
from unlearning_page.setting import SEED, setting

NOISE, SHARE = "Noise on weights", "Where the gradient is"
N_NOISE = 16
MASKS = ("top", "random")
BUCKETS = {"0-10": (0, 10), "11-29": (11, 29), "30-49": (30, 49), "50": (50, 50)}
PAPER_SHARE = {"0-10": 29, "11-29": 40, "30-49": 54, "50": 59}


def noisy(mask: Any) -> dict[str, Any]:
    s = setting()
    noise = weight_noise(
        s.model, s.targets[:N_NOISE], s.unseen[:N_NOISE], mask=mask, seed=SEED, progress=False
    )
    rows = noise.to_frame().to_dict("records")
    return {"rows": rows, "weights": noise.n_weights, "n": N_NOISE}


def share(bucket: str) -> dict[str, Any]:
    """Share of the lower layers in the paper's gradient map, resampled in up to 20 groups."""
    s = setting()
    paragraphs = mc.Paragraphs.shipped()
    em = mc.scan(s.model, paragraphs, progress=False).em
    low, high = BUCKETS[bucket]
    chosen = paragraphs[(em >= low) & (em <= high)]
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(SEED))]
    weights = s.adapter.weights()
    sizes, groups = [], []
    for rows in torch.arange(len(chosen)).tensor_split(min(20, len(chosen))):
        _, gradients = mean_gradient(s.adapter, chosen[rows], weights, progress=False)
        sizes.append(len(rows))
        groups.append([w.split(g).clone() for w, g in zip(weights, gradients, strict=True)])
    generator = torch.Generator().manual_seed(SEED)
    draws = [torch.ones(len(groups))]
    for _ in range(200):
        picks = torch.randint(len(groups), (len(groups),), generator=generator)
        draws.append(torch.bincount(picks, minlength=len(groups)).float())
    factors = torch.stack(draws) * torch.tensor(sizes)
    factors = factors / factors.sum(1, keepdim=True)
    layers = torch.zeros(len(draws), s.adapter.n_layers)
    for i, weight in enumerate(weights):
        stacked = torch.stack([group[i] for group in groups])
        for j, factor in enumerate(factors):
            mean = (factor @ stacked.flatten(1)).view(stacked.shape[1:])
            layers[j, weight.layer] += mean.abs().amax((-2, -1)).sum()
    half = s.adapter.n_layers // 2
    shares = layers[:, :half].sum(1) / layers.sum(1)
    bounds = torch.quantile(shares[1:], torch.tensor([0.025, 0.975])).tolist()
    return {"share": float(shares[0]), "bounds": bounds, "n": len(chosen), "groups": len(groups)}


def noise_section(runs: Mapping[str, Any]) -> str:
    results = {mask: runs[f"noise/{mask}"] for mask in MASKS}
    rows = [
        [
            f"{mask} 0.1 %",
            row["set"],
            f"{row['size']:g}",
            f"{row['em']:.1f} [{row['em_low']:.1f}, {row['em_high']:.1f}]",
            f"{row['nll']:.3f} [{row['nll_low']:.3f}, {row['nll_high']:.3f}]",
        ]
        for mask, result in results.items()
        for row in result["rows"]
    ]
    return (
        f"\nGaussian noise on {results['top']['weights']:,} weights, its size relative to the root "
        f"mean square of each matrix; {N_NOISE} memorized paragraphs and {N_NOISE} controls, 3 "
        f"draws, seed {SEED}, mask by the memorized paragraphs' gradient.\n\n"
        + table(["weights", "set", "size", "EM", "NLL (nats/token)"], rows)
        + "\n"
    )


def share_section(runs: Mapping[str, Any]) -> str:
    rows = []
    for bucket in BUCKETS:
        result = runs[f"share/{bucket}"]
        low, high = (100 * bound for bound in result["bounds"])
        share = f"{100 * result['share']:.1f} [{low:.1f}, {high:.1f}]"
        rows.append([bucket, str(result["n"]), share, str(PAPER_SHARE[bucket])])
    return (
        "\nShare of the lower half of the layers in the sum of the paper's map (largest |gradient| "
        "of the mean loss per component and head), by EM. Intervals: 200 bootstrap draws over at "
        "most 20 groups of paragraphs. The paper's model has 12 layers and another history; its "
        "numbers are there to compare directions.\n\n"
        + table(["EM", "n", "lower half (%)", "paper, GPT-Neo 125M (%)"], rows)
        + "\n"
    )
