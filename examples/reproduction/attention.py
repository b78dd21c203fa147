"""Attention to rare tokens: per rank, per token type, per paragraph, and one example."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import memcircuits as mc
from memcircuits.data.token_text import token_labels
from memcircuits.evidence.rare_tokens import RareTokenAttention
from reproduction.charts import Chart, bars, heatmap, lines
from reproduction.statistics import mean, top_head
from reproduction.study import Outcome, Study, experiment, is_papers, row

PAPERS_HEAD = mc.Head(1, 2)


@experiment("Attention to rare tokens", "figures 6 and 7")
def rare_tokens(study: Study) -> Outcome:
    result = study.rare
    best = top_head(-result.values)
    n, papers = len(result.attention), is_papers(study)
    rows = []
    for head in sorted({best} | ({PAPERS_HEAD} if papers else set())):
        ours, null = aggregated(result, head, study.seed)
        what = f"correlation of frequency rank and attention summed per rank, {head}"
        note = (
            f"as the paper aggregates; with counts permuted within paragraphs {null:.2f}: high "
            "ranks are often empty"
        )
        printed = "-0.97" if papers and head == PAPERS_HEAD else "-0.97 (L1H2)"
        rows.append(row(what, printed, ours, n, note=note))
    value = mean(result.samples["tau"][:, best.layer, best.head])
    what = f"attention and count within a paragraph, {best}, the most negative head"
    note = f"p = {float(result.p_value[best]):.2g} against counts permuted within paragraphs"
    rows.append(row(what, "", value, n, "tau-b", "; ".join((note, *result.notes))))
    note = f"mean over all heads {float(result.entropy.mean()):.2f}"
    what = f"entropy of the attention of {best} to the prefix"
    rows.append(row(what, "", float(result.entropy[best]), n, "nats", note))
    points = [
        {"rank": rank, "attention": float(value)}
        for rank, value in enumerate(attention_per_rank(result, best), 1)
    ]
    note = "The paper's: attention summed over paragraphs for each dense rank; 1 is the rarest."
    ours_note = "Ours: Kendall's tau-b within each paragraph, then the mean over paragraphs."
    charts = [
        lines(f"Attention of {best} by frequency rank", points, "rank", "attention", note=note),
        heatmap(
            "Attention to common (+) or rare (-) tokens",
            result.values,
            "tau-b",
            "",
            best,
            note=ours_note,
        ),
        heatmap("Entropy of the attention to the prefix", result.entropy, "entropy", "nats", best),
        example(study, best),
    ]
    return Outcome(rows, charts)


def example(study: Study, head: mc.Head) -> Chart:
    """One prefix, coloured by the attention that it gets from the first decoded token."""
    n = study.memorized.n_prefix
    labels = token_labels(study.memorized.ids[0, :n].tolist(), study.model)
    values = study.rare.attention[0, head.layer, head.head].tolist()
    title = f"Attention of {head} from the first decoded token: {study.memorized.names[0]}"
    settings = {"title": title, "tokens": labels, "values": values, "name": "attention"}
    return "Tokens", {**settings, "n_prefix": n}


@experiment("Attention by token type", "appendix")
def token_types(study: Study) -> Outcome:
    ids = (study.memorized + study.control).ids
    n_memorized, n_prefix = len(study.memorized), study.memorized.n_prefix
    corpora = {
        "all": ids,
        "memorized": ids[:n_memorized],
        "not memorized": ids[n_memorized:],
    }
    maps = {
        name: kendall_by_type(study.rare.attention, ids[:, :n_prefix], corpus)
        for name, corpus in corpora.items()
    }
    best = top_head(-maps["all"])
    note = "token types: attention summed over all paragraphs against occurrences in these"
    rows = [
        row(f"attention and frequency of token types of {name} paragraphs, {best}", "",
            float(values[best]), len(corpora[name]), "tau-b", note)
        for name, values in maps.items()
    ]  # fmt: skip
    layer = PAPERS_HEAD.layer if is_papers(study) else best.layer
    points = [
        {"head": head, "tau-b": float(value), "tokens of": name}
        for name, values in maps.items()
        for head, value in enumerate(values[layer])
    ]
    title = f"Attention and frequency by token type, heads of layer {layer}"
    told = "The paper's statistic, over all token types (its code leaves out half of them)."
    charts = [bars(title, points, "head", "tau-b", by="tokens of", note=told)]
    charts += [
        heatmap(f"Attention and frequency of token types, {name}", values, "tau-b", "")
        for name, values in maps.items()
    ]
    return Outcome(rows, charts)


def kendall_by_type(attention: Tensor, prefixes: Tensor, corpus: Tensor) -> Tensor:
    """Kendall's tau-b over token types, [layer, head].

    Args:
        attention: to the prefix tokens, [paragraph, layer, head, pos].
        prefixes: ids of these tokens, [paragraph, pos].
        corpus: ids whose occurrences are the frequencies, [paragraph, pos]; types that do not
            occur in it are left out.
    """
    from scipy.stats import kendalltau

    n_types = int(max(prefixes.max(), corpus.max())) + 1
    frequency = torch.bincount(corpus.flatten(), minlength=n_types)
    seen = torch.bincount(prefixes.flatten(), minlength=n_types) > 0
    types = ((frequency > 0) & seen).nonzero().flatten()
    values = torch.empty(attention.shape[1:3])
    for layer in range(values.shape[0]):
        for head in range(values.shape[1]):
            sums = torch.zeros(n_types, dtype=torch.float64).index_add_(
                0, prefixes.flatten(), attention[:, layer, head].flatten().double()
            )
            tau = kendalltau(frequency[types].numpy(), sums[types].numpy()).statistic
            values[layer, head] = float(tau)
    return values


def attention_per_rank(result: RareTokenAttention, head: mc.Head) -> Tensor:
    """The paper's aggregate: attention summed over all paragraphs for each dense rank."""
    ranks = torch.stack([row.unique(return_inverse=True)[1] for row in result.counts])
    attention = result.attention[:, head.layer, head.head]
    return _summed(attention, ranks)


def _summed(attention: Tensor, ranks: Tensor) -> Tensor:
    sums = torch.zeros(int(ranks.max()) + 1)
    return sums.scatter_add_(0, ranks.flatten(), attention.flatten())


def aggregated(result: RareTokenAttention, head: mc.Head, seed: int) -> tuple[float, float]:
    """Correlation of the paper's aggregate with the rank.

    Returns:
        Pearson's correlation, and its mean with counts permuted in each paragraph.
    """
    attention = result.attention[:, head.layer, head.head]
    ranks = torch.stack([row.unique(return_inverse=True)[1] for row in result.counts])

    def correlation(attention: Tensor) -> float:
        sums = _summed(attention, ranks)
        pair = torch.stack([torch.arange(len(sums), dtype=torch.float32), sums])
        return float(torch.corrcoef(pair)[0, 1])

    generator = torch.Generator().manual_seed(seed)
    orders = [torch.rand(attention.shape, generator=generator).argsort(-1) for _ in range(100)]
    null = [correlation(attention.gather(1, order)) for order in orders]
    return correlation(attention), math.fsum(null) / len(null)
