"""Look up the next token: which neurons write it, and which heads call them (arXiv 2402.15055).

Neo, Cohen and Barez (2024) take neurons whose output weights point at one token, the 20 prompts in
which such a neuron is most active, and the three heads that add most to its input there. A language
model describes in which prompts a head is active, and from this description predicts the new
prompts in which it is. Here no language model is asked, and every step is a number:

1. Next-token neurons are those of the upper half of the layers with the highest congruence
   (`memcircuits.evidence.lookups.writing`); as many others are drawn at random.
2. A prompt of a neuron ends where the neuron is most active in a paragraph; of all paragraphs those
   with the highest peaks are taken.
3. The heads that add most to the neuron's input there are its active heads, those of its own layer
   too (`memcircuits.evidence.lookups.driving`).
4. A head called active on one half of the prompts is to lower the neuron's activation, when it is
   taken out of what the MLP reads, on the other half. If it does so for random neurons just as
   well, these heads are not particular to next-token neurons (`Lookups.summary`).

Differences from the paper: tokens are not restricted to words; heads of the neuron's own layer
count; heads active in nearly all prompts are kept, since what is predicted is the drop of a head,
not the prompts in which it acts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, at_least
from memcircuits.base.progress import bar
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.token_text import token_labels
from memcircuits.evidence.lookups.driving import NeuronInputs, refuse_other_blocks
from memcircuits.evidence.lookups.results import Lookups
from memcircuits.evidence.lookups.writing import Congruence, LogitWriting
from memcircuits.measure.continuation import run_to_continuation
from memcircuits.measure.scanning import has_finite_scores
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.batching import iter_batches, map_batches, rows_that_fit
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

N_WRITERS = 5
"""Number of neurons kept for each continuation token."""


@plain_torch()
def lookups(
    model: Model,
    paragraphs: ParagraphsLike,
    *,
    neurons: int = 16,
    prompts: int = 20,
    max_paragraphs: int = 100,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Lookups:
    """Find neurons that write the next token, and test the heads that drive them.

    Args:
        model: the model.
        paragraphs: where neurons are looked at, at every position.
        neurons: number of next-token neurons, and of random ones, in each of the upper layers.
        prompts: number of prompts of each neuron, each from another paragraph.
        max_paragraphs: maximum number of paragraphs, drawn at random.
        seed: seed of the draws.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        A `Lookups`.

    Raises:
        InputError: for fewer than two paragraphs, more neurons than a layer has, or an option out
            of range.
        UnsupportedModel: if the model's blocks are not sums (norms after attention or MLP).

    Example:
        >>> calls = mc.lookups(model, memorized + control, neurons=2, prompts=4)
        >>> calls.drop.shape  # neuron, prompt, layer, head
        torch.Size([12, 4, 6, 8])
    """
    for name, value, minimum in (
        ("neurons", neurons, 1),
        ("prompts", prompts, 2),
        ("max_paragraphs", max_paragraphs, 2),
        ("seed", seed, 0),
    ):
        at_least(name, value, minimum)
    adapter = adapt(model)
    generator = torch.Generator().manual_seed(seed)
    drawn = _usable(adapter, paragraphs, memory_budget).sample(max_paragraphs, generator)
    with adapter.preserving_state():
        refuse_other_blocks(adapter, drawn)
        writing = LogitWriting(adapter)
        congruence = writing.congruence()
        chosen, is_next_token = _choose_neurons(adapter, congruence, neurons, generator)
        n_prompts = min(prompts, len(drawn))
        with bar(2 * len(drawn), "neurons", progress=progress) as progress_bar:
            search = _Search(adapter, drawn, chosen, memory_budget)
            activation, places = search.strongest(n_prompts, progress_bar.update)
            writers, contribution = search.writers(writing, progress_bar.update)
        attribution, drop = search.drive(places, activation, progress)
    layer, index = chosen.unbind(-1)
    tokens = congruence.tokens[layer, index]
    has_tokenizer = adapter.tokenizer is not None
    texts = token_labels(tokens.tolist(), adapter.model) if has_tokenizer else []
    return Lookups(
        neurons=chosen,
        is_next_token=is_next_token,
        congruence=congruence.values[layer, index],
        tokens=tokens,
        token_texts=tuple(texts) or tuple(str(token) for token in tokens.tolist()),
        prompts=places,
        activation=activation,
        attribution=attribution,
        drop=drop,
        writers=writers,
        contribution=contribution,
        names=drawn.names,
        provenance=Provenance.of(
            adapter,
            {"paragraphs": drawn},
            neurons=neurons,
            prompts=prompts,
            max_paragraphs=max_paragraphs,
            seed=seed,
        ),
        notes=() if n_prompts == prompts else (f"there are {n_prompts} prompts of each neuron",),
    )


class _Search:
    """Some neurons of a model, looked at in some paragraphs."""

    def __init__(
        self,
        adapter: Adapter,
        paragraphs: Paragraphs,
        neurons: Int[Tensor, "neuron 2"],
        memory_budget: int | None,
    ) -> None:
        self._adapter, self._paragraphs, self._neurons = adapter, paragraphs, neurons
        n_pos = paragraphs.inputs.shape[1]
        # The activations of all layers are held at once.
        self._size = rows_that_fit(adapter, n_pos, 0, memory_budget, backward=True)

    def strongest(
        self, n: int, done: Callable[[int], None]
    ) -> tuple[Float[Tensor, "neuron prompt"], Int[Tensor, "neuron prompt 2"]]:
        """The `n` paragraphs with each neuron's highest peaks; the peaks and where they are."""
        names = [hook_name("post", layer) for layer in range(self._adapter.n_layers)]
        first = self._paragraphs.n_bos or 1  # the first token has no context

        def peaks(batch: slice) -> Float[Tensor, "batch neuron 2"]:
            cache = run_to_continuation(self._adapter, self._paragraphs, batch, read=names).cache
            of_neurons = torch.stack(
                [cache[names[layer]][..., index] for layer, index in self._neurons.tolist()], 1
            )
            best = of_neurons[..., first:].max(-1)
            return torch.stack([best.values.float(), (best.indices + first).float()], -1).cpu()

        values, pos = map_batches(len(self._paragraphs), self._size, peaks, done).unbind(-1)
        top = values.T.topk(n)
        places = torch.stack([top.indices, pos.T.gather(1, top.indices).long()], -1)
        places[..., 1] -= self._paragraphs.n_bos
        return top.values, places

    def writers(
        self, writing: LogitWriting, done: Callable[[int], None]
    ) -> tuple[Int[Tensor, "paragraph pos rank 2"], Float[Tensor, "paragraph pos rank"]]:
        """The neurons that add most to the logit of each continuation token."""

        def best(batch: slice) -> Float[Tensor, "batch pos rank 2"]:
            all_neurons = writing.contributions(self._paragraphs, batch)
            top = all_neurons.flatten(2).topk(min(N_WRITERS, all_neurons[0, 0].numel()))
            return torch.stack([top.values.double(), top.indices.double()], -1).cpu()

        values, flat = map_batches(len(self._paragraphs), self._size, best, done).unbind(-1)
        d_mlp = self._adapter.weight(0, "W_out").values.shape[1]
        index = flat.long()
        return torch.stack([index // d_mlp, index % d_mlp], -1), values.float()

    def drive(
        self,
        places: Int[Tensor, "neuron prompt 2"],
        activation: Float[Tensor, "neuron prompt"],
        progress: bool,
    ) -> tuple[
        Float[Tensor, "neuron prompt layer head"], Float[Tensor, "neuron prompt layer head"]
    ]:
        """What each head adds to each neuron's input, and the activation's drop without it."""
        adapter, paragraphs = self._adapter, self._paragraphs
        shape = (*activation.shape, adapter.n_layers * adapter.n_heads)
        attribution, drop = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        layers = self._neurons[:, 0].unique().tolist()
        n_runs = len(layers) * len(paragraphs)
        with bar(n_runs, "heads", progress=progress) as progress_bar:
            for layer in layers:
                inputs = NeuronInputs(adapter, layer)

                def run(batch: slice, inputs: NeuronInputs = inputs) -> dict[str, Tensor]:
                    return run_to_continuation(adapter, paragraphs, batch, read=inputs.reads).cache

                of_layer = self._neurons[:, 0] == layer
                for batch, cache in iter_batches(len(paragraphs), self._size, run):
                    in_batch = (places[..., 0] >= batch.start) & (places[..., 0] < batch.stop)
                    neuron, prompt = (in_batch & of_layer[:, None]).nonzero().unbind(-1)
                    if len(neuron):
                        rows, pos = places[neuron, prompt].unbind(-1)
                        at = (rows - batch.start, pos + paragraphs.n_bos)
                        both = _without_each_head(inputs, cache, at, self._neurons[neuron, 1])
                        attribution[neuron, prompt, : inputs.n_heads] = both[0]
                        drop[neuron, prompt, : inputs.n_heads] = both[1]
                    progress_bar.update(batch.stop - batch.start)
        grid = (*activation.shape, adapter.n_layers, adapter.n_heads)
        return attribution.view(grid), drop.view(grid)


def _without_each_head(
    inputs: NeuronInputs,
    cache: dict[str, Tensor],
    at: tuple[Int[Tensor, " prompt"], Int[Tensor, " prompt"]],
    neurons: Int[Tensor, " prompt"],
) -> tuple[Float[Tensor, "prompt head"], Float[Tensor, "prompt head"]]:
    """Attribution and drop of every head at some prompts, each of one neuron."""
    device = next(iter(cache.values())).device
    neurons = neurons.to(device)
    parts = inputs.parts(cache, at[0].to(device), at[1].to(device))
    attribution = inputs.attribution(parts.heads, parts.total, neurons)
    without = (parts.total.unsqueeze(1) - parts.heads).flatten(0, 1)
    whole = inputs.activations(parts.total, neurons)
    remaining = inputs.activations(without, neurons.repeat_interleave(inputs.n_heads))
    drop = whole[:, None] - remaining.view(-1, inputs.n_heads)
    return attribution.float().cpu(), drop.float().cpu()


def _usable(adapter: Adapter, paragraphs: ParagraphsLike, memory_budget: int | None) -> Paragraphs:
    """The paragraphs with finite numbers, at least two."""
    given = Paragraphs.of(paragraphs, adapter.model)
    adapter.check_tokens(given.inputs, "paragraphs")
    usable = given[has_finite_scores(adapter, given, memory_budget=memory_budget)]
    if len(usable) < 2:
        remedy = "give at least two: heads are called on some and tested on others"
        raise InputError("paragraphs", f"{len(usable)} usable", remedy)
    return usable


def _choose_neurons(
    adapter: Adapter, congruence: Congruence, n: int, generator: torch.Generator
) -> tuple[Int[Tensor, "neuron 2"], Bool[Tensor, " neuron"]]:
    """The `n` most congruent neurons of each of the upper layers, and `n` others of the layer."""
    n_layers, d_mlp = congruence.values.shape
    if 2 * n > d_mlp:
        raise InputError("neurons", n, f"a layer has {d_mlp}: give at most {d_mlp // 2}")
    chosen = []
    for layer in range(n_layers // 2, n_layers):
        order = congruence.values[layer].argsort(descending=True)
        others = order[n:][torch.randperm(d_mlp - n, generator=generator)[:n]]
        index = torch.stack([order[:n], others], 1)
        chosen.append(torch.stack([torch.full_like(index, layer), index], -1))
    next_token, random = torch.cat(chosen).unbind(1)
    is_next_token = torch.arange(2 * len(random)) < len(next_token)
    return torch.cat([next_token, random]), is_next_token
