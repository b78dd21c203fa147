"""Which prefix token triggers the recitation? Replace one at a time and see how much is left.

Section 4.2 and figure 3 of the paper: every prefix position in turn gets another token and the
continuation is decoded greedily. Until its first mismatch, greedy decoding sees the same tokens as
teacher forcing, so EM and NLL of each replacement are read off one teacher-forced forward pass and
nothing is decoded: one pass instead of one per new token. All (paragraph, position, draw) triples
are rows of one long batch, unembedded only where they predict the continuation.

Positions before the replaced one keep their activations in every layer. Where transformers can
keep the model's keys and values, those of the prefix are computed once per paragraph, and every row
is run from its replaced token on.

New text is decoded only for the pairs (`Perturbation.pairs`), by `greedy_continuations`: guess the
whole continuation, let the model predict every token of the guess at once, take that as the next
guess. Each round makes at least one more token right, and a guess that predicts itself is the
greedy continuation, under the same arithmetic that EM is read from. Where keys and values are kept,
the first guess is decoded token by token, and one round confirms it.

`Perturbation.causes` asks *why* some tokens matter: position, rarity and surprisal are entangled.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.core.errors import InputError
from memcircuits.core.progress import bar
from memcircuits.core.statistics import DRAWS, bootstrap_interval, finite_rows, interval, left_out
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.unigrams import UnigramTable
from memcircuits.evidence.triggers.regression import (
    Interval,
    least_squares,
    mean_with_interval,
    rank_correlations,
)
from memcircuits.evidence.triggers.replacements import (
    choose_tokens,
    measure_replaced,
    most_destructive,
)
from memcircuits.measure.continuation import read_continuation
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.measure.scanning import has_finite_scores
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import map_batches, rows_that_fit
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd


class Pairs(NamedTuple):
    """Paragraphs and their perturbed twins, row by row.

    Attributes:
        clean: the paragraphs as they are.
        corrupted: the same with one prefix token replaced, and what the model then writes. Facts:
            `position` of that token, `replacement` (its new id), `em` (tokens of the clean
            continuation still recited) and `first_impacted` (index of the first continuation token
            that differs).
    """

    clean: Paragraphs
    corrupted: Paragraphs


@dataclass(frozen=True)
class Perturbation(Result, kind="perturbation"):
    """What is left of the recitation when one prefix token is replaced.

    Attributes:
        em: tokens still recited, [paragraph, pos, draw].
        nll: of the original continuation, nats/token, [paragraph, pos, draw].
        replacements: the token ids put in, [paragraph, pos, draw].
        baseline_em: EM with nothing replaced, [paragraph].
        baseline_nll: NLL with nothing replaced, nats/token, [paragraph].
        surprisal: -log p of every prefix token given those before it, nats, [paragraph, pos]; NaN
            for the first one, which nothing precedes.
        ids: the paragraphs, [paragraph, pos].
        n_prefix: tokens of the prefix.
        names: one per paragraph.
        replacement: how tokens were chosen.
        provenance: where the numbers come from.
        notes: what the reader must know.
        model: the model, kept for `pairs`; not saved.
    """

    em: Int[Tensor, "paragraph pos draw"]
    nll: Float[Tensor, "paragraph pos draw"]
    replacements: Int[Tensor, "paragraph pos draw"]
    baseline_em: Int[Tensor, " paragraph"]
    baseline_nll: Float[Tensor, " paragraph"]
    surprisal: Float[Tensor, "paragraph pos"]
    ids: Tensor
    n_prefix: int
    names: tuple[str, ...]
    replacement: str
    provenance: Provenance
    notes: tuple[str, ...] = ()
    model: Any = field(default=None, repr=False, compare=False, metadata={"saved": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.em.shape != self.nll.shape or self.em.shape != self.replacements.shape:
            raise InputError("em", tuple(self.em.shape), "em, nll, replacements must agree")

    @property
    def paragraphs(self) -> Paragraphs:
        """The paragraphs perturbed."""
        return Paragraphs(self.ids, self.n_prefix, self.names)

    @property
    def drops(self) -> Float[Tensor, "paragraph pos"]:
        """EM lost by replacing each token, mean over draws, tokens."""
        return self.baseline_em[:, None] - self.em.float().mean(-1)

    def drop(self, *, resamples: int = DRAWS, seed: int = 0) -> Interval:
        """Mean EM drop per replaced token, tokens (figure 3: 12.19 memorized, 33.12 not)."""
        return mean_with_interval(self.drops.mean(-1), resamples, seed)

    def pairs(self, *, model: Any = None) -> Pairs:
        """The most destructive replacement of each paragraph, with the model's new continuation.

        Most destructive: lowest EM, among equals highest NLL. Paragraphs whose continuation no
        single replacement changes are left out of both sides.

        Args:
            model: needed by a loaded result, which has none.

        Raises:
            InputError: without a model, or if no paragraph is left.
        """
        model = self.model if model is None else model
        if model is None:
            raise InputError("model", "None", "a loaded result has no model: pass model=")
        worst = most_destructive(self.em, self.nll)
        position, draw = worst // self.em.shape[2], worst % self.em.shape[2]
        rows = torch.arange(len(self.ids))
        ids = self.ids.clone()
        ids[rows, position] = self.replacements[rows, position, draw]
        new = greedy_continuations(model, Paragraphs(ids, self.n_prefix, self.names))
        different = new.continuation != self.ids[:, self.n_prefix :]
        metadata = {
            "position": position,
            "replacement": ids[rows, position],
            "em": self.em[rows, position, draw],
            "first_impacted": different.long().argmax(-1),
        }
        kept = different.any(-1)
        if not kept.any():
            raise InputError(
                "paragraphs",
                "no single replacement changes a continuation",
                "use more draws or another replacement",
            )
        columns = {name: tuple(values.tolist()) for name, values in metadata.items()}
        return Pairs(self.paragraphs[kept], dataclasses.replace(new, metadata=columns)[kept])

    def causes(
        self, unigrams: UnigramTable, *, resamples: int = DRAWS, seed: int = 0
    ) -> pd.DataFrame:
        """Do late, rare or surprising tokens matter? Each with the others held fixed.

        Least squares of the EM drop on a token's position, its rarity (-log unigram probability)
        and its surprisal, over all prefix tokens but the first. Every column is centred within its
        paragraph, so that a fragile paragraph does not pose as a rare token, and divided by its
        standard deviation. The rank correlations are taken within each paragraph, each cause by
        itself, and averaged.

        Args:
            unigrams: token counts of the training corpus or of text like it.
            resamples: bootstrap resamples of the paragraphs.
            seed: of the bootstrap.

        Returns:
            Columns `cause, coefficient, ci_low, ci_high` (tokens of EM per standard deviation),
            `spearman, spearman_low, spearman_high, kendall`.

        Raises:
            InputError: if the prefix is shorter than three tokens or the table is another
                tokenizer's.
        """
        import pandas as pd

        if self.n_prefix < 3:
            raise InputError("n_prefix", self.n_prefix, "the regression needs at least 3 tokens")
        if self.model is not None:
            unigrams.check(adapt(self.model).model)
        elif len(unigrams.counts) <= int(self.ids.max()):
            raise InputError(
                "unigrams", f"{len(unigrams.counts)} tokens", "count with the model's tokenizer"
            )
        n, length = self.surprisal.shape
        causes = {
            "position": torch.arange(length, dtype=torch.float32).expand(n, length),
            "rarity": -unigrams.log_prob[self.ids[:, : self.n_prefix]],
            "surprisal": self.surprisal,
        }
        x = torch.stack([cause[:, 1:] for cause in causes.values()], -1).double()
        y = self.drops[:, 1:].double()
        effects, resampled = least_squares(x, y, resamples, seed)
        low, high = interval(resampled)
        rows = []
        for i, name in enumerate(causes):
            ranks = rank_correlations(x[..., i], y)
            correlation = mean_with_interval(ranks[:, 0].nan_to_num(0.0).float(), resamples, seed)
            rows.append(
                {
                    "cause": name,
                    "coefficient": float(effects[i]),
                    "ci_low": float(low[i]),
                    "ci_high": float(high[i]),
                    "spearman": correlation.mean,
                    "spearman_low": correlation.low,
                    "spearman_high": correlation.high,
                    "kendall": float(ranks[:, 1].nan_to_num(0.0).mean()),
                }
            )
        return pd.DataFrame(rows)

    def to_frame(self) -> pd.DataFrame:
        """One row per paragraph and position, mean over draws.

        Columns `id, position, token, drop, em, em_se, nll, nll_se, surprisal`; standard errors over
        draws are NaN where there is one.
        """
        import pandas as pd

        n, length, draws = self.em.shape
        data: dict[str, Any] = {
            "id": [name for name in self.names for _ in range(length)],
            "position": list(range(length)) * n,
            "token": self.ids[:, :length].flatten().numpy(),
            "drop": self.drops.flatten().double().numpy(),
        }
        for name, values in {"em": self.em.double(), "nll": self.nll.double()}.items():
            data[name] = values.mean(-1).flatten().numpy()
            spread = values.std(-1) if draws > 1 else torch.full((n, length), torch.nan)
            data[f"{name}_se"] = (spread / draws**0.5).flatten().numpy()
        data["surprisal"] = self.surprisal.flatten().double().numpy()
        return pd.DataFrame(data)

    def curves(self, paragraph: int | None = None) -> pd.DataFrame:
        """EM and NLL against the position replaced, with 95 % intervals.

        Args:
            paragraph: index of one paragraph, with intervals over draws; by default the mean over
                all, with intervals over paragraphs.

        Returns:
            Columns `position, em, em_low, em_high, nll, nll_low, nll_high`.
        """
        import pandas as pd

        data: dict[str, Any] = {"position": range(self.em.shape[1])}
        for name, values in {"em": self.em.float(), "nll": self.nll.float()}.items():
            samples = values.mean(-1) if paragraph is None else values[paragraph].T
            low, high = bootstrap_interval(samples)
            data[name] = samples.mean(0).numpy()
            if len(samples) > 1:
                data[f"{name}_low"], data[f"{name}_high"] = low.numpy(), high.numpy()
        return pd.DataFrame(data)

    def figure(self, paragraph: int | None = None) -> Any:
        """Figure 3 of the paper (plotly): of one paragraph, or the mean over all."""
        from memcircuits.display import figures

        title = f"{self.replacement} replacement" + (
            "" if paragraph is None else f": {self.names[paragraph]}"
        )
        return figures.perturbation_curves(self.curves(paragraph), title=title)

    def __str__(self) -> str:
        n, length, draws = self.em.shape
        mean = float(self.drops.mean())
        return (
            f"{self.replacement} replacement of {length} prefix tokens in {n} paragraphs, "
            f"{draws} draws: mean EM drop {mean:.2f} tokens"
        )


def perturb_prefix(
    model: Any,
    paragraphs: Any,
    *,
    replacement: str = "random",
    draws: int = 1,
    unigrams: UnigramTable | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Perturbation:
    """Replace every prefix token, one at a time, and measure what is still recited.

    EM counts against the given continuation. For paragraphs that are not memorized the paper
    measures against what the model writes by itself: pass `greedy_continuations(model, controls)`.

    Args:
        model: HookedTransformer or TransformerBridge.
        paragraphs: `Paragraphs`, a list of strings or a LongTensor of ids.
        replacement: `random` (any token of the vocabulary), `frequency` (a token about as frequent
            in the corpus), `neighbor` (nearest in the cosine of embeddings) or `second` (the
            model's most likely other token there; the first position, which nothing precedes, is
            replaced at random).
        draws: replacements per position; `neighbor` and `second` take the best `draws` of them.
        unigrams: token counts for `frequency`; by default the paragraphs are counted, and the
            result says so in `notes`.
        seed: of the random draws.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        A `Perturbation`.

    Raises:
        InputError: for a wrong replacement, unusable paragraphs, a table of another tokenizer, or
            non-finite logits.

    Example:
        >>> found = mc.perturb_prefix(model, memorized[:1], replacement="second")
        >>> found.em.shape  # paragraph, position, draw
        torch.Size([1, 50, 1])
        >>> clean, corrupted = found.pairs()
        >>> int((clean.prefix != corrupted.prefix).sum())
        1
    """
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.ids, "paragraphs")
    if unigrams is not None:
        UnigramTable.check(unigrams, adapter.model)
    with adapter.preserving_state():
        finite = has_finite_scores(adapter, paragraphs, "paragraphs", memory_budget)
        paragraphs, of_those = paragraphs[finite], left_out(finite)
        tokens, notes = choose_tokens(
            adapter, paragraphs, replacement, draws, unigrams, seed, memory_budget
        )
        log_prob, correct = _unperturbed(adapter, paragraphs, memory_budget)
        with bar(tokens.numel(), "perturb", progress=progress) as shown:
            em, nll = measure_replaced(
                adapter, paragraphs.ids, paragraphs.n_prefix, tokens, memory_budget, shown.update
            )
    finite = finite_rows(nll)  # a token put in may be one that the model cannot take
    if not finite.any():
        raise InputError("model", "non-finite logits when tokens are replaced", "use float32")
    if not finite.all():
        of_those = (*of_those, *left_out(finite))
        paragraphs, em, nll, tokens = (x[finite] for x in (paragraphs, em, nll, tokens))
        log_prob, correct = log_prob[finite], correct[finite]
    n_prefix = paragraphs.n_prefix
    surprisal = torch.full((len(paragraphs), n_prefix), torch.nan)
    surprisal[:, 1:] = -log_prob[:, : n_prefix - 1]
    return Perturbation(
        em=em,
        nll=nll,
        replacements=tokens,
        baseline_em=correct[:, n_prefix - 1 :].long().cumprod(-1).sum(-1),
        baseline_nll=-log_prob[:, n_prefix - 1 :].mean(-1),
        surprisal=surprisal,
        ids=paragraphs.ids,
        n_prefix=n_prefix,
        names=paragraphs.names,
        replacement=replacement,
        provenance=Provenance.of(
            adapter,
            {"paragraphs": paragraphs},
            replacement=replacement,
            draws=draws,
            seed=seed,
            unigrams=None if unigrams is None else unigrams.source,
        ),
        notes=(*notes, *of_those),
        model=model,
    )


def _unperturbed(
    adapter: Adapter, paragraphs: Paragraphs, memory_budget: int | None
) -> tuple[Float[Tensor, "paragraph pos"], Tensor]:
    """Log-probability of every token but the first, and whether it is the greedy choice."""
    ids = paragraphs.ids

    def one_batch(piece: slice) -> Tensor:
        logits = adapter.run(ids[piece, :-1]).logits
        found = read_continuation(logits, ids[piece, 1:].to(adapter.device))
        return torch.stack([found.log_prob, found.correct.float()], 1).cpu()

    size = rows_that_fit(adapter, ids.shape[1], ids.shape[1], memory_budget)
    log_prob, correct = map_batches(len(ids), size, one_batch).unbind(1)
    if not log_prob.isfinite().all():
        raise InputError("model", "non-finite logits", "load it in float32 and check its weights")
    return log_prob, correct > 0.5
