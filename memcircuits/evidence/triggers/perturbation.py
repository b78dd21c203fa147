"""Which prefix tokens trigger the recitation? Replace each one and measure what is still recited.

Section 4.2 and figure 3 of the paper: every prefix position in turn gets another token, and the
continuation is decoded greedily. Up to its first mismatch, greedy decoding sees the same tokens as
teacher forcing. EM and NLL of each replacement are therefore read from one teacher-forced forward
pass, and nothing is decoded: one pass instead of one per new token
(`memcircuits.evidence.triggers.scoring`).

New text is decoded only for the pairs of clean and corrupted paragraphs (`Perturbation.pairs`),
which activation patching compares. `Perturbation.causes` asks *why* some tokens matter: position,
rarity and surprisal are entangled, and a regression separates them
(`memcircuits.evidence.triggers.regression`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from memcircuits.base.errors import InputError
from memcircuits.base.progress import bar
from memcircuits.base.statistics import (
    DRAWS,
    bootstrap_interval,
    finite_rows,
    group_means,
    group_notes,
    left_out,
)
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.unigrams import UnigramTable
from memcircuits.evidence.triggers.pairs import CleanCorrupted, most_destructive_pairs
from memcircuits.evidence.triggers.regression import (
    Interval,
    Samples,
    causes_of_em_drop,
    mean_with_interval,
)
from memcircuits.evidence.triggers.replacements import Replacement, choose_tokens
from memcircuits.evidence.triggers.scoring import score_replacements
from memcircuits.measure.continuation import Continuation, score_paragraphs
from memcircuits.measure.scanning import has_finite_scores
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.batching import rows_that_fit
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance
from memcircuits.results.result import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Perturbation(Result, kind="perturbation"):
    """What is still recited when one prefix token is replaced.

    Attributes:
        em: tokens still recited, [paragraph, pos, draw].
        nll: of the original continuation, nats/token, [paragraph, pos, draw].
        replacements: the token ids put in, [paragraph, pos, draw].
        baseline_em: EM with nothing replaced, [paragraph].
        baseline_nll: NLL with nothing replaced, nats/token, [paragraph].
        surprisal: -log p of every prefix token given the tokens before it, nats, [paragraph, pos];
            NaN for the first one if nothing precedes it.
        ids: the paragraphs, [paragraph, pos].
        n_prefix: tokens of the prefix.
        names: one per paragraph.
        replacement: how tokens were chosen.
        provenance: where the numbers come from.
        notes: what the reader must know.
        bos: ids of the tokens in front of every paragraph, which were never replaced.
        groups: number of each paragraph's independent group, [paragraph]; None: each is its own.
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
    bos: tuple[int, ...] = ()
    groups: Int[Tensor, " paragraph"] | None = None
    model: Model | None = field(default=None, repr=False, compare=False, metadata={"saved": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.em.shape != self.nll.shape or self.em.shape != self.replacements.shape:
            raise InputError("em", tuple(self.em.shape), "em, nll, replacements must agree")

    @property
    def paragraphs(self) -> Paragraphs:
        """The paragraphs perturbed."""
        return Paragraphs(self.ids, self.n_prefix, self.names, bos=self.bos)

    @property
    def em_drop(self) -> Float[Tensor, "paragraph pos"]:
        """EM lost by replacing each token: baseline minus mean over draws, tokens."""
        return self.baseline_em[:, None] - self.em.float().mean(-1)

    def mean_em_drop(self, *, resamples: int = DRAWS, seed: int = 0) -> Interval:
        """Mean EM drop per replaced token, with its 95 % interval over groups, tokens.

        The paper finds 12.19 for memorized paragraphs and 33.12 for others (figure 3).
        """
        return mean_with_interval(self.em_drop.mean(-1), self.groups, resamples, seed)

    def pairs(self, *, model: Model | None = None) -> CleanCorrupted:
        """The most destructive replacement of each paragraph, with the model's new continuation.

        Most destructive: lowest EM, among equals highest NLL. Paragraphs whose continuation no
        single replacement changes are left out of both sides.

        Args:
            model: needed by a loaded result, which has none.

        Raises:
            InputError: without a model, or if no paragraph remains.
        """
        model = self.model if model is None else model
        if model is None:
            raise InputError("model", "None", "a loaded result has no model: pass model=")
        return most_destructive_pairs(model, self.paragraphs, self.replacements, self.em, self.nll)

    def causes(
        self, unigrams: UnigramTable, *, resamples: int = DRAWS, seed: int = 0
    ) -> pd.DataFrame:
        """Effects of a token's position, rarity and surprisal on its EM drop, others held fixed.

        Least squares of the EM drop on a token's position, its rarity (-log unigram probability)
        and its surprisal, over all prefix tokens but the first. Every column is centred within its
        paragraph, so that the effect of an easily disturbed paragraph is not taken for that of its
        tokens, and divided by its standard deviation. The rank correlations are computed within
        each paragraph, for each cause by itself, and averaged.

        Args:
            unigrams: token counts of the training corpus or of similar text.
            resamples: bootstrap resamples of the groups of paragraphs.
            seed: of the bootstrap.

        Returns:
            Columns `cause, coefficient, ci_low, ci_high` (tokens of EM per standard deviation),
            `spearman, spearman_low, spearman_high, kendall`.

        Raises:
            InputError: if the prefix is shorter than three tokens, or the table is of another
                tokenizer.
        """
        if self.n_prefix < 3:
            raise InputError("n_prefix", self.n_prefix, "the regression needs at least 3 tokens")
        if self.model is not None:
            unigrams.check(adapt(self.model).model)
        elif len(unigrams.counts) <= int(self.ids.max()):
            raise InputError(
                "unigrams", f"{len(unigrams.counts)} tokens", "count with the model's tokenizer"
            )
        prefix = self.ids[:, : self.n_prefix]
        samples = Samples(self.em_drop, prefix, self.surprisal, self.groups)
        return causes_of_em_drop(samples, unigrams, resamples, seed)

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
            "drop": self.em_drop.flatten().double().numpy(),
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
                all, with intervals over independent groups of paragraphs.

        Returns:
            Columns `position, em, em_low, em_high, nll, nll_low, nll_high`.
        """
        import pandas as pd

        data: dict[str, Any] = {"position": range(self.em.shape[1])}
        for name, values in {"em": self.em.float(), "nll": self.nll.float()}.items():
            if paragraph is None:
                samples = group_means(values.mean(-1), self.groups)
            else:
                samples = values[paragraph].T
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
        mean = float(group_means(self.em_drop, self.groups).mean())
        return (
            f"{self.replacement} replacement of {length} prefix tokens in {n} paragraphs, "
            f"{draws} draws: mean EM drop {mean:.2f} tokens"
        )


@plain_torch()
def perturb_prefix(
    model: Model,
    paragraphs: ParagraphsLike,
    *,
    replacement: Replacement = "random",
    draws: int = 1,
    unigrams: UnigramTable | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Perturbation:
    """Replace every prefix token, one at a time, and measure what is still recited.

    EM counts against the given continuation. For paragraphs that are not memorized the paper
    measures against the model's own continuation: pass `greedy_continuations(model, controls)`.

    Args:
        model: the model.
        paragraphs: the paragraphs.
        replacement: `random` (any token of the vocabulary), `frequency` (a token about as frequent
            in the corpus), `neighbor` (nearest in the cosine of embeddings) or `second` (the
            model's most likely other token there; the first position, which nothing precedes, is
            replaced at random).
        draws: replacements per position; `neighbor` and `second` take the best `draws` of them.
        unigrams: token counts for `frequency`; by default the paragraphs are counted, and the
            result's `notes` say so.
        seed: of the random draws.
        memory_budget: maximum bytes per batch; by default a third of the free memory.
        progress: show a bar on stderr.

    Returns:
        A `Perturbation` of the paragraphs whose numbers are all finite.

    Raises:
        InputError: for a wrong replacement, unusable paragraphs, a table of another tokenizer, or
            non-finite logits.

    Example:
        >>> perturbation = mc.perturb_prefix(model, memorized[:1], replacement="second")
        >>> perturbation.em.shape  # paragraph, position, draw
        torch.Size([1, 50, 1])
        >>> clean, corrupted = perturbation.pairs()
        >>> int((clean.prefix != corrupted.prefix).sum())
        1
    """
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.inputs, "paragraphs")
    if unigrams is not None:
        UnigramTable.check(unigrams, adapter.model)
    with adapter.preserving_state():
        # Paragraphs that the model cannot score are left out before anything is replaced.
        finite = has_finite_scores(adapter, paragraphs, "paragraphs", memory_budget)
        paragraphs, notes = paragraphs[finite], left_out(finite)
        tokens, replacement_notes = choose_tokens(
            adapter, paragraphs, replacement, draws, unigrams, seed, memory_budget
        )
        unperturbed = _score_all_tokens(adapter, paragraphs, memory_budget)
        with bar(tokens.numel(), "perturb", progress=progress) as progress_bar:
            em, nll = score_replacements(
                adapter, paragraphs, tokens, memory_budget, progress_bar.update
            )
    # A replacement may be a token whose embedding is damaged: leave such paragraphs out too.
    finite = finite_rows(nll)
    if not finite.any():
        raise InputError("model", "non-finite logits when tokens are replaced", "use float32")
    notes = (*replacement_notes, *notes, *left_out(finite))
    kept = paragraphs[finite]
    log_prob, correct = unperturbed.log_prob[finite], unperturbed.correct[finite]
    # If nothing precedes the first token, nothing predicts it: columns start at the second.
    n_unpredicted = 0 if kept.bos else 1
    first = kept.n_prefix - n_unpredicted
    return Perturbation(
        em=em[finite],
        nll=nll[finite],
        replacements=tokens[finite],
        baseline_em=correct[:, first:].long().cumprod(-1).sum(-1),
        baseline_nll=-log_prob[:, first:].mean(-1),
        surprisal=pad(-log_prob[:, :first], (n_unpredicted, 0), value=torch.nan),
        ids=kept.ids,
        n_prefix=kept.n_prefix,
        names=kept.names,
        bos=kept.bos,
        replacement=replacement,
        provenance=Provenance.of(
            adapter,
            {"paragraphs": kept},
            replacement=replacement,
            draws=draws,
            seed=seed,
            unigrams=None if unigrams is None else unigrams.source,
        ),
        notes=(*notes, *group_notes({"given": kept.groups})),
        groups=kept.groups,
        model=model,
    )


def _score_all_tokens(
    adapter: Adapter, paragraphs: Paragraphs, memory_budget: int | None
) -> Continuation:
    """Scores of every token that a token precedes, given all tokens before it."""
    inputs = paragraphs.inputs
    size = rows_that_fit(adapter, inputs.shape[1], inputs.shape[1], memory_budget)
    all_tokens = Paragraphs(inputs, n_prefix=max(1, paragraphs.n_bos))
    scores = score_paragraphs(adapter, all_tokens, batch_size=size)
    if not scores.log_prob.isfinite().all():
        raise InputError("model", "non-finite logits", "load it in float32 and check its weights")
    return scores
