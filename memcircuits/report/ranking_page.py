"""The report of a ranking: one page for a reader who has not seen the project.

The page says which paragraphs were recited, which heads are significant and with what certainty,
what each of them attends to and writes, how the scores change with other ablations and controls,
the evidence beside the score, the gradients by layer, the prefix tokens that trigger a recitation,
what was run and how to run it again.

1. `memcircuits.report.measurements` runs the model for what the ranking does not hold.
2. `compose` turns the ranking and these measurements into blocks of a page
   (`memcircuits.report.sections`, `explorer_section`, `checks_sections`, `triggers_section`,
   `rerun`); it runs no model.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from memcircuits.display.pages import Attention, Block, Facts, Page
from memcircuits.models.adapter import Model
from memcircuits.report import sections
from memcircuits.report.checks_sections import (
    control_table,
    effect_scatter,
    interval_bars,
    next_steps,
    robustness_bars,
)
from memcircuits.report.explorer_section import explorer
from memcircuits.report.measurements import Measurements, take_measurements
from memcircuits.report.rerun import commands
from memcircuits.report.triggers_section import TOKENS_LOST, tokens_lost, trigger_blocks

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.evidence.ranking import Ranking


def ranking_page(
    ranking: Ranking,
    model: Model,
    *,
    heads: int = 6,
    triggers: int = 3,
    controls: pd.DataFrame | None = None,
    progress: bool = True,
) -> Page:
    """Measure what the report of a ranking needs, and compose it.

    Args:
        ranking: what `find_memorization_heads` returned.
        model: the model it was computed from, for the attention views and trigger tokens.
        heads: number of best heads to show the attention of.
        triggers: number of paragraphs to look for trigger tokens in; 0 leaves that section out.
        controls: the table of `memcircuits.evidence.control_choices.compare_controls`, if any.
        progress: show a bar on stderr.

    Raises:
        InputError: if the model's weights are not those of the ranking.
    """
    measurements = take_measurements(
        ranking, model, heads=heads, triggers=triggers, progress=progress
    )
    return compose(ranking, measurements, controls)


def compose(
    ranking: Ranking, measurements: Measurements, controls: pd.DataFrame | None = None
) -> Page:
    """The page of a ranking and of what was measured for it; runs no model."""
    name = ranking.provenance.model["name"]
    return Page(
        title=f"What {name} recites{sections.subject(ranking)}",
        lead=sections.lead(ranking),
        blocks=[
            sections.headline_numbers(ranking),
            sections.how_to_read(ranking),
            *next_steps(ranking),
            sections.score_map(ranking),
            explorer(ranking, measurements),
            interval_bars(ranking),
            effect_scatter(ranking),
            *robustness_bars(measurements),
            control_table(measurements),
            sections.evidence_table(ranking),
            *([sections.levels_table(ranking)] if ranking.levels else []),
            *([] if controls is None else [sections.controls_table(controls)]),
            sections.gradient_bars(ranking),
            *_triggers(measurements),
            *_attention(measurements),
            sections.paragraphs_table(ranking, measurements, "memorized"),
            sections.paragraphs_table(ranking, measurements, "control"),
            sections.run_facts(ranking),
            Facts({}, commands=commands(ranking), title="Run it again"),
        ],
        overview=sections.overview(ranking),
        footer="Made by memcircuits. Method: Stoehr et al. 2024, arXiv 2403.19851.",
    )


def _triggers(measurements: Measurements) -> list[Block]:
    if measurements.perturbation is None:
        return []
    return trigger_blocks(measurements.perturbation, measurements.tokens)


def _attention(measurements: Measurements) -> list[Block]:
    """The best heads' attention; where triggers were measured, the text can be coloured by them."""
    view = measurements.view
    if view is None:
        return []
    if measurements.perturbation is not None:
        perturbation = measurements.perturbation
        lost = tokens_lost(perturbation, 0, n_front=len(perturbation.bos))
        strips = {**view.strips, TOKENS_LOST: lost}
        view = dataclasses.replace(view, strips=strips)
    return [
        Attention(
            view,
            title="Attention of the heads with the largest scores",
            note=f"On {view.title}, one of the memorized paragraphs.",
        )
    ]
