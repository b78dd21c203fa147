"""Any Python value as JSON, and back: further columns of paragraphs may hold anything.

JSON knows null, booleans, numbers, text, lists and objects. `json_value` turns every other value of
a data set (times, decimals, bytes, arrays, tensors, objects with keys that are not text) into an
object `{"__type__": name, "value": ...}`; `python_value`, given to `json.loads` as `object_hook`,
turns it back. Tuples become lists, scalars of NumPy become Python's, missing values null, and
objects of unknown types their text.
"""

from __future__ import annotations

import base64
import datetime
import enum
import uuid
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import torch

_TYPE = "__type__"


def json_value(value: Any) -> Any:
    """The value in a form that `json.dumps` takes."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)):
        return [json_value(entry) for entry in value]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key != _TYPE for key in value):
            return {str(key): json_value(entry) for key, entry in value.items()}
        return _tagged("object", [[json_value(k), json_value(v)] for k, v in value.items()])
    for kind, encode in _ENCODERS.items():
        if isinstance(value, kind):
            return encode(value)
    return _of_pandas(value)


def python_value(entry: dict[str, Any]) -> Any:
    """The value that an object of JSON stands for: what `json_value` made it from.

    Raises:
        ValueError: if it is marked as the work of `json_value` and is damaged.
    """
    if _TYPE not in entry:
        return entry
    try:
        return _DECODERS[entry[_TYPE]](entry["value"])
    except (LookupError, TypeError, ArithmeticError, ValueError, RuntimeError) as error:
        raise ValueError(f"a damaged value of type {entry[_TYPE]} ({error})") from None


def readable_value(value: Any) -> Any:
    """The value as JSON for readers, which is not read back: times and other types are text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): readable_value(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [readable_value(entry) for entry in value]
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        plain = value.tolist()
        return readable_value(plain) if type(plain) is not type(value) else str(value)
    return value.isoformat() if isinstance(value, datetime.date) else _of_pandas(value)


def _tagged(name: str, value: Any) -> dict[str, Any]:
    return {_TYPE: name, "value": value}


def _of_datetime(value: datetime.datetime) -> Any:
    # Those of pandas are subclasses, with nanoseconds and a value for "missing".
    is_pandas = type(value) is not datetime.datetime
    return _tagged("timestamp" if is_pandas else "datetime", value.isoformat())


def _of_timedelta(value: datetime.timedelta) -> Any:
    if type(value) is not datetime.timedelta:
        return _tagged("pandas timedelta", str(value))
    return _tagged("timedelta", [value.days, value.seconds, value.microseconds])


def _of_scalar(value: np.generic) -> Any:
    if isinstance(value, (np.datetime64, np.timedelta64)):
        kind = "timestamp" if isinstance(value, np.datetime64) else "pandas timedelta"
        import pandas as pd

        read = pd.Timestamp if isinstance(value, np.datetime64) else pd.Timedelta
        return _tagged(kind, str(read(value)))
    return json_value(value.item())


def _of_array(value: np.ndarray) -> Any:
    if value.dtype.kind not in "biuf":
        return json_value(value.tolist())
    return _tagged("array", [str(value.dtype), value.tolist()])


def _of_tensor(value: torch.Tensor) -> Any:
    dense = value.detach().cpu()
    return _tagged("tensor", [str(value.dtype).removeprefix("torch."), dense.tolist()])


def _of_pandas(value: Any) -> Any:
    """Null for a missing value of pandas; the text of any other object."""
    return None if type(value).__name__ in ("NAType", "NaTType") else str(value)


_ENCODERS: dict[type, Callable[[Any], Any]] = {
    enum.Enum: lambda value: json_value(value.value),
    np.generic: _of_scalar,  # before float, from which np.float64 derives
    bool: bool,
    int: int,
    float: float,
    str: str,
    datetime.datetime: _of_datetime,
    datetime.date: lambda value: _tagged("date", value.isoformat()),
    datetime.time: lambda value: _tagged("time", value.isoformat()),
    datetime.timedelta: _of_timedelta,
    Decimal: lambda value: _tagged("decimal", str(value)),
    bytes: lambda value: _tagged("bytes", base64.b64encode(value).decode()),
    bytearray: lambda value: _tagged("bytes", base64.b64encode(value).decode()),
    uuid.UUID: lambda value: _tagged("uuid", str(value)),
    complex: lambda value: _tagged("complex", [value.real, value.imag]),
    set: lambda value: _tagged("set", [json_value(v) for v in sorted(value, key=repr)]),
    frozenset: lambda value: _tagged("set", [json_value(v) for v in sorted(value, key=repr)]),
    np.ndarray: _of_array,
    torch.Tensor: _of_tensor,
}


def _timestamp(text: str) -> Any:
    import pandas as pd

    return pd.Timestamp(text)


def _pandas_timedelta(text: str) -> Any:
    import pandas as pd

    return pd.Timedelta(text)


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "object": lambda pairs: {_hashable(key): entry for key, entry in pairs},
    "datetime": datetime.datetime.fromisoformat,
    "timestamp": _timestamp,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": lambda parts: datetime.timedelta(*parts),
    "pandas timedelta": _pandas_timedelta,
    "decimal": Decimal,
    "bytes": base64.b64decode,
    "uuid": uuid.UUID,
    "complex": lambda parts: complex(*parts),
    "set": lambda entries: set(map(_hashable, entries)),
    "array": lambda parts: np.array(parts[1], dtype=parts[0]),
    "tensor": lambda parts: torch.tensor(parts[1], dtype=getattr(torch, parts[0])),
}


def _hashable(value: Any) -> Any:
    """Keys and members of sets are tuples where JSON has lists."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
