"""A tokenizer stays as its files describe it while TransformerLens wraps its model.

TransformerLens reads every tokenizer again with `add_bos_token=True`, so that GPT-2's would put a
token in front of each text that GPT-2 was never trained behind, and so that a tokenizer made in
memory, which has no files, is a `KeyError`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def kept_as_read(tokenizer: Any) -> Iterator[None]:
    """Inside, TransformerLens takes the tokenizer for one that was read with `add_bos_token`."""
    settings = getattr(tokenizer, "init_kwargs", None)
    if settings is None:
        yield
        return
    before = dict(settings)
    settings.setdefault("name_or_path", "")
    settings["add_bos_token"] = True
    try:
        yield
    finally:
        settings.clear()
        settings.update(before)
