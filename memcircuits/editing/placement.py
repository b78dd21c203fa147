"""Places where `plant` writes: from text such as `L1H2` to a mask of weights.

| place | weights |
| --- | --- |
| `L1H2` | a head's W_Q, W_K, W_V and W_O (grouped-query: keys and values of its group) |
| `L1.attn`, `L1.mlp` | all matrices of a layer's attention or MLP |
| `neurons:0.01` | that fraction of all MLP neurons, drawn at random: what each reads and writes |
| `weights:0.001` | that fraction of all weights, drawn at random |
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.base.errors import InputError, sequence
from memcircuits.base.errors import fraction as check_fraction
from memcircuits.base.heads import Head, HeadLike
from memcircuits.editing.masks import Candidates, Mask
from memcircuits.models.adapter import Adapter
from memcircuits.models.weights import HEAD_COMPONENTS, Weight

HEAD_PATTERN = re.compile(r"L\d+H\d+")
_LAYER_PATTERN = re.compile(r"L(\d+)\.(attn|mlp)")
_FRACTION_PATTERN = re.compile(r"(neurons|weights):([0-9.e-]+)")


def select_weights(
    adapter: Adapter,
    where: HeadLike | Sequence[HeadLike],
    *,
    components: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[tuple[str, ...], Mask]:
    """The locations as text, and the mask of the weights that they name; see `plant`.

    Args:
        adapter: the model.
        where: one or more locations.
        components: only these matrices of the locations.
        generator: of the random fractions.

    Raises:
        InputError: if a location cannot be read, does not exist or contains no weight.
    """
    listed = [where] if isinstance(where, (str, Head)) else where
    sequence("where", listed)
    sequence("components", components)
    locations = [p.strip() if isinstance(p, str) else str(Head.of(p)) for p in listed or ()]
    if not locations:
        raise InputError("where", "nothing", "name a place, such as L1H2")
    generator = generator or torch.Generator().manual_seed(0)
    # Locations may overlap: collect the positions of each matrix, then take each position once.
    positions: dict[tuple[int, str], list[Tensor]] = {}
    for location in locations:
        for weight, index in _weights_of(adapter, location, components, generator):
            positions.setdefault((weight.layer, weight.component), []).append(index)
    indices = {matrix: torch.cat(parts).unique() for matrix, parts in sorted(positions.items())}
    weights = tuple(adapter.weight(*matrix) for matrix in indices)
    total = sum(weight.values.numel() for weight in adapter.weights())
    return tuple(locations), Mask(weights, tuple(indices.values()), total)


def owners_of(
    adapter: Adapter, mask: Mask, locations: Sequence[str], components: Sequence[str] | None
) -> Int[Tensor, " weight"]:
    """For each masked weight the number of the location that it belongs to.

    Raises:
        InputError: if a location is a random fraction, or two share a weight.
    """
    places = dict(zip(mask.named, mask.indices, strict=True))
    owners = {name: torch.full_like(index, -1) for name, index in places.items()}
    for number, location in enumerate(locations):
        if _FRACTION_PATTERN.fullmatch(location):
            raise InputError("where", repr(location), "with one_each, name heads or layers")
        own = select_weights(adapter, location, components=components)[1]
        for name, index in zip(own.named, own.indices, strict=True):
            at = torch.searchsorted(places[name], index)
            if (owners[name][at] >= 0).any():
                raise InputError("where", location, "with one_each, locations share no weight")
            owners[name][at] = number
    return torch.cat(list(owners.values()))


def _weights_of(
    adapter: Adapter,
    location: str,
    components: Sequence[str] | None,
    generator: torch.Generator,
) -> list[tuple[Weight, Tensor]]:
    """Matrices of one location, and the positions in each."""
    if HEAD_PATTERN.fullmatch(location):
        candidates = Candidates.of(adapter, heads=[location], components=components)
    elif match := _LAYER_PATTERN.fullmatch(location):
        attention = match[2] == "attn"
        side = [c for c in adapter.components if (c in HEAD_COMPONENTS) == attention]
        allowed = [c for c in side if components is None or c in components]
        candidates = Candidates.of(adapter, layers=[int(match[1])], components=allowed)
    elif match := _FRACTION_PATTERN.fullmatch(location):
        fraction = _fraction(location, match[2])
        if match[1] == "neurons":
            return _neurons(adapter, fraction, _mlp_matrices(adapter, components), generator)
        candidates = Candidates.of(adapter, components=components)
        mask = candidates.choose(fraction, None, "random", generator)
        return list(zip(mask.weights, mask.indices, strict=True))
    else:
        raise InputError(
            "where", repr(location), "write L1H2, L1.attn, L1.mlp, neurons:0.01 or weights:0.001"
        )
    mask = candidates.choose(1.0, None, "all")
    return list(zip(mask.weights, mask.indices, strict=True))


def _fraction(location: str, number: str) -> float:
    try:
        fraction = float(number)
    except ValueError:
        raise InputError("where", repr(location), "write the fraction like 0.01") from None
    check_fraction("where", fraction)
    return fraction


def _mlp_matrices(adapter: Adapter, components: Sequence[str] | None) -> list[str]:
    """The matrices of a neuron, or those of `components`."""
    of_neurons = [c for c in adapter.components if c not in HEAD_COMPONENTS]
    if components is None:
        return of_neurons
    for component in components or ("nothing",):
        if component not in of_neurons:
            known = ", ".join(of_neurons)
            raise InputError("components", component, f"the matrices of neurons are {known}")
    return list(components)


def _neurons(
    adapter: Adapter, fraction: float, components: Sequence[str], generator: torch.Generator
) -> list[tuple[Weight, Tensor]]:
    """A random fraction of all MLP neurons: the weights that each reads and writes by."""
    sizes = [adapter.weight(i, "W_out").values.shape[1] for i in range(adapter.n_layers)]
    n = max(1, round(fraction * sum(sizes)))
    drawn = torch.zeros(sum(sizes), dtype=torch.bool)
    drawn[torch.randperm(sum(sizes), generator=generator)[:n]] = True
    weights = []
    for layer, neurons in enumerate(drawn.split(sizes)):
        if not neurons.any():
            continue
        for component in components:
            weight = adapter.weight(layer, component)
            member = torch.zeros(weight.values.shape, dtype=torch.bool)
            if component == "W_out":
                member[:, neurons] = True
            else:
                member[:, :, neurons] = True
            weights.append((weight, member.flatten().nonzero()[:, 0]))
    return weights
