"""The models and paragraphs that every analysis is tried on."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import memcircuits as mc
from memcircuits.models.loading import as_bridge
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.oracle import Plain

N_PREFIX, N_CONTINUATION = 10, 12
CLASSES, BASES = ("Bridge", "HookedTransformer"), ("raw", "folded")
VARIANTS = tuple(f"{kind} {basis}" for kind in CLASSES for basis in BASES)
Numbers = Mapping[str, Tensor]


@functools.cache
def plain(name: str) -> Plain:
    """The transformers model itself, norms and biases random."""
    return Plain(name, zoo.shaken(zoo.hf_model(name)))


@functools.cache
def model(name: str, variant: str) -> Any:
    """The same weights as a TransformerLens model."""
    return _as_variant(name, variant, zoo.shaken(zoo.hf_model(name)))


def _as_variant(name: str, variant: str, source: Any) -> Any:
    kind, basis = variant.replace("TransformerBridge", "Bridge").split()
    if kind == "HookedTransformer":
        return zoo.hooked(name, source, folded=basis == "folded")
    bridge = as_bridge(source, zoo.tokenizer(), name=f"tiny-{name}")
    if basis == "folded":
        bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge


def variants() -> list[str]:
    """Those that the installed transformer-lens has."""
    return [v for v in VARIANTS if zoo.has_hooked() or v.startswith("Bridge")]


@functools.cache
def plain_twin(name: str) -> Plain:
    """A transformers model of the same architecture with other weights."""
    return Plain(name, zoo.shaken(zoo.hf_model(name, seed=1), seed=6))


def twin_model(m: Any) -> Any:
    """The same as a TransformerLens model, of the class and basis of a model."""
    adapter = adapt(m)
    return _twin_model(adapter.name.removeprefix("tiny-"), f"{adapter.kind} {adapter.basis}")


@functools.cache
def _twin_model(name: str, variant: str) -> Any:
    return _as_variant(name, variant, zoo.shaken(zoo.hf_model(name, seed=1), seed=6))


@functools.cache
def paragraphs(name: str) -> mc.Paragraphs:
    """Three that the model recites (by `generate`), three random ones."""
    ids = zoo.random_ids(6, N_PREFIX + N_CONTINUATION, seed=1)
    with torch.no_grad():
        for position in range(N_PREFIX, ids.shape[1]):
            ids[:3, position] = plain(name).logits(ids[:3, :position])[:, -1].argmax(-1)
    return mc.Paragraphs.from_tokens(ids, n_prefix=N_PREFIX)


def reference_paragraph() -> mc.Paragraphs:
    """One paragraph of its own that means and samples are taken from."""
    return mc.Paragraphs.from_tokens(
        zoo.random_ids(1, N_PREFIX + N_CONTINUATION, seed=2), n_prefix=N_PREFIX
    )


def unigrams() -> mc.UnigramTable:
    """Random counts with ties."""
    counts = zoo.random_ids(1, zoo.D_VOCAB, seed=3)[0] // 4
    return mc.UnigramTable(counts, "random counts")


def twins(p: mc.Paragraphs) -> mc.Paragraphs:
    """The same continuations behind prefixes with one other token."""
    ids = p.ids.clone()
    ids[:, 4] = (ids[:, 4] + 1) % zoo.D_VOCAB
    return mc.Paragraphs.from_tokens(ids, n_prefix=p.n_prefix)


def told(p: mc.Paragraphs) -> mc.Paragraphs:
    """A short text that the model does not know."""
    return mc.Paragraphs.from_tokens(p.ids[3:4, : N_PREFIX + 6], n_prefix=N_PREFIX)
