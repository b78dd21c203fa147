"""How much does a ranking depend on what recitations are compared with?

The same components are ranked against several sets of controls, and by the interaction
(`memcircuits.evidence.controls`, `memcircuits.evidence.component_scores`). Where the number of
significant components changes with the choice, that number says as much about the controls as about
the recitation; what all choices agree on does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memcircuits.data.paragraphs import ParagraphsLike
from memcircuits.evidence.find_components import find_memorization_components
from memcircuits.measure.scanning import Scan, scan
from memcircuits.models.adapter import Model
from memcircuits.models.registry import adapt

if TYPE_CHECKING:
    import pandas as pd

CHOICES: dict[str, dict[str, Any]] = {
    "texts": {"match_nll": False, "control_text": "true", "score": "effect"},
    "texts nearest in NLL": {"match_nll": True},
    "own text": {"control_text": "own"},
    "own text, interaction": {"control_text": "own", "score": "interaction"},
}
"""Name -> options of `find_memorization_components`."""

_NAMED = 5  # components of each ranking


def compare_controls(
    model: Model,
    paragraphs: ParagraphsLike | Scan,
    *,
    progress: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Rank components against each choice of controls; as long as four rankings.

    Args:
        model: the model.
        paragraphs: as for `find_memorization_components`.
        progress: show bars on stderr.
        **options: further options of `find_memorization_components`, such as `control` and `units`;
            those that choose controls and score are set here. With `method="screen"` or neurons
            the interaction is left out.

    Returns:
        One row per choice: `controls`, their number `n`, `nll` (nats/token) and share of `greedy`
        tokens; the number of `significant` components `of` so many; the `first` ones; and the rank
        correlation of the scores with those of the first row, `agreement`.

    Raises:
        InputError: as `find_memorization_components`.

    Example:
        >>> table = compare_controls(
        ...     model, memorized, control=control, units=["mlp"], progress=False
        ... )
        >>> list(table["controls"])
        ['texts', 'texts nearest in NLL', 'own text', 'own text, interaction']
    """
    import pandas as pd
    from scipy.stats import spearmanr

    adapter = adapt(model)
    screened = options.get("method") == "screen" or "neuron" in options.get("units", ())
    rows, scores = [], []
    for name, choice in CHOICES.items():
        if screened and choice.get("score") == "interaction":
            continue
        ranking = find_memorization_components(
            model, paragraphs, progress=progress, **{**options, **CHOICES["texts"], **choice}
        )
        controls = scan(adapter, ranking.control, progress=False)
        values = ranking.score.flatten()
        scores.append(values[values.isfinite()].double().numpy())
        listed = ranking.top_components(values.numel())
        rows.append(
            {
                "controls": name,
                "n": len(ranking.control),
                "nll": float(controls.nll.mean()),
                "greedy": float(controls.loose_match.mean()),
                "significant": int(ranking.significant.sum()),
                "of": len(listed),
                "first": ", ".join(str(component) for component in listed[:_NAMED]),
                "agreement": float(spearmanr(scores[0], scores[-1]).statistic),
            }
        )
    return pd.DataFrame(rows)
