"""The jobs as people do them today, each the way the package's own documentation shows.

All work on whole paragraphs `ids` [row, 100] in batches of `batch` rows and give float tensors that
can be compared with ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tests.benchmarks.subjects import N_PREFIX

Heads = Sequence[tuple[int, int]]


def batches(ids: Tensor, size: int) -> Iterator[Tensor]:
    yield from ids.split(size)


def nll_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of the continuation, nats/token, [row]."""
    log_probs = logits[:, N_PREFIX - 1 : -1].log_softmax(-1)
    return -log_probs.gather(-1, ids[:, N_PREFIX:, None])[..., 0].mean(-1)


def matches(guesses: Tensor, ids: Tensor) -> Tensor:
    """Tokens equal to the continuation before the first mismatch, [row]."""
    true = ids[:, N_PREFIX : N_PREFIX + guesses.shape[1]]
    return (guesses == true).long().cumprod(-1).sum(-1).float()


# -- scan: EM and NLL -----------------------------------------------------------------------------


@torch.no_grad()
def scan_lens(model: Any, ids: Tensor, batch: int, n_new: int | None = None) -> Tensor:
    """TransformerLens: greedy `generate` with its cache, then a forward pass. [row, (em, nll)].

    With `n_new` fewer tokens are decoded, to try a batch size; EM is then of these.
    """
    scores = []
    for rows in batches(ids, batch):
        text = model.generate(
            rows[:, :N_PREFIX],
            max_new_tokens=n_new or rows.shape[1] - N_PREFIX,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
        )
        em = matches(text[:, N_PREFIX:], rows)
        scores.append(torch.stack([em, nll_of(model(rows, return_type="logits"), rows)], -1))
    return torch.cat(scores)


@torch.no_grad()
def scan_transformers(model: Any, ids: Tensor, batch: int, n_new: int | None = None) -> Tensor:
    """The same through transformers."""
    scores = []
    for rows in batches(ids, batch):
        prefix = rows[:, :N_PREFIX]
        text = model.generate(
            prefix,
            attention_mask=torch.ones_like(prefix),
            max_new_tokens=n_new or rows.shape[1] - N_PREFIX,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        em = matches(text[:, N_PREFIX:], rows)
        scores.append(torch.stack([em, nll_of(model(rows).logits, rows)], -1))
    return torch.cat(scores)


# -- ablation: one hooked forward pass per head ---------------------------------------------------


def zero_head(z: Tensor, hook: Any, head: int) -> Tensor:
    z[:, :, head] = 0.0
    return z


@torch.no_grad()
def ablate_lens(model: Any, ids: Tensor, batch: int, heads: Heads) -> Tensor:
    """TransformerLens: `run_with_hooks` for every head. NLL [row, head]."""
    ablated_nll = []
    for rows in batches(ids, batch):
        nll = []
        for layer, head in heads:
            hook = (f"blocks.{layer}.attn.hook_z", partial(zero_head, head=head))
            logits = model.run_with_hooks(rows, return_type="logits", fwd_hooks=[hook])
            nll.append(nll_of(logits, rows))
        ablated_nll.append(torch.stack(nll, -1))
    return torch.cat(ablated_nll)


def nnsight_model(plain: Any, tokenizer: Any) -> Any:
    """Wrap a transformers model for nnsight.

    Raises:
        ImportError: if nnsight is not installed.
    """
    import nnsight

    kind = getattr(nnsight, "TransformersModel", None)
    if kind is not None:
        return kind(plain, tokenizer=tokenizer, task="text-generation")
    return nnsight.LanguageModel(plain, tokenizer=tokenizer)


@torch.no_grad()
def ablate_nnsight(model: Any, ids: Tensor, batch: int, heads: Heads, d_head: int) -> Tensor:
    """nnsight: a trace for every head that zeroes its part of what enters W_O. NLL [row, head]."""
    ablated_nll = []
    for rows in batches(ids, batch):
        nll = []
        for layer, head in heads:
            with model.trace(rows):
                entering = model.transformer.h[layer].attn.attention.out_proj
                entering.input[:, :, head * d_head : (head + 1) * d_head] = 0.0
                logits = model.lm_head.output.save()
            nll.append(nll_of(logits, rows))
        ablated_nll.append(torch.stack(nll, -1))
    return torch.cat(ablated_nll)


# -- patching: TransformerLens's own module -------------------------------------------------------


@torch.no_grad()
def patch_lens(model: Any, ids: Tensor, corrupted: Tensor, batch: int, heads: Heads) -> Tensor:
    """`transformer_lens.patching`: z of the corrupted run into the clean one. Mean NLL [head].

    `get_act_patch_attn_head_out_all_pos`, with its arguments, for the heads given.
    """
    from transformer_lens import patching

    index = pd.DataFrame(list(heads), columns=["layer", "head"])
    total = torch.zeros(len(heads))
    for rows, others in zip(batches(ids, batch), batches(corrupted, batch), strict=True):
        _, cache = model.run_with_cache(others)
        nll = patching.generic_activation_patch(
            model,
            rows,
            cache,
            lambda logits, rows=rows: nll_of(logits, rows).mean(),
            patch_setter=patching.layer_head_vector_patch_setter,
            activation_name="z",
            index_df=index,
        )
        total += nll * len(rows) / len(ids)
    return total


# -- perturbation: one `generate` per position ----------------------------------------------------


def perturbed(ids: Tensor, replacements: Tensor, positions: Sequence[int]) -> Tensor:
    """Every paragraph with one prefix token replaced, [row x position, pos], row by row."""
    rows = ids.repeat_interleave(len(positions), 0)
    place = torch.tensor(list(positions)).repeat(len(ids))[:, None]
    new = replacements[:, list(positions)].reshape(-1, 1)
    return rows.scatter(1, place, new)


# -- gradients: one backward pass per paragraph ---------------------------------------------------

COMPONENTS = ("W_Q", "W_K", "W_V", "W_O")


def gradients_lens(model: Any, ids: Tensor, batch: int) -> Tensor:
    """`loss.backward()` for every paragraph. max |gradient|, [row, component, layer, head]."""
    maxima = []
    for row in batches(ids, 1):
        model.zero_grad()
        nll_of(model(row, return_type="logits"), row).sum().backward()
        maxima.append(torch.stack([head_maxima(model, name) for name in COMPONENTS]))
    model.zero_grad()
    return torch.stack(maxima)


def head_maxima(model: Any, component: str) -> Tensor:
    """max |gradient| of a component, [layer, head]."""
    rows = []
    for block in model.blocks:
        weight = getattr(block.attn, component)
        if isinstance(weight, torch.nn.Parameter):  # HookedTransformer: [head, d_in, d_out]
            rows.append(weight.grad.abs().amax((-2, -1)))
        else:  # Bridge: the weight of a Linear, [out, in]
            name = component[-1].lower()
            gradient = getattr(block.attn, name).weight.grad
            gradient = gradient.T if name == "o" else gradient
            rows.append(gradient.unflatten(0, (model.cfg.n_heads, -1)).abs().amax((-2, -1)))
    return torch.stack(rows)
