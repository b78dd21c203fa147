"""Does a head look at rare tokens? Rank correlation of attention with unigram counts.

Section 5.4 of the paper: from the position that reads the first continuation token, heads attend
back to the prefix; the memorization head attends to its rare tokens. The paper sums attention per
frequency rank over the corpus, which falls mechanically because high ranks are often empty. Here,
within each paragraph, Kendall's tau-b correlates attention with counts over the prefix tokens, is
averaged over paragraphs, and is held against a null in which the counts are permuted within each
paragraph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.core.errors import InputError, at_least
from memcircuits.core.heads import Head
from memcircuits.core.progress import bar
from memcircuits.core.statistics import finite_mean, finite_rows, interval, left_out
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.unigrams import UnigramTable
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.score_map import ScoreMap

if TYPE_CHECKING:
    import pandas as pd


_GROUP = 16


@dataclass(frozen=True)
class RareTokenAttention(ScoreMap, kind="rare-token-attention"):
    """Mean tau-b per head; negative: rare tokens get more attention.

    Attributes beside `ScoreMap`'s:
        null: the same mean under permuted counts, [permutation, layer, head].
        attention: attention from the query to the prefix, [paragraph, layer, head, pos].
        counts: unigram counts of the prefix tokens, [paragraph, pos].
        query: position the attention is read from.
    """

    null: Tensor = field(default_factory=lambda: torch.empty(0))
    attention: Tensor = field(default_factory=lambda: torch.empty(0))
    counts: Tensor = field(default_factory=lambda: torch.empty(0))
    query: int = 0

    @property
    def p_value(self) -> Float[Tensor, "layer head"]:
        """One-sided permutation p-value of a tau this negative."""
        below = (self.null <= self.values).sum(0)
        return (1 + below) / (1 + len(self.null))

    @property
    def entropy(self) -> Float[Tensor, "layer head"]:
        """Mean entropy of the attention within the prefix, nats."""
        p = self.attention / self.attention.sum(-1, keepdim=True).clamp_min(1e-12)
        return finite_mean(-(p * p.clamp_min(1e-12).log()).sum(-1))

    def by_rank(
        self, head: Head | tuple[int, int], *, permutations: int = 200, seed: int = 0
    ) -> pd.DataFrame:
        """Attention of one head against the frequency rank of tokens (figure 7 of the paper).

        Within each paragraph the prefix tokens are ranked by count, 1 for the rarest, ties sharing
        a rank; attention is averaged per token, and only then over the paragraphs that have the
        rank. The band is where 95 % of such means lie when counts are permuted within paragraphs.
        Ranks that fewer than a quarter of the paragraphs have are left out.

        Args:
            head: layer and head.
            permutations: draws of the band.
            seed: of the draws.

        Returns:
            Columns `rank, n, attention, attention_se, null_low, null_high`.
        """
        import pandas as pd

        n_layers, n_heads = self.values.shape
        head = Head.of(head).within(n_layers, n_heads, "head")
        attention = self.attention[:, head.layer, head.head]
        ranks = torch.stack([row.unique(return_inverse=True)[1] for row in self.counts])
        member = torch.nn.functional.one_hot(ranks).float()  # [paragraph, pos, rank]
        size = member.sum(1)
        present = size > 0

        def per_rank(attention: Tensor) -> Tensor:
            return torch.einsum("pk,pkr->pr", attention, member) / size.clamp_min(1)

        def mean(values: Tensor) -> Tensor:
            return (values * present).sum(0) / present.sum(0).clamp_min(1)

        values = per_rank(attention)
        n = present.sum(0)
        spread = mean((values - mean(values)).square()) * n / (n - 1).clamp_min(1)
        generator = torch.Generator().manual_seed(seed)
        null = []
        for _ in range(permutations):
            order = torch.rand(attention.shape, generator=generator).argsort(-1)
            null.append(mean(per_rank(attention.gather(1, order))))
        low, high = interval(torch.stack(null))
        frame = pd.DataFrame(
            {
                "rank": range(1, len(n) + 1),
                "n": n.numpy(),
                "attention": mean(values).double().numpy(),
                "attention_se": (spread / n.clamp_min(1)).sqrt().double().numpy(),
                "null_low": low.double().numpy(),
                "null_high": high.double().numpy(),
            }
        )
        return frame[4 * frame["n"] >= len(attention)].reset_index(drop=True)

    def figure(self, head: Head | tuple[int, int] | None = None) -> Any:
        """Tau of every head; with `head` its attention by frequency rank (plotly, figure 7)."""
        from memcircuits.display import figures

        if head is not None:
            return figures.attention_by_rank(
                self.by_rank(head), title=f"{Head(*head)}: attention to rare and common tokens"
            )
        return figures.heatmap(
            self.values,
            title="Attention to common (+) or rare (\u2212) tokens, framed where p < 0.05",
            name="mean tau-b",
            diverging=True,
            marks=self.p_value < 0.05,
        )

    def to_frame(self) -> pd.DataFrame:
        """Columns `layer, head, value, p_value, entropy`."""
        frame = super().to_frame()
        frame["p_value"] = self.p_value.flatten().double().numpy()
        frame["entropy"] = self.entropy.flatten().double().numpy()
        return frame


def rare_token_attention(
    model: Any,
    paragraphs: Any,
    unigrams: UnigramTable | None = None,
    *,
    query: int | None = None,
    permutations: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> RareTokenAttention:
    """Correlate each head's attention to the prefix with the rarity of its tokens.

    Args:
        model: HookedTransformer or TransformerBridge.
        paragraphs: `Paragraphs`, a list of strings or a LongTensor of ids.
        unigrams: token counts; by default the paragraphs themselves are counted, and the result
            says so in `notes`.
        query: position attention is read from; by default the first continuation token.
        permutations: draws of the within-paragraph null.
        seed: of the permutations.
        progress: show a bar on stderr.

    Returns:
        Mean over paragraphs of Kendall's tau-b between attention and count (source: figure 7).

    Raises:
        InputError: for a query outside the paragraph or a table of another tokenizer.

    Example:
        >>> rare = mc.rare_token_attention(model, memorized, mc.UnigramTable.shipped())
        >>> rare.values.shape, rare.units
        (torch.Size([6, 8]), 'tau-b')
    """
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.ids, "paragraphs")
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
        attention = _attention_from(adapter, paragraphs.ids, query, n_keys, progress)
    notes += left_out(finite_rows(attention))
    tau, null = _tau_with_null(attention, counts, permutations, seed)
    return RareTokenAttention(
        name="rare-token attention (tau-b)",
        units="tau-b",
        values=tau.nanmean(0).nan_to_num(0.0),
        provenance=Provenance.of(
            adapter,
            {"paragraphs": paragraphs},
            query=query,
            permutations=permutations,
            seed=seed,
            unigrams=unigrams.source,
        ),
        samples={"tau": tau.nan_to_num(0.0)},
        notes=notes,
        null=null,
        attention=attention,
        counts=counts,
        query=query,
    )


def _attention_from(
    adapter: Adapter, ids: Int[Tensor, "batch pos"], query: int, n_keys: int, progress: bool
) -> Float[Tensor, "batch layer head key"]:
    """Attention rows of one query position; nothing behind it is run."""
    names = [hook_name("pattern", layer) for layer in range(adapter.n_layers)]
    parts = []
    with bar(len(ids), "attention", progress=progress) as shown:
        for start in range(0, len(ids), _GROUP):
            piece = ids[start : start + _GROUP, : query + 1]
            run = adapter.run(piece, positions=slice(-1, None), read=names)
            rows = [run.cache[name][:, :, query, :n_keys].float().cpu() for name in names]
            parts.append(torch.stack(rows, 1))
            shown.update(len(piece))
    return torch.cat(parts)


def kendall_tau_b(
    x: Float[Tensor, "*batch pos"], y: Float[Tensor, "*other pos"]
) -> Float[Tensor, "*batch *other"]:
    """Kendall's tau-b of every row of `x` with every row of `y`; NaN where one is constant."""
    a, b = _pair_signs(x), _pair_signs(y)
    agreement = a.reshape(-1, a.shape[-1]) @ b.reshape(-1, b.shape[-1]).T
    size = (a.abs().sum(-1).reshape(-1, 1) * b.abs().sum(-1).reshape(1, -1)).sqrt()
    return (agreement / size).reshape((*x.shape[:-1], *y.shape[:-1]))


def _pair_signs(x: Tensor) -> Float[Tensor, "*batch pair"]:
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], 1)
    return (x[..., i] > x[..., j]).float() - (x[..., i] < x[..., j]).float()


def _tau_with_null(
    attention: Float[Tensor, "batch layer head pos"],
    counts: Int[Tensor, "batch pos"],
    permutations: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Tau per paragraph, and the mean tau under counts permuted within each paragraph."""
    generator = torch.Generator().manual_seed(seed)
    n_rows, n_layers, n_heads, n_keys = attention.shape
    tau = torch.empty(n_rows, n_layers, n_heads)
    null = torch.zeros(permutations, n_layers, n_heads)
    counted = torch.zeros(n_layers, n_heads)  # tau is NaN where attention or counts are constant
    for row in range(n_rows):
        order = torch.rand(permutations, n_keys, generator=generator).argsort(-1)
        shuffled = torch.cat([counts[row][None], counts[row][order]]).float()
        found = kendall_tau_b(attention[row], shuffled)  # [layer, head, 1 + permutation]
        tau[row] = found[..., 0]
        null += found[..., 1:].nan_to_num(0.0).permute(2, 0, 1)
        counted += ~tau[row].isnan()
    return tau, null / counted.clamp_min(1)
