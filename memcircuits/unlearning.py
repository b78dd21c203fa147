"""Cut it out: change a few weights so that paragraphs are no longer recited, and little else.

The objective is the paper's equation 3, both terms means per continuation token given the true
tokens before it, in nats:

    weight * KL(original || current) on the controls  +  forgetting on the memorized

1. Score every weight at the unedited model and keep the top fraction as a fixed mask.
2. Optimise a vector with one number per masked weight. Nothing else can change: each step writes
   `original + delta` into the masked places.
3. Stop as soon as every target is recited for fewer than `em_below` tokens, or when the KL on
   controls that nothing else sees passes `kl_budget`; the last step within it is kept. (`NATURAL`
   first tries shorter steps from there.)
4. Put the original weights back, check by fingerprint that the model is bit for bit the one that
   came in (so that no weight outside the mask had moved), and return the change as an `Edit`.

`REFERENCE` is the paper's recipe: forgetting is 0.1 times the log-likelihood, the KL is summed over
the positions, and Adam follows the gradient of the sum. `NATURAL`, the default, differs in this:

* *Objective*: the number of tokens recited when sampling, sum over k of p_1 ... p_k, as log(1 + .),
  where a falling log-likelihood of all the tokens has no end and pulls also at those that are never
  reached. A paragraph that is forgotten pulls no further.
* *Curvature*: the cost on the controls is the quadratic model of `memcircuits.curvature`. Where
  Adam changes every masked weight alike and lets the KL pull it back, a step here is F^-1 g, the
  change that forgets most for its KL, with a length of `step_kl`. The mask takes the weights whose
  own gain is largest for their KL. (`memcircuits.gradients` says why the KL term itself has no say
  in a mask taken at the unedited model.)
* *Shrinking*: at the end, delta is scaled back as far as the targets stay forgotten.
* *One by one*: each of several targets has a mask and steps of its own, at the weights that the
  earlier ones left, until all are forgotten. What the quadratic model says of a step that pushes
  forty texts off their way at once is far too little. The mask is then the union of theirs.

What is forgotten is the way in: a model that takes another first step no longer recites, though it
may still know the rest. `NATURAL` with `objective="margin"` and `em_below=0` spends the whole
budget on pushing every token of the continuation off the greedy path.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.adapter import Adapter, Head, adapt
from memcircuits.checks import InputError, at_least, one_of, positive
from memcircuits.checks import fraction as check_fraction
from memcircuits.curvature import Curvature, Quadratic
from memcircuits.edits import Edit
from memcircuits.gradients import (
    all_weights,
    refuse_overlap,
    row_gradients,
    rows_with_gradient,
)
from memcircuits.masks import CHOICES, Candidates, Mask, named_mask
from memcircuits.measure import Continuation, read_continuation
from memcircuits.memory import each_piece, in_pieces, rows_that_fit
from memcircuits.paragraphs import Paragraphs
from memcircuits.progress import bar
from memcircuits.results import Provenance
from memcircuits.scanning import scan, without_non_finite

MAX_CONTROL = 80
SHORTEST = 0.1  # of the first step's length: shorter ones are not tried within the budget
OBJECTIVES = ("nll", "margin", "recitation")
CURVATURES = ("none", "diagonal", "full")


@dataclass(frozen=True)
class Recipe:
    """How to optimise.

    Attributes:
        steps: steps at most.
        objective: the forgetting term, a mean over paragraphs. `nll`: the mean log-likelihood of
            the tokens. `margin`: the mean over tokens of max(0, 1 + margin), the margin of a
            token's logit over the next best. `recitation`: log(1 + the expected number of tokens
            recited when sampling) (`edit` takes `margin` for it).
        curvature: `none`: Adam on forgetting + kl_weight * KL. `full`: steps by the quadratic model
            of the KL; `diagonal`: by its diagonal alone.
        curved_mask: divide the mask's scores by the root of the Fisher information.
        step_kl: length of a step, as the KL that the model gives it, nats/token; the length is
            halved after a step that went too far.
        draws: labels drawn for each position of the controls, for the curvature.
        shrink: scale the result back as far as the targets stay forgotten.
        one_by_one: forget several targets one after another, each with a mask of its own (`edit`
            and `em_below=0` take all at once).
        learning_rate: of Adam, in units of weight.
        kl_weight: of the KL (nats/token) beside the forgetting term, with Adam.
        control_batch: controls in each step of Adam.
    """

    steps: int = 10
    objective: str = "nll"
    curvature: str = "none"
    curved_mask: bool = False
    step_kl: float = 3e-5
    draws: int = 4
    shrink: bool = False
    one_by_one: bool = False
    learning_rate: float = 1e-5
    kl_weight: float = 500.0
    control_batch: int = 10


REFERENCE = Recipe()
NATURAL = Recipe(
    steps=50,
    objective="recitation",
    curvature="full",
    curved_mask=True,
    shrink=True,
    one_by_one=True,
)


def unlearn(
    model: Any,
    memorized: Any,
    control: Any,
    *,
    fraction: float = 0.001,
    mask: str = "top",
    heads: Sequence[Head | str] | None = None,
    layers: Sequence[int] | None = None,
    components: Sequence[str] | None = None,
    recipe: Recipe = NATURAL,
    em_below: float | None = None,
    kl_budget: float | None = 0.002,
    curvature: Curvature | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Edit:
    """Find a sparse change of weights after which `memorized` are no longer recited.

    The model itself is as before when this returns; use `Edit.apply`.

    Args:
        model: HookedTransformer or TransformerBridge.
        memorized: paragraphs to forget: `Paragraphs`, a list of strings or ids.
        control: paragraphs to keep, at least two; at most 80 are drawn. Every fifth is held out
            from the objective, to measure the KL.
        fraction: how many of the candidate weights may change, for each target if the recipe goes
            one by one. Candidates are the matrices of the blocks, or those asked for.
        mask: `top` fraction by score; for comparison `random`, `random-per-tensor` (as many in each
            matrix as `top` takes) or `all`.
        heads: only these heads' matrices may change.
        layers: only these layers.
        components: only these, such as `W_in`.
        recipe: how to optimise.
        em_below: stop when every target is recited for fewer tokens; by default a tenth of the
            continuation. 0: never.
        kl_budget: nats/token of KL that the held-out controls may show; None: no limit.
        curvature: `control_curvature` of these controls and this seed, where it serves several
            edits of one model.
        seed: of the controls' draws, the curvature's labels and random masks.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        An `Edit`.

    Raises:
        InputError: for unusable paragraphs, controls that are among the memorized, an empty mask,
            or a loss that is no longer finite (the model is restored; the step is named).
    """
    adapter = adapt(model)
    memorized = Paragraphs.of(memorized, model, "memorized")
    return _find(
        adapter,
        memorized,
        None,
        Paragraphs.of(control, model, "control"),
        Candidates.of(adapter, heads=heads, layers=layers, components=components),
        fraction=fraction,
        how=mask,
        recipe=recipe,
        em_below=memorized.n_continuation / 10 if em_below is None else em_below,
        kl_budget=kl_budget,
        curvature=curvature,
        seed=seed,
        memory_budget=memory_budget,
        progress=progress,
    )


def edit(
    model: Any,
    memorized: Any,
    targets: Any,
    control: Any,
    *,
    fraction: float = 0.001,
    mask: str = "top",
    heads: Sequence[Head | str] | None = None,
    layers: Sequence[int] | None = None,
    components: Sequence[str] | None = None,
    recipe: Recipe = NATURAL,
    kl_budget: float | None = 0.002,
    curvature: Curvature | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Edit:
    """Find a sparse change of weights after which `memorized` prefixes go on like `targets`.

    Stops when every new continuation is recited in full; otherwise like `unlearn`.

    Args:
        model: HookedTransformer or TransformerBridge.
        memorized: paragraphs to rewrite.
        targets: for each of them a paragraph whose continuation is to follow its prefix.
        control: paragraphs to keep.
        fraction: how many of the candidate weights may change.
        mask: see `unlearn`.
        heads: only these heads' matrices may change.
        layers: only these layers.
        components: only these, such as `W_in`.
        recipe: how to optimise.
        kl_budget: nats/token of KL that the held-out controls may show; None: no limit.
        curvature: `control_curvature` of these controls and this seed, where it serves several
            edits of one model.
        seed: of the controls' draws, the curvature's labels and random masks.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        An `Edit`; its history has also `em_new`, the recited tokens of the new continuations.

    Raises:
        InputError: as `unlearn`, or if `targets` do not match `memorized` in number and lengths.
    """
    adapter = adapt(model)
    memorized = Paragraphs.of(memorized, model, "memorized")
    targets = Paragraphs.of(targets, model, "targets")
    if targets.ids.shape != memorized.ids.shape or targets.n_prefix != memorized.n_prefix:
        raise InputError("targets", repr(targets), f"give one for each of {memorized!r}, as long")
    if (targets.continuation == memorized.continuation).all(-1).any():
        raise InputError("targets", "one continues as memorized", "give another continuation")
    new = Paragraphs(
        torch.cat([memorized.prefix, targets.continuation], 1), memorized.n_prefix, memorized.names
    )
    adapter.check_tokens(new.ids, "targets")
    return _find(
        adapter,
        memorized,
        new,
        Paragraphs.of(control, model, "control"),
        Candidates.of(adapter, heads=heads, layers=layers, components=components),
        fraction=fraction,
        how=mask,
        recipe=recipe,
        em_below=0.0,
        kl_budget=kl_budget,
        curvature=curvature,
        seed=seed,
        memory_budget=memory_budget,
        progress=progress,
    )


def control_curvature(
    model: Any,
    control: Any,
    *,
    draws: int = NATURAL.draws,
    seed: int = 0,
    memory_budget: int | None = None,
) -> Curvature:
    """The curvature that `unlearn` and `edit` take of these controls, for more than one edit.

    It keeps the sampled gradients of all weights, in two bytes each, where they fit into memory.

    Args:
        model: HookedTransformer or TransformerBridge.
        control: the paragraphs that `unlearn` will be given.
        draws: labels drawn for each position.
        seed: the seed that `unlearn` will be given.
        memory_budget: bytes that one batch may take.
    """
    adapter = adapt(model)
    control = Paragraphs.of(control, model, "control")
    adapter.check_tokens(control.ids, "control")
    return Curvature.of(
        adapter,
        _split(control, seed)[0],
        all_weights(adapter),
        draws=draws,
        seed=seed,
        memory_budget=memory_budget,
        keep=True,
    )


def _split(control: Paragraphs, seed: int) -> tuple[Paragraphs, Paragraphs]:
    """The controls that the optimisation sees, and those held out from it."""
    if len(control) < 2:
        raise InputError("control", "one paragraph", "one is held out: give at least two")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(control), generator=generator)[:MAX_CONTROL]
    held = max(1, len(order) // 5)
    return control[order[held:]], control[order[:held]]


def _find(
    adapter: Adapter,
    memorized: Paragraphs,
    new: Paragraphs | None,
    control: Paragraphs,
    candidates: Candidates,
    *,
    fraction: float,
    how: str,
    recipe: Recipe,
    em_below: float,
    kl_budget: float | None,
    curvature: Curvature | None,
    seed: int,
    memory_budget: int | None,
    progress: bool,
) -> Edit:
    """What `unlearn` and `edit` share: mask, steps, restoring and the report."""
    check_fraction("fraction", fraction)
    one_of("mask", how, CHOICES)
    at_least("seed", seed, 0)
    if kl_budget is not None:
        positive("kl_budget", kl_budget)
    if not isinstance(recipe, Recipe):
        raise InputError("recipe", repr(recipe), "pass a Recipe, such as NATURAL")
    at_least("steps", recipe.steps, 1)
    at_least("draws", recipe.draws, 1)
    one_of("objective", recipe.objective, OBJECTIVES)
    one_of("curvature", recipe.curvature, CURVATURES)
    adapter.check_tokens(memorized.ids, "memorized")
    adapter.check_tokens(control.ids, "control")
    refuse_overlap(memorized, control)
    for name, group in {"memorized": memorized, "targets": new, "control": control}.items():
        if group is not None and without_non_finite(adapter, group, name, memory_budget)[1]:
            raise InputError(
                name,
                "paragraphs with non-finite logits",
                "leave out those where scan(...).finite is False",
            )
    seen, held = _split(control, seed)
    provenance = Provenance.of(
        adapter,
        {"memorized": memorized, "targets": new, "control": control},
        fraction=fraction,
        mask=how,
        recipe=asdict(recipe),
        em_below=em_below,
        kl_budget=kl_budget,
        seed=seed,
    )
    fingerprint = provenance.model["fingerprint"]
    # What is forgotten stays so in the turns of others; what is to be recited does not. And where
    # no EM is low enough, nothing but the budget would end the first target's turn.
    in_turns = recipe.one_by_one and len(memorized) > 1 and new is None and em_below > 0
    if recipe.curvature == "none" and not recipe.curved_mask:
        curvature = None
    elif curvature is None:
        curvature = Curvature.of(
            adapter,
            seen,
            candidates.weights,
            draws=recipe.draws,
            seed=seed,
            memory_budget=memory_budget,
        )
    elif (curvature.fingerprint, curvature.control.hash) != (fingerprint, seen.hash):
        raise InputError(
            "curvature", "of other weights, controls or seed", "make it of those given here"
        )
    targets = _Targets(adapter, memorized, new, recipe.objective, em_below, memory_budget)
    with contextlib.ExitStack() as undo:
        editor = _Editor(
            adapter=adapter,
            candidates=candidates,
            fraction=fraction,
            how=how,
            seen=_Anchor.of(adapter, seen, memory_budget) if recipe.curvature == "none" else None,
            held=_Anchor.of(adapter, held, memory_budget),
            curvature=curvature,
            recipe=recipe,
            kl_budget=math.inf if kl_budget is None else kl_budget,
            generator=torch.Generator().manual_seed(seed),
            memory_budget=memory_budget,
            undo=undo,
        )
        found = editor.one_by_one if in_turns else editor.together
        mask, report = found(targets, progress)
        after = mask.read()
    if adapter.fingerprint() != fingerprint:
        raise RuntimeError("weights outside the mask changed while it was optimised")
    return Edit.of(mask, mask.read(), after, provenance, **report)


@dataclass(frozen=True)
class _Targets:
    """The paragraphs that are to change, and what is minimised on them."""

    adapter: Adapter
    memorized: Paragraphs
    new: Paragraphs | None
    kind: str
    em_below: float
    memory_budget: int | None

    def __getitem__(self, index: int) -> _Targets:
        """One of them alone."""
        return replace(
            self,
            memorized=self.memorized[[index]],
            new=None if self.new is None else self.new[[index]],
        )

    @property
    def aim(self) -> Paragraphs:
        """What the objective reads."""
        return self.memorized if self.new is None else self.new

    def objective(
        self, piece: slice, logits: Float[Tensor, "row pos d_vocab"]
    ) -> tuple[Float[Tensor, " row"], Continuation]:
        """The loss of each paragraph, and how the model takes the continuation."""
        tokens = self.aim.continuation[piece].to(logits.device)
        found = read_continuation(logits, tokens)
        sign = 1.0 if self.new is None else -1.0
        if self.kind == "nll":
            return sign * found.log_prob.mean(-1), found
        if self.kind == "margin" or self.new is not None:
            margin = sign * _margin(logits.float(), tokens)
            return (margin + 1).clamp_min(0).mean(-1), found
        return found.log_prob.cumsum(-1).exp().sum(-1).log1p(), found

    def alone(self, piece: slice, logits: Tensor) -> list[Tensor]:
        """For `row_gradients`."""
        return [self.objective(piece, logits)[0]]

    def pulls(self, em: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """1 for the paragraphs that still count."""
        if self.kind != "recitation" or self.new is not None:
            return torch.ones(len(em), device=em.device)
        return (em >= self.em_below).float()

    def reached(self, found: dict[str, Tensor]) -> Bool[Tensor, " row"]:
        """Which are forgotten, or which new continuations are recited."""
        if self.new is not None:
            return found["em_new"] == self.new.n_continuation
        return found["em"] < self.em_below

    def read(
        self, mask: Mask | None = None
    ) -> tuple[dict[str, Tensor], Float[Tensor, " weight"] | None]:
        """Measures of each at the weights as they are, and the objective's slope in a mask."""
        aim = self.aim
        parameters = [] if mask is None else mask.parameters
        total = None

        def work(piece: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
            ids = aim.ids[piece, :-1]
            logits = self.adapter.run(ids, positions=slice(aim.n_prefix - 1, None)).logits
            loss, found = self.objective(piece, logits)
            slope = None
            if mask is not None:
                part = (loss * self.pulls(found.em)).sum() / len(aim)
                slope = mask.gather(torch.autograd.grad(part, parameters))
            nll = found.nll.detach()
            return loss.detach().cpu(), nll.cpu(), found.em.detach().cpu(), slope

        size = rows_with_gradient(self.adapter, aim, self.memory_budget)
        parts: list[list[Tensor]] = [[], [], []]
        with self.adapter.untouched(grad=parameters):
            for _, (*measures, slope) in each_piece(len(aim), size, work):
                for part, values in zip(parts, measures, strict=True):
                    part.append(values)
                if slope is not None:
                    total = slope if total is None else total + slope
        found = dict(zip(("forget", "nll", "em"), map(torch.cat, parts), strict=True))
        if self.new is not None:
            found["em_new"] = found["em"]
            found["em"] = scan(
                self.adapter, self.memorized, memory_budget=self.memory_budget, progress=False
            ).em.cpu()
        return found, total


def _row(found: dict[str, Tensor]) -> dict[str, float]:
    """A row of the history, but for the KL."""
    row = {key: float(values.float().mean()) for key, values in found.items()}
    return row | {"em_max": float(found["em"].max())}


@dataclass(frozen=True)
class _Editor:
    """What all targets of an edit share. Changes stay in the model until `undo` is closed."""

    adapter: Adapter
    candidates: Candidates
    fraction: float
    how: str
    seen: _Anchor | None
    held: _Anchor
    curvature: Curvature | None
    recipe: Recipe
    kl_budget: float
    generator: torch.Generator
    memory_budget: int | None
    undo: contextlib.ExitStack

    def together(
        self, targets: _Targets, progress: bool, *, anew: bool = False
    ) -> tuple[Mask, dict[str, Any]]:
        """One mask for all targets: the mask, and the fields of `Edit` that tell what was done."""
        mask = self._choose(targets)
        cost = None
        if self.curvature is not None and self.recipe.curvature != "none":
            cost = self.curvature.on(mask, together=self.recipe.curvature == "full", anew=anew)
        original = self.undo.enter_context(mask.restored())
        delta, report = _Search(self, targets, mask, cost, original).run(progress)
        mask.add(original, delta)
        return mask, report

    def one_by_one(self, targets: _Targets, progress: bool) -> tuple[Mask, dict[str, Any]]:
        """A mask and steps for each target: the same of the union of the masks."""
        n = len(targets.memorized)
        masks: list[Mask] = []
        rows: list[dict[str, float]] = []
        spent = False

        def measured() -> Tensor:
            found, _ = targets.read()
            kl = self.held.mean_kl(self.adapter, self.memory_budget)
            rows.append(_row(found) | {"kl": kl})
            return targets.reached(found)

        reached = measured()
        # The second round is for what a later target brought back.
        with bar(2 * n, "edit", unit="paragraph", progress=progress) as shown:
            for index in (*range(n), *range(n)):
                if not spent and not reached[index]:
                    # What a step costs is another thing at weights that many turns have changed.
                    mask, report = self.together(targets[index], False, anew=bool(masks))
                    masks.append(mask)
                    reached = measured()
                    spent = report["stopped"] == "kl"
                shown.update()
        stopped = "em" if reached.all() else "kl" if spent else "steps"
        union = self._union(masks or [self._choose(targets)])
        history = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        return union, {"history": history, "kept": len(rows) - 1, "stopped": stopped}

    def _union(self, masks: Sequence[Mask]) -> Mask:
        places: dict[str, list[Tensor]] = {
            f"{w.layer}.{w.component}": [] for w in self.candidates.weights
        }
        for mask in masks:
            for name, index in zip(mask.named, mask.indices, strict=True):
                places[name].append(index)
        found = {name: torch.cat(parts).unique() for name, parts in places.items() if parts}
        return named_mask(self.adapter, found, len(self.candidates))

    def _choose(self, targets: _Targets) -> Mask:
        scores: list[Tensor] | None = None
        if self.how in ("top", "random-per-tensor"):
            weights = self.candidates.weights
            scores = [torch.zeros_like(w.parameter, dtype=torch.float32) for w in weights]
            # Over paragraphs the squares are added: opposite gradients do not cancel.
            for _, (found,) in row_gradients(
                self.adapter,
                targets.aim,
                weights,
                targets.alone,
                lambda _, gradient: gradient.float().square().sum(0),
                self.memory_budget,
            ):
                for weight, score, square in zip(weights, scores, found, strict=True):
                    weight.split(score).add_(square)
            for weight, score in zip(weights, scores, strict=True):
                score.sqrt_()
                if self.recipe.curved_mask:
                    assert self.curvature is not None
                    score.div_(self.curvature.root_of(weight))
        return self.candidates.choose(self.fraction, scores, self.how, self.generator)


@dataclass(frozen=True)
class _Anchor:
    """Controls and the unedited model's log-probabilities of every token at their continuations."""

    paragraphs: Paragraphs
    log_p: Float[Tensor, "row pos d_vocab"]

    @classmethod
    def of(cls, adapter: Adapter, paragraphs: Paragraphs, memory_budget: int | None) -> _Anchor:
        with adapter.untouched():
            size = rows_that_fit(
                adapter, paragraphs.ids.shape[1], paragraphs.n_continuation, memory_budget
            )
            log_p = in_pieces(
                len(paragraphs),
                size,
                lambda piece: _log_p(adapter, paragraphs.ids[piece], paragraphs),
            )
        return cls(paragraphs, log_p)

    def kl(self, adapter: Adapter, rows: Tensor) -> Float[Tensor, " row"]:
        """KL(original || current) of some rows, nats/token."""
        current = _log_p(adapter, self.paragraphs.ids[rows], self.paragraphs)
        original = self.log_p[rows.to(self.log_p.device)]
        return (original.exp() * (original - current)).sum(-1).mean(-1)

    def mean_kl(self, adapter: Adapter, memory_budget: int | None) -> float:
        """The same of all rows together."""
        held = self.paragraphs
        size = rows_that_fit(adapter, held.ids.shape[1], held.n_continuation, memory_budget)
        rows = torch.arange(len(held))
        with adapter.untouched():
            return float(
                in_pieces(len(held), size, lambda piece: self.kl(adapter, rows[piece])).mean()
            )


def _log_p(adapter: Adapter, ids: Tensor, paragraphs: Paragraphs) -> Tensor:
    run = adapter.run(ids[:, :-1], positions=slice(paragraphs.n_prefix - 1, None))
    return run.logits.float().log_softmax(-1)


@dataclass(frozen=True)
class _Search:
    """Steps in the masked weights, each written into the model."""

    editor: _Editor
    targets: _Targets
    mask: Mask
    cost: Quadratic | None
    original: list[Tensor]

    def run(self, progress: bool) -> tuple[Float[Tensor, " weight"], dict[str, Any]]:
        """The change kept, and the fields of `Edit` that tell how it was found."""
        recipe, budget = self.editor.recipe, self.editor.kl_budget
        device = self.mask.weights[0].parameter.device
        place = torch.nn.Parameter(torch.zeros(len(self.mask), device=device))
        adam = torch.optim.Adam([place], lr=recipe.learning_rate)
        length = longest = recipe.step_kl**0.5
        unit = torch.zeros_like(place)
        rows: list[dict[str, float]] = []
        best, kept, stopped = place.detach().clone(), 0, "steps"
        with bar(recipe.steps, "edit", unit="step", progress=progress) as shown:
            for step in range(recipe.steps + 1):
                delta = place.detach().clone()
                row, reached, slope = self._at(delta)
                last = step == recipe.steps or reached
                # Without a budget it decides nothing before the end.
                row["kl"] = self._held_kl() if last or budget < math.inf else math.nan
                known = [row[key] for key in row if key != "kl" or budget < math.inf]
                if not all(map(math.isfinite, known)):
                    raise InputError(
                        "learning_rate" if self.cost is None else "step_kl",
                        recipe.learning_rate if self.cost is None else recipe.step_kl,
                        f"the loss was not finite at step {step}; the model is restored; "
                        "use a smaller one",
                    )
                rows.append(row)
                if reached and step and recipe.shrink:
                    delta, row = self._shrunk(delta, row)
                    rows.append(row)
                if row["kl"] > budget:
                    if self.cost is None or step == recipe.steps or length < SHORTEST * longest:
                        stopped = "kl"
                        break
                    length /= 2
                    place.data = best - length * unit
                    shown.update()
                    continue
                went_too_far = row["forget"] > rows[kept]["forget"]
                best, kept = delta, len(rows) - 1
                if reached or not slope.any():
                    stopped = "em"
                    break
                if step == recipe.steps:
                    break
                if self.cost is None:
                    place.grad = slope + recipe.kl_weight * self._kl_slope()
                    adam.step()
                else:
                    direction = self.cost.cheapest(slope)
                    unit = self.cost.kl(direction) ** -0.5 * direction
                    length = length / 2 if went_too_far else length
                    place.data -= length * unit
                shown.update()
        history = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        return best, {"history": history, "kept": kept, "stopped": stopped}

    def _shrunk(self, delta: Tensor, row: dict[str, float]) -> tuple[Tensor, dict[str, float]]:
        """The smallest multiple of `delta`, to 1/64, that is enough."""
        low, high = 0.0, 1.0
        while high - low > 1 / 64:
            middle = (low + high) / 2
            found, reached, _ = self._at(middle * delta, gradient=False)
            if reached:
                high, row = middle, found
            else:
                low = middle
        self.mask.add(self.original, high * delta)
        return high * delta, row | {"kl": self._held_kl()}

    def _at(
        self, delta: Float[Tensor, " weight"], *, gradient: bool = True
    ) -> tuple[dict[str, float], bool, Float[Tensor, " weight"]]:
        """Write a change, measure the targets, and take the forgetting term's gradient."""
        self.mask.add(self.original, delta)
        found, slope = self.targets.read(self.mask if gradient else None)
        reached = bool(self.targets.reached(found).all())
        return _row(found), reached, torch.zeros_like(delta) if slope is None else slope

    def _kl_slope(self) -> Float[Tensor, " weight"]:
        """Gradient of the KL of a random batch of the seen controls."""
        seen = self.editor.seen
        assert seen is not None
        adapter, control = self.editor.adapter, seen.paragraphs
        order = torch.randperm(len(control), generator=self.editor.generator)
        batch = order[: self.editor.recipe.control_batch]
        parameters = self.mask.parameters
        total = torch.zeros(len(self.mask), device=parameters[0].device)

        def work(piece: slice) -> Tensor:
            part = seen.kl(adapter, batch[piece]).sum() / len(batch)
            return self.mask.gather(torch.autograd.grad(part, parameters))

        size = rows_with_gradient(adapter, control, self.editor.memory_budget)
        with adapter.untouched(grad=parameters):
            for _, slope in each_piece(len(batch), size, work):
                total += slope
        return total

    def _held_kl(self) -> float:
        """KL on the held-out controls at the weights as they are, nats/token."""
        return self.editor.held.mean_kl(self.editor.adapter, self.editor.memory_budget)


def _margin(logits: Float[Tensor, "row pos d_vocab"], targets: Tensor) -> Float[Tensor, "row pos"]:
    """Logit of the target minus the largest other logit."""
    mine = logits.gather(-1, targets[..., None])
    others = logits.scatter(-1, targets[..., None], -torch.inf)
    return mine[..., 0] - others.amax(-1)
