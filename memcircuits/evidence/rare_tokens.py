"""Does a head attend to rare tokens? Rank correlation of attention with unigram counts.

Section 5.4 of the paper: from the position of the first continuation token, heads attend
back to the prefix; the memorization head attends to its rare tokens. The paper sums attention per
frequency rank over the corpus. That sum falls mechanically, because few paragraphs have the high
ranks. Here Kendall's tau-b correlates attention with counts over the prefix tokens within each
paragraph, and is averaged over paragraphs. The null distribution comes from counts permuted within
each paragraph.

Paragraphs that depend on each other are one group (`memcircuits.data.groups`), which counts once:
its tau is the mean of its paragraphs', and each permutation takes only one of its paragraphs, in
turn, because the mean over several permuted copies would vary too little.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError, at_least
from memcircuits.base.heads import Head, HeadLike
from memcircuits.base.progress import bar
from memcircuits.base.simultaneous import max_p_value
from memcircuits.base.statistics import (
    finite_mean,
    finite_rows,
    group_means,
    group_notes,
    interval,
    left_out,
    turns_in_groups,
)
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.unigrams import UnigramTable
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.score_map import ScoreMap

if TYPE_CHECKING:
    import pandas as pd

_BATCH_SIZE = 16  # paragraphs


@dataclass(frozen=True)
class RareTokenAttention(ScoreMap, kind="rare-token-attention"):
    """Mean tau-b per head; negative: rare tokens get more attention.

    Attributes beside `ScoreMap`'s:
        null: the same mean under permuted counts, [permutation, layer, head].
        attention: attention from the query to the prefix, [paragraph, layer, head, pos].
        counts: unigram counts of the prefix tokens, [paragraph, pos].
        query: position from which the attention is read.
        groups: number of each paragraph's independent group, [paragraph]; None: each is its own.
    """

    null: Tensor = field(default_factory=lambda: torch.empty(0))
    attention: Tensor = field(default_factory=lambda: torch.empty(0))
    counts: Tensor = field(default_factory=lambda: torch.empty(0))
    query: int = 0
    groups: Tensor | None = None

    @property
    def p_value(self) -> Float[Tensor, "layer head"]:
        """One-sided permutation p-value of a tau this negative."""
        below = (self.null <= self.values).sum(0)
        return (1 + below) / (1 + len(self.null))

    @property
    def corrected_p_value(self) -> Float[Tensor, "layer head"]:
        """The same, corrected for testing all heads (`memcircuits.base.simultaneous`).

        Counts are permuted for all heads together, so the smallest tau of each permutation is that
        of a model in which no head attends to rare tokens.
        """
        return max_p_value(-self.values, -self.null)

    @property
    def entropy(self) -> Float[Tensor, "layer head"]:
        """Mean entropy of the attention within the prefix, rescaled to sum to 1, nats."""
        p = self.attention / self.attention.sum(-1, keepdim=True).clamp_min(1e-12)
        return finite_mean(-(p * p.clamp_min(1e-12).log()).sum(-1), self.groups)

    def by_rank(self, head: HeadLike, *, permutations: int = 200, seed: int = 0) -> pd.DataFrame:
        """Attention of one head against the frequency rank of tokens (figure 7 of the paper).

        Within each paragraph the prefix tokens are ranked by count, 1 for the rarest; ties share a
        rank. Attention is averaged over the tokens of a rank within each paragraph, then over the
        paragraphs that have the rank. The null band holds 95 % of such means under counts permuted
        within paragraphs. Ranks that fewer than a quarter of the paragraphs have are left out.

        Args:
            head: layer and head.
            permutations: number of permutations for the null band.
            seed: seed of the permutations.

        Returns:
            Columns `rank, n, attention, attention_se, null_low, null_high`; `n` counts independent
            groups of paragraphs.

        Raises:
            InputError: if there is no such head.
        """
        import pandas as pd

        n_layers, n_heads = self.values.shape
        head = Head.of(head).within(n_layers, n_heads, "head")
        attention = self.attention[:, head.layer, head.head]

        # Which tokens have which rank.
        ranks = torch.stack([row.unique(return_inverse=True)[1] for row in self.counts])
        has_rank = torch.nn.functional.one_hot(ranks).float()  # [paragraph, pos, rank]
        n_tokens = has_rank.sum(1)
        present = (n_tokens > 0).float()

        def mean_per_rank(attention: Tensor) -> Float[Tensor, "paragraph rank"]:
            return torch.einsum("pk,pkr->pr", attention, has_rank) / n_tokens.clamp_min(1)

        def mean(values: Tensor, present: Tensor) -> Float[Tensor, " rank"]:
            return (values * present).sum(0) / present.sum(0).clamp_min(1)

        # The mean per rank, and its spread over the groups that have the rank.
        share_present = group_means(present, self.groups)
        values = group_means(mean_per_rank(attention) * present, self.groups)
        values = values / share_present.where(share_present > 0, 1.0)
        has_group = (share_present > 0).float()
        n_groups = has_group.sum(0).long()
        squares = mean((values - mean(values, has_group)).square(), has_group)
        variance = squares * n_groups / (n_groups - 1).clamp_min(1)

        # The same mean when the counts, and so the ranks, are permuted within paragraphs.
        generator = torch.Generator().manual_seed(seed)
        null = []
        for permutation in range(permutations):
            order = torch.rand(attention.shape, generator=generator).argsort(-1)
            taken = _taken(self.groups, len(attention), permutation)
            permuted = mean_per_rank(attention.gather(1, order))
            null.append(mean(permuted[taken], present[taken]))
        low, high = interval(torch.stack(null))
        frame = pd.DataFrame(
            {
                "rank": range(1, len(n_groups) + 1),
                "n": n_groups.numpy(),
                "attention": mean(values, has_group).double().numpy(),
                "attention_se": (variance / n_groups.clamp_min(1)).sqrt().double().numpy(),
                "null_low": low.double().numpy(),
                "null_high": high.double().numpy(),
            }
        )
        return frame[4 * frame["n"] >= len(values)].reset_index(drop=True)

    def figure(self, head: HeadLike | None = None) -> Any:
        """Tau of every head; with `head` its attention by frequency rank (plotly, figure 7)."""
        from memcircuits.display import figures

        if head is not None:
            return figures.attention_by_rank(
                self.by_rank(head), title=f"{Head.of(head)}: attention to rare and common tokens"
            )
        return figures.heatmap(
            self.values,
            title="Attention to common (+) or rare (\u2212) tokens, frame: corrected p < 0.05",
            name="mean tau-b",
            diverging=True,
            marks=self.corrected_p_value < 0.05,
        )

    def to_frame(self) -> pd.DataFrame:
        """Columns `layer, head, value, p_value, corrected_p_value, entropy`."""
        frame = super().to_frame()
        frame["p_value"] = self.p_value.flatten().double().numpy()
        frame["corrected_p_value"] = self.corrected_p_value.flatten().double().numpy()
        frame["entropy"] = self.entropy.flatten().double().numpy()
        return frame


@plain_torch()
def rare_token_attention(
    model: Model,
    paragraphs: ParagraphsLike,
    unigrams: UnigramTable | None = None,
    *,
    query: int | None = None,
    permutations: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> RareTokenAttention:
    """Correlate each head's attention to the prefix with the rarity of its tokens.

    Args:
        model: the model.
        paragraphs: the paragraphs.
        unigrams: token counts; by default the paragraphs themselves are counted, and the result
            says so in `notes`.
        query: position from which attention is read; by default that of the first continuation
            token.
        permutations: number of permutations for the within-paragraph null.
        seed: seed of the permutations.
        progress: show a bar on stderr.

    Returns:
        Mean over paragraphs of Kendall's tau-b between attention and count (section 5.4, figure 7
        of the paper).

    Raises:
        InputError: for a query outside the paragraph or a table of another tokenizer.

    Example:
        >>> rare = mc.rare_token_attention(model, memorized, mc.UnigramTable.shipped())
        >>> rare.values.shape, rare.units
        (torch.Size([6, 8]), 'tau-b')
    """
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, adapter)
    adapter.check_tokens(paragraphs.inputs, "paragraphs")
    at_least("permutations", permutations, 1)
    query = paragraphs.n_prefix if query is None else query
    at_least("query", query, 1)
    if query >= paragraphs.ids.shape[1]:
        raise InputError("query", query, f"give a position in [1, {paragraphs.ids.shape[1]})")
    notes: tuple[str, ...] = ()
    if unigrams is None:
        unigrams = UnigramTable.from_tokens(
            paragraphs.ids, adapter.d_vocab, source="the paragraphs themselves"
        )
        notes = ("no unigram table was given: rarity is counted in the paragraphs themselves",)
    else:
        UnigramTable.check(unigrams, adapter.model)
    n_keys = min(query, paragraphs.n_prefix)
    counts = unigrams.counts[paragraphs.ids[:, :n_keys]]
    with adapter.preserving_state():
        attention = _attention_from(adapter, paragraphs, query, n_keys, progress)
    tau, null = _tau_with_null(attention, counts, paragraphs.groups, permutations, seed)
    return RareTokenAttention(
        name="rare-token attention (tau-b)",
        units="tau-b",
        values=_mean_tau(tau, paragraphs.groups),
        provenance=Provenance.of(
            adapter,
            {"paragraphs": paragraphs},
            query=query,
            permutations=permutations,
            seed=seed,
            unigrams=unigrams.source,
        ),
        samples={"tau": tau.nan_to_num(0.0)},
        notes=(
            *notes,
            *left_out(finite_rows(attention)),
            *group_notes({"given": paragraphs.groups}),
        ),
        null=null,
        attention=attention,
        counts=counts,
        query=query,
        groups=paragraphs.groups,
    )


def _mean_tau(
    tau: Float[Tensor, "paragraph layer head"], groups: Int[Tensor, " paragraph"]
) -> Float[Tensor, "layer head"]:
    """Mean over the groups in which tau is defined; 0 if there are none."""
    share_defined = group_means((~tau.isnan()).float(), groups)
    return (group_means(tau.nan_to_num(0.0), groups) / share_defined).nanmean(0).nan_to_num(0.0)


def _taken(
    groups: Int[Tensor, " paragraph"] | None, n: int, permutation: int
) -> Bool[Tensor, " paragraph"]:
    """The paragraphs that a permutation takes: one of each group, another one each time."""
    if groups is None:
        return torch.ones(n, dtype=torch.bool)
    turns, sizes = turns_in_groups(groups)
    return turns == permutation % sizes


def _attention_from(
    adapter: Adapter, paragraphs: Paragraphs, query: int, n_keys: int, progress: bool
) -> Float[Tensor, "batch layer head key"]:
    """Attention of one query position to the first `n_keys`; no later position is run.

    Attention to tokens in front of the paragraph, often a large part of it, has no key here.
    """
    names = [hook_name("pattern", layer) for layer in range(adapter.n_layers)]
    attention = []
    first = paragraphs.n_bos
    keys = slice(first, first + n_keys)
    with bar(len(paragraphs), "attention", progress=progress) as progress_bar:
        for batch_ids in paragraphs.inputs[:, : first + query + 1].split(_BATCH_SIZE):
            run = adapter.run(batch_ids, positions=slice(-1, None), read=names)
            layers = [run.cache[name][:, :, -1, keys].float().cpu() for name in names]
            attention.append(torch.stack(layers, 1))
            progress_bar.update(len(batch_ids))
    return torch.cat(attention)


def kendall_tau_b(
    x: Float[Tensor, "*batch pos"], y: Float[Tensor, "*other pos"]
) -> Float[Tensor, "*batch *other"]:
    """Kendall's tau-b of every row of `x` with every row of `y`; NaN where one is constant.

    Concordant minus discordant pairs of positions, over the geometric mean of the pairs that are
    not tied in `x` and in `y`. All rows together are one matrix product.
    """
    x_signs, y_signs = _pair_signs(x), _pair_signs(y)
    n_pairs = x_signs.shape[-1]
    difference = x_signs.reshape(-1, n_pairs) @ y_signs.reshape(-1, n_pairs).T
    x_untied, y_untied = x_signs.abs().sum(-1), y_signs.abs().sum(-1)
    scale = (x_untied.reshape(-1, 1) * y_untied.reshape(1, -1)).sqrt()
    return (difference / scale).reshape((*x.shape[:-1], *y.shape[:-1]))


def _pair_signs(x: Float[Tensor, "*batch pos"]) -> Float[Tensor, "*batch pair"]:
    """For each pair of positions i < j: 1 if x[i] > x[j], -1 if x[i] < x[j], 0 if tied."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], 1)
    return (x[..., i] > x[..., j]).float() - (x[..., i] < x[..., j]).float()


def _tau_with_null(
    attention: Float[Tensor, "batch layer head pos"],
    counts: Int[Tensor, "batch pos"],
    groups: Int[Tensor, " batch"],
    permutations: int,
    seed: int,
) -> tuple[Float[Tensor, "batch layer head"], Float[Tensor, "permutation layer head"]]:
    """Tau per paragraph, and the mean tau under counts permuted within each paragraph."""
    generator = torch.Generator().manual_seed(seed)
    n_paragraphs, n_layers, n_heads, n_keys = attention.shape
    tau = torch.empty(n_paragraphs, n_layers, n_heads)
    null_sum = torch.zeros(permutations, n_layers, n_heads)
    turns, sizes = turns_in_groups(groups)
    for paragraph in range(n_paragraphs):
        order = torch.rand(permutations, n_keys, generator=generator).argsort(-1)
        own_counts = counts[paragraph]
        own_and_permuted = torch.cat([own_counts[None], own_counts[order]]).float()
        taus = kendall_tau_b(attention[paragraph], own_and_permuted)  # [layer, head, 1 + draw]
        tau[paragraph] = taus[..., 0]
        taken = torch.arange(permutations) % sizes[paragraph] == turns[paragraph]
        null_sum += taus[..., 1:].nan_to_num(0.0).permute(2, 0, 1) * taken[:, None, None]
    # Tau is NaN where attention or counts are constant.
    n_defined = (group_means((~tau.isnan()).float(), groups) > 0).sum(0)
    return tau, null_sum / n_defined.clamp_min(1)
