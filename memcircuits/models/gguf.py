"""Reading GGUF files: the header once, not once for each of configuration, tokenizer and weights.

A GGUF file lists every token of the vocabulary in its header, and transformers reads all of it
anew for each of the three, number by number. For a vocabulary of a quarter of a million that takes
longer than reading the weights.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Inside, transformers opens each GGUF file once and parses each value of its header once.

    Nothing happens where the package `gguf` is missing: transformers says so if it needs it.
    """
    try:
        package: Any = importlib.import_module("gguf")
    except ImportError:
        yield
        return
    utilities: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    reader, parse = package.GGUFReader, utilities._gguf_parse_value
    # Keyed by the array of a value, which the reader holds as long as it is in the cache.
    parsed: dict[int, Any] = {}

    def parse_once(value: Any, kind: Any) -> Any:
        key = id(value)
        if key not in parsed:
            parsed[key] = parse(value, kind)
        return parsed[key]

    package.GGUFReader = functools.cache(reader)
    utilities._gguf_parse_value = parse_once
    try:
        yield
    finally:
        package.GGUFReader, utilities._gguf_parse_value = reader, parse
