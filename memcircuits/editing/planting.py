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
   change (`memcircuits.evidence.interventions` uses the same fact).
5. It stops when every paragraph is recited in full and the KL on anchors that the objective does
   not see is within `kl_budget`; failing the budget, the recited step with the lowest KL is kept.

(Writing facts to score their localization: Chang et al. 2024, "INJ", for feed-forward neurons.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memcircuits.core.errors import InputError, at_least, positive
from memcircuits.core.heads import Head
from memcircuits.data.paragraphs import Paragraphs, refuse_overlap
from memcircuits.editing.edit import Edit
from memcircuits.editing.placement import HEAD_PATTERN, place
from memcircuits.editing.writing import BatchRows, Writer, written_weights
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

_ANCHORS = 40  # every tenth is held out


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
        heads = [Head.parse(text) for text in self.where if HEAD_PATTERN.fullmatch(text)]
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
        anchors = written_weights(adapter, paragraphs, generator)
    else:
        anchors = Paragraphs.of(control, model, "control")
        adapter.check_tokens(anchors.ids, "control")
        refuse_overlap(paragraphs, anchors, same="prefix")
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
    low = min(weight.layer for weight in mask.weights) if adapter.supports_partial_forward else 0
    aim, seen, unseen = (
        BatchRows.of(adapter, group, low, memory_budget)
        for group in (paragraphs, anchors[held:], anchors[:held])
    )
    for name, found in (("paragraphs", aim), ("control", seen), ("control", unseen)):
        if found.log_p.isnan().any():
            raise InputError(
                name,
                "paragraphs with non-finite logits",
                "leave out those where scan(...).finite is False",
            )
    writer = Writer(adapter, mask, low, aim, seen, unseen, memory_budget)
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
