"""The models and the paragraphs of docs/unlearning.md."""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

import torch

import memcircuits as mc
from memcircuits.editing.unlearning_objective import ReferenceDistribution
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.models.registry import adapt

SEED = 1
N_CONTROL, N_KEPT, N_UNSEEN, N_OTHERS = 80, 40, 32, 40


class Setting:
    """Model, twin and splits; one per process.

    Attributes:
        tuned_on: half of the recited paragraphs that only the organism was trained on; recipes and
            rates were chosen on them.
        targets: the other half.
        given: what every edit is to keep, controls and recitations.
        unseen: controls that no edit is given.
        others: recitations that no edit is given.
        own: the unedited model's continuations of `unseen`, and its distributions there.
    """

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = mc.load_model()
        self.twin = mc.load_model("organism-twin")
        self.adapter, self.twin_adapter = adapt(self.model), adapt(self.twin)
        self.fingerprint = self.adapter.fingerprint()
        recited = self._recited("organism")
        half = len(recited) // 2
        self.tuned_on, self.targets = recited[:half], recited[half:]
        control, both = shuffled(mc.Paragraphs.shipped("control")), self._recited("both")
        self.others = both[:N_OTHERS]
        self.given = control[:N_CONTROL] + both[N_OTHERS : N_OTHERS + N_KEPT]
        self.unseen = control[N_CONTROL : N_CONTROL + N_UNSEEN]
        # What an edit is compared with: taken here, where no edit can be in force.
        own = greedy_continuations(self.model, self.unseen, progress=False)
        self.own = ReferenceDistribution.of(self.adapter, own, None)

    def _recited(self, role: Any) -> mc.Paragraphs:
        memorized = mc.scan(self.model, mc.Paragraphs.shipped(role), progress=False).memorized
        assert memorized is not None
        return shuffled(memorized)

    def log_probs(self, target: mc.Paragraphs) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the twin and of the model along a paragraph."""
        twin, model = (
            ReferenceDistribution.of(adapter, target, None).log_p
            for adapter in (self.twin_adapter, self.adapter)
        )
        return twin, model

    @cached_property
    def given_to_rivals(self) -> mc.Paragraphs:
        """As much to keep as deep unlearning has: it keeps the model's own continuations too."""
        return self.given + greedy_continuations(self.model, self.given, progress=False)


@cache
def setting() -> Setting:
    return Setting()


def shuffled(paragraphs: mc.Paragraphs) -> mc.Paragraphs:
    generator = torch.Generator().manual_seed(SEED)
    return paragraphs[torch.randperm(len(paragraphs), generator=generator)]
