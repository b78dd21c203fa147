"""Ground truth: plant paragraphs in chosen weights, to score localization methods.

Nobody knows where a public model stores a paragraph. `plant` fine-tunes chosen weights and nothing
else until the paragraphs are recited, and says which weights those were.

1. The location is a fixed mask (`memcircuits.editing.placement`): heads, the attention or MLP of a
   layer, some MLP neurons, or a random fraction of all weights.
2. The objective (`memcircuits.editing.planting_objective`) is the NLL of the continuations plus
   `kl_weight` times KL(original || current) on anchors, texts on which the model must not change.
3. Adam optimises one number per masked weight (`memcircuits.editing.optimization`), in units of the
   root mean square of its matrix, so that one learning rate serves every layer. (In units of
   weight, heads of higher layers do not learn.)
4. The search stops when every paragraph is recited in full and the KL on held-out anchors is within
   `kl_budget`. If that is never reached, the step with the lowest KL of those at which everything
   is recited is kept.

(Writing facts to score their localization: Chang et al. 2024, "INJ", for feed-forward neurons.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memcircuits.base.errors import InputError, at_least, positive
from memcircuits.base.heads import Head, HeadLike
from memcircuits.base.statistics import count_groups
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.draws import random_order, split_groups
from memcircuits.data.overlap import refuse_overlap
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.editing.edit import Edit
from memcircuits.editing.masks import Mask
from memcircuits.editing.optimization import SearchResult, search
from memcircuits.editing.placement import HEAD_PATTERN, owners_of, select_weights
from memcircuits.editing.planting_objective import PartialForward, WritingObjective, sampled_text
from memcircuits.editing.planting_steps import NormKeepingSteps, PlantingSteps
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

MAX_ANCHORS = 40  # every tenth is held out


@dataclass(frozen=True)
class Truth:
    """What was written.

    Attributes:
        where: the locations, as text.
        heads: heads with at least one written matrix; empty for other locations.
        layers: layers that hold a written weight.
        mask: the exact weights: matrix (`3.W_V`) -> positions in its `[head, d_in, d_out]`.
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
        where: the locations, as text.
        ids: the paragraphs, [paragraph, pos].
        n_prefix: tokens of their prefix.
        names: of the paragraphs.
        bos: ids of the tokens in front of them.
    """

    where: tuple[str, ...] = ()
    ids: Tensor | None = None
    n_prefix: int = 50
    names: tuple[str, ...] = ()
    bos: tuple[int, ...] = ()

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
        return Paragraphs(self.ids, self.n_prefix, tuple(self.names), bos=self.bos)

    def __str__(self) -> str:
        em, kl = self.history["em"].tolist(), self.history["kl"].tolist()
        return (
            f"{len(self.names)} paragraphs written into {', '.join(self.where)} "
            f"({self.n_masked:,} weights) in {len(em) - 1} steps: EM {em[0]:.1f} -> "
            f"{em[self.kept]:.1f} tokens, KL of held-out anchors {kl[self.kept]:.2g} nats/token"
        )


@plain_torch()
def plant(  # noqa: PLR0913
    model: Model,
    paragraphs: ParagraphsLike,
    *,
    where: HeadLike | Sequence[HeadLike],
    components: Sequence[str] | None = None,
    control: ParagraphsLike | None = None,
    steps: int = 400,
    learning_rate: float = 0.06,
    kl_weight: float = 1.0,
    kl_budget: float = 0.1,
    keep_norms: bool = False,
    one_each: bool = False,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Planted:
    """Write paragraphs through chosen weights only, until the model recites them.

    The model is unchanged when this returns; use `Planted.apply`.

    Args:
        model: the model.
        paragraphs: what is to be recited; the model must not recite all of it already.
        where: one or more of `L1H2` (a head's four matrices; of grouped-query models with the keys
            and values of its group), `L1.attn`, `L1.mlp` (a layer's matrices), `neurons:0.01` (that
            fraction of all MLP neurons, drawn by `seed`: what they read and write) and
            `weights:0.001` (that fraction of all weights).
        components: only these matrices of the locations, such as `("W_V",)`.
        control: anchors, on which the model must not change; at most 40 are drawn. By default text
            that the model writes itself (sampled).
        steps: maximum number of Adam steps.
        learning_rate: of Adam, relative to the root mean square of each matrix.
        kl_weight: of the KL on the anchors beside the NLL.
        kl_budget: KL on held-out anchors (nats/token) at which the search stops; if `steps` do not
            suffice for that, the step with the lowest KL at which all is recited is kept.
        keep_norms: hold the norm of every written matrix of a head, or of an MLP, at its value, so
            that the place cannot be told from its weights alone.
        one_each: the i-th paragraph is learned by the i-th location alone, all in one search.
        seed: of the draws of locations, anchors and batches.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        A `Planted`.

    Raises:
        InputError: for unusable paragraphs or locations, or if the weights cannot store the text
            (the message says how many tokens were reached).
    """
    at_least("steps", steps, 1)
    at_least("seed", seed, 0)
    positive("learning_rate", learning_rate)
    positive("kl_budget", kl_budget)
    if kl_weight != 0:
        positive("kl_weight", kl_weight)
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.inputs, "paragraphs")
    generator = torch.Generator().manual_seed(seed)
    locations, mask = select_weights(adapter, where, components=components, generator=generator)
    owners = None
    if one_each:
        if len(locations) != len(paragraphs):
            remedy = f"with one_each, name a location for each of {len(paragraphs)} paragraphs"
            raise InputError("where", f"{len(locations)} locations", remedy)
        owners = owners_of(adapter, mask, locations, components)
    anchors = _anchors(adapter, paragraphs, control, generator)
    provenance = Provenance.of(
        adapter,
        {"paragraphs": paragraphs, "control": anchors},
        where=list(locations),
        components=None if components is None else list(components),
        steps=steps,
        learning_rate=learning_rate,
        kl_weight=kl_weight,
        kl_budget=kl_budget,
        keep_norms=keep_norms,
        one_each=one_each,
        seed=seed,
    )
    objective = _objective(
        adapter, mask, paragraphs, anchors, kl_weight, kl_budget, generator, memory_budget
    )
    objective = replace(objective, owners=owners)
    stepper = (NormKeepingSteps if keep_norms else PlantingSteps).of(mask, learning_rate)
    with mask.restored() as original:
        result = search(
            objective, stepper, mask, original, steps=steps, label="plant", progress=progress
        )
        _check_written(result, paragraphs, locations, len(mask), steps)
        assert result.change is not None
        mask.add(original, result.change)
        after = mask.read()
    if adapter.fingerprint() != provenance.model["fingerprint"]:
        raise RuntimeError("weights outside the mask changed while it was optimised")
    return Planted.of(
        mask,
        original,
        after,
        provenance,
        **result.report,
        where=locations,
        ids=paragraphs.ids,
        n_prefix=paragraphs.n_prefix,
        names=paragraphs.names,
        bos=paragraphs.bos,
    )


def _anchors(
    adapter: Adapter,
    paragraphs: Paragraphs,
    control: ParagraphsLike | None,
    generator: torch.Generator,
) -> Paragraphs:
    """The texts on which the model must not change: a draw of those given, or its own text."""
    if control is None:
        return sampled_text(adapter, paragraphs, generator)
    anchors = Paragraphs.of(control, adapter, "control")
    adapter.check_tokens(anchors.inputs, "control")
    refuse_overlap(paragraphs, anchors, same="prefix")
    if len(anchors) < 2:
        raise InputError("control", "one paragraph", "one is held out: give at least two")
    return anchors[random_order(anchors.groups, generator)[:MAX_ANCHORS]]


def _objective(
    adapter: Adapter,
    mask: Mask,
    paragraphs: Paragraphs,
    anchors: Paragraphs,
    kl_weight: float,
    kl_budget: float,
    generator: torch.Generator,
    memory_budget: int | None,
) -> WritingObjective:
    """Run the unedited model on all texts; a tenth of the groups of anchors is held out.

    Raises:
        InputError: if its logits are not finite.
    """
    n_held_out = max(1, count_groups(anchors.groups) // 10)
    held_out_rows, seen_rows = split_groups(anchors.groups, torch.arange(len(anchors)), n_held_out)
    low = min(weight.layer for weight in mask.weights) if adapter.supports_partial_forward else 0
    targets, seen, held_out = (
        PartialForward.of(adapter, group, low, memory_budget)
        for group in (paragraphs, anchors[seen_rows], anchors[held_out_rows])
    )
    for name, forward in (("paragraphs", targets), ("control", seen), ("control", held_out)):
        if forward.log_p.isnan().any():
            raise InputError(
                name,
                "paragraphs with non-finite logits",
                "leave out those where scan(...).finite is False",
            )
    return WritingObjective(targets, seen, held_out, kl_weight, kl_budget, generator, memory_budget)


def _check_written(
    result: SearchResult, paragraphs: Paragraphs, locations: Sequence[str], n: int, steps: int
) -> None:
    """Raise `InputError` if the text was recited from the start, or never."""
    if float(result.history["em_min"][0]) == paragraphs.n_continuation:
        raise InputError(
            "paragraphs",
            f"{len(paragraphs)}, all recited already",
            "give some that the model does not recite",
        )
    if result.change is None:
        best = float(result.history["em"].max())
        raise InputError(
            "where",
            ", ".join(locations),
            f"its {n:,} weights do not hold the text: mean EM reached "
            f"{best:.1f} of {paragraphs.n_continuation} tokens in {steps} steps; choose more "
            "weights, fewer paragraphs or more steps",
        )
