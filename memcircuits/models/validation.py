"""Is a model what the analyses take it for? Checked by trying, once per model object.

Wrong numbers without an error are the worst fault of hook-based work: hooks that do nothing,
tokens that are silently prepended, weights stored in another order. So before anything is measured
it is made sure that every block has the weight matrices that are edited and differentiated, a model
is run on a few random tokens, and five statements are tested:

1. *attention rows*: each row of every attention pattern sums to 1;
2. *head removal*: zeroing the z of one head of every layer changes that layer's attention output by
   exactly -z @ W_O of that head, and changes the logits;
3. *batching*: a row alone gives the logits that it gives among others;
4. *greedy decoding*: tokens decoded one by one see the logits of one teacher-forced pass;
5. *plain forward*: the transformers module inside a Bridge gives the same logits.

Each yields the largest difference seen, relative to the size of what is compared; a difference
above the tolerance makes the model unsupported. The same passes tell at which sites an edit reaches
the logits. The cost is about a dozen forward passes of eight tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.core.errors import UnsupportedModel
from memcircuits.models.adapter import Adapter, Run
from memcircuits.models.hooks import SITES, ActivationEdit, hook_name

TOLERANCE, TOLERANCE_HALF = 1e-3, 5e-2


_LENGTH, _DECODED, _DRAWS = 8, 3, 4


@dataclass(frozen=True)
class ModelReport:
    """What a model is, and how far it was from each statement that the analyses rest on.

    Attributes:
        name: of the model, without the path.
        revision: commit, tag or branch it was loaded at, if one was asked for.
        kind: `HookedTransformer` or `TransformerBridge`.
        architecture: name of the transformers class.
        basis: `raw` or `folded` (`Adapter.basis`).
        dtype: of the weights.
        device: kind of device.
        n_layers: blocks.
        n_heads: query heads per layer.
        n_kv_heads: key-value heads per layer.
        d_model: width of the residual stream.
        d_head: width of a head.
        d_vocab: size of the vocabulary.
        n_ctx: longest paragraph, tokens.
        local_layers: layers whose attention sees a sliding window only.
        parallel: whether attention and MLP read the same residual stream.
        writable: sites where an edit changes the logits.
        supports_partial_forward: whether forward passes can be continued in the middle; else sweeps are slow.
        checks: statement -> largest relative difference; None where it could not be tried.
        tolerance: the largest difference that is let pass.
    """

    name: str
    revision: str | None
    kind: str
    architecture: str
    basis: str
    dtype: str
    device: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    n_ctx: int
    local_layers: tuple[int, ...]
    parallel: bool
    writable: tuple[str, ...]
    supports_partial_forward: bool
    checks: Mapping[str, float | None]
    tolerance: float

    def facts(self) -> dict[str, Any]:
        """The report in words, ready for JSON."""
        return {
            "model": self.name,
            "revision": self.revision,
            "class": self.kind,
            "architecture": self.architecture,
            "basis": self.basis,
            "dtype": self.dtype,
            "device": self.device,
            "layers": self.n_layers,
            "query heads": self.n_heads,
            "key-value heads": self.n_kv_heads,
            "d_model": self.d_model,
            "d_head": self.d_head,
            "d_vocab": self.d_vocab,
            "context": self.n_ctx,
            "local layers": list(self.local_layers),
            "parallel blocks": self.parallel,
            "writable sites": list(self.writable),
            "can restart": self.supports_partial_forward,
            "checks": dict(self.checks),
            "tolerance": self.tolerance,
        }


def run_checks(adapter: Adapter) -> ModelReport:
    for layer in range(adapter.n_layers):
        for component in adapter.components:
            adapter.weight(layer, component)  # mixtures of experts have no W_in, for one
    with adapter.preserving_state():
        tokens, clean, patterns = _clean_run(adapter)
        removal, writable = _try_edits(adapter, tokens[0], clean)
        checks = {
            "attention rows": _off_one(patterns),
            "head removal": removal,
            "batching": _difference(adapter.forward(tokens[1:]), clean.logits[1:]),
            "greedy decoding": _decoded_and_forced(adapter, tokens[:1, : _LENGTH - _DECODED]),
            "plain forward": _plain_forward(adapter, tokens, clean.logits),
        }
    tolerance = TOLERANCE if adapter.dtype in (torch.float32, torch.float64) else TOLERANCE_HALF
    for name, difference in checks.items():
        if difference is not None and not difference <= tolerance:
            raise UnsupportedModel(
                "model",
                f"{adapter.name} ({adapter.architecture})",
                f"{_REASONS[name]} (off by {difference:.2g} of its size): results would be wrong",
            )
    return ModelReport(
        name=adapter.label,
        revision=adapter.revision,
        kind=adapter.kind,
        architecture=adapter.architecture,
        basis=adapter.basis,
        dtype=str(adapter.dtype).removeprefix("torch."),
        device=adapter.device.type,
        n_layers=adapter.n_layers,
        n_heads=adapter.n_heads,
        n_kv_heads=adapter.n_kv_heads,
        d_model=adapter.d_model,
        d_head=adapter.d_head,
        d_vocab=adapter.d_vocab,
        n_ctx=adapter.n_ctx,
        local_layers=tuple(adapter.local_layers),
        parallel=adapter.parallel,
        writable=writable,
        supports_partial_forward=adapter.supports_partial_forward,
        checks=checks,
        tolerance=tolerance,
    )


_REASONS = {
    "attention rows": "its attention rows do not sum to 1",
    "head removal": "zeroing a head's z does not remove z @ W_O from the attention output",
    "batching": "a row alone gives other logits than in a batch",
    "greedy decoding": "decoding token by token gives other logits than one pass over the tokens",
    "plain forward": "the transformers module inside gives other logits",
}


def _clean_run(adapter: Adapter) -> tuple[Int[Tensor, "batch pos"], Run, list[Tensor]]:
    """Two rows of random tokens with finite logits, their z, and the patterns if readable."""
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
) -> tuple[float, tuple[str, ...]]:
    """One batch of copies of a row, each with another edit; row 0 has none.

    Returns:
        The largest relative error of -z @ W_O as the change of an attention output, infinite where
        a head's removal left the logits as they were; and the sites whose edits reach the logits.
    """
    n_layers = adapter.n_layers
    sites = [
        (site, hook_name(site, layer))
        for layer in sorted({0, n_layers - 1})
        for site in SITES
        if hook_name(site, layer) in adapter.hook_names
    ]
    n_rows = 1 + n_layers + len(sites)
    # Per layer the head that writes most, and what it writes.
    heads: list[int] = []
    written: list[Float[Tensor, "pos d_model"]] = []
    for layer in range(n_layers):
        z = clean.cache[hook_name("z", layer)][0]
        w_o = adapter.weight(layer, "W_O").values
        if w_o.shape[:2] != z.shape[1:]:
            raise UnsupportedModel(
                "model",
                f"{adapter.name} ({adapter.architecture})",
                f"z holds {tuple(z.shape[1:])} heads and dimensions, W_O {tuple(w_o.shape[:2])}",
            )
        each = torch.einsum("phd,hdm->hpm", z.to(w_o.dtype), w_o)
        heads.append(int(each.float().square().sum((1, 2)).argmax()))
        written.append(each[heads[layer]])
    edits: dict[str, list[tuple[int, int | None]]] = {}
    for layer in range(n_layers):
        edits.setdefault(hook_name("z", layer), []).append((1 + layer, heads[layer]))
    for index, (_, name) in enumerate(sites):
        edits.setdefault(name, []).append((1 + n_layers + index, None))
    with adapter.recording() as record, warnings.catch_warnings():
        # TransformerLens 4 warns of edits that it discards: finding those is the purpose.
        warnings.simplefilter("ignore", UserWarning)
        run = adapter.run(
            tokens.expand(n_rows, -1),
            positions=slice(-1, None),
            edit={name: _edit_rows(n_rows, wanted) for name, wanted in edits.items()},
        )
    moved = (run.logits - run.logits[:1]).abs().amax((1, 2)) > 0
    worst = 0.0
    for layer, answer in enumerate(record.attn_out):
        change = answer[1 + layer] - answer[0]
        error = (change + written[layer]).abs().max() / answer[0].abs().max().clamp_min(1e-12)
        worst = max(worst, float(error))
        if written[layer].abs().max() > 0 and not moved[1 + layer]:
            worst = float("inf")
    dead = {site for row, (site, _) in enumerate(sites, 1 + n_layers) if not moved[row]}
    return worst, tuple(s for s in SITES if s in {site for site, _ in sites} - dead)


def _edit_rows(n_rows: int, wanted: list[tuple[int, int | None]]) -> ActivationEdit:
    """Zero one head of a row, or (no head) flip the sign of all that the row holds."""

    def edit(tensor: Tensor) -> Tensor:
        if tensor.shape[0] != n_rows:  # tokens and rows in one axis: cannot be edited by row
            return tensor
        tensor = tensor.clone()
        for row, head in wanted:
            if head is None:
                tensor[row] = -tensor[row]
            else:
                tensor[row, :, head] = 0
        return tensor

    return edit


def _off_one(patterns: list[Float[Tensor, "batch head query key"]]) -> float | None:
    if not patterns:
        return None
    return max(float((p.float().sum(-1) - 1).abs().max()) for p in patterns)


def _decoded_and_forced(adapter: Adapter, tokens: Int[Tensor, "batch pos"]) -> float:
    n = tokens.shape[1]
    steps = []
    for _ in range(_DECODED):
        steps.append(adapter.forward(tokens)[:, -1:])
        tokens = torch.cat([tokens, steps[-1].argmax(-1)], 1)
    return _difference(torch.cat(steps, 1), adapter.forward(tokens)[:, n - 1 : -1])


def _plain_forward(
    adapter: Adapter, tokens: Int[Tensor, "batch pos"], logits: Float[Tensor, "batch pos d_vocab"]
) -> float | None:
    if not adapter.is_bridge:
        return None
    plain = adapter.model.original_model(input_ids=tokens, use_cache=False).logits
    return _difference(plain, logits)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two sets of logits, relative to the largest logit."""
    scale = expected.float().abs().max().clamp_min(1e-12)
    return float((found.float() - expected.float()).abs().max() / scale)
