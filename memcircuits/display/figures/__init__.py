"""Figures of the measurements in plotly: pure functions of arrays and frames that return a figure.

Nothing here computes a measurement, shows a figure or changes plotly's settings: the caller does
`figure.show()`, `figure.write_html("f.html", include_plotlyjs=True)` (one file that needs no
network) or, with kaleido and Chrome or Chromium installed, `figure.write_image("f.pdf")`. One
template serves all: white ground, Okabe and Ito's colours with a dash and a marker of their own for
each series (colour is never the only difference), sequential blues for amounts and
blue-white-orange for values with a sign.

Frames are tidy: one row per point. An interval around column `y` is given by the columns `y_low`
and `y_high`, or by `y_se` (1.96 standard errors either way), where they exist. `set` names the
series ("memorized", "control"). A missing column raises an `InputError` that lists what is there.
"""

from memcircuits.display.figures.bars import arms, leaderboard, minimal_sets, token_bits
from memcircuits.display.figures.heatmaps import attention_pattern, heatmap
from memcircuits.display.figures.lines import (
    attention_by_rank,
    curves,
    duplication_curve,
    em_against_em,
    em_against_nll,
    noise_curves,
    perturbation_curves,
)
from memcircuits.display.figures.panels import gradient_map, patching_map
from memcircuits.display.figures.style import COMPONENTS

__all__ = [
    "COMPONENTS",
    "arms",
    "attention_by_rank",
    "attention_pattern",
    "curves",
    "duplication_curve",
    "em_against_em",
    "em_against_nll",
    "gradient_map",
    "heatmap",
    "leaderboard",
    "minimal_sets",
    "noise_curves",
    "patching_map",
    "perturbation_curves",
    "token_bits",
]
