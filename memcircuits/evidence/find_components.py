"""Which parts of a model does the recitation depend on? The paper's argument, with controls.

Given paragraphs, the scan says which of them the model recites. For each component (attention
heads, MLPs, neurons, whole layers), three kinds of evidence are gathered, on memorized paragraphs
and on controls:

1. *Causal* (`memcircuits.evidence.ablation`): how much worse does the model predict the memorized
   continuations without the component, and is that more than for controls? In nats/token and EM.
2. *Weights* (`memcircuits.evidence.gradients.parameters`): how large are the gradients of the loss
   on memorized paragraphs in the matrices of the head or MLP (equation 2)?
3. *Attention* (`memcircuits.evidence.rare_tokens`): does the head attend to rare prefix tokens
   (section 5.4)?

The score is the causal evidence, memorized minus control, because only ablation says what the
recitation *needs*. The algorithm:

1. `select_groups` (`memcircuits.evidence.groups`): scan, then draw memorized paragraphs and
   controls;
2. `measure_effects` (`memcircuits.evidence.component_effects`): ablate the components on both sets;
3. `score_components` (`memcircuits.evidence.component_scores`): score, bootstrap interval and
   permutation p-value; independent groups of paragraphs are averaged, resampled and relabelled;
4. `gather_evidence` (`memcircuits.evidence.further_evidence`): gradients and attention beside the
   score.

The result is a `memcircuits.evidence.ranking.Ranking`. Single effects do not say how much of the
recitation a sort of component carries; its summary therefore says what lies outside heads
(`memcircuits.evidence.levels`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any, get_args

import torch

from memcircuits.base.errors import InputError, one_of
from memcircuits.base.statistics import DRAWS
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.tokenizer_trials import tokenizer_notes
from memcircuits.data.unigrams import COUNTED_HERE, UnigramTable
from memcircuits.evidence.ablation import Ablation, Mode
from memcircuits.evidence.cluster import Cluster
from memcircuits.evidence.component_effects import ComponentEffects, measure_effects
from memcircuits.evidence.component_grid import ComponentGrid, RankedUnit, check_ranked_units
from memcircuits.evidence.component_scores import Score, score_components
from memcircuits.evidence.controls import ControlChoice, ControlText
from memcircuits.evidence.further_evidence import gather_evidence
from memcircuits.evidence.groups import Groups, add_reference, select_groups
from memcircuits.evidence.ranking import Ranking
from memcircuits.evidence.ranking_options import RankingOptions, RunOptions
from memcircuits.evidence.screening import Method
from memcircuits.measure.scanning import Scan
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

HEADS_AND_MLPS: tuple[RankedUnit, ...] = ("head", "mlp")


@plain_torch()
def find_memorization_components(  # noqa: PLR0913
    model: Model,
    paragraphs: ParagraphsLike | Scan,
    *,
    units: Sequence[RankedUnit] = HEADS_AND_MLPS,
    control: ParagraphsLike | None = None,
    control_text: ControlText = "true",
    match_nll: bool = False,
    score: Score = "effect",
    unigrams: UnigramTable | None = None,
    mode: Mode = "zero",
    method: Method = "exact",
    max_paragraphs: int | None = 100,
    draws: int = DRAWS,
    seed: int = 0,
    cluster: Cluster | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Ranking:
    """Rank heads, MLPs, layers and neurons by how much the recitation depends on them.

    Args:
        model: the model.
        paragraphs: those with EM equal to the continuation's length are the memorized set. A `Scan`
            of them by this model saves scanning them again.
        units: what is ranked, together: `head`, `mlp`, `layer` (all heads and the MLP of a layer at
            once) and `neuron`. Neurons are screened: those with the largest estimates and some at
            random are ablated.
        control: paragraphs that are not memorized; by default those of `paragraphs` that the model
            does not know (`memcircuits.evidence.controls`).
        control_text: `true` for controls as they are, `own` for the model's own greedy
            continuations of their prefixes, of which it is as sure as of what it recites.
        match_nll: take the controls whose NLL is nearest to the memorized paragraphs' mean instead
            of drawing them; `notes` says how near they are.
        score: `effect`, the rise of the NLL, or `interaction`, which asks what memorized paragraphs
            need more than controls do in comparison with the other components
            (`memcircuits.evidence.component_scores`); not with neurons or a screen.
        unigrams: token counts that define rarity; by default counted in the given paragraphs.
        mode: ablation, `zero`, `mean` or `resample`; the latter two replace activations by those of
            a third set: further controls, or half of them where all would be measured.
        method: `exact` ablates every head, MLP and layer. `screen`
            (`memcircuits.evidence.screening`) is several times faster on models with many: it
            estimates all of them, ablates the best ones and some at random, and says in `notes`
            what it may have missed. Those that were not ablated have an estimate as their score, no
            interval, p = 1 and `verified` False.
        max_paragraphs: maximum number of memorized paragraphs, and of controls, that are measured,
            drawn by `seed`; of controls found among `paragraphs` as many as of memorized ones, but
            at least 20. None: all.
        draws: number of bootstrap resamples, and the least number of label permutations, which
            grows with the number of components.
        seed: seed of all draws.
        cluster: Ray workers that share the ablations, which take most of the time.
        memory_budget: maximum bytes per batch.
        progress: show bars on stderr.

    Returns:
        A `Ranking` of all components, best first in its table.

    Raises:
        InputError: if no paragraph is memorized, fewer than two controls are available (four for
            `mean` and `resample`), all numbers are non-finite, the paragraphs do not fit the model,
            the scan is another model's, or the cluster cannot be reached or has other weights.

    Example:
        >>> ranking = mc.find_memorization_components(
        ...     model, memorized[:2], control=control, method="screen", progress=False
        ... )
        >>> ranking.to_frame()[["unit", "layer", "head", "score"]].shape  # 48 heads, 6 MLPs
        (54, 4)
        >>> list(ranking.levels_frame()["level"])
        ['head', 'mlp', 'all']
    """
    settings = RankingOptions(
        check_ranked_units(units), score, mode, method, max_paragraphs, draws, seed
    )
    settings.check()
    choice = ControlChoice(control, control_text, match_nll)
    one_of("control_text", control_text, get_args(ControlText))
    run = RunOptions(memory_budget=memory_budget, progress=progress)
    return _rank(model, paragraphs, choice, unigrams, settings, run, cluster)


@plain_torch()
def find_memorization_heads(  # noqa: PLR0913
    model: Model,
    paragraphs: ParagraphsLike | Scan,
    *,
    control: ParagraphsLike | None = None,
    control_text: ControlText = "true",
    match_nll: bool = False,
    score: Score = "effect",
    unigrams: UnigramTable | None = None,
    mode: Mode = "zero",
    method: Method = "exact",
    max_paragraphs: int | None = 100,
    draws: int = DRAWS,
    seed: int = 0,
    cluster: Cluster | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Ranking:
    """Rank all heads by how much the recitation of memorized paragraphs depends on them.

    This is `find_memorization_components` with `units=["head"]`, which documents the arguments. Its
    summary says how much of the effect lies outside heads.

    Returns:
        A `Ranking` over all layers and heads, in nats/token.

    Raises:
        InputError: if no paragraph is memorized, fewer than two controls are available,
            all numbers are non-finite, the paragraphs do not fit the model, or the scan is another
            model's.

    Example:
        >>> ranking = mc.find_memorization_heads(model, memorized[:2], control=control, draws=100)
        >>> frame = ranking.to_frame()  # one row per head, best first
        >>> len(frame), mc.Head(*frame.loc[0, ["layer", "head"]]) == ranking.top(1)[0]
        (48, True)
    """
    return find_memorization_components(
        model,
        paragraphs,
        units=("head",),
        control=control,
        control_text=control_text,
        match_nll=match_nll,
        score=score,
        unigrams=unigrams,
        mode=mode,
        method=method,
        max_paragraphs=max_paragraphs,
        draws=draws,
        seed=seed,
        cluster=cluster,
        memory_budget=memory_budget,
        progress=progress,
    )


def _rank(
    model: Model,
    paragraphs: ParagraphsLike | Scan,
    choice: ControlChoice,
    unigrams: UnigramTable | None,
    settings: RankingOptions,
    run: RunOptions,
    cluster: Cluster | None,
) -> Ranking:
    """Choose the sets, measure and compare them."""
    started = time.monotonic()
    adapter = adapt(model)
    if isinstance(paragraphs, Scan):
        _check_scan(adapter, paragraphs)
        given = paragraphs.paragraphs
    else:
        given = paragraphs = Paragraphs.of(paragraphs, adapter)
    unigrams, rarity_notes = _unigram_table(adapter, given, unigrams)
    grid = ComponentGrid.of(adapter, settings.units)
    generator = torch.Generator().manual_seed(settings.seed)
    n_max = settings.max_paragraphs
    groups = select_groups(adapter, paragraphs, choice, generator, max_paragraphs=n_max, **run)
    if settings.mode != "zero":
        groups = add_reference(groups, n_max, generator)
    effects = _effects(adapter, groups, grid, settings, run, cluster)
    scores = score_components(effects, settings.score, settings.draws, generator)
    evidence = gather_evidence(adapter, groups, effects, unigrams, settings.seed, **run)
    return Ranking(
        score=scores.score,
        ci=scores.ci,
        p_value=scores.p_value,
        ranks=scores.ranks,
        evidence=evidence.columns,
        memorized_ids=groups.memorized.ids,
        control_ids=groups.control.ids,
        names={"memorized": groups.memorized.names, "control": groups.control.names},
        n_prefix=given.n_prefix,
        bos=given.bos,
        layer_share=evidence.layer_share,
        layer_gradients=evidence.layer_gradients,
        counts={**groups.counts, "permutations": scores.permutations},
        levels=effects.levels,
        units=grid.units,
        n_heads=grid.n_heads,
        provenance=Provenance.of(
            adapter,
            {
                "paragraphs": given,
                "memorized": groups.memorized,
                "control": groups.control,
                "reference": groups.reference,
            },
            **{**settings._asdict(), "units": list(settings.units)},
            match_nll=choice.match_nll,
            control="of the paragraphs" if choice.given is None else "given",
            control_text=choice.text,
            unigrams=unigrams.source,
        ),
        notes=(
            *groups.notes,
            *rarity_notes,
            *_caveats(adapter, groups),
            *effects.notes,
            *scores.notes,
        ),
        model=model,
        unigrams=unigrams,
        seconds=time.monotonic() - started,
        samples={name: effects.nll_of_groups(name) for name in effects.samples},
    )


def _effects(
    adapter: Adapter,
    groups: Groups,
    grid: ComponentGrid,
    settings: RankingOptions,
    run: RunOptions,
    cluster: Cluster | None,
) -> ComponentEffects:
    """Effects of the components on both sets; means and samples are those of a third one."""
    options: dict[str, Any] = {"mode": settings.mode, "seed": settings.seed}
    options["reference"] = groups.reference
    here = contextlib.nullcontext(Ablation)
    with here if cluster is None else cluster.ablations(adapter) as ablation:
        return measure_effects(
            ablation(adapter, groups.memorized, **options),
            ablation(adapter, groups.control, **options),
            grid,
            method=settings.method,
            seed=settings.seed,
            **run,
        )


def _check_scan(adapter: Adapter, scan_result: Scan) -> None:
    """Raise `InputError` unless the scan is one of this very model."""
    scanned = scan_result.provenance.model
    if (scanned["fingerprint"], scanned["basis"]) != (adapter.fingerprint(), adapter.basis):
        raise InputError(
            "paragraphs", f"a scan of {scanned['name']}", "its weights are other ones: scan again"
        )


def _unigram_table(
    adapter: Adapter, given: Paragraphs, unigrams: UnigramTable | None
) -> tuple[UnigramTable, tuple[str, ...]]:
    """The table that defines rarity, and a note if none was given."""
    if unigrams is not None:
        UnigramTable.check(unigrams, adapter.model)
        return unigrams, ()
    adapter.check_tokens(given.inputs, "paragraphs")
    counted = UnigramTable.from_tokens(given.ids, adapter.d_vocab, source=COUNTED_HERE)
    return counted, ("No unigram table was given: rarity is counted in the given paragraphs.",)


def _caveats(adapter: Adapter, groups: Groups) -> tuple[str, ...]:
    """Notes about the paragraphs and the model that change how to read the ranking."""
    not_finite = groups.counts["not_finite"]
    notes = {
        f"{not_finite} paragraphs had non-finite numbers and were left out.": not_finite > 0,
        "Half precision: near-ties may decide exact matches differently.": (
            adapter.dtype in (torch.float16, torch.bfloat16)
        ),
    }
    applicable = tuple(note for note, applies in notes.items() if applies)
    return applicable + tokenizer_notes(adapter.tokenizer)
