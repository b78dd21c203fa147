"""Cut it out: change a few weights so that paragraphs are no longer recited, and little else.

The objective is the paper's equation 3, both terms means per continuation token given the true
tokens before it, in nats:

    weight * KL(original || current) on the controls  +  forgetting on the memorized

1. Score every weight at the unedited model and keep the top fraction as a fixed mask.
2. Optimise a vector with one number per masked weight. Nothing else can change: each step writes
   `original + delta` into the masked places.
3. Stop as soon as every target is recited for fewer than `em_below` tokens, or when the KL on
   controls that the objective does not see passes `kl_budget`; the last step within it is kept.
4. Put the original weights back, check by fingerprint that the model is bit for bit the one that
   came in (so that no weight outside the mask had moved), and return the change as an `Edit`.

`REFERENCE` is the paper's recipe: forgetting is 0.1 times the log-likelihood, the KL is summed over
the positions. `CONSTRAINED`, the default, differs in four ways.

* *Hinge*: a token is forgotten when it is no longer the greedy choice, by a margin; tokens that are
  forgotten pull no further, where a falling log-likelihood has no end.
* *Curvature*: mask and steps are measured by the KL that a change of each weight costs on the
  controls, the Fisher information (`memcircuits.gradients` says why the KL term itself has no say
  in a mask taken at the unedited model).
* *Constraint*: the weight of the KL term rises while the KL is above half its budget and falls
  while it is below.
* *Shrinking*: at the end, delta is scaled back as far as the targets stay forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.adapter import Adapter, Head, adapt
from memcircuits.checks import InputError, at_least, one_of, positive
from memcircuits.checks import fraction as check_fraction
from memcircuits.edits import Edit
from memcircuits.gradients import (
    batches,
    damped_root,
    each_gradient,
    fisher_diagonal,
    refuse_overlap,
)
from memcircuits.masks import CHOICES, Candidates, Mask
from memcircuits.measure import read_continuation
from memcircuits.memory import in_pieces, rows_that_fit
from memcircuits.paragraphs import Paragraphs
from memcircuits.progress import bar
from memcircuits.results import Provenance
from memcircuits.scanning import scan, without_non_finite

MAX_CONTROL = 80
FISHER_DRAWS = 4


@dataclass(frozen=True)
class Recipe:
    """How to optimise.

    Attributes:
        steps: Adam steps at most.
        learning_rate: of Adam, in units of weight; with `curvature` for a weight of mean Fisher
            information.
        kl_weight: of the KL term (nats/token) beside the forgetting term (nats/token); with
            `constraint` where it starts.
        hinge: None: the forgetting term is the log-likelihood. A number: that of the mean over
            tokens of max(0, margin + hinge), the margin of a token's logit over the next best.
        curvature: divide the mask's scores by the root of the Fisher information, and the steps.
        constraint: adapt `kl_weight` so that the KL stays at half the budget.
        shrink: scale the result back as far as the targets stay forgotten.
        control_batch: controls in each step.
    """

    steps: int = 10
    learning_rate: float = 1e-5
    kl_weight: float = 500.0
    hinge: float | None = None
    curvature: bool = False
    constraint: bool = False
    shrink: bool = False
    control_batch: int = 10


REFERENCE = Recipe()
CONSTRAINED = Recipe(
    steps=100,
    learning_rate=1e-3,
    kl_weight=100.0,
    hinge=1.0,
    curvature=True,
    constraint=True,
    shrink=True,
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
    recipe: Recipe = CONSTRAINED,
    em_below: float | None = None,
    kl_budget: float | None = 0.002,
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
        fraction: how many of the candidate weights may change. Candidates are the matrices of the
            blocks, or those asked for.
        mask: `top` fraction by score; for comparison `random`, `random-per-tensor` (as many in each
            matrix as `top` takes) or `all`.
        heads: only these heads' matrices may change.
        layers: only these layers.
        components: only these, such as `W_in`.
        recipe: how to optimise.
        em_below: stop when every target is recited for fewer tokens; by default a tenth of the
            continuation. 0: never.
        kl_budget: nats/token of KL that the held-out controls may show; None: no limit.
        seed: of the controls' draws, the Fisher estimate and random masks.
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
    recipe: Recipe = CONSTRAINED,
    kl_budget: float | None = 0.002,
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
        seed: of the controls' draws, the Fisher estimate and random masks.
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
        seed=seed,
        memory_budget=memory_budget,
        progress=progress,
    )


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
        raise InputError("recipe", repr(recipe), "pass a Recipe, such as CONSTRAINED")
    at_least("steps", recipe.steps, 1)
    adapter.check_tokens(memorized.ids, "memorized")
    adapter.check_tokens(control.ids, "control")
    refuse_overlap(memorized, control)
    if len(control) < 2:
        raise InputError("control", "one paragraph", "one is held out: give at least two")
    if recipe.constraint and not kl_budget:
        raise InputError("kl_budget", kl_budget, "this recipe needs one, such as 0.002 nats/token")
    for name, group in {"memorized": memorized, "targets": new, "control": control}.items():
        if group is not None and without_non_finite(adapter, group, name, memory_budget)[1]:
            raise InputError(
                name,
                "paragraphs with non-finite logits",
                "leave out those where scan(...).finite is False",
            )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(control), generator=generator)[:MAX_CONTROL]
    held = max(1, len(order) // 5)
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
    aim = memorized if new is None else new
    chosen, scale = _choose(
        adapter,
        aim,
        control[order[held:]],
        candidates,
        fraction,
        how,
        recipe,
        generator,
        memory_budget,
    )
    with chosen.restored() as original:
        search = _Search(
            adapter=adapter,
            memorized=memorized,
            new=new,
            seen=_Anchor.of(adapter, control[order[held:]], memory_budget),
            held=_Anchor.of(adapter, control[order[:held]], memory_budget),
            mask=chosen,
            scale=scale,
            original=original,
            recipe=recipe,
            em_below=em_below,
            kl_budget=math.inf if kl_budget is None else kl_budget,
            generator=generator,
            memory_budget=memory_budget,
        )
        delta, report = search.run(progress)
        chosen.add(original, delta)
        after = chosen.read()
    if adapter.fingerprint() != provenance.model["fingerprint"]:
        raise RuntimeError("weights outside the mask changed while it was optimised")
    return Edit.of(chosen, original, after, provenance, **report)


def _choose(
    adapter: Adapter,
    aim: Paragraphs,
    control: Paragraphs,
    candidates: Candidates,
    fraction: float,
    how: str,
    recipe: Recipe,
    generator: torch.Generator,
    memory_budget: int | None,
) -> tuple[Mask, Float[Tensor, " weight"] | float]:
    """The mask, and the size of a step for each of its weights."""
    weights = list(candidates.weights)
    scores: list[Tensor] | None = None
    roots: list[Tensor] | None = None
    if how in ("top", "random-per-tensor"):
        # Over paragraphs the squares are added: opposite gradients do not cancel.
        squares = [torch.zeros_like(w.parameter, dtype=torch.float32) for w in weights]

        def add(index: int, gradient: Tensor) -> Tensor:
            weights[index].split(squares[index]).add_(gradient.float().square().sum(0))
            return gradient.new_zeros(len(gradient))

        each_gradient(adapter, aim, weights, add, memory_budget, progress=False)
        scores = [square.sqrt() for square in squares]
    if recipe.curvature:
        fisher = fisher_diagonal(adapter, control, weights, FISHER_DRAWS, generator, memory_budget)
        roots = damped_root(fisher)
        if scores is not None:
            scores = [score / root for score, root in zip(scores, roots, strict=True)]
    mask = candidates.choose(fraction, scores, how, generator)
    if roots is None:
        return mask, 1.0
    held = {id(w.parameter): root for w, root in zip(weights, roots, strict=True)}
    inverse = 1 / mask.gather([held[id(w.parameter)] for w in mask.weights])
    return mask, inverse / inverse.mean()


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


def _log_p(adapter: Adapter, ids: Tensor, paragraphs: Paragraphs) -> Tensor:
    run = adapter.run(ids[:, :-1], positions=slice(paragraphs.n_prefix - 1, None))
    return run.logits.float().log_softmax(-1)


@dataclass(frozen=True)
class _Search:
    """Adam on the masked weights, written into the model at every step."""

    adapter: Adapter
    memorized: Paragraphs
    new: Paragraphs | None
    seen: _Anchor
    held: _Anchor
    mask: Mask
    scale: Tensor | float
    original: list[Tensor]
    recipe: Recipe
    em_below: float
    kl_budget: float
    generator: torch.Generator
    memory_budget: int | None

    def run(self, progress: bool) -> tuple[Float[Tensor, " weight"], dict[str, Any]]:
        """The change kept, and the fields of `Edit` that tell how it was found."""
        recipe = self.recipe
        device = self.mask.weights[0].parameter.device
        place = torch.nn.Parameter(torch.zeros(len(self.mask), device=device))
        adam = torch.optim.Adam([place], lr=recipe.learning_rate)
        weight = recipe.kl_weight
        rows: list[dict[str, float]] = []
        best, kept, stopped = place.detach() * self.scale, 0, "steps"
        with bar(recipe.steps, "edit", unit="step", progress=progress) as shown:
            for step in range(recipe.steps + 1):
                delta = place.detach() * self.scale
                row, of_forget = self._at(delta, weight)
                if not all(map(math.isfinite, row.values())):
                    raise InputError(
                        "learning_rate",
                        recipe.learning_rate,
                        f"the loss was not finite at step {step}; the model is restored; "
                        "use a smaller learning rate",
                    )
                rows.append(row)
                within = row["kl"] <= self.kl_budget
                if within and (not recipe.constraint or row["forget"] <= rows[kept]["forget"]):
                    best, kept = delta, step
                if not within and not recipe.constraint:
                    stopped = "kl"
                    break
                if within and self._done(row):
                    best, kept, stopped = delta, step, "em"
                    break
                if step == recipe.steps:
                    break
                kl, of_kl = self._seen_kl()
                place.grad = (of_forget + weight * of_kl) * self.scale
                adam.step()
                if recipe.constraint:
                    excess = kl / (0.5 * self.kl_budget) - 1
                    weight *= math.exp(0.1 * min(1.0, max(-1.0, excess)))
                shown.update()
        if recipe.shrink and stopped == "em":
            best, row = self._shrunk(best, rows[kept])
            kept = len(rows)
            rows.append(row)
        history = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        return best, {"history": history, "kept": kept, "stopped": stopped}

    def _shrunk(self, delta: Tensor, row: dict[str, float]) -> tuple[Tensor, dict[str, float]]:
        """The smallest multiple of `delta`, to 1/64, that is enough."""
        low, high = 0.0, 1.0
        best = delta
        while high - low > 1 / 64:
            middle = (low + high) / 2
            found, _ = self._at(middle * delta, row["kl_weight"], gradient=False)
            if self._done(found):
                high, best, row = middle, middle * delta, found
            else:
                low = middle
        return best, row

    def _done(self, row: dict[str, float]) -> bool:
        """Whether every target is forgotten, or every new continuation recited."""
        if self.new is None:
            return row["em_max"] < self.em_below
        return row["em_new"] == self.new.n_continuation

    def _at(
        self, delta: Float[Tensor, " weight"], weight: float, *, gradient: bool = True
    ) -> tuple[dict[str, float], Float[Tensor, " weight"]]:
        """Write a change, measure it, and take the forgetting term's gradient."""
        self.mask.add(self.original, delta)
        aim = self.memorized if self.new is None else self.new
        sign = 1.0 if self.new is None else -1.0
        parameters = self.mask.parameters
        total = torch.zeros_like(delta)
        em = []
        row = {"forget": 0.0, "nll": 0.0}
        with self.adapter.untouched(grad=parameters if gradient else ()):
            for piece in batches(self.adapter, aim, self.memory_budget):
                run = self.adapter.run(aim.ids[piece, :-1], positions=slice(aim.n_prefix - 1, None))
                targets = aim.continuation[piece].to(run.logits.device)
                found = read_continuation(run.logits, targets)
                if self.recipe.hinge is None:
                    loss = sign * found.log_prob.mean(-1)
                else:
                    margin = sign * _margin(run.logits.float(), targets)
                    loss = (margin + self.recipe.hinge).clamp_min(0).mean(-1)
                part = loss.sum() / len(aim)
                if gradient:
                    total += self.mask.gather(torch.autograd.grad(part, parameters))
                em.append(found.em.detach().cpu())
                row["forget"] += float(part.detach())
                row["nll"] += float(found.nll.detach().sum()) / len(aim)
        recited = torch.cat(em).float()
        if self.new is not None:
            row["em_new"] = float(recited.mean())
            recited = scan(
                self.adapter, self.memorized, memory_budget=self.memory_budget, progress=False
            ).em.float()
        row |= {"em": float(recited.mean()), "em_max": float(recited.max())}
        return row | {"kl": self._held_kl(), "kl_weight": weight}, total

    def _seen_kl(self) -> tuple[float, Float[Tensor, " weight"]]:
        """KL of a random batch of the seen controls (nats/token), and its gradient."""
        n = len(self.seen.paragraphs)
        rows = torch.randperm(n, generator=self.generator)[: self.recipe.control_batch]
        parameters = self.mask.parameters
        total = torch.zeros(len(self.mask), device=parameters[0].device)
        kl = 0.0
        with self.adapter.untouched(grad=parameters):
            for piece in batches(self.adapter, self.seen.paragraphs[rows], self.memory_budget):
                part = self.seen.kl(self.adapter, rows[piece]).sum() / len(rows)
                total += self.mask.gather(torch.autograd.grad(part, parameters))
                kl += float(part.detach())
        return kl, total

    def _held_kl(self) -> float:
        held = self.held.paragraphs
        size = rows_that_fit(
            self.adapter, held.ids.shape[1], held.n_continuation, self.memory_budget
        )
        rows = torch.arange(len(held))
        with self.adapter.untouched():
            found = in_pieces(
                len(held), size, lambda piece: self.held.kl(self.adapter, rows[piece])
            )
        return float(found.mean())


def _margin(logits: Float[Tensor, "row pos d_vocab"], targets: Tensor) -> Float[Tensor, "row pos"]:
    """Logit of the target minus the largest other logit."""
    mine = logits.gather(-1, targets[..., None])
    others = logits.scatter(-1, targets[..., None], -torch.inf)
    return mine[..., 0] - others.amax(-1)
