"""What a model that never saw a text would say of it: the target of deep unlearning.

The best reference is a twin, a model that was trained alike but not on the text. Where there is
none, a *proxy* stands in, the mean of two distributions of the model itself:

* behind the last few true tokens only, with another text in place of all tokens before them,
  averaged over several other texts. It knows what any short context tells, and lacks the long
  context that retrieves the text, but also what that context tells about any other token;
* behind the whole text, with the probability of the true token lowered to what the first one gives
  it. What a model that recites thinks of the other tokens is much like what a twin thinks of them.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.editing.unlearning_objective import ReferenceDistribution
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import map_batches, rows_that_fit

N_TRUE = 3  # true tokens of the short context; from 4 it begins to retrieve the text
DRAWS = 8  # other texts that the short context is averaged over
_LEAST = 1e-6  # probability that is left to the other tokens


def proxy_log_probs(
    adapter: Adapter,
    paragraphs: Paragraphs,
    fillers: Paragraphs,
    generator: torch.Generator,
    memory_budget: int | None = None,
) -> Float[Tensor, "paragraph pos d_vocab"]:
    """Log-probabilities (nats) of every token by the stand-in for a twin; see the module's text.

    Args:
        adapter: the model, unedited.
        paragraphs: the texts.
        fillers: texts that stand in place of the tokens before, at the same positions.
        generator: of the choice of fillers.
        memory_budget: maximum bytes per batch.
    """
    short = _behind_short_context(adapter, paragraphs, fillers, generator, memory_budget)
    whole = ReferenceDistribution.of(adapter, paragraphs, memory_budget).log_p.cpu()
    lowered = _with_probability_of(whole, short, paragraphs.continuation)
    return torch.logaddexp(short, lowered) - math.log(2)


def _with_probability_of(
    log_p: Float[Tensor, "paragraph pos d_vocab"],
    other: Float[Tensor, "paragraph pos d_vocab"],
    tokens: Int[Tensor, "paragraph pos"],
) -> Float[Tensor, "paragraph pos d_vocab"]:
    """A distribution in which these tokens are as likely as in `other`, the rest in proportion."""
    index = tokens[..., None]
    new, old = (
        values.gather(-1, index).clamp_max(math.log1p(-_LEAST)) for values in (other, log_p)
    )
    scaled = log_p + torch.log1p(-new.exp()) - torch.log1p(-old.exp())
    return scaled.scatter(-1, index, new).log_softmax(-1)


def _behind_short_context(
    adapter: Adapter,
    paragraphs: Paragraphs,
    fillers: Paragraphs,
    generator: torch.Generator,
    memory_budget: int | None,
) -> Float[Tensor, "paragraph pos d_vocab"]:
    """Log-probabilities behind the last `N_TRUE` true tokens, averaged over other texts before."""
    n_rows = len(paragraphs)
    n_draws = min(DRAWS, len(fillers))
    columns = []
    for position in range(paragraphs.n_prefix, paragraphs.ids.shape[1]):
        n_true = min(N_TRUE, position)
        chosen = torch.randperm(len(fillers), generator=generator)[:n_draws]
        filler = fillers.ids[chosen][:, torch.arange(position) % fillers.ids.shape[1]]
        rows = filler.repeat(n_rows, 1)
        true = paragraphs.ids[:, position - n_true : position].repeat_interleave(n_draws, 0)
        rows[:, position - n_true :] = true
        front = torch.tensor(paragraphs.bos, dtype=rows.dtype).expand(len(rows), -1)
        log_p = _next_token(adapter, torch.cat([front, rows], 1), memory_budget)
        columns.append(log_p.view(n_rows, n_draws, -1).logsumexp(1) - math.log(n_draws))
    return torch.stack(columns, 1)


def _next_token(
    adapter: Adapter, inputs: Int[Tensor, "row pos"], memory_budget: int | None
) -> Float[Tensor, "row d_vocab"]:
    """Log-probabilities of the token after each row."""
    last = slice(inputs.shape[1] - 1, None)

    def work(batch: slice) -> Tensor:
        logits = adapter.run(inputs[batch], positions=last).logits[:, -1]
        return logits.float().log_softmax(-1).cpu()

    size = rows_that_fit(adapter, inputs.shape[1], 1, memory_budget)
    with adapter.preserving_state():
        return map_batches(len(inputs), size, work)
