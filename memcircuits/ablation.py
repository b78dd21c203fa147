"""What breaks when one head is removed? Zero, mean and resample ablation of every head.

A head's z is replaced at all positions: by zeros, by its mean over paragraphs (per position), or by
its z in another paragraph. The effect is the change of the continuation's NLL and EM, kept per
paragraph. Exact, by restarted forwards (`memcircuits.engine`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.adapter import Adapter, adapt, hook_z
from memcircuits.checks import InputError, one_of
from memcircuits.engine import FALLBACK, HeadEdit, Restart
from memcircuits.paragraphs import Paragraphs
from memcircuits.progress import bar
from memcircuits.results import Provenance, ScoreMap

_GROUP = 16  # paragraphs whose clean run is held at once


def ablate_heads(
    model: Any,
    paragraphs: Any,
    *,
    mode: str = "zero",
    reference: Any = None,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> ScoreMap:
    """Ablate each head by itself.

    Args:
        model: HookedTransformer or TransformerBridge.
        paragraphs: `Paragraphs`, a list of strings or a LongTensor of ids.
        mode: `zero`, `mean` (over `reference`, at the same position) or `resample` (z of a random
            other paragraph of `reference`).
        reference: paragraphs that give the means or samples; by default `paragraphs` themselves.
        seed: of the draws of `resample`.
        memory_budget: bytes that one batch may take.
        progress: show a bar on stderr.

    Returns:
        Mean increase of NLL (nats/token) when the head is ablated; `samples["nll"]` and
        `samples["em"]` (change in tokens, negative when the head helps) keep every paragraph.

    Raises:
        InputError: for a wrong mode, unusable paragraphs, or a reference of other lengths.
    """
    one_of("mode", mode, ("zero", "mean", "resample"))
    adapter = adapt(model)
    paragraphs = Paragraphs.of(paragraphs, model)
    adapter.check_tokens(paragraphs.ids, "paragraphs")
    source = paragraphs if reference is None else Paragraphs.of(reference, model, "reference")
    if source.ids.shape[1] != paragraphs.ids.shape[1]:
        raise InputError("reference", repr(source), "use paragraphs of the same length")
    own = reference is None
    if mode == "resample" and own and len(paragraphs) < 2:
        raise InputError(
            "paragraphs", "one paragraph", "resampling needs another one; pass reference="
        )
    draws = _draws(len(paragraphs), len(source), own, seed) if mode == "resample" else None
    effects = torch.empty(2, len(paragraphs), adapter.n_layers, adapter.n_heads)
    with (
        adapter.untouched(),
        bar(len(paragraphs) * adapter.n_layers, "ablate", unit="layer", progress=progress) as shown,
    ):
        means = _mean_z(adapter, source) if mode == "mean" else None
        for start in range(0, len(paragraphs), _GROUP):
            rows = slice(start, min(len(paragraphs), start + _GROUP))
            ids = paragraphs.ids[rows]
            restart = Restart(adapter, ids, paragraphs.n_prefix, memory_budget)
            other = _read_z(adapter, source.ids[draws[rows]]) if draws is not None else None
            clean = restart.clean()
            for layer in range(adapter.n_layers):
                edits = []
                for head in range(adapter.n_heads):
                    if means is not None:
                        z = means[layer][None, :, [head]]
                    elif other is not None:
                        z = other[layer][:, :, [head]]
                    else:
                        z = torch.zeros(1, 1, 1, adapter.d_head, device=adapter.device)
                    edits.append(HeadEdit((head,), z))
                change = restart.edited(layer, edits) - clean
                effects[:, rows, layer] = change.permute(2, 1, 0).float().cpu()
                shown.update(len(ids))
    return ScoreMap(
        name=f"{mode} ablation",
        units="nats/token",
        values=effects[0].mean(0),
        provenance=Provenance.of(
            adapter,
            {"paragraphs": paragraphs, "reference": None if own else source},
            mode=mode,
            seed=seed,
        ),
        samples={"nll": effects[0], "em": effects[1]},
        notes=() if adapter.can_restart else (FALLBACK,),
    )


def _draws(n: int, n_source: int, own: bool, seed: int) -> Tensor:
    """For each paragraph another one, never itself."""
    generator = torch.Generator().manual_seed(seed)
    if not own:
        return torch.randint(n_source, (n,), generator=generator)
    shift = torch.randint(1, n, (n,), generator=generator)
    return (torch.arange(n) + shift) % n


def _read_z(adapter: Adapter, ids: Tensor) -> list[Float[Tensor, "row pos head d_head"]]:
    names = [hook_z(layer) for layer in range(adapter.n_layers)]
    run = adapter.run(ids[:, :-1], positions=slice(-1, None), read=names)
    return [run.cache[name] for name in names]


def _mean_z(adapter: Adapter, source: Paragraphs) -> list[Float[Tensor, "pos head d_head"]]:
    total: list[Tensor] | None = None
    for start in range(0, len(source), _GROUP):
        z = [t.double().sum(0) for t in _read_z(adapter, source.ids[start : start + _GROUP])]
        total = z if total is None else [a + b for a, b in zip(total, z, strict=True)]
    assert total is not None
    return [(t / len(source)).to(adapter.dtype) for t in total]
