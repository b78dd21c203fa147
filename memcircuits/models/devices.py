"""Where the weights of a model are put, and in which type.

A model is on one device, or, by a device map, split over several: accelerate then moves what enters
each part to its device. Weights that a device map leaves in main memory beside a GPU, or on disk,
are fetched for the moment in which they are used. In between there is nothing that could be read,
differentiated or edited, so such maps are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch

from memcircuits.base.errors import InputError, one_of

DtypeName: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
"""Types that weights can be loaded in; `auto` is the type of the files."""

DeviceKind: TypeAlias = Literal["auto", "cpu", "cuda", "mps"]
"""Kinds of device; `auto` is CUDA if there is one, else the CPU."""

DeviceMap: TypeAlias = str | Mapping[str, int | str]
"""How accelerate splits a model: `auto`, or from names of modules to devices."""

_PLANS = ("auto", "balanced", "balanced_low_0", "sequential")


def resolve_device(device: str) -> str:
    """`auto` becomes `cuda` or `cpu`; an unavailable device is an error."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = ["cpu"]
    if n_cuda:
        available += ["cuda", *(f"cuda:{i}" for i in range(n_cuda))]
    if torch.backends.mps.is_available():
        available.append("mps")
    one_of("device", device.partition(":")[0], get_args(DeviceKind))
    if device not in available:
        raise InputError(
            "device", device, f"torch finds no such device; use {', '.join(available)}"
        )
    return device


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | Literal["auto"]:
    """The type of this name; other types than those of `DtypeName` are an error."""
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    one_of("dtype", name, get_args(DtypeName))
    return "auto" if name == "auto" else getattr(torch, name)


def check_device_map(device_map: DeviceMap, device: str) -> None:
    """Raise `InputError` for a map that is no map, or beside a device."""
    if device != "auto":
        raise InputError(
            "device_map", repr(device_map), f"give it without device={device!r}: a map has its own"
        )
    if isinstance(device_map, str):
        one_of("device_map", device_map, _PLANS)
    elif not isinstance(device_map, Mapping) or not device_map:
        raise InputError(
            "device_map", repr(device_map), f"choose {', '.join(_PLANS)} or map modules to devices"
        )
    else:
        places = {str(place).partition(":")[0] for place in device_map.values()}
        if places & {"disk", "meta"} or ("cpu" in places and len(places) > 1):
            raise offloaded(", ".join(sorted(map(str, set(device_map.values())))), "some")


def refuse_offloaded(hf_model: Any) -> None:
    """Raise `InputError` if weights were left where they cannot be read or changed."""
    absent = [name for name, p in hf_model.named_parameters() if p.device.type == "meta"]
    if absent:
        places = {str(place) for place in getattr(hf_model, "hf_device_map", {}).values()}
        raise offloaded(", ".join(sorted(places)), f"{len(absent)} ({absent[0]} the first)")


def offloaded(value: str, which: str) -> InputError:
    """The error for a device map that leaves weights in main memory beside a GPU, or on disk."""
    return InputError(
        "device_map",
        value,
        f"{which} weights would be fetched whenever they are used, and could not be read or "
        'edited; give devices with enough memory, a smaller dtype, or device="cpu" for all',
    )
