"""The section on one component at a time: its row, its intervals, attention and what it writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memcircuits.base.components import Component
from memcircuits.display.pages import ComponentDetails, Estimate, Explorer, ParagraphText
from memcircuits.display.text import number
from memcircuits.report.columns import LABELS
from memcircuits.report.component_rows import named_rows

if TYPE_CHECKING:
    from memcircuits.evidence.ranking import Ranking
    from memcircuits.report.measurements import Measurements

MAX_EFFECTS = 60_000
"""Maximum number of single effects on the page; of the best components all are shown."""

_OMITTED = {"component", "unit", "layer", "head", "neuron", "rank", "score", "ci_low", "ci_high"}
_OMITTED |= {"p_value", "rare_token_p", "verified", "margin_memorized", "margin_control"}


def explorer(ranking: Ranking, measurements: Measurements) -> Explorer:
    """Everything known of each component of a ranking."""
    details = measurements.details
    rows = named_rows(ranking).to_dict("records")
    n_groups = sum(len(values) for values in ranking.samples.values())
    n_with_effects = MAX_EFFECTS // n_groups if n_groups else 0
    components = {
        row["component"]: ComponentDetails(
            facts=_facts(row),
            estimates=[_score(row), *_other_choices(measurements, row["component"])],
            effects=_effects(ranking, row) if index < n_with_effects else {},
            top_tokens=details.top_tokens.get(row["component"], ()),
            on_paragraphs=details.on_paragraphs.get(row["component"], ()),
            attends=row["unit"] == "head",
        )
        for index, row in enumerate(rows)
    }
    shown = max(len(one.on_paragraphs) for one in components.values())
    return Explorer(
        components,
        paragraphs=[
            ParagraphText(name, tokens)
            for name, tokens in zip(details.paragraphs.names, measurements.token_rows, strict=True)
        ][:shown],
        first_query=details.paragraphs.n_given - 1,
        losses=measurements.losses,
        units=ranking.score_units,
        few=_few(measurements),
        missing="Of this head fewer paragraphs are on the page, to keep it small; "
        "ranking.attention(paragraph) and mc.attention_view show any.",
        title="One part at a time",
        note="Click a cell of the map, or a name in a table, to open it here. " + details.note,
    )


def _few(measurements: Measurements) -> str:
    """Why a component has one score alone."""
    if not measurements.choices:
        return ""
    heads = ", ".join(map(str, measurements.heads))
    return f"Other ablations and controls were measured for the best heads alone: {heads}."


def _facts(row: dict[Any, Any]) -> dict[str, str]:
    facts = {"score": number(row["score"])}
    for name, value in row.items():
        if name in _OMITTED or value != value:
            continue
        shown = ("yes" if value else "no") if isinstance(value, bool) else number(float(value))
        facts[LABELS.get(str(name), str(name))] = shown
    return facts


def _score(row: dict[Any, Any]) -> Estimate:
    return Estimate("as ranked", row["score"], row["ci_low"], row["ci_high"])


def _other_choices(measurements: Measurements, name: str) -> list[Estimate]:
    """The scores under other choices, if they were measured; the first one is as ranked."""
    heads = [str(head) for head in measurements.heads]
    if name not in heads:
        return []
    place = heads.index(name)
    return [
        Estimate(choice.name, float(choice.score[place]), *choice.ci[:, place].tolist())
        for choice in measurements.choices[1:]
    ]


def _effects(ranking: Ranking, row: dict[Any, Any]) -> dict[str, list[float]]:
    """The effect on each group of paragraphs; neurons have none."""
    if row["unit"] == "neuron":
        return {}
    place = (slice(None), *ranking.grid.place(Component.of(row["component"])))
    return {name: values[place].tolist() for name, values in ranking.samples.items()}
