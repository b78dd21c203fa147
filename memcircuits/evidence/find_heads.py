"""TODO."""

from __future__ import annotations

import time
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.core.errors import InputError, at_least, one_of
from memcircuits.core.statistics import (
    DRAWS,
    bootstrap_means,
    finite_rows,
    interval,
    left_out,
    permuted_differences,
)
from memcircuits.data.paragraphs import Paragraphs, refuse_overlap
from memcircuits.data.unigrams import UnigramTable
from memcircuits.evidence.ablation import Ablation
from memcircuits.evidence.gradients.parameters import parameter_gradients
from memcircuits.evidence.ranking import Ranking
from memcircuits.evidence.rare_tokens import rare_token_attention
from memcircuits.evidence.screening import Method, head_effects
from memcircuits.measure.scanning import Scan, scan
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

MIN_CONTROLS = 20  # at least, where there are so many: few labels leave no room for small p-values


def find_memorization_heads(
    model: Any,
    paragraphs: Any,
    *,
    control: Any = None,
    unigrams: UnigramTable | None = None,
    mode: str = "zero",
    method: str = "exact",
    max_paragraphs: int | None = 100,
    match_nll: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Ranking:
    """Rank all heads by how much the recitation of memorized paragraphs hangs on them.

    Args:
        model: HookedTransformer or TransformerBridge.
        paragraphs: `Paragraphs`, a list of strings or a LongTensor of ids. Those with EM equal to
            the continuation's length are the memorized set.
        control: paragraphs not memorized; by default those of `paragraphs` with a low EM.
        unigrams: token counts that define rarity; by default counted in the given paragraphs.
        mode: ablation, `zero`, `mean` or `resample`; the latter two draw on the controls.
        method: `exact` ablates every head. `screen` (`memcircuits.evidence.screening`) is several times
            faster on models with many heads: it estimates all of them, ablates the best ones and
            some at random, and says in `notes` what it may have missed. Heads that were not ablated
            have an estimate as their score, no interval, p = 1 and `verified` False.
        max_paragraphs: measure at most so many memorized paragraphs and so many controls, drawn by
            `seed`; of controls found among `paragraphs` as many as of memorized ones, but at least
            20. None: all.
        match_nll: take the controls whose NLL is nearest to the memorized paragraphs' mean instead
            of drawing them; `notes` says how near they are.
        draws: bootstrap resamples and label permutations.
        seed: of all draws.
        memory_budget: bytes that one batch may take.
        progress: show bars on stderr.

    Returns:
        A `Ranking` over all layers and heads.

    Raises:
        InputError: if no paragraph is memorized, fewer than two controls are at hand,
            all numbers are non-finite, or the paragraphs do not fit the model.

    Example:
        >>> ranking = mc.find_memorization_heads(model, memorized[:2], control=control, draws=100)
        >>> frame = ranking.to_frame()  # one row per head, best first
        >>> len(frame), mc.Head(*frame.loc[0, ["layer", "head"]]) == ranking.top(1)[0]
        (48, True)
    """
    started = time.monotonic()
    adapter = adapt(model)
    given = Paragraphs.of(paragraphs, model)
    at_least("draws", draws, 1)
    one_of("method", method, get_args(Method))
    if max_paragraphs is not None:
        at_least("max_paragraphs", max_paragraphs, 2)
    if unigrams is not None:
        UnigramTable.check(unigrams, adapter.model)
    found = scan(model, given, memory_budget=memory_budget, progress=progress)
    memorized = _memorized(found)
    own_control = control is None
    among = found  # the scan that holds the controls
    if control is None:
        controls = found.control
        if controls is None or len(controls) < 2:
            found_controls = 0 if controls is None else len(controls)
            raise InputError(
                "paragraphs",
                f"{found_controls} controls among {len(given)} paragraphs",
                "at least two must not be memorized; add some or pass control=",
            )
    else:
        controls = Paragraphs.of(control, model, "control")
        among = scan(model, controls, memory_budget=memory_budget, progress=progress)
        controls = _finite(among)
        if len(controls) < 2:
            raise InputError("control", "fewer than two usable paragraphs", "give at least two")
    refuse_overlap(memorized, controls, same="paragraph")
    generator = torch.Generator().manual_seed(seed)
    counts = {
        "given": len(given),
        "memorized": len(memorized),
        "control": len(controls),
        "not_finite": int((~found.finite).sum()),
    }
    memorized = memorized.sample(max_paragraphs, generator)
    limit = max_paragraphs
    if own_control:
        limit = max(MIN_CONTROLS, min(len(memorized), max_paragraphs or len(memorized)))
    notes: list[str] = []
    if match_nll:
        controls, note = _nearest(found, memorized, among, controls, limit)
        notes.append(note)
    else:
        controls = controls.sample(limit, generator)
    counts |= {"measured": len(memorized), "measured_control": len(controls)}
    if unigrams is None:
        unigrams = UnigramTable.from_tokens(
            given.ids, adapter.d_vocab, source="the given paragraphs"
        )
        notes.append("No unigram table was given: rarity is counted in the given paragraphs.")
    if len(memorized) == 1:
        notes.append(
            "One memorized paragraph: the intervals show how the controls vary, not the paragraphs."
        )
    if counts["not_finite"]:
        notes.append(f"{counts['not_finite']} paragraphs had non-finite numbers and were left out.")
    if adapter.dtype in (torch.float16, torch.bfloat16):
        notes.append("Half precision: near-ties may decide exact matches differently.")

    options: dict[str, Any] = {"memory_budget": memory_budget, "progress": progress}
    ablated = head_effects(
        Ablation(
            model, memorized, mode=mode, reference=None if mode == "zero" else controls, seed=seed
        ),
        Ablation(model, controls, mode=mode, seed=seed),
        method=method,
        seed=seed,
        **options,
    )
    notes += ablated.notes
    gradients = {
        name: parameter_gradients(model, group, **options)
        for name, group in {"memorized": memorized, "control": controls}.items()
    }
    rare = rare_token_attention(model, memorized, unigrams, seed=seed, progress=progress)

    # An ablation may overflow where the whole model does not.
    finite = {name: finite_rows(rows) for name, rows in ablated.nll.items()}
    for name, rows in finite.items():
        notes += [f"{name}: {note}" for note in left_out(rows)]
        if rows.sum() < (1 if name == "memorized" else 2):
            raise InputError(name, "non-finite numbers when heads are ablated", "use float32")
    effect = {name: rows[finite[name]] for name, rows in ablated.nll.items()}
    em = {name: rows[finite[name]] for name, rows in ablated.em.items()}
    score = effect["memorized"].mean(0) - effect["control"].mean(0)
    resampled = bootstrap_means(effect["memorized"], draws, generator) - bootstrap_means(
        effect["control"], draws, generator
    )
    null = permuted_differences(effect["memorized"], effect["control"], draws, generator)
    evidence = {
        "ablation_memorized": effect["memorized"].mean(0),
        "ablation_control": effect["control"].mean(0),
        "em_memorized": em["memorized"].mean(0),
        "em_control": em["control"].mean(0),
        "gradient": gradients["memorized"].per_head(adapter.n_heads),
        "gradient_control": gradients["control"].per_head(adapter.n_heads),
        "rare_token_tau": rare.values,
        "rare_token_p": rare.p_value,
        "verified": ablated.verified,
    }
    ci = interval(resampled)
    p_value = (1 + (null >= score).sum(0)) / (1 + draws)
    return Ranking(
        score=score,
        ci=ci.where(ablated.verified, torch.nan),
        p_value=p_value.where(ablated.verified, 1.0),
        evidence=evidence,
        memorized_ids=memorized.ids,
        control_ids=controls.ids,
        names={"memorized": memorized.names, "control": controls.names},
        n_prefix=given.n_prefix,
        layer_share={name: result.layer_share() for name, result in gradients.items()},
        layer_gradients={name: result.layers for name, result in gradients.items()},
        counts=counts,
        provenance=Provenance.of(
            adapter,
            {"paragraphs": given, "memorized": memorized, "control": controls},
            mode=mode,
            method=method,
            max_paragraphs=max_paragraphs,
            match_nll=match_nll,
            draws=draws,
            seed=seed,
            control="of the paragraphs" if own_control else "given",
            unigrams=unigrams.source,
        ),
        notes=tuple(notes),
        model=model,
        unigrams=unigrams,
        seconds=time.monotonic() - started,
    )


def _memorized(found: Scan) -> Paragraphs:
    if not found.finite.any():
        raise InputError(
            "model", "non-finite logits on every paragraph", "load it in float32, check its weights"
        )
    memorized = found.memorized
    n = found.token_correct.shape[1]
    if memorized is None:
        raise InputError(
            "paragraphs",
            f"none of {len(found.em)} is memorized (largest EM {int(found.em.max())} of {n})",
            "give paragraphs that the model recites, or a shorter n_continuation",
        )
    return memorized


def _finite(found: Scan) -> Paragraphs:
    if not found.finite.any():
        raise InputError(
            "control", "non-finite logits on every paragraph", "load the model in float32"
        )
    return found.paragraphs[found.finite]


def _nearest(
    found: Scan, memorized: Paragraphs, among: Scan, controls: Paragraphs, limit: int | None
) -> tuple[Paragraphs, str]:
    """The controls whose NLL is nearest to the memorized paragraphs' mean, and how near it is."""

    def nll(scanned: Scan, some: Paragraphs) -> Float[Tensor, " paragraph"]:
        of = dict(zip(map(tuple, scanned.paragraphs.ids.tolist()), scanned.nll, strict=True))
        return torch.stack([of[tuple(row)] for row in some.ids.tolist()])

    target, own = nll(found, memorized).mean(), nll(among, controls)
    chosen = (own - target).abs().argsort(stable=True)[:limit].sort().values
    note = (
        f"Controls are those nearest in NLL: {float(own[chosen].mean()):.2f} nats/token on average "
        f"against {float(target):.2f} of the memorized paragraphs."
    )
    return controls[chosen], note
