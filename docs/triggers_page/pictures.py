"""The pictures of docs/triggers.md."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from memcircuits.display import figures
from memcircuits.evidence.patching.context import DIRECTIONS
from memcircuits.evidence.patching.results import LayerPatches
from memcircuits.evidence.triggers.perturbation import Perturbation
from triggers_page.kept import PICTURES, SITES, Maps, Results


def pictures(
    results: Results,
    one: Perturbation,
    maps: Maps,
    sweeps: dict[str, LayerPatches],
    early: Any,
    model: Any,
) -> None:
    PICTURES.mkdir(exist_ok=True)
    curves = pd.concat(
        [results[name, "random"].curves().assign(set=name) for name in ("memorized", "control")]
    )
    title = "One prefix token replaced at random: mean over paragraphs"
    shoot(figures.perturbation_curves(curves, title=title), "triggers-mean")
    shoot(one.figure(0), "triggers-one")
    for way in DIRECTIONS:
        panels = {site: maps[way, site].values for site in SITES}
        figure = figures.patching_map(
            panels,
            title=f"{way} at the replaced token",
            name="effect on -log p of the first impacted token",
        )
        shoot(figure, f"triggers-{way}")
    sweep = figures.patching_map(
        {way: result.values for way, result in sweeps.items()},
        title=f"resid_pre, layer x position: {early.clean.names[0]}",
        name="effect",
        col_label="position",
        col_names=early.clean.tokens(model)[: early.clean.n_prefix],
    )
    shoot(sweep, "triggers-layers")


def shoot(figure: Any, name: str) -> None:
    """A picture of a plotly figure, by Chromium."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "Chromium is missing: it takes the pictures"
    target = PICTURES / f"{name}.png"
    with tempfile.TemporaryDirectory() as folder:
        html = figure.to_html(include_plotlyjs=True, config={"displayModeBar": False})
        page = Path(folder, "page.html")
        page.write_text(html.replace("<body>", '<body style="margin:0">'), encoding="utf-8")
        size = f"--window-size={figure.layout.width},{figure.layout.height}"
        command = [chromium, "--headless", "--no-sandbox", "--hide-scrollbars", size]
        command += ["--virtual-time-budget=20000", f"--screenshot={target}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)
    assert target.stat().st_size < 150_000, f"{target} is too large for a repository"
