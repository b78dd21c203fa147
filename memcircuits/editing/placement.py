"""TODO."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memcircuits.core.errors import InputError, fraction, sequence
from memcircuits.core.heads import Head
from memcircuits.editing.masks import Candidates, Mask
from memcircuits.models.adapter import Adapter
from memcircuits.models.weights import HEAD_COMPONENTS

HEAD_PATTERN = re.compile(r"L\d+H\d+")


_LAYER = re.compile(r"L(\d+)\.(attn|mlp)")


_DRAWN = re.compile(r"(neurons|weights):([0-9.e-]+)")


def place(
    adapter: Adapter,
    where: str | Head | Sequence[str | Head],
    *,
    components: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[tuple[str, ...], Mask]:
    """The weights that places name, and the places as text; see `plant`.

    Raises:
        InputError: if a place cannot be read, does not exist or leaves no weight.
    """
    listed = [where] if isinstance(where, (str, Head)) else where
    sequence("where", listed)
    sequence("components", components)
    places = [p.strip() if isinstance(p, str) else str(Head.of(p)) for p in listed or ()]
    if not places:
        raise InputError("where", "nothing", "name a place, such as L1H2")
    generator = generator or torch.Generator().manual_seed(0)
    chosen: dict[tuple[int, str], list[Tensor]] = {}
    for text in places:
        for weight, index in _places_of(adapter, text, components, generator):
            chosen.setdefault((weight.layer, weight.component), []).append(index)
    indices = {key: torch.cat(parts).unique() for key, parts in sorted(chosen.items())}
    weights = tuple(adapter.weight(*key) for key in indices)
    total = sum(weight.values.numel() for weight in adapter.weights())
    return tuple(places), Mask(weights, tuple(indices.values()), total)


def _places_of(
    adapter: Adapter, text: str, components: Sequence[str] | None, generator: torch.Generator
) -> list[tuple[Any, Tensor]]:
    options: dict[str, Any] = {"components": components}
    if HEAD_PATTERN.fullmatch(text):
        options["heads"] = [text]
    elif found := _LAYER.fullmatch(text):
        options["layers"] = [int(found[1])]
        attention = found[2] == "attn"
        mine = [c for c in adapter.components if (c in HEAD_COMPONENTS) == attention]
        options["components"] = [c for c in mine if components is None or c in components]
    elif found := _DRAWN.fullmatch(text):
        try:
            part = float(found[2])
        except ValueError:
            raise InputError("where", repr(text), "write the fraction like 0.01") from None
        fraction("where", part)
        if found[1] == "neurons":
            return _neurons(adapter, part, generator)
        mask = Candidates.of(adapter, **options).choose(part, None, "random", generator)
        return list(zip(mask.weights, mask.indices, strict=True))
    else:
        raise InputError(
            "where", repr(text), "write L1H2, L1.attn, L1.mlp, neurons:0.01 or weights:0.001"
        )
    mask = Candidates.of(adapter, **options).choose(1.0, None, "all")
    return list(zip(mask.weights, mask.indices, strict=True))


def _neurons(adapter: Adapter, part: float, generator: torch.Generator) -> list[tuple[Any, Tensor]]:
    """A random fraction of all MLP neurons: the weights that each reads and writes by."""
    sizes = [adapter.weight(i, "W_out").values.shape[1] for i in range(adapter.n_layers)]
    n = max(1, round(part * sum(sizes)))
    drawn = torch.zeros(sum(sizes), dtype=torch.bool)
    drawn[torch.randperm(sum(sizes), generator=generator)[:n]] = True
    found = []
    for layer, mine in enumerate(drawn.split(sizes)):
        if not mine.any():
            continue
        for component in (c for c in adapter.components if c not in HEAD_COMPONENTS):
            weight = adapter.weight(layer, component)
            member = torch.zeros(weight.values.shape, dtype=torch.bool)
            if component == "W_out":
                member[:, mine] = True
            else:
                member[:, :, mine] = True
            found.append((weight, member.flatten().nonzero()[:, 0]))
    return found
