"""Sections on relearning, noise and the overlap of masks."""

from __future__ import annotations

from unlearning_page.numbers import table
from unlearning_page.setting import BUCKETS, PAPER_SHARE, SEED, Runs


def relearning(runs: Runs) -> str:
    parts = []
    titles = {"half": "the other half of the forgotten", "text": "other text"}
    for name, title in titles.items():
        result = runs.get(f"relearn/{name}")
        if result is None:
            continue
        cells: dict[int, list[str]] = {}
        for r in result["rows"]:
            value = f"{r['em']:.1f} [{r['ci_low']:.1f}, {r['ci_high']:.1f}]"
            cells.setdefault(r["step"], []).append(value)
        lines = [[str(step), *values] for step, values in cells.items()]
        half = result["to_25"]
        back = f"back after {half} step{'' if half == 1 else 's'}" if half else "not back by then"
        parts.append(
            f"Trained on {title} ({result['n']} paragraphs in each step), EM of {result['n']} "
            f"forgotten ones; half of it is {back}.\n\n"
            + table(["step", "edited", "unedited"], lines)
        )
    if not parts:
        return ""
    return (
        "## Relearning\n\nAll weights of the blocks are trained with Adam, lr 1e-4, from the edit "
        "of all paragraphs one\nby one, and from the unedited model.\n\n"
        + "\n\n".join(parts)
        + "\n"
    )


def noise_section(runs: Runs) -> str:
    rows, weights = [], 0
    for mask in ("top", "random"):
        result = runs.get(f"noise/{mask}")
        if result is not None:
            weights = result["weights"]
            rows += [
                [
                    f"{mask} 0.1 %",
                    r["set"],
                    f"{r['size']:g}",
                    f"{r['em']:.1f} [{r['em_low']:.1f}, {r['em_high']:.1f}]",
                    f"{r['nll']:.3f} [{r['nll_low']:.3f}, {r['nll_high']:.3f}]",
                ]
                for r in result["rows"]
            ]
    if not rows:
        return ""
    return (
        f"## Noise on weights\n\nGaussian noise on {weights:,} weights, its size relative to each "
        "matrix's root mean square;\n16 memorized paragraphs and 16 controls, 3 draws, seed "
        f"{SEED}, mask by the memorized paragraphs' gradient.\n\n"
        + table(["weights", "set", "size", "EM", "NLL (nats/token)"], rows)
        + "\n"
    )


def share_section(runs: Runs) -> str:
    rows = []
    for bucket in BUCKETS:
        r = runs.get(f"share/{bucket}")
        if r is not None:
            low, high = (100 * b for b in r["bounds"])
            rows.append(
                [
                    bucket,
                    str(r["n"]),
                    f"{100 * r['share']:.1f} [{low:.1f}, {high:.1f}]",
                    f"{PAPER_SHARE[bucket]}",
                ]
            )
    if not rows:
        return ""
    return (
        "## Where the gradient is\n\nShare of the lower half of the layers in the sum of the "
        "paper's map (largest |gradient| of the mean\nloss per component and head), by EM. "
        "Intervals: 200 bootstrap draws over at most 20 groups of\nparagraphs. The paper's model "
        "has 12 layers and another history; its numbers are there to compare\ndirections.\n\n"
        + table(["EM", "n", "lower half (%)", "paper, GPT-Neo 125M (%)"], rows)
        + "\n"
    )
