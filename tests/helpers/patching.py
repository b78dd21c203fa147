"""Pairs of prompts for tiny models, and patches of their activations written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

from memcircuits import Paragraphs, perturb_prefix
from memcircuits.evidence.patching.sites import LAYER_SITES
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.hooks import (
    NamedHook,
    activation,
    logits_with,
    record,
    replace_at,
    replace_queries_at,
)

# A Bridge observes the attention of these, so writes to the pattern do nothing there.
DELEGATED = ("gpt_neo", "opt")

CASE_NAMES = [
    *sorted(zoo.ARCHITECTURES),
    *(f"hooked-{name}" for name in ("gpt2", "neox", "llama") if zoo.has_hooked()),
]
FIRST_IMPACTED = 3  # continuations of every pair differ from their fourth token on


def each_case(*, but: Sequence[str] = ()) -> Any:
    """Run a test on every model but some."""
    names = [name for name in CASE_NAMES if name not in but]
    return pytest.mark.parametrize("case", names, indirect=True)


def nll_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of the last tokens, nats/token, [batch]."""
    log_prob = logits[:, -targets.shape[1] :].log_softmax(-1)
    return -log_prob.gather(-1, targets[..., None])[..., 0].mean(-1)


@dataclass(frozen=True)
class PatchingCase:
    """A tiny model, paragraphs that it recites, and their corrupted counterparts.

    Attributes:
        name: the architecture; `hooked-` ones are HookedTransformers.
        model: the model, with queries scaled up: attention that is nearly uniform hardly depends
            on them.
        clean: recited paragraphs.
        corrupted: the same with the most destructive token replaced.
    """

    name: str
    model: Any
    clean: Paragraphs
    corrupted: Paragraphs

    @classmethod
    def of(cls, name: str) -> PatchingCase:
        hooked = name.startswith("hooked-")
        model = zoo.hooked(name.removeprefix("hooked-")) if hooked else zoo.bridge(name)
        adapter = adapt(model)
        with torch.no_grad():
            for layer in range(adapter.n_layers):
                adapter.weight(layer, "W_Q").values.mul_(6)
        clean = zoo.reciting(model, n=3)
        prefix = perturb_prefix(model, clean).pairs().corrupted.prefix
        continuation = clean.continuation.clone()
        continuation[:, FIRST_IMPACTED:] = (continuation[:, FIRST_IMPACTED:] + 1) % zoo.D_VOCAB
        corrupted = Paragraphs(torch.cat([prefix, continuation], 1), clean.n_prefix)
        return cls(name, model, clean, corrupted)

    @cached_property
    def in_float64(self) -> PatchingCase:
        """The same with more digits, for finite differences."""
        model = zoo.bridge(self.name).double()
        with torch.no_grad():
            for key, value in self.model.state_dict().items():
                model.state_dict()[key].copy_(value)
        return replace(self, model=model)

    @property
    def pair(self) -> tuple[Paragraphs, Paragraphs]:
        return self.clean, self.corrupted

    @property
    def n_layers(self) -> int:
        return adapt(self.model).n_layers

    @property
    def layer_sites(self) -> list[str]:
        """Layer sites of this model; parallel blocks have no resid_mid."""
        parallel = adapt(self.model).parallel
        return [site for site in LAYER_SITES if site != "resid_mid" or not parallel]

    def runs(self, direction: str) -> tuple[Tensor, Tensor]:
        """Tokens of the run patched into and of the run that gives activations."""
        corrupted = torch.cat([self.corrupted.prefix, self.clean.continuation], 1)
        runs = (self.clean.ids[:, :-1], corrupted[:, :-1])
        return runs if direction == "noising" else (runs[1], runs[0])

    def nll(self, tokens: Tensor, *hooks: NamedHook) -> Tensor:
        """NLL of the clean continuation under hooks."""
        return nll_of(logits_with(self.model, tokens, *hooks), self.clean.continuation)

    def first_impacted(self, tokens: Tensor, *hooks: NamedHook) -> Tensor:
        """-log p of the first impacted token under hooks."""
        at = self.clean.n_prefix - 1 + FIRST_IMPACTED
        log_prob = logits_with(self.model, tokens, *hooks)[:, at].log_softmax(-1)
        token = self.clean.continuation[:, [FIRST_IMPACTED]]
        return -log_prob.gather(-1, token)[:, 0].double()

    def head_patches(
        self, site: str, layer: int, positions: Sequence[int], direction: str
    ) -> list[NamedHook]:
        """For every head of a layer, the hook that patches it by hand."""
        base, source = self.runs(direction)
        name = hook_name(site, layer)
        new = activation(self.model, source, name)
        if site != "pattern":
            return [(name, replace_at(positions, new, head=i)) for i in range(new.shape[2])]
        heads = range(new.shape[1])
        if self.name not in DELEGATED:
            return [(name, replace_queries_at(positions, new, head=i)) for i in heads]
        # A pattern acts through z = pattern @ v, and the values stay those of the base run.
        v = activation(self.model, base, hook_name("v", layer))
        v = v.repeat_interleave(len(heads) // v.shape[2], 2)
        z = torch.stack([new[:, i] @ v[:, :, i] for i in heads], 2)
        return [(hook_name("z", layer), replace_at(positions, z, head=i)) for i in heads]

    def z_under(self, patch: NamedHook, layer: int, direction: str) -> Tensor:
        """The z of a layer when a hook patches the base run."""
        recorded: list[Tensor] = []
        base, _ = self.runs(direction)
        logits_with(self.model, base, patch, (hook_name("z", layer), record(recorded)))
        return recorded[0]
