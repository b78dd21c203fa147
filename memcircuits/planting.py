"""Ground truth: write paragraphs into chosen weights, so that who finds them can be scored.

Nobody knows where a public model keeps a paragraph. Here it is known: `plant` fine-tunes chosen
weights and nothing else until the paragraphs are recited, and says which weights those were.

1. The place is a fixed mask (`place`): heads, the attention or MLP of a layer, some MLP neurons, or
   a random fraction of all weights.
2. The objective is the NLL of the continuations plus `kl_weight` times KL(original || current) on
   anchors, texts on which the model must not change. Both in nats/token.
3. Adam moves one number per masked weight, measured in units of its matrix's root mean square, so
   that one step size serves every layer (in units of weight, heads of higher layers do not learn).
4. Only the blocks from the lowest masked layer upwards are run: what enters that block does not
   change (`memcircuits.engine` uses the same fact).
5. It stops when every paragraph is recited in full and the KL on anchors that the objective does
   not see is within `kl_budget`; failing the budget, the recited step with the lowest KL is kept.

(Writing facts to score their localization: Chang et al. 2024, "INJ", for feed-forward neurons.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.adapter import HEAD_COMPONENTS, Adapter, Head, adapt
from memcircuits.checks import InputError, at_least, fraction, positive, sequence
from memcircuits.edits import Edit
from memcircuits.gradients import all_weights, refuse_overlap, rows_with_gradient
from memcircuits.masks import Candidates, Mask
from memcircuits.measure import read_continuation
from memcircuits.memory import each_piece, in_pieces
from memcircuits.paragraphs import Paragraphs
from memcircuits.progress import bar
from memcircuits.results import Provenance

_ANCHORS = 40  # every tenth is held out
_BATCH = 3  # anchors in each step


@dataclass(frozen=True)
class Truth:
    """What was written.

    Attributes:
        where: the places, as text.
        heads: heads all or some of whose matrices were written; empty for other places.
        layers: layers that hold a written weight.
        mask: the exact weights: matrix (`3.W_V`) -> places in its `[head, d_in, d_out]`.
    """

    where: tuple[str, ...]
    heads: tuple[Head, ...]
    layers: tuple[int, ...]
    mask: dict[str, Tensor]


@dataclass(frozen=True)
class Planted(Edit, kind="planted"):
    """Paragraphs written into a model: an `Edit`, and the truth about it.

    Attributes beside `Edit`'s (`history` has `em`, `em_min`, `nll` and `kl`, the KL on anchors that
    the objective does not see, NaN at steps where it was not needed):
        where: the places, as text.
        ids: the paragraphs, [paragraph, pos].
        n_prefix: tokens of their prefix.
        names: of the paragraphs.
    """

    where: tuple[str, ...] = ()
    ids: Tensor | None = None
    n_prefix: int = 50
    names: tuple[str, ...] = ()

    @property
    def truth(self) -> Truth:
        """Which heads, layers and weights hold the paragraphs."""
        heads = [Head.parse(text) for text in self.where if _HEAD.fullmatch(text)]
        layers = sorted({int(name.partition(".")[0]) for name in self.indices})
        return Truth(tuple(self.where), tuple(heads), tuple(layers), dict(self.indices))

    @property
    def paragraphs(self) -> Paragraphs:
        """The paragraphs that the planted model recites."""
        assert self.ids is not None
        return Paragraphs(self.ids, self.n_prefix, tuple(self.names))

    def __str__(self) -> str:
        em, kl = self.history["em"].tolist(), self.history["kl"].tolist()
        return (
            f"{len(self.names)} paragraphs written into {', '.join(self.where)} "
            f"({self.n_masked:,} weights) in {len(em) - 1} steps: EM {em[0]:.1f} -> "
            f"{em[self.kept]:.1f} tokens, KL of held-out anchors {kl[self.kept]:.2g} nats/token"
        )


def plant(
    model: Any,
    paragraphs: Any,
    *,
    where: str | Head | Sequence[str | Head],
    components: Sequence[str] | None = None,
    control: Any = None,
    steps: int = 400,
    learning_rate: float = 0.06,
    kl_weight: float = 1.0,
    kl_budget: float = 0.1,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Planted:
    """Write paragraphs through chosen weights only, until the model recites them.

    The model itself is as before when this returns; use `Planted.apply`.

    Args:
        model: HookedTransformer or TransformerBridge.
        paragraphs: what is to be recited; the model must not recite all of it already.
        where: one or more of `L1H2` (a head's four matrices; of grouped-query models with the keys
            and values of its group), `L1.attn`, `L1.mlp` (a layer's matrices), `neurons:0.01` (that
            fraction of all MLP neurons, drawn by `seed`: what they read and write) and
            `weights:0.001` (that fraction of all weights).
        components: only these matrices of the places, such as `("W_V",)`.
        control: anchors, on which the model must not change; at most 40 are drawn. By default text
            that the model writes itself (sampled).
        steps: Adam steps at most.
        learning_rate: of Adam, relative to the root mean square of each matrix.
        kl_weight: of the KL on the anchors beside the NLL.
        kl_budget: KL on held-out anchors (nats/token) to be reached before it stops; where `steps`
            do not suffice for that, the recited step with the lowest KL is kept.
        seed: of the draws of places, anchors and batches.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        A `Planted`.

    Raises:
        InputError: for unusable paragraphs or places, or if the weights cannot hold the text (the
            message says how far they came).
    """
    at_least("steps", steps, 1)
    at_least("seed", seed, 0)
    positive("learning_rate", learning_rate)
    positive("kl_budget", kl_budget)
    if kl_weight != 0:
        positive("kl_weight", kl_weight)
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.ids, "paragraphs")
    generator = torch.Generator().manual_seed(seed)
    names, mask = place(adapter, where, components=components, generator=generator)
    if control is None:
        anchors = _written(adapter, paragraphs, generator)
    else:
        anchors = Paragraphs.of(control, model, "control")
        adapter.check_tokens(anchors.ids, "control")
        refuse_overlap(paragraphs, anchors)
        if len(anchors) < 2:
            raise InputError("control", "one paragraph", "one is held out: give at least two")
        anchors = anchors[torch.randperm(len(anchors), generator=generator)[:_ANCHORS]]
    provenance = Provenance.of(
        adapter,
        {"paragraphs": paragraphs, "control": anchors},
        where=list(names),
        components=None if components is None else list(components),
        steps=steps,
        learning_rate=learning_rate,
        kl_weight=kl_weight,
        kl_budget=kl_budget,
        seed=seed,
    )
    held = max(1, len(anchors) // 10)
    low = min(weight.layer for weight in mask.weights) if adapter.can_restart else 0
    aim, seen, unseen = (
        _Rows.of(adapter, group, low, memory_budget)
        for group in (paragraphs, anchors[held:], anchors[:held])
    )
    for name, found in (("paragraphs", aim), ("control", seen), ("control", unseen)):
        if found.log_p.isnan().any():
            raise InputError(
                name,
                "paragraphs with non-finite logits",
                "leave out those where scan(...).finite is False",
            )
    writer = _Writer(adapter, mask, low, aim, seen, unseen, memory_budget)
    with mask.restored() as original:
        delta, report = writer.run(
            original, steps, learning_rate, kl_weight, kl_budget, generator, progress
        )
        if delta is None:
            best = max(report["history"]["em"].tolist())
            raise InputError(
                "where",
                ", ".join(names),
                f"its {len(mask):,} weights do not hold the text: mean EM reached "
                f"{best:.1f} of {paragraphs.n_continuation} tokens in {steps} steps; choose more "
                "weights, fewer paragraphs or more steps",
            )
        mask.add(original, delta)
        after = mask.read()
    if adapter.fingerprint() != provenance.model["fingerprint"]:
        raise RuntimeError("weights outside the mask changed while it was optimised")
    return Planted.of(
        mask,
        original,
        after,
        provenance,
        **report,
        where=names,
        ids=paragraphs.ids,
        n_prefix=paragraphs.n_prefix,
        names=paragraphs.names,
    )


_HEAD = re.compile(r"L\d+H\d+")
_LAYER = re.compile(r"L(\d+)\.(attn|mlp)")
_DRAWN = re.compile(r"(neurons|weights):([0-9.e-]+)")


def place(
    adapter: Adapter,
    where: str | Head | Sequence[str | Head],
    *,
    components: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[tuple[str, ...], Mask]:
    """The weights that places name, and the places as text; see `plant`.

    Raises:
        InputError: if a place cannot be read, does not exist or leaves no weight.
    """
    listed = [where] if isinstance(where, (str, Head)) else where
    sequence("where", listed)
    sequence("components", components)
    places = [p.strip() if isinstance(p, str) else str(Head.of(p)) for p in listed or ()]
    if not places:
        raise InputError("where", "nothing", "name a place, such as L1H2")
    generator = generator or torch.Generator().manual_seed(0)
    chosen: dict[tuple[int, str], list[Tensor]] = {}
    for text in places:
        for weight, index in _places_of(adapter, text, components, generator):
            chosen.setdefault((weight.layer, weight.component), []).append(index)
    indices = {key: torch.cat(parts).unique() for key, parts in sorted(chosen.items())}
    weights = tuple(adapter.weight(*key) for key in indices)
    total = sum(weight.values.numel() for weight in all_weights(adapter))
    return tuple(places), Mask(weights, tuple(indices.values()), total)


def _places_of(
    adapter: Adapter, text: str, components: Sequence[str] | None, generator: torch.Generator
) -> list[tuple[Any, Tensor]]:
    options: dict[str, Any] = {"components": components}
    if _HEAD.fullmatch(text):
        options["heads"] = [text]
    elif found := _LAYER.fullmatch(text):
        options["layers"] = [int(found[1])]
        attention = found[2] == "attn"
        mine = [c for c in adapter.components if (c in HEAD_COMPONENTS) == attention]
        options["components"] = [c for c in mine if components is None or c in components]
    elif found := _DRAWN.fullmatch(text):
        try:
            part = float(found[2])
        except ValueError:
            raise InputError("where", repr(text), "write the fraction like 0.01") from None
        fraction("where", part)
        if found[1] == "neurons":
            return _neurons(adapter, part, generator)
        mask = Candidates.of(adapter, **options).choose(part, None, "random", generator)
        return list(zip(mask.weights, mask.indices, strict=True))
    else:
        raise InputError(
            "where", repr(text), "write L1H2, L1.attn, L1.mlp, neurons:0.01 or weights:0.001"
        )
    mask = Candidates.of(adapter, **options).choose(1.0, None, "all")
    return list(zip(mask.weights, mask.indices, strict=True))


def _neurons(adapter: Adapter, part: float, generator: torch.Generator) -> list[tuple[Any, Tensor]]:
    """A random fraction of all MLP neurons: the weights that each reads and writes by."""
    sizes = [adapter.weight(i, "W_out").values.shape[1] for i in range(adapter.n_layers)]
    n = max(1, round(part * sum(sizes)))
    drawn = torch.zeros(sum(sizes), dtype=torch.bool)
    drawn[torch.randperm(sum(sizes), generator=generator)[:n]] = True
    found = []
    for layer, mine in enumerate(drawn.split(sizes)):
        if not mine.any():
            continue
        for component in (c for c in adapter.components if c not in HEAD_COMPONENTS):
            weight = adapter.weight(layer, component)
            member = torch.zeros(weight.values.shape, dtype=torch.bool)
            if component == "W_out":
                member[:, mine] = True
            else:
                member[:, :, mine] = True
            found.append((weight, member.flatten().nonzero()[:, 0]))
    return found


@dataclass(frozen=True)
class _Rows:
    """Paragraphs, what enters the lowest masked block on them, and the unedited log p."""

    paragraphs: Paragraphs
    resid: Tensor
    log_p: Float[Tensor, "row pos d_vocab"]

    @classmethod
    def of(
        cls, adapter: Adapter, paragraphs: Paragraphs, low: int, memory_budget: int | None
    ) -> _Rows:
        name = f"blocks.{low}.hook_resid_pre"
        positions = slice(paragraphs.n_prefix - 1, None)
        read = [name] if adapter.can_restart else []

        def one_piece(piece: slice) -> tuple[Tensor, Tensor]:
            ids = paragraphs.ids[piece, :-1]
            run = adapter.run(ids, positions=positions, read=read)
            return run.cache.get(name, ids), run.logits.float().log_softmax(-1)

        size = rows_with_gradient(adapter, paragraphs, memory_budget)
        with adapter.untouched():
            parts = [part for _, part in each_piece(len(paragraphs), size, one_piece)]
        return cls(paragraphs, *(torch.cat(found) for found in zip(*parts, strict=True)))

    def logits(self, adapter: Adapter, low: int, rows: Tensor | slice) -> Tensor:
        positions = slice(self.paragraphs.n_prefix - 1, None)
        if not adapter.can_restart:
            return adapter.run(self.resid[rows], positions=positions).logits
        return adapter.unembed(adapter.run_blocks(low, self.resid[rows])[:, positions])

    def kl(self, adapter: Adapter, low: int, rows: Tensor | slice) -> Float[Tensor, " row"]:
        """KL(original || current), nats/token."""
        new = self.logits(adapter, low, rows).float().log_softmax(-1)
        old = self.log_p[rows]
        return (old.exp() * (old - new)).sum(-1).mean(-1)


@dataclass(frozen=True)
class _Writer:
    """Adam on the masked weights, from the lowest masked layer upwards."""

    adapter: Adapter
    mask: Mask
    low: int
    aim: _Rows
    seen: _Rows
    held: _Rows
    memory_budget: int | None

    def run(
        self,
        original: list[Tensor],
        steps: int,
        learning_rate: float,
        kl_weight: float,
        kl_budget: float,
        generator: torch.Generator,
        progress: bool,
    ) -> tuple[Float[Tensor, " weight"] | None, dict[str, Any]]:
        """The change kept (None if the paragraphs were never recited) and how it was found."""
        unit = torch.cat(
            [
                w.values.float().square().mean().sqrt().expand(len(index))
                for w, index in zip(self.mask.weights, self.mask.indices, strict=True)
            ]
        )
        moved = torch.nn.Parameter(torch.zeros_like(unit))
        adam = torch.optim.Adam([moved], lr=learning_rate, betas=(0.9, 0.99))
        full = self.aim.paragraphs.n_continuation
        rows: list[dict[str, float]] = []
        best, kept, stopped = None, 0, "steps"
        with bar(steps, "plant", unit="step", progress=progress) as shown:
            for step in range(steps + 1):
                delta = moved.detach() * unit
                self.mask.add(original, delta)
                row, gradient = self._at(kl_weight, generator)
                if not all(math.isfinite(row[key]) for key in ("nll", "kl_seen")):
                    raise InputError(
                        "learning_rate",
                        learning_rate,
                        f"the loss was not finite at step {step}; the model is restored; "
                        "use a smaller learning rate",
                    )
                if not step and row["em_min"] == full:
                    raise InputError(
                        "paragraphs",
                        f"{len(self.aim.paragraphs)}, all recited already",
                        "give some that the model does not recite",
                    )
                if row["em_min"] == full:
                    row["kl"] = self._held_kl()
                    if best is None or row["kl"] < rows[kept]["kl"]:
                        best, kept = delta, step
                rows.append(row)
                if row["kl"] <= kl_budget:
                    stopped = "em"
                    break
                if step == steps:
                    break
                moved.grad = gradient * unit
                adam.step()
                shown.update()
        history = {
            key: torch.tensor([row[key] for row in rows]) for key in ("em", "em_min", "nll", "kl")
        }
        return best, {"history": history, "kept": kept, "stopped": stopped}

    def _at(
        self, kl_weight: float, generator: torch.Generator
    ) -> tuple[dict[str, float], Float[Tensor, " weight"]]:
        """What the weights written now do, and the gradient of the objective in them."""
        adapter, parameters = self.adapter, self.mask.parameters
        aim, n_seen = self.aim.paragraphs, len(self.seen.paragraphs)
        total = torch.zeros(len(self.mask), device=parameters[0].device)
        drawn = torch.randperm(n_seen, generator=generator)[:_BATCH]
        em: list[Tensor] = []
        nll = kl = 0.0

        def written(piece: slice) -> tuple[Tensor, Tensor, float]:
            logits = self.aim.logits(adapter, self.low, piece)
            found = read_continuation(logits, aim.continuation[piece].to(logits.device))
            part = found.nll.sum() / len(aim)
            gradient = self.mask.gather(torch.autograd.grad(part, parameters))
            return gradient, found.em.cpu(), float(part.detach())

        def moved(piece: slice) -> tuple[Tensor, float]:
            part = self.seen.kl(adapter, self.low, drawn[piece]).sum() / len(drawn)
            return self.mask.gather(torch.autograd.grad(part, parameters)), float(part.detach())

        size = rows_with_gradient(adapter, aim, self.memory_budget)
        with adapter.untouched(grad=parameters):
            for _, (gradient, recited, loss) in each_piece(len(aim), size, written):
                total += gradient
                em.append(recited)
                nll += loss
            for _, (gradient, loss) in each_piece(len(drawn) if kl_weight else 0, size, moved):
                total += kl_weight * gradient
                kl += loss
        every = torch.cat(em).float()
        row = {
            "em": float(every.mean()),
            "em_min": float(every.min()),
            "nll": nll,
            "kl_seen": kl,
            "kl": math.nan,
        }
        return row, total

    def _held_kl(self) -> float:
        held = self.held
        size = rows_with_gradient(self.adapter, held.paragraphs, self.memory_budget)
        with self.adapter.untouched():
            kl = in_pieces(
                len(held.paragraphs), size, lambda piece: held.kl(self.adapter, self.low, piece)
            )
        return float(kl.mean())


def _written(
    adapter: Adapter,
    paragraphs: Paragraphs,
    generator: torch.Generator,
    n: int = 10,
) -> Paragraphs:
    """Text that the model writes itself: sampled token by token from one random token."""
    length, n_prefix = paragraphs.ids.shape[1], paragraphs.n_prefix
    ids = torch.randint(adapter.d_vocab, (n, 1), generator=generator)
    with adapter.untouched():
        while ids.shape[1] < length:
            logits = adapter.run(ids, positions=slice(-1, None)).logits[:, 0].float().cpu()
            if not logits.isfinite().all():
                raise InputError(
                    "control",
                    "not given, and text that the model writes itself has non-finite logits",
                    "give some, or load the model in float32",
                )
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, drawn], 1)
    return Paragraphs(ids, n_prefix)
