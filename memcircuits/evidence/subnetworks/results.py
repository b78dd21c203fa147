"""`Core`: the parts that every subnetwork of recitations has, and those of ordinary text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.base.errors import one_of
from memcircuits.base.heads import Head
from memcircuits.base.statistics import bootstrap_interval, group_means
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.display.pages import Block

SetName: TypeAlias = Literal["memorized", "control"]
"""Which paragraphs subnetworks were trained for."""

SETS: tuple[SetName, ...] = get_args(SetName)

MEASURES = ("em", "accuracy", "nll")
"""What is measured: tokens recited, share of tokens that are the greedy choice given the true ones
before, nats/token."""


@dataclass(frozen=True)
class Core(Result, kind="core"):
    """Subnetworks of several seeds for two sets of paragraphs, and what they share.

    A part is a head or a whole MLP: heads layer by layer, then the MLPs.

    Attributes:
        log_odds: of every part, higher for those needed more, [set, seed, part]; the sets are
            `memorized` and `control`.
        kept: which parts a subnetwork has, [set, seed, part].
        effective_size: smallest number of parts, nested by `log_odds`, whose accuracy is within
            `tolerance` of the whole model's, [set, seed].
        scores: `SET, CONDITION` -> [paragraph, measure] on the test paragraphs of a set; measures
            are `MEASURES`, conditions are `whole`, `subnetworks` (of the set itself, mean over
            seeds), `only` or `without` the core of a set, as in `without memorized`, and `without
            own`: without the parts of the memorized paragraphs' core that the controls' core lacks.
        n_layers: number of layers.
        n_heads: number of heads per layer.
        shuffled: the same as `kept`, with the labels of the paragraphs shuffled, [shuffle, set,
            seed, part]; empty if that was not asked for.
        provenance: where the numbers come from.
        notes: what the reader must know about the numbers.
        groups: set -> number of each test paragraph's independent group; of a set that is not
            there, each paragraph is its own group.
    """

    log_odds: Float[Tensor, "set seed part"]
    kept: Bool[Tensor, "set seed part"]
    effective_size: Int[Tensor, "set seed"]
    scores: Mapping[str, Float[Tensor, "paragraph measure"]]
    n_layers: int
    n_heads: int
    shuffled: Bool[Tensor, "shuffle set seed part"]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    groups: Mapping[str, Int[Tensor, " paragraph"]] = field(default_factory=dict)

    def in_core(self, of: SetName = "memorized") -> Bool[Tensor, " part"]:
        """Which parts every subnetwork of a set has."""
        one_of("of", of, SETS)
        return self.kept[SETS.index(of)].all(0)

    def heads(self, of: SetName = "memorized") -> list[Head]:
        """The heads in the core of a set, layer by layer."""
        return self._heads(self.in_core(of))

    @property
    def own_heads(self) -> list[Head]:
        """Heads in the core of the memorized paragraphs and not in that of the controls."""
        return self._heads(self.in_core("memorized") & ~self.in_core("control"))

    def _heads(self, parts: Bool[Tensor, " part"]) -> list[Head]:
        n = self.n_layers * self.n_heads
        return [Head(*divmod(i, self.n_heads)) for i in parts[:n].nonzero().flatten().tolist()]

    def share(self, of: SetName = "memorized") -> Float[Tensor, "layer head"]:
        """Share of a set's subnetworks that have each head."""
        one_of("of", of, SETS)
        n = self.n_layers * self.n_heads
        share = self.kept[SETS.index(of)].float().mean(0)
        return share[:n].view(self.n_layers, self.n_heads)

    @property
    def false_core_rate(self) -> Float[Tensor, " shuffle"]:
        """Share of all heads in one shuffled set's core and not in the other's, per shuffle.

        With shuffled labels the sets do not differ, so that every such head is a false one.
        """
        n = self.n_layers * self.n_heads
        cores = self.shuffled[..., :n].all(2)
        return (cores[:, 0] != cores[:, 1]).float().mean(-1) / 2

    def effects(self) -> pd.DataFrame:
        """What the whole model, subnetworks and cores predict, with 95 % intervals over groups.

        Returns:
            Columns `set, condition, n` and `em, accuracy, nll`, each with `_low` and `_high`.
        """
        import pandas as pd

        seed = int(self.provenance.options["seed"])
        rows = []
        for name, samples in self.scores.items():
            group, _, condition = name.partition(", ")
            row: dict[str, Any] = {"set": group, "condition": condition, "n": len(samples)}
            means = group_means(samples, self.groups.get(group))
            low, high = bootstrap_interval(means, seed=seed)
            for i, measure in enumerate(MEASURES):
                row[measure] = float(means[:, i].mean())
                row |= {f"{measure}_low": float(low[i]), f"{measure}_high": float(high[i])}
            rows.append(row)
        return pd.DataFrame(rows)

    def to_frame(self) -> pd.DataFrame:
        """Columns `part, layer, head, memorized, control` (shares of subnetworks), `core`.

        `head` is empty for an MLP. `core` is `both`, `memorized`, `control` or empty.
        """
        import pandas as pd

        n = self.n_layers * self.n_heads
        heads = self._heads(torch.ones(n, dtype=torch.bool))
        names = [*map(str, heads), *(f"L{i}.mlp" for i in range(self.n_layers))]
        memorized, control = (self.in_core(of).tolist() for of in SETS)
        cores = {(True, True): "both", (True, False): "memorized", (False, True): "control"}
        share = self.kept.float().mean(1)
        return pd.DataFrame(
            {
                "part": names,
                "layer": [*(h.layer for h in heads), *range(self.n_layers)],
                "head": [*(str(h.head) for h in heads), *([""] * self.n_layers)],
                "memorized": share[0].double().numpy(),
                "control": share[1].double().numpy(),
                "core": [cores.get(pair, "") for pair in zip(memorized, control, strict=True)],
            }
        )

    def figure(self) -> Any:
        """How many of the subnetworks have each head, for both sets (plotly)."""
        from memcircuits.display import figures

        return figures.patching_map(
            {of: self.share(of) for of in SETS},
            title=str(self),
            name="share of subnetworks",
            units="",
        )

    def block(self) -> Block:
        """How many of the subnetworks for memorized paragraphs have each head, on a page."""
        from memcircuits.display.pages import Heatmap

        return Heatmap(
            self.share("memorized"),
            name="share of subnetworks",
            title="Heads of the subnetworks that recite",
            marks=self.own_heads,
            marks_mean="in every subnetwork for memorized paragraphs, and not for controls",
        )

    def __str__(self) -> str:
        cores = [f"{of} {len(self.heads(of))} heads" for of in SETS]
        return (
            f"{self.kept.shape[1]} subnetworks of {int(self.kept[0, 0].sum())} of "
            f"{self.kept.shape[2]} parts; in all of them: {', '.join(cores)}"
        )
