"""Which paragraphs does a language model recite, and where does that live?

The public names, imported when first used so that `import memcircuits` is quick.

| module | idea |
| --- | --- |
| `adapter` | one view of every model class and architecture |
| `loading` | models from the package, folders, GGUF files and the hub |
| `paragraphs`, `readers` | token ids, prefix and continuation; file formats |
| `measure`, `scanning` | EM, NLL and margins from one forward pass |
| `engine`, `memory` | forward passes continued in the middle, in pieces that fit |
| `ablation`, `attention`, `gradients` | the three kinds of evidence about heads |
| `ranking` | `find_memorization_heads`: evidence, intervals, p-values |
| `unigrams`, `statistics` | token rarity; bootstrap and permutation over paragraphs |
| `results`, `checks`, `progress` | typed results, clear errors, bars |
| `views`, `report`, `figures`, `pages` | what people look at |
| `organism` | the model that ships with the package |
| `cli` | the command line |
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Head": "adapter",
    "InputError": "checks",
    "Paragraphs": "paragraphs",
    "UnigramTable": "unigrams",
    "ablate_heads": "ablation",
    "attention_view": "views",
    "find_memorization_heads": "ranking",
    "load_model": "loading",
    "parameter_gradients": "gradients",
    "rare_token_attention": "attention",
    "scan": "scanning",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"memcircuits.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
