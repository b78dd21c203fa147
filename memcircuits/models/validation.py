"""Is a model what the analyses take it for? It is tried, once per model object.

Wrong numbers without an error are the worst fault of work with hooks: hooks that do nothing, tokens
that are prepended in silence, weights stored in another order. So before anything is measured,
every block must have the weight matrices that are edited and differentiated, and a few random
tokens are run to test six statements:

1. *attention rows*: each row of every attention pattern sums to 1;
2. *head removal*: zeroing the z of one head of every layer changes that layer's attention output by
   exactly -z @ W_O of that head, and changes the logits;
3. *batching*: a row by itself gives the logits that it gives in a batch;
4. *greedy decoding*: tokens decoded one by one see the logits of one teacher-forced pass;
5. *plain forward*: the transformers module inside a Bridge gives the same logits;
6. *weights of heads*: a change of the weights of one head or neuron changes its output and no
   other's, in every kind of block (`memcircuits.models.weight_checks`).

Each gives the largest difference found, relative to the size of what is compared; a difference
above the tolerance makes the model unsupported. The same passes tell at which sites an edit reaches
the logits. The cost is about a dozen forward passes of eight tokens, and eight of sentences
(`memcircuits.models.bos_probe`).

`memcircuits.models.registry.validate_model` runs the checks once per model and keeps the report.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.base.errors import UnsupportedModel
from memcircuits.models.adapter import Adapter, Run
from memcircuits.models.architecture import Basis
from memcircuits.models.bos_probe import bos_gain
from memcircuits.models.hooks import SITES, ActivationEdit, Site, hook_name
from memcircuits.models.weight_checks import (
    misplaced_gradient,
    refuse_lost_wrappers,
    refuse_shared,
)

TOLERANCE = 1e-3
"""Largest relative difference that passes in float32 and float64."""

TOLERANCE_HALF = 5e-2
"""Largest relative difference that passes in half precision."""

_LENGTH, _DECODED, _DRAWS = 8, 3, 4


def _fact(label: str, read: Callable[[Adapter], Any] | None = None) -> dict[str, Any]:
    """Metadata of a field of the report: its name for readers, and how it is read from an adapter.

    Without `read` it is the adapter's attribute of the same name.
    """
    return {"label": label, "read": read}


@dataclass(frozen=True)
class ModelReport:
    """What a model is, and how far it was from each statement that the analyses rely on."""

    name: str = field(metadata=_fact("model", attrgetter("label")))
    """Name of the model, without the path."""
    revision: str | None = field(metadata=_fact("revision"))
    """Commit, tag or branch it was loaded at, if one was asked for."""
    kind: str = field(metadata=_fact("class"))
    """`HookedTransformer` or `TransformerBridge`."""
    architecture: str = field(metadata=_fact("architecture"))
    """Name of the transformers class."""
    basis: Basis = field(metadata=_fact("basis"))
    """`raw` or `folded` (`Adapter.basis`)."""
    dtype: str = field(
        metadata=_fact("dtype", lambda adapter: str(adapter.dtype).removeprefix("torch."))
    )
    """Type of the weights."""
    device: str = field(metadata=_fact("device", attrgetter("device.type")))
    """Kind of device."""
    n_layers: int = field(metadata=_fact("layers"))
    """Number of blocks."""
    n_heads: int = field(metadata=_fact("query heads"))
    """Number of query heads per layer."""
    n_kv_heads: int = field(metadata=_fact("key-value heads"))
    """Number of key-value heads per layer."""
    d_model: int = field(metadata=_fact("d_model"))
    """Width of the residual stream."""
    d_head: int = field(metadata=_fact("d_head"))
    """Width of a head."""
    d_vocab: int = field(metadata=_fact("d_vocab"))
    """Size of the vocabulary."""
    n_ctx: int = field(metadata=_fact("context"))
    """Longest paragraph, tokens."""
    bos_gain: float | None = field(metadata=_fact("gain behind BOS", bos_gain))
    """By how much BOS in front lowers the NLL of a few sentences, nats/token."""
    local_layers: tuple[int, ...] = field(
        metadata=_fact("local layers", lambda a: tuple(a.local_layers))
    )
    """Layers whose attention sees a sliding window only."""
    parallel: bool = field(metadata=_fact("parallel blocks"))
    """Whether attention and MLP read the same residual stream."""
    writable: tuple[str, ...] = field(metadata=_fact("writable sites"))
    """Sites where an edit changes the logits."""
    supports_partial_forward: bool = field(metadata=_fact("can restart"))
    """Whether forward passes can be continued in the middle; otherwise sweeps are slow."""
    checks: Mapping[str, float | None] = field(metadata=_fact("checks"))
    """Statement -> largest relative difference; None where it could not be tried."""
    tolerance: float = field(metadata=_fact("tolerance"))
    """Largest relative difference that passes."""

    @classmethod
    def of(cls, adapter: Adapter, **measured: Any) -> ModelReport:
        """The report of a model.

        Args:
            adapter: the model.
            measured: the fields that an adapter does not have.
        """
        values = dict(measured)
        for each in fields(cls):
            if each.name not in values:
                read = each.metadata["read"] or attrgetter(each.name)
                values[each.name] = read(adapter)
        return cls(**values)

    def properties(self) -> dict[str, Any]:
        """The report in words, ready for JSON."""
        values = {each.metadata["label"]: getattr(self, each.name) for each in fields(self)}
        return values | {
            "local layers": list(self.local_layers),
            "writable sites": list(self.writable),
            "checks": dict(self.checks),
        }


def run_checks(adapter: Adapter) -> ModelReport:
    """Test the six statements on a model, whether or not it was tested before.

    Raises:
        UnsupportedModel: if one does not hold, or a weight matrix is missing.
    """
    weights = adapter.weights()  # mixtures of experts have no W_in, for one
    refuse_shared(adapter, weights)
    refuse_lost_wrappers(adapter)
    with adapter.preserving_state():
        tokens, clean, patterns = _clean_run(adapter)
        removal, writable = _try_edits(adapter, tokens[0], clean)
        checks = {
            "attention rows": _row_sum_error(patterns),
            "head removal": removal,
            "batching": _difference(adapter.forward(tokens[1:]), clean.logits[1:]),
            "greedy decoding": _decoding_error(adapter, tokens[:1, : _LENGTH - _DECODED]),
            "plain forward": _plain_forward_error(adapter, tokens, clean.logits),
            "weights of heads": _weights_error(adapter, tokens),
        }
    tolerance = TOLERANCE if adapter.dtype in (torch.float32, torch.float64) else TOLERANCE_HALF
    for name, difference in checks.items():
        if difference is not None and not difference <= tolerance:
            raise UnsupportedModel(
                "model",
                f"{adapter.name} ({adapter.architecture})",
                f"{_REASONS[name]} (off by {difference:.2g} of its size): results would be wrong",
            )
    return ModelReport.of(adapter, writable=writable, checks=checks, tolerance=tolerance)


_REASONS = {
    "attention rows": "its attention rows do not sum to 1",
    "head removal": "zeroing a head's z does not remove z @ W_O from the attention output",
    "batching": "a row alone gives other logits than in a batch",
    "greedy decoding": "decoding token by token gives other logits than one pass over the tokens",
    "plain forward": "the transformers module inside gives other logits",
    "weights of heads": "a change of one head's or neuron's weights changes another's output",
}


def _clean_run(adapter: Adapter) -> tuple[Int[Tensor, "batch pos"], Run, list[Tensor]]:
    """Two rows of random tokens with finite logits, the run with z, and the readable patterns."""
    z = [hook_name("z", layer) for layer in range(adapter.n_layers)]
    names = [hook_name("pattern", layer) for layer in range(adapter.n_layers)]
    names = names if adapter.hook_names.issuperset(names) else []
    length = min(_LENGTH, adapter.n_ctx)
    for seed in range(_DRAWS):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(adapter.d_vocab, (2, length), generator=generator)
        try:
            run = adapter.run(tokens, read=[*z, *names])
        except UnsupportedModel:  # the pattern's hook exists and never fires
            names = []
            run = adapter.run(tokens, read=z)
        if run.logits.isfinite().all():
            return tokens.to(adapter.device), run, [run.cache[name] for name in names]
    raise UnsupportedModel(
        "model", adapter.name, "its logits are not finite: load it in float32, check its weights"
    )


def _try_edits(
    adapter: Adapter, tokens: Int[Tensor, " pos"], clean: Run
) -> tuple[float, tuple[Site, ...]]:
    """Remove a head of every layer and change every site, each in a row of one batch.

    Row 0 is unchanged. In row 1 + l one head of layer l is removed. Each row behind those has a
    site of the first or last layer changed.

    Returns:
        The largest relative error of -z @ W_O as the change of an attention output, infinite where
        a head's removal left the logits as they were; and the sites whose edits reach the logits.
    """
    heads, outputs = _largest_heads(adapter, clean)
    layers = dict.fromkeys((0, adapter.n_layers - 1))
    sites = [
        (site, hook_name(site, layer))
        for layer in layers
        for site in SITES
        if hook_name(site, layer) in adapter.hook_names
    ]
    n_batch = 1 + adapter.n_layers + len(sites)
    rows: dict[str, list[tuple[int, int | None]]] = {}
    for layer, head in enumerate(heads):
        rows.setdefault(hook_name("z", layer), []).append((1 + layer, head))
    for row, (_, name) in enumerate(sites, start=1 + adapter.n_layers):
        rows.setdefault(name, []).append((row, None))

    with adapter.recording() as record, warnings.catch_warnings():
        # TransformerLens 4 warns of edits that it discards: finding those is the purpose.
        warnings.simplefilter("ignore", UserWarning)
        run = adapter.run(
            tokens.expand(n_batch, -1),
            positions=slice(-1, None),
            edit={name: _edit_rows(n_batch, edited) for name, edited in rows.items()},
        )

    moved = (run.logits - run.logits[:1]).abs().amax((1, 2)) > 0
    worst = 0.0
    for layer, attn_out in enumerate(record.attn_out):
        change = attn_out[1 + layer] - attn_out[0]
        error = (change + outputs[layer]).abs().max() / attn_out[0].abs().max().clamp_min(1e-12)
        worst = max(worst, float(error))
        if outputs[layer].abs().max() > 0 and not moved[1 + layer]:
            worst = float("inf")
    present = {site for site, _ in sites}
    dead = {site for row, (site, _) in enumerate(sites, 1 + adapter.n_layers) if not moved[row]}
    return worst, tuple(site for site in SITES if site in present - dead)


def _largest_heads(
    adapter: Adapter, clean: Run
) -> tuple[list[int], list[Float[Tensor, "pos d_model"]]]:
    """Per layer the head with the largest output z @ W_O on the first row, and that output."""
    heads: list[int] = []
    outputs: list[Float[Tensor, "pos d_model"]] = []
    for layer in range(adapter.n_layers):
        z = clean.cache[hook_name("z", layer)][0]
        w_o = adapter.weight(layer, "W_O").matrix.to(z.device)
        if w_o.shape[:2] != z.shape[1:]:
            raise UnsupportedModel(
                "model",
                f"{adapter.name} ({adapter.architecture})",
                f"z holds {tuple(z.shape[1:])} heads and dimensions, W_O {tuple(w_o.shape[:2])}",
            )
        by_head = torch.einsum("phd,hdm->hpm", z.to(w_o.dtype), w_o)
        heads.append(int(by_head.float().square().sum((1, 2)).argmax()))
        outputs.append(by_head[heads[layer]])
    return heads, outputs


def _edit_rows(n_batch: int, edited: list[tuple[int, int | None]]) -> ActivationEdit:
    """Zero one head of a row, or (no head) flip the sign of the whole row."""

    def edit(tensor: Tensor) -> Tensor:
        if tensor.shape[0] != n_batch:  # tokens and rows in one axis: cannot be edited by row
            return tensor
        tensor = tensor.clone()
        for row, head in edited:
            if head is None:
                tensor[row] = -tensor[row]
            else:
                tensor[row, :, head] = 0
        return tensor

    return edit


def _row_sum_error(patterns: list[Float[Tensor, "batch head query key"]]) -> float | None:
    """Largest difference from 1 of the sum of an attention row; None if none can be read."""
    if not patterns:
        return None
    return max(float((p.float().sum(-1) - 1).abs().max()) for p in patterns)


def _decoding_error(adapter: Adapter, tokens: Int[Tensor, "batch pos"]) -> float:
    """Difference of the logits of step-by-step decoding from those of one pass over its tokens."""
    n = tokens.shape[1]
    steps = []
    for _ in range(_DECODED):
        steps.append(adapter.forward(tokens)[:, -1:])
        tokens = torch.cat([tokens, steps[-1].argmax(-1)], 1)
    return _difference(torch.cat(steps, 1), adapter.forward(tokens)[:, n - 1 : -1])


def _weights_error(adapter: Adapter, tokens: Int[Tensor, "batch pos"]) -> float | None:
    """The largest error of `misplaced_gradient` in one block of every kind; None if not tried."""
    first_of_kind: dict[Any, int] = {}
    for layer, block in enumerate(adapter.model.blocks):
        first_of_kind.setdefault(tuple(type(module) for module in block.modules()), layer)
    with adapter.recording() as record:
        adapter.run(tokens, positions=slice(-1, None))
    errors = [
        misplaced_gradient(adapter, layer, record.resid_pre[layer][:1])
        for layer in first_of_kind.values()
    ]
    return max((error for error in errors if error is not None), default=None)


def _plain_forward_error(
    adapter: Adapter, tokens: Int[Tensor, "batch pos"], logits: Float[Tensor, "batch pos d_vocab"]
) -> float | None:
    """Difference of the transformers module's logits from the Bridge's; None without a Bridge."""
    if not adapter.is_bridge:
        return None
    plain = adapter.model.original_model(input_ids=tokens, use_cache=False).logits
    return _difference(plain.to(logits.device), logits)


def _difference(logits: Tensor, expected: Tensor) -> float:
    """Largest difference of two sets of logits, relative to the largest logit."""
    scale = expected.float().abs().max().clamp_min(1e-12)
    return float((logits.float() - expected.float()).abs().max() / scale)
