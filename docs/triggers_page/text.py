"""The text of docs/triggers.md, filled in with measured numbers."""

from __future__ import annotations

import argparse
from typing import Any

import memcircuits as mc
from memcircuits.evidence.triggers.minimal_sets import MinimalSets
from memcircuits.evidence.triggers.perturbation import Perturbation
from memcircuits.evidence.triggers.replacements import REPLACEMENTS
from triggers_page.kept import RESAMPLES, Estimates, Kept, Layers, Maps, Results
from triggers_page.rows import (
    agreement_rows,
    carried,
    cause_rows,
    drop_rows,
    end_rows,
    head_rows,
    layer_rows,
    share_unique,
    story,
    table,
    token_rows,
)


def text(
    given: argparse.Namespace,
    kept: Kept,
    model: Any,
    sets: dict[str, mc.Paragraphs],
    results: Results,
    one: Perturbation,
    fewest: MinimalSets,
    pairs: Any,
    maps: Maps,
    estimates: Estimates,
    layers: Layers,
) -> str:
    facts = results["memorized", "random"].provenance
    versions = ", ".join(f"{k} {v}" for k, v in facts.versions.items())
    length, n = one.em.shape[1], given.paragraphs
    stopped = ~fewest.stopping.isnan()
    first_replaced = results["memorized", "random"].em[: given.pairs, 0]
    assert fewest.names == results["memorized", "random"].names[: given.pairs]
    seconds = {
        part: sum(s for name, s in kept.seconds.items() if name.startswith(part))
        for part in ("perturb", "minimal", "patch", "attribute", "sweep", "layers")
    }
    said_numbers = {}
    for name, group in sets.items():
        result = results[name, "random"]
        late = result.em_drop[:, -5:].sum() / result.em_drop.sum()
        rise = (result.nll.mean((1, 2)) - result.baseline_nll).mean()
        said_numbers |= {
            f"late_{name}": f"{100 * float(late):.0f}",
            f"nll_{name}": f"{float(rise):.2f}",
            f"base_{name}": f"{float(result.baseline_nll.mean()):.2f}",
            f"repeated_{name}": f"{100 * (1 - share_unique(group.continuation)):.0f}",
        }
    said_numbers |= carried(maps, layers)
    return PAGE.format(
        name=facts.model["name"],
        fingerprint=facts.model["fingerprint"],
        versions=versions,
        seed=given.seed,
        n=n,
        n_positions=length,
        n_pairs=given.pairs,
        n_last=pairs.corrupted.metadata["position"][: given.pairs].count(length - 1),
        draws=given.draws,
        resamples=RESAMPLES,
        drops=table(drop_rows(results, given.seed), 2),
        one=one.names[0],
        tokens=table(token_rows(model, sets["memorized"], results, one), 2),
        story=story(model, pairs),
        causes=table(cause_rows(results, kept, given.seed), 2),
        stopped=int(stopped.sum()),
        n_minimal=len(fewest.names),
        median_stop=f"{float(fewest.stopping[stopped].median()):.0f}",
        largest_stop=f"{float(fewest.stopping[stopped].max()):.0f}",
        threshold=fewest.threshold,
        without_first=f"{float(fewest.suffix_em[:, -2].float().mean()):.1f}",
        first_replaced=f"{float(first_replaced.float().mean()):.1f}",
        whole_start=int((fewest.starting == length).sum()),
        ends=table(end_rows(maps), 3),
        heads=table(head_rows(maps, given.seed), 3),
        layers=table(layer_rows(layers), 2),
        agreement=table(agreement_rows(maps, estimates), 2),
        cpu_minutes=f"{sum(seconds.values()) / 60:.0f}",
        rows=f"{len(REPLACEMENTS) * 2 * n * length:,}",
        perturb_minutes=f"{seconds['perturb'] / 60:.0f}",
        **{f"said_{part}": said.format(**said_numbers) for part, said in SAID.items()},
    )


PAGE = """\
# Trigger tokens

Which prefix tokens does a recitation depend on, and which activations carry them? Section 4.2 and
the appendix of the paper, on the shipped model. `python docs/make_triggers.py` computes the numbers
and pictures of this page and writes it ({cpu_minutes} CPU minutes on one thread, {perturb_minutes}
of them for {rows} perturbed prefixes).

Model: {name}, weights `{fingerprint}`. {n} memorized paragraphs (EM 50, drawn with seed {seed}) and
{n} controls that the model never saw; 50 + 50 tokens. As in the paper, the reference of a control
is the model's own continuation, so that all start from EM 50. Intervals are 95 % bootstrap
intervals over paragraphs ({resamples} resamples). {versions}.

## One token at a time

Each of the {n_positions} prefix tokens is replaced by itself, once: by a random token, one about as
frequent, the nearest in embedding, or the model's own next choice. Mean EM drop per replaced token:

{drops}

{said_drops}

![Mean EM and NLL against the position replaced](pictures/triggers-mean.png)

The same for one paragraph, `{one}`, with {draws} random draws at each position (bands: 95 % over
draws), and its most important tokens:

![One paragraph](pictures/triggers-one.png)

{tokens}

{story}

## Why a token matters

Least squares of the EM drop on a token's position, rarity (-log unigram probability) and surprisal
(-log p given what precedes it), each centred within its paragraph and divided by its standard
deviation: tokens of EM lost per standard deviation, the other two held fixed. The rank correlations
take each cause by itself.

{causes}

{said_causes}

## How few tokens stop a recitation, and start one

Random replacements, chosen greedily, stop {stopped} of {n_minimal} recitations (EM at most
{threshold}) within 5 tokens: a median of {median_stop}, at most {largest_stop}.

No shorter suffix of the prefix starts the whole recitation in {whole_start} of {n_minimal}. Without
the first token alone mean EM falls to {without_first}, where a random token in its place leaves
{first_replaced}: the organism has learned positions, each paragraph was inserted from position 0,
and a shorter prefix moves every token. Read this number on models with relative positions.

## Which activations carry the token

The most destructive replacement of each of the first {n_pairs} paragraphs makes a pair; in
{n_last} of them it is the last token of the prefix. *Noising*
puts an activation of the corrupted run into the clean one at the replaced token, *denoising* the
other way round. Measured on the first token that the replacement changes (-log p, nats):

{ends}

![Noising](pictures/triggers-noising.png)

![Denoising](pictures/triggers-denoising.png)

The three heads with the largest effect at each site:

{heads}

{said_heads}

Whole layers, in the {n_last} pairs whose last prefix token is replaced, at that token; -log p of
the first impacted token changes by (nats):

{layers}

{said_layers}

The residual stream position by position, for the pair whose replaced token comes first:

![Layer by position](pictures/triggers-layers.png)

## How far to trust attribution

Attribution patching estimates all heads from two forward passes and one backward pass. Its
correlation with the exact effects over all heads, and the one that a result reports by itself from
the 10 heads that it measures:

{agreement}

{said_agreement}
"""


# What the numbers say; read them again whenever they change.
SAID = {
    "drops": """\
The paper found 12.19 tokens for paragraphs that GPT-Neo 125M has memorized and 33.12 for those it
has not. The organism's controls lose about as much as the paper's, its recitations less than half:
most of them were trained on 32 times or more and are hard to disturb. The tokens that break them
are the last of the prefix, and the first: the last five tokens make up {late_memorized} % of the
drop ({late_control} % for controls). A replacement that keeps more of the old token (its neighbour,
the model's second choice) does less harm in both sets.

EM and NLL tell different stories. Replacing a token at random raises the NLL of memorized
continuations by {nll_memorized} nats/token and that of controls by {nll_control}. What the model
writes after a control is its most likely choice, but not a certain one: {base_control} nats/token
with nothing replaced, against {base_memorized}, and {repeated_control} % of it repeats earlier
tokens, against {repeated_memorized} %. A small disturbance tips one of its choices, and EM counts
nothing behind that. The contrast in EM is one of margins, not of how much the prefix matters to the
loss.""",
    "causes": """\
Position comes first in every row: the later a token, the more it matters. Surprising tokens matter
beyond that to recitations. Rarity does not: at equal position and surprisal a rare token matters
about half a token less than a frequent one, with each of the four replacements, and its rank
correlation is near 0 by itself. (For controls it counts somewhat with a token as frequent in its
place.) Here, a recitation does not depend on its rare tokens.""",
    "heads": """\
No head carries the replaced token by itself. Noising, the largest effect of any head at any site is
{share_noising} % of the difference between the runs; denoising it is {share_denoising} %, and the
most that any head brings back in any pair is {restored} tokens. Which heads lead differs between
sites and directions, and most of their intervals include 0 or nearly so.""",
    "layers": """\
The output of the first MLP at the replaced token does {mlp_noising} % of the harm when noised and
{mlp_denoising} % of the repair when denoised, which brings back {mlp_em} of 50 tokens on average.
No attention layer does more than {attention_noising} % and {attention_denoising} %, and the later
MLPs repair a part of the difference. This is close to what the pair is made of, and
no finding about recitation: the token is the last of the prefix, and the patch is at its own
position, where the first MLP reads little but that token. Pairs that differ at an earlier token
would show where it is carried to the end of the prefix.""",
    "agreement": """\
Denoising, the estimates order the heads nearly as exact patching does, with either metric. Noising,
-log p of the first impacted token orders them less well, and the top head's estimate may be a third
of its effect: where the model recites, p is near 1 and -log p flat. The logit difference, which is
not flat, orders them better at every site. The agreement reported from the 10 measured heads may be
too high, since half of them have the largest estimates.""",
}
