"""How much of a recitation is memory? Bits per token, against a model that never saw the text.

A language model predicts a recited token well for three reasons: any text has it often, any model
trained on such texts knows it, or this model saw this text. A *twin*, a model that was trained in
the same way without the paragraph, tells the last two apart, and an n-gram model the first two. For
a vocabulary of V tokens and token x, each term in bits,

    log2 V      = guessable + known + remembered + unexplained
    guessable   = log2 p_ngram(x) + log2 V
    known       = log2 p_twin(x) - log2 p_ngram(x)
    remembered  = log2 p_model(x) - log2 p_twin(x)
    unexplained = -log2 p_model(x)

where every p is conditioned on the tokens before x, as far as its model reads them. `remembered` is
the counterfactual memorization of Zhang et al. (2021, arXiv 2112.12938), token by token and with
one model for each side. Every term may be negative: the twin may guess better than the n-gram model
knows. Sums and means are unbiased for that reason, and nothing is cut at zero.

The twin decides what `remembered` means. With a true twin it is what training on these paragraphs
wrote, up to what two trainings differ by chance (a twin of other order but the same paragraphs
shows how much that is). With a smaller model, an earlier checkpoint or a model of other data in its
place, it also holds whatever else the model knows and the reference does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.progress import bar
from memcircuits.base.statistics import (
    group_notes,
    left_out,
)
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.tokens import TokenizerLike, refuse_other_tokenizer
from memcircuits.data.unigrams import UnigramTable
from memcircuits.evidence.counterfactual_results import Counterfactual
from memcircuits.evidence.recitation_kinds import template_of
from memcircuits.measure.continuation import score_paragraphs
from memcircuits.models.adapter import Model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

if TYPE_CHECKING:
    pass

NGram: TypeAlias = (
    UnigramTable | Callable[[Int[Tensor, "paragraph pos"]], Float[Tensor, "paragraph pos"]]
)
"""Token counts, or a function from token ids to the log-probability (nats) of each token given
those before it, such as `memcircuits.organism_build.kneser_ney.KneserNey.log_prob`."""


@plain_torch()
def counterfactual(
    model: Model,
    twin: Model,
    paragraphs: ParagraphsLike,
    *,
    ngram: NGram | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Counterfactual:
    """Split every token of the continuations into what is guessable, known and remembered.

    Args:
        model: the model that may have memorized the paragraphs.
        twin: a model of the same tokenizer that was not trained on them; its size may differ.
        paragraphs: the paragraphs.
        ngram: token counts, or a function from ids [paragraph, pos] to the log p (nats) of each
            token given those before it; without one, nothing counts as guessable and `known` is all
            that the twin knows.
        memory_budget: maximum bytes per batch.
        progress: show a bar on stderr.

    Returns:
        A `Counterfactual`: bits per token, and of each memorized paragraph whether it is recited,
        reconstructed or recollected.

    Raises:
        InputError: for models of different tokenizers, unusable paragraphs, or an n-gram model of
            another tokenizer or of another shape.

    Example:
        >>> planted = mc.load_model("organism-planted", device="cpu")
        >>> result = mc.counterfactual(planted, model, control, progress=False)
        >>> result.remembered.shape  # [paragraph, pos]
        torch.Size([4, 50])
    """
    adapter, twin_adapter = adapt(model), adapt(twin)
    refuse_other_tokenizer("twin", adapter.model, twin_adapter.model)
    paragraphs = Paragraphs.of(paragraphs, adapter.model)
    adapter.check_tokens(paragraphs.inputs, "paragraphs")
    twin_adapter.check_tokens(paragraphs.inputs, "paragraphs")
    ngram_log_prob = _ngram_log_prob(ngram, adapter.model, paragraphs)
    with bar(2 * len(paragraphs), "counterfactual", progress=progress) as progress_bar:
        options: dict[str, Any] = {"memory_budget": memory_budget, "done": progress_bar.update}
        scores = score_paragraphs(adapter, paragraphs, **options)
        twin_scores = score_paragraphs(twin_adapter, paragraphs, **options)
    texts = [""] * len(paragraphs)
    if adapter.tokenizer is not None:
        texts = paragraphs.texts(adapter.model)
    templates = [
        template_of(ids, text) for ids, text in zip(paragraphs.ids.tolist(), texts, strict=True)
    ]
    twin_provenance = Provenance.of(twin_adapter, {}).model
    return Counterfactual(
        ids=paragraphs.ids,
        n_prefix=paragraphs.n_prefix,
        bos=paragraphs.bos,
        names=paragraphs.names,
        metadata=paragraphs.metadata,
        log_prob=scores.log_prob,
        twin_log_prob=twin_scores.log_prob,
        ngram_log_prob=ngram_log_prob,
        em=scores.em * scores.finite,
        twin_em=twin_scores.em * twin_scores.finite,
        d_vocab=adapter.d_vocab,
        templates=tuple(templates),
        provenance=Provenance.of(
            adapter,
            {"paragraphs": paragraphs},
            twin=dict(twin_provenance),
            ngram=_ngram_name(ngram),
        ),
        notes=(
            *left_out(scores.finite & twin_scores.finite),
            *group_notes({"given": paragraphs.groups}),
        ),
    )


def _ngram_name(ngram: NGram | None) -> str:
    if ngram is None:
        return "none"
    return ngram.source if isinstance(ngram, UnigramTable) else "a function"


def _ngram_log_prob(
    ngram: NGram | None, model: TokenizerLike, paragraphs: Paragraphs
) -> Float[Tensor, "paragraph pos"]:
    """Log p of every continuation token under the n-gram model, nats; uniform without one."""
    continuation = paragraphs.continuation
    if ngram is None:
        size = float(model.cfg.d_vocab)  # type: ignore[union-attr]
        return torch.full(continuation.shape, -math.log(size))
    if isinstance(ngram, UnigramTable):
        ngram.check(model)
        return ngram.log_prob[continuation]
    if not callable(ngram):
        raise InputError("ngram", repr(ngram), "give a UnigramTable or a function of token ids")
    log_prob = torch.as_tensor(ngram(paragraphs.ids)).float()
    if log_prob.shape != paragraphs.ids.shape or bool((log_prob > 0).any()):
        shape = tuple(log_prob.shape)
        raise InputError(
            "ngram", f"gave {shape}", f"it must give log p <= 0 of {tuple(paragraphs.ids.shape)}"
        )
    return log_prob[:, paragraphs.n_prefix :]
