"""How do recited texts differ from others, at the surface and inside the model?

Li, Zhao and Wen 2024, "ROME: Memorization Insights from Text, Logits and Representation"
(arXiv 2403.00510), compare memorized samples with others by text, probability and hidden states.
Here the two sets are given, and each paragraph is described by three families of features:

* *text*: characters per token and per word, rarity (mean -log unigram probability, nats), size
  after compression, and shares of parts of speech where a tagger is given, of the continuation;
* *probability*: mean and variance of p, entropy (nats), top-2 logit margin and NLL, over the
  continuation tokens given all before;
* *hidden states*, in every layer, at the last prefix token and over the continuation: length,
  variance over dimensions, cosine with the other members of the set, projection on the difference
  of the sets' means (leave-one-out), and stability: the cosine with the state when one prefix token
  is replaced.

Means are compared with bootstrap intervals over independent groups of paragraphs and with permuted
labels (`memcircuits.evidence.contrasts.statistics`). Text features are the same for every model: a
difference there is one of the texts and not of memory. `match_nll` takes the controls that are
nearest in NLL, so that what remains is not the loss again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, at_least
from memcircuits.base.progress import bar
from memcircuits.base.statistics import count_groups, group_means, group_notes
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.unigrams import COUNTED_HERE, UnigramTable
from memcircuits.evidence.contrasts.model_features import (
    PLACES,
    PROBABILITY,
    ModelFeatures,
    model_features,
)
from memcircuits.evidence.contrasts.result import Contrast
from memcircuits.evidence.contrasts.statistics import Gram, compare, compare_sets, with_q_values
from memcircuits.evidence.contrasts.text_features import Tagger, text_features
from memcircuits.measure.comparable_sets import comparable_sets
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance


@plain_torch()
def contrast(  # noqa: PLR0913
    model: Model,
    memorized: ParagraphsLike,
    control: ParagraphsLike,
    *,
    unigrams: UnigramTable | None = None,
    tagger: Tagger | None = None,
    match_nll: bool = False,
    replacements: int = 4,
    draws: int = 1000,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Contrast:
    """Compare memorized paragraphs with controls by text, probability and hidden states.

    Args:
        model: the model.
        memorized: paragraphs that it recites.
        control: others, of the same lengths.
        unigrams: token counts; by default the given paragraphs are counted, and `notes` say so.
        tagger: function from a text to the part of speech of each word, such as that of spaCy or
            NLTK; by default parts of speech are left out.
        match_nll: compare only as many controls as there are memorized paragraphs, those nearest
            in NLL to their mean.
        replacements: prefixes with one token replaced, for the stability of each paragraph.
        draws: bootstrap resamples and permutations.
        seed: of all draws.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        A `Contrast` of the paragraphs whose numbers are all finite.

    Raises:
        InputError: for unusable paragraphs, fewer than two paragraphs in a set, sets of other
            lengths, a control among the memorized paragraphs, or a table of another tokenizer.

    Example:
        >>> result = mc.contrast(model, memorized, control, unigrams=mc.UnigramTable.shipped())
        >>> frame = result.to_frame().set_index("feature")
        >>> bool(frame.loc["p mean", "difference"] > 0.5)
        True
    """
    at_least("replacements", replacements, 1)
    at_least("draws", draws, 1)
    at_least("seed", seed, 0)
    if tagger is not None and not callable(tagger):
        raise InputError("tagger", repr(tagger), "give a function from a text to its tags")
    adapter = adapt(model)
    sets = comparable_sets(adapter, memorized, control, memory_budget)
    notes: tuple[str, ...] = ()
    if unigrams is None:
        ids = torch.cat([group.ids for group in sets])
        unigrams = UnigramTable.from_tokens(ids, adapter.d_vocab, source=COUNTED_HERE)
        notes = ("no unigram table was given: rarity is counted in the paragraphs",)
    UnigramTable.check(unigrams, adapter.model)
    options = {"replacements": replacements, "seed": seed, "memory_budget": memory_budget}
    measured = {
        name: _measure(adapter, group, unigrams, tagger, options, progress)
        for name, group in zip(("memorized", "control"), sets, strict=True)
    }
    if match_nll:
        measured["control"], note = _nearest_in_nll(measured["memorized"], measured["control"])
        notes += (note,)
    paragraphs = {name: of_set.paragraphs for name, of_set in measured.items()}
    for name, group in paragraphs.items():
        if count_groups(group.groups) < 2:
            n = f"{len(group)} paragraph{'s' * (len(group) > 1)} of one group"
            raise InputError(name, n, "give at least two that are independent")
    notes += group_notes({name: group.groups for name, group in paragraphs.items()})
    provenance = Provenance.of(
        adapter,
        paragraphs,
        unigrams=unigrams.source,
        match_nll=match_nll,
        replacements=replacements,
        draws=draws,
        seed=seed,
    )
    return _compared(measured["memorized"], measured["control"], draws, seed, provenance, notes)


@dataclass(frozen=True)
class _Measured:
    """One set and its features."""

    paragraphs: Paragraphs
    text: dict[str, Float[Tensor, " paragraph"]]
    model: ModelFeatures

    @property
    def nll(self) -> Float[Tensor, " paragraph"]:
        return self.model.probability[:, PROBABILITY.index("NLL")]

    def __getitem__(self, rows: Int[Tensor, " row"]) -> _Measured:
        return _Measured(
            self.paragraphs[rows],
            {name: values[rows] for name, values in self.text.items()},
            ModelFeatures(*(values[rows] for values in vars(self.model).values())),
        )


def _measure(
    adapter: Adapter,
    paragraphs: Paragraphs,
    unigrams: UnigramTable,
    tagger: Tagger | None,
    options: dict[str, Any],
    progress: bool,
) -> _Measured:
    text = text_features(paragraphs, adapter.tokenizer, unigrams, tagger)
    with adapter.preserving_state(), bar(len(paragraphs), "contrast", progress=progress) as done:
        return _Measured(
            paragraphs, text, model_features(adapter, paragraphs, done=done.update, **options)
        )


def _nearest_in_nll(memorized: _Measured, control: _Measured) -> tuple[_Measured, str]:
    """The controls whose NLL is nearest to the mean of the memorized paragraphs, and a note."""
    target = memorized.nll.mean()
    order = (control.nll - target).abs().argsort(stable=True)
    nearest = control[order[: len(memorized.paragraphs)].sort().values]
    return nearest, (
        f"Controls are those nearest in NLL: {float(nearest.nll.mean()):.2f} nats/token on average "
        f"against {float(target):.2f} of the memorized paragraphs."
    )


@dataclass(frozen=True)
class _Column:
    """One feature: its values of both sets, and statistics that replace the usual ones."""

    family: str
    feature: str
    memorized: Float[Tensor, " paragraph"]
    control: Float[Tensor, " paragraph"]
    place: str = ""
    layer: int = -1
    own: dict[str, float] = field(default_factory=dict)


def _compared(
    memorized: _Measured,
    control: _Measured,
    draws: int,
    seed: int,
    provenance: Provenance,
    notes: tuple[str, ...],
) -> Contrast:
    generator = torch.Generator().manual_seed(seed)
    columns = [*_surface(memorized, control), *_hidden(memorized, control, draws, generator)]
    first = torch.stack([column.memorized for column in columns], -1)
    second = torch.stack([column.control for column in columns], -1)
    groups = memorized.paragraphs.groups, control.paragraphs.groups
    units = group_means(first, groups[0]), group_means(second, groups[1])
    statistics = compare(*units, draws, generator)
    for i, column in enumerate(columns):
        for name, value in column.own.items():
            statistics[name][i] = value
    return Contrast(
        features=tuple(column.feature for column in columns),
        family=tuple(column.family for column in columns),
        place=tuple(column.place for column in columns),
        layer=tuple(column.layer for column in columns),
        memorized=first,
        control=second,
        statistics=with_q_values(statistics),
        provenance=provenance,
        notes=notes,
    )


def _surface(memorized: _Measured, control: _Measured) -> list[_Column]:
    """Text and probability; a part of speech that only one set has is 0 in the other."""
    columns = []
    zeros = torch.zeros(len(memorized.paragraphs)), torch.zeros(len(control.paragraphs))
    for name in dict.fromkeys([*memorized.text, *control.text]):
        values = memorized.text.get(name, zeros[0]), control.text.get(name, zeros[1])
        columns.append(_Column("text", name, *values))
    for i, name in enumerate(PROBABILITY):
        pair = memorized.model.probability[:, i], control.model.probability[:, i]
        columns.append(_Column("probability", name, *pair))
    return columns


def _hidden(
    memorized: _Measured, control: _Measured, draws: int, generator: torch.Generator
) -> list[_Column]:
    """Hidden states: every feature of every layer, at the last prefix token and after it."""
    columns = []
    for place, place_name in enumerate(PLACES):
        by_set = [of.model.states[:, place] for of in (memorized, control)]
        cosine, direction, own = _of_sets(memorized, control, by_set, draws, generator)
        n_first = len(memorized.paragraphs)
        for layer in range(by_set[0].shape[1]):
            features = {
                "norm": [of.model.norm[:, place, layer] for of in (memorized, control)],
                "variance": [of.model.variance[:, place, layer] for of in (memorized, control)],
                "cosine": list(cosine[:, layer].split([n_first, len(cosine) - n_first])),
                "direction": list(direction[:, layer].split([n_first, len(direction) - n_first])),
            }
            if place_name == PLACES[0]:
                stability = [of.model.stability[:, layer] for of in (memorized, control)]
                features["stability"] = stability
            for name, pair in features.items():
                given = {key: float(values[layer]) for key, values in own.get(name, {}).items()}
                first, second = pair
                columns.append(
                    _Column("hidden state", name, first, second, place_name, layer, given)
                )
    return columns


def _of_sets(
    memorized: _Measured,
    control: _Measured,
    states: list[Float[Tensor, "paragraph layer d_model"]],
    draws: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, dict[str, dict[str, Tensor]]]:
    """Cosine and direction of every paragraph, [paragraph, layer], and their own statistics.

    Paragraphs of one independent group share a state, their mean.
    """
    groups = [of.paragraphs.groups for of in (memorized, control)]
    units = [group_means(*pair) for pair in zip(states, groups, strict=True)]
    n_first = len(units[0])
    features, cosine, direction = compare_sets(Gram(torch.cat(units)), n_first, draws, generator)
    first, second = (numbers.unique(return_inverse=True)[1] for numbers in groups)
    unit = torch.cat([first, n_first + second])
    own = {"cosine": cosine, "direction": direction}
    return features.cosine[unit], features.direction[unit], own
