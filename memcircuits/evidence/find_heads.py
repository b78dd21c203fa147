"""Which heads does the recitation depend on? The paper's argument, with controls and intervals.

Given paragraphs, the scan says which of them the model recites. For each head, three kinds of
evidence are gathered, on memorized paragraphs and on controls:

1. *Causal* (`memcircuits.evidence.ablation`): how much worse does the model predict the memorized
   continuations without the head, and is that more than for controls? In nats/token and EM.
2. *Weights* (`memcircuits.evidence.gradients.parameters`): how large are the gradients of the loss
   on memorized paragraphs in the head's four matrices (equation 2)?
3. *Attention* (`memcircuits.evidence.rare_tokens`): does the head attend to rare prefix tokens
   (section 5.4)?

The score is the causal evidence, memorized minus control, because only ablation says what the
recitation *needs*. The algorithm:

1. `select_groups` (`memcircuits.evidence.groups`): scan, then draw memorized paragraphs and
   controls;
2. `ablation_effects`: ablate the heads on both sets;
3. `compare_groups`: score, bootstrap interval and permutation p-value; independent groups of
   paragraphs are averaged, resampled and relabelled (`memcircuits.base.statistics`);
4. `gather_evidence`: gradients and attention beside the score.

The result is a `memcircuits.evidence.ranking.Ranking`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import InputError, at_least, one_of
from memcircuits.base.statistics import (
    DRAWS,
    bootstrap_means,
    finite_rows,
    group_means,
    interval,
    left_out,
    permutation_p_value,
    permuted_differences,
)
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.tokenizer_trials import tokenizer_notes
from memcircuits.data.unigrams import COUNTED_HERE, UnigramTable
from memcircuits.evidence.ablation import Ablation, Mode
from memcircuits.evidence.gradients.parameters import parameter_gradients
from memcircuits.evidence.groups import Groups, select_groups
from memcircuits.evidence.ranking import Ranking
from memcircuits.evidence.rare_tokens import rare_token_attention
from memcircuits.evidence.screening import HeadEffects, Method, head_effects
from memcircuits.measure.scanning import Scan
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance


@plain_torch()
def find_memorization_heads(  # noqa: PLR0913
    model: Model,
    paragraphs: ParagraphsLike | Scan,
    *,
    control: ParagraphsLike | None = None,
    unigrams: UnigramTable | None = None,
    mode: Mode = "zero",
    method: Method = "exact",
    max_paragraphs: int | None = 100,
    match_nll: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Ranking:
    """Rank all heads by how much the recitation of memorized paragraphs depends on them.

    Args:
        model: the model.
        paragraphs: those with EM equal to the continuation's length are the memorized set. A `Scan`
            of them by this model saves scanning them again.
        control: paragraphs that are not memorized; by default those of `paragraphs` with a low EM.
        unigrams: token counts that define rarity; by default counted in the given paragraphs.
        mode: ablation, `zero`, `mean` or `resample`; the latter two use the controls as reference.
        method: `exact` ablates every head. `screen` (`memcircuits.evidence.screening`) is several
            times faster on models with many heads: it estimates all of them, ablates the best ones
            and some at random, and says in `notes` what it may have missed. Heads that were not
            ablated have an estimate as their score, no interval, p = 1 and `verified` False.
        max_paragraphs: maximum number of memorized paragraphs, and of controls, that are measured,
            drawn by `seed`; of controls found among `paragraphs` as many as of memorized ones, but
            at least 20. None: all.
        match_nll: take the controls whose NLL is nearest to the memorized paragraphs' mean instead
            of drawing them; `notes` says how near they are.
        draws: number of bootstrap resamples and of label permutations.
        seed: seed of all draws.
        memory_budget: maximum bytes per batch.
        progress: show bars on stderr.

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
    started = time.monotonic()
    adapter = adapt(model)
    if isinstance(paragraphs, Scan):
        _check_scan(adapter, paragraphs)
        given = paragraphs.paragraphs
    else:
        given = Paragraphs.of(paragraphs, adapter)
    _check_options(mode, method, max_paragraphs, draws, seed)
    unigrams, rarity_notes = _unigram_table(adapter, given, unigrams)
    generator = torch.Generator().manual_seed(seed)
    run = RunOptions(memory_budget=memory_budget, progress=progress)

    groups = select_groups(
        adapter,
        paragraphs if isinstance(paragraphs, Scan) else given,
        control,
        generator,
        max_paragraphs=max_paragraphs,
        match_nll=match_nll,
        **run,
    )
    effects = ablation_effects(adapter, groups, mode, method, seed, **run)
    comparison = compare_groups(effects, draws, generator)
    evidence = gather_evidence(adapter, groups, effects, unigrams, seed, **run)
    return Ranking(
        score=comparison.score,
        ci=comparison.ci,
        p_value=comparison.p_value,
        evidence=evidence.columns,
        memorized_ids=groups.memorized.ids,
        control_ids=groups.control.ids,
        names={"memorized": groups.memorized.names, "control": groups.control.names},
        n_prefix=given.n_prefix,
        bos=given.bos,
        layer_share=evidence.layer_share,
        layer_gradients=evidence.layer_gradients,
        counts=groups.counts,
        provenance=Provenance.of(
            adapter,
            {"paragraphs": given, "memorized": groups.memorized, "control": groups.control},
            mode=mode,
            method=method,
            max_paragraphs=max_paragraphs,
            match_nll=match_nll,
            draws=draws,
            seed=seed,
            control="of the paragraphs" if control is None else "given",
            unigrams=unigrams.source,
        ),
        notes=(*groups.notes, *rarity_notes, *_caveats(adapter, groups), *effects.notes),
        model=model,
        unigrams=unigrams,
        seconds=time.monotonic() - started,
        samples=effects.nll,
    )


class RunOptions(TypedDict):
    """How every step runs: maximum bytes per batch, and whether it shows a bar."""

    memory_budget: int | None
    progress: bool


def _check_options(
    mode: Mode, method: Method, max_paragraphs: int | None, draws: int, seed: int
) -> None:
    one_of("mode", mode, get_args(Mode))
    one_of("method", method, get_args(Method))
    if max_paragraphs is not None:
        at_least("max_paragraphs", max_paragraphs, 2)
    at_least("draws", draws, 1)
    at_least("seed", seed, 0)


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


def ablation_effects(
    adapter: Adapter,
    groups: Groups,
    mode: Mode,
    method: Method,
    seed: int,
    *,
    memory_budget: int | None = None,
    progress: bool = True,
) -> HeadEffects:
    """Effects of the heads on both sets, one for each independent group of paragraphs.

    Paragraphs with non-finite numbers are left out; the others are averaged within their group.

    Raises:
        InputError: if fewer than one memorized paragraph or two controls have finite effects.
    """
    reference = None if mode == "zero" else groups.control
    effects = head_effects(
        Ablation(adapter, groups.memorized, mode=mode, reference=reference, seed=seed),
        Ablation(adapter, groups.control, mode=mode, seed=seed),
        method=method,
        seed=seed,
        memory_budget=memory_budget,
        progress=progress,
    )
    # An ablation may overflow where the whole model does not.
    finite = {name: finite_rows(nll) for name, nll in effects.nll.items()}
    notes = list(effects.notes)
    for name, minimum in {"memorized": 1, "control": 2}.items():
        notes += [f"{name}: {note}" for note in left_out(finite[name])]
        if finite[name].sum() < minimum:
            raise InputError(name, "non-finite numbers when heads are ablated", "use float32")
    sets = {"memorized": groups.memorized, "control": groups.control}
    groups_of = {name: sets[name].groups[finite[name]] for name in sets}
    return HeadEffects(
        nll={name: group_means(effects.nll[name][finite[name]], groups_of[name]) for name in sets},
        em={name: group_means(effects.em[name][finite[name]], groups_of[name]) for name in sets},
        verified=effects.verified,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class Comparison:
    """How much more memorized paragraphs need each head than controls do.

    Attributes:
        score: memorized minus control effect, nats/token, [layer, head].
        ci: its 95 % bootstrap interval, [bound, layer, head]; NaN where not verified, and if a set
            has one group.
        p_value: one-sided label permutation, [layer, head]; 1 where not verified.
    """

    score: Float[Tensor, "layer head"]
    ci: Float[Tensor, "bound layer head"]
    p_value: Float[Tensor, "layer head"]


def compare_groups(effects: HeadEffects, draws: int, generator: torch.Generator) -> Comparison:
    """Score, interval and p-value of every head; the effects are those of independent groups."""
    memorized, control = effects.nll["memorized"], effects.nll["control"]
    score = memorized.mean(0) - control.mean(0)
    # The generator is used in this order: interval (memorized, then control), then p-value.
    resampled = bootstrap_means(memorized, draws, generator)
    resampled = resampled - bootstrap_means(control, draws, generator)
    null = permuted_differences(memorized, control, draws, generator)
    p_value = permutation_p_value(score, null)
    has_interval = effects.verified & (min(len(memorized), len(control)) > 1)
    return Comparison(
        score=score,
        ci=interval(resampled).where(has_interval, torch.nan),
        p_value=p_value.where(effects.verified, 1.0),
    )


@dataclass(frozen=True)
class Evidence:
    """What stands beside the score.

    Attributes:
        columns: name -> [layer, head].
        layer_share: set -> share of the lower half of the layers in the gradient.
        layer_gradients: set -> gradient sum per layer.
    """

    columns: Mapping[str, Float[Tensor, "layer head"]]
    layer_share: Mapping[str, float]
    layer_gradients: Mapping[str, Float[Tensor, " layer"]]


def gather_evidence(
    adapter: Adapter,
    groups: Groups,
    effects: HeadEffects,
    unigrams: UnigramTable,
    seed: int,
    *,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Evidence:
    """Effects of both sets, their gradients, and attention to rare tokens, for every head."""
    gradients = {
        name: parameter_gradients(
            adapter, paragraphs, memory_budget=memory_budget, progress=progress
        )
        for name, paragraphs in {"memorized": groups.memorized, "control": groups.control}.items()
    }
    rare = rare_token_attention(adapter, groups.memorized, unigrams, seed=seed, progress=progress)
    return Evidence(
        columns={
            "ablation_memorized": effects.nll["memorized"].mean(0),
            "ablation_control": effects.nll["control"].mean(0),
            "em_memorized": effects.em["memorized"].mean(0),
            "em_control": effects.em["control"].mean(0),
            "gradient": gradients["memorized"].per_head(adapter.n_heads),
            "gradient_control": gradients["control"].per_head(adapter.n_heads),
            "rare_token_tau": rare.values,
            "rare_token_p": rare.p_value,
            "verified": effects.verified,
        },
        layer_share={name: result.layer_share() for name, result in gradients.items()},
        layer_gradients={name: result.layers for name, result in gradients.items()},
    )
