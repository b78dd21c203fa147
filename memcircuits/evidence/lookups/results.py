"""`Lookups`: next-token neurons, the heads that drive them, and their test on other prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.base.statistics import DRAWS, bootstrap_means, interval
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.display.pages import Block

N_ACTIVE = 3
"""Number of heads that add most to a neuron's input at a prompt: the active ones (the paper's)."""

CALLED = 0.25
"""Share of the prompts in which a head must be active to be called active for a neuron."""


@dataclass(frozen=True)
class Lookups(Result, kind="lookups"):
    """Neurons that write a token, the heads that add to their input, and the drop without a head.

    A prompt is a paragraph up to the position where the neuron is most active in it.

    Attributes:
        neurons: layer and index of each neuron measured, [neuron, 2].
        is_next_token: whether it was chosen for its congruence; the others were drawn at random
            from the same layers, [neuron].
        congruence: see `memcircuits.evidence.lookups.writing`, [neuron].
        tokens: id of the token that it writes most, [neuron].
        token_texts: that token as text.
        prompts: paragraph and position of each prompt, strongest first, [neuron, prompt, 2].
        activation: of the neuron at the prompt, [neuron, prompt].
        attribution: what each head adds to the neuron's input there, NaN for heads that it cannot
            read, [neuron, prompt, layer, head].
        drop: fall of the activation when the head's output is taken out of what this MLP reads,
            [neuron, prompt, layer, head]; NaN as above.
        writers: layer and index of the neurons that add most to the logit of each continuation
            token, [paragraph, pos, rank, 2].
        contribution: what they add, logits, [paragraph, pos, rank].
        names: the paragraphs' names.
        provenance: where the numbers come from.
        notes: what the reader must know about the numbers.
    """

    neurons: Int[Tensor, "neuron 2"]
    is_next_token: Bool[Tensor, " neuron"]
    congruence: Float[Tensor, " neuron"]
    tokens: Int[Tensor, " neuron"]
    token_texts: tuple[str, ...]
    prompts: Int[Tensor, "neuron prompt 2"]
    activation: Float[Tensor, "neuron prompt"]
    attribution: Float[Tensor, "neuron prompt layer head"]
    drop: Float[Tensor, "neuron prompt layer head"]
    writers: Int[Tensor, "paragraph pos rank 2"]
    contribution: Float[Tensor, "paragraph pos rank"]
    names: tuple[str, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    @property
    def active(self) -> Bool[Tensor, "neuron prompt layer head"]:
        """Whether a head is among the `N_ACTIVE` that add most to the neuron's input."""
        flat = self.attribution.nan_to_num(-torch.inf).flatten(2)
        rank = flat.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return (rank < N_ACTIVE).view(self.attribution.shape) & self.attribution.isfinite()

    @property
    def rate(self) -> Float[Tensor, "neuron layer head"]:
        """Share of a neuron's prompts in which a head is active."""
        return self.active.float().mean(1)

    @property
    def relative_drop(self) -> Float[Tensor, "neuron prompt layer head"]:
        """The drop as a share of the activation."""
        return self.drop / self.activation[..., None, None]

    @property
    def auc(self) -> Float[Tensor, " neuron"]:
        """Do heads called active on some prompts drop the neuron on others? One AUC per neuron.

        A neuron's prompts, each of another paragraph, are split into halves. A head is called
        active if it is so in `CALLED` of one half. The AUC is the probability that a head called
        active has a larger mean drop in the other half than one that was not called: 0.5 is chance.
        Mean of both directions; NaN where no head or every head is called.
        """
        halves = [self.active[:, start::2].float().mean(1).flatten(1) for start in (0, 1)]
        drops = [self.relative_drop[:, start::2].mean(1).flatten(1) for start in (0, 1)]
        both = [
            torch.tensor(
                [_auc(d, r >= CALLED) for d, r in zip(drops[1 - i], halves[i], strict=True)]
            )
            for i in (0, 1)
        ]
        return torch.stack(both).nanmean(0)

    @property
    def ks(self) -> tuple[float, float]:
        """Kolmogorov-Smirnov distance between the held-out drops of heads called active or not.

        Of next-token neurons and of random ones, all their (neuron, head) pairs together, as the
        paper has it. Pairs of one neuron are not independent, so no p-value is given.
        """
        return self._ks(self.is_next_token), self._ks(~self.is_next_token)

    def _ks(self, which: Bool[Tensor, " neuron"]) -> float:
        from scipy.stats import ks_2samp

        called, others = [], []
        for start in (0, 1):
            rate = self.active[which, start::2].float().mean(1)
            drop = self.relative_drop[which, 1 - start :: 2].mean(1)
            known = drop.isfinite()
            called.append(drop[known & (rate >= CALLED)])
            others.append(drop[known & (rate < CALLED)])
        if not (sum(map(len, called)) and sum(map(len, others))):
            return float("nan")
        test = ks_2samp(torch.cat(called).double().numpy(), torch.cat(others).double().numpy())
        return float(test.statistic)

    def summary(self, *, draws: int = DRAWS) -> pd.DataFrame:
        """The mean AUC of next-token neurons, of random ones, and their difference.

        Neurons are what is resampled: the question is about neurons of these two kinds.

        Args:
            draws: number of resamples.

        Returns:
            Columns `neurons, n, auc, auc_low, auc_high, ks`.
        """
        import pandas as pd

        generator = torch.Generator().manual_seed(int(self.provenance.options["seed"]))
        rows, resampled = [], []
        for name, which, ks in zip(
            ("next-token", "random"),
            (self.is_next_token, ~self.is_next_token),
            self.ks,
            strict=True,
        ):
            auc = self.auc[which]
            auc = auc[auc.isfinite()]
            means = (
                bootstrap_means(auc, draws, generator) if len(auc) else torch.full((1,), torch.nan)
            )
            resampled.append(means)
            rows.append((name, len(auc), float(auc.mean()), *interval(means).tolist(), ks))
        low, high = interval(resampled[0] - resampled[1]).tolist()
        rows.append(("difference", 0, rows[0][2] - rows[1][2], low, high, rows[0][5] - rows[1][5]))
        return pd.DataFrame(rows, columns=["neurons", "n", "auc", "auc_low", "auc_high", "ks"])

    def writers_frame(self) -> pd.DataFrame:
        """The neurons that add most to each token: `id, pos, rank, layer, neuron, contribution`.

        Positions count from the first continuation token.
        """
        import pandas as pd

        n, n_pos, k = self.contribution.shape
        grid = torch.cartesian_prod(torch.arange(n), torch.arange(n_pos), torch.arange(k))
        layer, neuron = self.writers.reshape(-1, 2).unbind(-1)
        return pd.DataFrame(
            {
                "id": [self.names[i] for i in grid[:, 0].tolist()],
                "pos": grid[:, 1].numpy(),
                "rank": (grid[:, 2] + 1).numpy(),
                "layer": layer.numpy(),
                "neuron": neuron.numpy(),
                "contribution": self.contribution.flatten().double().numpy(),
            }
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per neuron, with the head that is active in most of its prompts.

        Columns `layer, neuron, kind` (`next-token` or `random`), `token, congruence, activation,
        head, rate, drop` (mean share of the activation lost without that head) and `auc`.
        """
        import pandas as pd

        best = self.rate.flatten(1).argmax(1)
        layer, head = best // self.rate.shape[2], best % self.rate.shape[2]
        each = torch.arange(len(best))
        drop = self.relative_drop.mean(1)[each, layer, head]
        return pd.DataFrame(
            {
                "layer": self.neurons[:, 0].numpy(),
                "neuron": self.neurons[:, 1].numpy(),
                "kind": ["next-token" if x else "random" for x in self.is_next_token.tolist()],
                "token": list(self.token_texts),
                "congruence": self.congruence.double().numpy(),
                "activation": self.activation.mean(1).double().numpy(),
                "head": [f"L{i}H{j}" for i, j in zip(layer.tolist(), head.tolist(), strict=True)],
                "rate": self.rate.flatten(1).amax(1).double().numpy(),
                "drop": drop.double().numpy(),
                "auc": self.auc.double().numpy(),
            }
        )

    def figure(self) -> Any:
        """Mean share of the activation lost without each head, by kind of neuron (plotly)."""
        from memcircuits.display import figures

        kinds = {"next-token": self.is_next_token, "random": ~self.is_next_token}
        return figures.patching_map(
            {
                name: self.relative_drop[which].flatten(0, 1).nanmean(0)
                for name, which in kinds.items()
            },
            title=str(self),
            name="share of the activation lost",
            units="",
        )

    def block(self) -> Block:
        """Mean share of a next-token neuron's activation lost without each head, on a page."""
        from memcircuits.display.pages import Heatmap

        return Heatmap(
            self.relative_drop[self.is_next_token].flatten(0, 1).nanmean(0),
            name="share of the activation lost",
            title="Heads that drive next-token neurons",
        )

    def __str__(self) -> str:
        n = int(self.is_next_token.sum())
        mean = [float(self.auc[w].nanmean()) for w in (self.is_next_token, ~self.is_next_token)]
        return (
            f"{n} next-token neurons and {len(self.neurons) - n} random ones; AUC of the heads "
            f"called active {mean[0]:.2f} and {mean[1]:.2f}"
        )


def _auc(values: Float[Tensor, " head"], called: Bool[Tensor, " head"]) -> float:
    """Probability that a called head has a larger value than another; ties count one half."""
    known = values.isfinite()
    first, second = values[known & called], values[known & ~called]
    if not (len(first) and len(second)):
        return float("nan")
    above = (first[:, None] > second).float() + 0.5 * (first[:, None] == second).float()
    return float(above.mean())
