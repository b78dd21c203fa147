"""`info --plan`: what would the analyses of a model cost? Their pieces are timed, and multiplied.

An analysis does the same to each paragraph: passes through the whole model, passes that start in
the middle (`memcircuits.evidence.interventions`), backward passes. Which tokens and weights they
compute with does not change their cost. So each piece is timed on a few random rows, and an
analysis costs as many pieces as it has. The seconds of an edit grow linearly from the last layer to
the first one, so the mean of these two is that of all layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from memcircuits.base.components import Component
from memcircuits.base.errors import InputError
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.unigrams import UnigramTable
from memcircuits.editing.deep_objective import ROWS as ENTRIES
from memcircuits.editing.find_edit import MAX_CONTROL
from memcircuits.editing.masks import Candidates
from memcircuits.editing.recipe import DEEP
from memcircuits.editing.references import DRAWS
from memcircuits.editing.whitening import WhitenedSteps
from memcircuits.evidence.ablation import MAX_PARAGRAPHS as CLEAN_ROWS
from memcircuits.evidence.ablation import Ablation, Part
from memcircuits.evidence.gradients.parameters import parameter_gradients
from memcircuits.evidence.groups import MIN_CONTROLS
from memcircuits.evidence.rare_tokens import rare_token_attention
from memcircuits.evidence.screening import PILOT, SIZES, attributions
from memcircuits.evidence.triggers.perturbation import perturb_prefix
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.measure.gradients import mean_gradient
from memcircuits.measure.scanning import scan
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import default_budget

if TYPE_CHECKING:
    import pandas as pd

_ROWS = 8  # that most pieces are timed on
_SCANNED = 32  # rows of the scan, which has larger batches
_HEADS = 4  # of a layer
_FULL_WIDTH = 1024  # of the matrix whose eigendecomposition is timed; others cost as the cube


@dataclass(frozen=True)
class Pieces:
    """Seconds of the pieces of all analyses.

    Attributes:
        forward: one forward pass of one paragraph, with its NLL and EM.
        decode: greedy decoding of one continuation.
        head: one head edited in one paragraph, mean over layers.
        mlp: one MLP edited in one paragraph, mean over layers.
        joint: all heads edited at once in one paragraph.
        gradient: the gradient of one of many paragraphs, pooled for every component.
        slope: first-order effects of all heads on one paragraph.
        attention: attention of all heads to rare tokens in one paragraph.
        replacement: one prefix token replaced in one paragraph.
        batch: forward and backward pass of a batch of texts to keep.
        entry: forward and backward pass of two entries to forget.
        step: one step of Adam in whitened coordinates, on all weights.
        roots: the inverse roots of all second moments.
    """

    forward: float
    decode: float
    head: float
    mlp: float
    joint: float
    gradient: float
    slope: float
    attention: float
    replacement: float
    batch: float
    entry: float
    step: float
    roots: float


def measure_pieces(adapter: Adapter, n_prefix: int, n_continuation: int) -> Pieces:
    """Time every piece on random rows of these lengths."""
    generator = torch.Generator().manual_seed(0)
    shape = (_ROWS, n_prefix + n_continuation)
    ids = torch.randint(adapter.d_vocab, shape, generator=generator)
    rows = Paragraphs.from_tokens(ids, n_prefix=n_prefix)
    ablation = Ablation(adapter, rows, mode="zero")
    table = UnigramTable.from_tokens(ids, adapter.d_vocab, source="random")
    weights = adapter.weights()
    ends = (0, adapter.n_layers - 1)
    n_heads = min(_HEADS, adapter.n_heads)
    heads: list[Part] = [Component("head", layer, h) for layer in ends for h in range(n_heads)]
    mlps: list[Part] = [Component("mlp", layer) for layer in ends]
    every: list[Part] = [[Component("head", *head) for head in adapter.heads()]]

    def edits(parts: Sequence[Part]) -> float:
        """Of one of the parts in one row, without the clean run."""
        seconds = _seconds(lambda: ablation.effects(parts, progress=False))
        return max(seconds - _ROWS * forward, 0) / (_ROWS * len(parts))

    many = rows[[i % _ROWS for i in range(_SCANNED)]]
    scan(adapter, many, progress=False)  # the first time, memory is allocated
    forward = _seconds(lambda: scan(adapter, many, progress=False)) / _SCANNED
    few = rows[:2]
    return Pieces(
        forward=forward,
        decode=_seconds(lambda: greedy_continuations(adapter, rows, progress=False)) / _ROWS,
        head=edits(heads),
        mlp=edits(mlps),
        joint=edits(every),
        gradient=_seconds(lambda: parameter_gradients(adapter, rows, progress=False)) / _ROWS,
        slope=_seconds(lambda: attributions(ablation, progress=False)) / _ROWS,
        attention=_seconds(lambda: rare_token_attention(adapter, rows, table, progress=False))
        / _ROWS,
        replacement=_seconds(lambda: perturb_prefix(adapter, few, progress=False)) / (2 * n_prefix),
        batch=_seconds(lambda: mean_gradient(adapter, rows, weights, progress=False)),
        entry=_seconds(lambda: mean_gradient(adapter, few, weights, progress=False)),
        step=_seconds_of_a_step(adapter),
        roots=_seconds_of_roots(adapter),
    )


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _seconds_of_a_step(adapter: Adapter) -> float:
    """A step of Adam that changes nothing, on the weights of one layer, times the layers."""
    mask = Candidates.of(adapter, layers=[0]).choose(1.0, None, "all")
    roots = [
        torch.eye(weight.values.shape[1], device=mask.device).expand(len(weight.values), -1, -1)
        for weight in mask.weights
    ]
    nothing = torch.zeros(len(mask), device=mask.device)
    steps = WhitenedSteps(mask, roots, DEEP.learning_rate, None, nothing)
    with adapter.preserving_state(), mask.restored() as original:

        def step() -> None:
            steps.propose(nothing, 0.0)
            mask.add(original, steps.change)

        step()  # Adam makes its numbers
        return adapter.n_layers * _seconds(step)


def _seconds_of_roots(adapter: Adapter) -> float:
    """Eigendecompositions of the second moments, by that of one matrix of moderate width."""
    widths = [
        weight.values.shape[1] for weight in adapter.weights() for _ in range(len(weight.values))
    ]
    width = min(_FULL_WIDTH, max(widths))
    matrix = torch.eye(width, dtype=torch.float64) + torch.ones(width, width, dtype=torch.float64)
    seconds = _seconds(lambda: torch.linalg.eigh(matrix))
    return sum(seconds * (other / width) ** 3 for other in widths)


def plan(
    adapter: Adapter,
    *,
    n_prefix: int,
    n_continuation: int,
    n_paragraphs: int,
    n_measured: int,
    memory_budget: int | None = None,
) -> pd.DataFrame:
    """Expected cost of each analysis, by its command with its other options as they are.

    Args:
        adapter: the model.
        n_prefix: tokens of a prefix.
        n_continuation: tokens of a continuation.
        n_paragraphs: number of paragraphs that are scanned.
        n_measured: number of memorized paragraphs that are measured, and of controls.
        memory_budget: maximum bytes per batch.

    Returns:
        `analysis`, `of` (what it is done to), `passes` (its seconds in forward passes of one
        paragraph), `seconds`, and `mib`, the memory beyond the weights, about.

    Raises:
        InputError: if paragraphs of these lengths do not fit the model.
    """
    import pandas as pd

    n_pos = n_prefix + n_continuation
    if n_pos > adapter.n_ctx:
        raise InputError("n_prefix + n_continuation", n_pos, f"at most {adapter.n_ctx} tokens fit")
    pieces = measure_pieces(adapter, n_prefix, n_continuation)
    seconds = _seconds_of_analyses(
        adapter, pieces, (n_prefix, n_continuation), n_paragraphs, n_measured
    )
    held = _bytes_of_analyses(adapter, n_pos, memory_budget)
    pair = f"{n_measured} + {n_measured} paragraphs"
    compared = f"{n_measured} + {max(n_measured, MIN_CONTROLS)} paragraphs"
    done_to = {
        "scan": f"{n_paragraphs} paragraphs",
        "heads": compared,
        "unlearn": "1 paragraph",
    }
    rows = [
        {
            "analysis": name,
            "of": done_to.get(name.split()[0], pair),
            "passes": round(value / pieces.forward),
            "seconds": float(f"{value:.3g}"),
            "mib": round(held[name.split()[0]] / 2**20),
        }
        for name, value in seconds.items()
    ]
    return pd.DataFrame(rows)


def _seconds_of_analyses(
    adapter: Adapter, one: Pieces, lengths: tuple[int, int], n_paragraphs: int, n_measured: int
) -> dict[str, float]:
    """Seconds of each analysis, with the pieces that its module's text names."""
    both = 2 * n_measured
    n_control = max(n_measured, MIN_CONTROLS)  # of a ranking
    compared, pilot = n_measured + n_control, min(PILOT, n_measured) + PILOT
    n_layers, n_heads = adapter.n_layers, adapter.n_layers * adapter.n_heads
    scanned = n_paragraphs * one.forward
    each_head = one.forward + n_heads * one.head
    ablated = compared * each_head
    # Heads, MLPs and both are taken out together, and each MLP alone.
    levels = pilot * (one.forward + 3 * one.joint + n_layers * one.mlp)
    evidence = scanned + compared * one.gradient + n_measured * one.attention + levels
    n_screened = min(n_heads, SIZES.near_best + SIZES.far_best + SIZES.random)
    screened = compared * (one.forward + n_screened * one.head) + 2 * pilot * one.slope
    return {
        "scan": scanned,
        "heads": evidence + ablated,
        "heads --units head,mlp": evidence + ablated + (compared - pilot) * n_layers * one.mlp,
        "heads --method screen": evidence + screened,
        "gradients": scanned + both * one.gradient,
        "ablate": scanned + both * each_head,
        "perturb": scanned + both * lengths[0] * one.replacement,
        "unlearn": _seconds_of_unlearning(one, *lengths),
    }


def _seconds_of_unlearning(one: Pieces, n_prefix: int, n_continuation: int) -> float:
    """One target, `MAX_CONTROL` controls of which a fifth is held out, one round of steps."""
    seen = MAX_CONTROL * 4 // 5
    controls = seen * (one.decode + 3 * one.forward) + MAX_CONTROL * one.forward
    # The stand-in reads every position of the continuation behind several other texts.
    length = (n_prefix + n_continuation / 2) / (n_prefix + n_continuation)
    stand_in = n_continuation * DRAWS * length * one.forward
    keep = 2 * one.batch * DEEP.control_batch / _ROWS
    forget = one.entry * (ENTRIES // 2 + 0.5)  # pairs of attacked entries, and the clean one
    return controls + stand_in + one.roots + DEEP.steps * (keep + forget + one.step)


def _bytes_of_analyses(adapter: Adapter, n_pos: int, memory_budget: int | None) -> dict[str, int]:
    """Bytes beyond the weights: a batch, and what each analysis keeps beside it."""
    batch = default_budget(adapter.device) if memory_budget is None else memory_budget
    size = torch.finfo(adapter.dtype).bits // 8
    weights = adapter.weights()
    gradient = 4 * sum(weight.values.numel() for weight in weights)
    clean = 3 * CLEAN_ROWS * n_pos * adapter.d_model * adapter.n_layers * size
    roots = 4 * sum(len(w.values) * w.values.shape[1] ** 2 for w in weights)
    return {
        "scan": batch,
        "heads": batch + clean + gradient,
        "gradients": batch + gradient,
        "ablate": batch + clean,
        "perturb": batch,
        # The weights as they were, two gradients, the change and its start, and Adam's numbers.
        "unlearn": batch + 9 * gradient + roots,
    }
