"""Transplant every component of a model and its twin, one at a time, in both directions.

A *twin* was trained like the model but without some paragraphs that the model recites. Where do the
two differ in what matters for these paragraphs?

* *Necessity* of a component: how much does the model's NLL rise if it gets the twin's component?
* *Sufficiency*: how much does the twin's NLL fall if it gets the model's component?

Both are causal, exact, and about *storage* for weights, about *use* for activations. Two controls
belong to them: paragraphs that only the twin was trained on, with the two models exchanged, and a
noise twin, which was trained on the same paragraphs in another order and shows what transplants do
that change nothing about what was learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.components import Component, Unit
from memcircuits.base.errors import UnsupportedModel, at_least, one_of
from memcircuits.base.progress import bar
from memcircuits.base.statistics import group_notes, left_out
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.tokens import refuse_other_tokenizer
from memcircuits.evidence.interventions import FALLBACK, ResumableRun
from memcircuits.evidence.transplants.activations import SITES, ActivationTransplants
from memcircuits.evidence.transplants.components import (
    NEURON_GROUPS,
    UNITS,
    NeuronOrder,
    check_units,
    components_of,
)
from memcircuits.evidence.transplants.results import Patched, Transplant
from memcircuits.evidence.transplants.weights import WeightTransplants
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.exchange import check_exchangeable
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

_MAX_PARAGRAPHS = 16  # maximum number of paragraphs whose clean run is held at once

Sweep = WeightTransplants | ActivationTransplants


@plain_torch()
def transplant(
    model: Model,
    twin: Model,
    paragraphs: ParagraphsLike,
    *,
    patched: Patched = "weights",
    units: Sequence[Unit] | None = None,
    neuron_groups: int = NEURON_GROUPS,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Transplant:
    """Put every component of a model into its twin and back, one at a time.

    Args:
        model: the model that was trained on the paragraphs.
        twin: a model of the same class, basis and shape that was not.
        paragraphs: the paragraphs.
        patched: `weights`, or `activations` of the other model's run of the same text.
        units: sorts of components, by default all: `head`, `qk`, `ov`, `attn`, `mlp`, `neurons`,
            `layer`, `rest` and `all` for weights; `head`, `attn`, `mlp` and `layer` for
            activations. `memcircuits.evidence.transplants.components` defines them.
        neuron_groups: number of groups that the neurons of a layer are divided into, those whose
            weights differ most first.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        A `Transplant`: necessity and sufficiency of each component, nats/token, per paragraph.

    Raises:
        InputError: for a wrong option, unusable paragraphs, or models of different shapes.
        UnsupportedModel: if the model cannot be continued in the middle.

    Example:
        >>> planted = mc.load_model("organism-planted", device="cpu")
        >>> effects = mc.transplant(planted, model, control, units=["head"], progress=False)
        >>> changed = effects.map().values.nonzero()  # planted through L3H5 alone
        >>> changed.tolist()
        [[3, 5]]
    """
    one_of("patched", patched, get_args(Patched))
    at_least("neuron_groups", neuron_groups, 1)
    chosen = check_units(units, UNITS if patched == "weights" else tuple(SITES))
    adapter, other = adapt(model), adapt(twin)
    paragraphs = Paragraphs.of(paragraphs, adapter)
    adapter.check_tokens(paragraphs.inputs, "paragraphs")
    refuse_other_tokenizer("twin", adapter.model, other.model)
    check_exchangeable("twin", adapter, other)
    if not adapter.supports_partial_forward:
        raise UnsupportedModel("model", adapter.label, FALLBACK + ": transplants need partial ones")
    components = components_of(adapter, chosen, neuron_groups)
    neurons = NeuronOrder(adapter, other, neuron_groups)

    effects: list[Tensor] = []
    clean: list[Tensor] = []
    total = 2 * len(paragraphs) * len(components)
    with bar(total, "transplant", unit="component", progress=progress) as progress_bar:
        for receiver, donor in ((adapter, other), (other, adapter)):
            sweep: Sweep = ActivationTransplants(receiver, donor)
            if patched == "weights":
                sweep = WeightTransplants(receiver, donor, neurons)
            measured = _effects(sweep, paragraphs, components, memory_budget, progress_bar.update)
            effects.append(measured[:, 1:] - measured[:, :1])
            clean.append(measured[:, 0, 0])
    samples = _samples(*effects)
    return Transplant(
        patched=patched,
        units=tuple(part.unit for part in components),
        layers=tuple(part.layer for part in components),
        heads=tuple(part.head for part in components),
        groups=tuple(part.group for part in components),
        samples=samples,
        nll=clean[0].contiguous(),
        twin_nll=clean[1].contiguous(),
        names=paragraphs.names,
        provenance=Provenance.of(
            adapter,
            {"paragraphs": paragraphs},
            twin=dict(Provenance.of(other, {}).model),
            patched=patched,
            units=list(chosen),
            neuron_groups=neuron_groups,
        ),
        notes=(
            *left_out(torch.stack(list(samples.values())).isfinite().all(0).all(-1)),
            *group_notes({"given": paragraphs.groups}),
        ),
        independent=paragraphs.groups,
    )


def _effects(
    sweep: Sweep,
    paragraphs: Paragraphs,
    components: Sequence[Component],
    memory_budget: int | None,
    done: Callable[[int], object],
) -> Float[Tensor, "paragraph 1+component measure"]:
    """NLL and EM of the receiver, first as it is, then with each component of the donor."""
    receiver: Adapter = sweep.receiver

    def measure_batch(rows: slice) -> Tensor:
        # One clean run of these paragraphs serves all components.
        run = ResumableRun(receiver, paragraphs[rows], memory_budget)
        clean = run.clean().float().cpu()
        measured = clean[:, None].repeat(1, 1 + len(components), 1)
        for columns, values in sweep.measure(run, components):
            measured[:, [1 + column for column in columns]] = values.transpose(0, 1).float().cpu()
        done(len(clean) * len(components))
        return measured

    size = rows_that_fit(
        receiver, paragraphs.inputs.shape[1], paragraphs.n_continuation, memory_budget
    )
    with receiver.preserving_state():
        return map_batches(len(paragraphs), min(size, _MAX_PARAGRAPHS), measure_batch)


def _samples(
    in_model: Float[Tensor, "paragraph component measure"],
    in_twin: Float[Tensor, "paragraph component measure"],
) -> Mapping[str, Float[Tensor, "paragraph component"]]:
    """Changes of NLL and EM in either model as what is lost or gained."""
    lost, gained = (
        change.where(change[..., :1].isfinite(), torch.nan) for change in (in_model, in_twin)
    )
    return {
        "necessity": lost[..., 0].contiguous(),
        "sufficiency": -gained[..., 0].contiguous(),
        "em_lost": -lost[..., 1].contiguous(),
        "em_gained": gained[..., 1].contiguous(),
    }
