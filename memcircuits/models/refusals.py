"""What to say of objects and folders that are almost a model: the call that makes one of them.

People hold models of transformers, PEFT models, pipelines, compiled or distributed models, and the
names of models. None of these has named activations, so none can be analysed as it is, but each is
one call away from what can.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from memcircuits.base.errors import InputError, UnsupportedModel

_BOOT = (
    'use transformer_lens.model_bridge.TransformerBridge.boot_transformers("my-model", '
    "hf_model={}, tokenizer=tokenizer)"
)
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "Pipeline": "model",
}
"""Class of an object that holds a model, and the attribute where."""


def not_a_model(thing: Any, argument: str = "model") -> UnsupportedModel:
    """The error for something that is no TransformerLens model, with the call that makes one."""
    name = type(thing).__name__
    if isinstance(thing, (str, Path)):
        remedy = f"this is a name: pass what load_model({str(thing)!r}) returns"
        return UnsupportedModel(argument, repr(str(thing)), remedy)
    for kind in type(thing).__mro__:
        attribute = _WRAPPERS.get(kind.__name__)
        if attribute is not None and hasattr(thing, attribute):
            inner = type(getattr(thing, attribute)).__name__
            return UnsupportedModel(argument, name, f"pass its .{attribute} ({inner})")
    if _is_peft(thing):
        return UnsupportedModel(argument, name, _BOOT.format("model.merge_and_unload()"))
    if isinstance(thing, nn.Module) and hasattr(thing, "config"):
        return UnsupportedModel(argument, name, _BOOT.format("model"))
    return UnsupportedModel(
        argument, name, "pass a HookedTransformer, a TransformerBridge or what load_model() returns"
    )


def _is_peft(thing: Any) -> bool:
    return isinstance(thing, nn.Module) and hasattr(thing, "merge_and_unload")


def refuse_adapter_folder(folder: Path) -> None:
    """Raise `InputError` for a folder that holds a PEFT adapter without the model under it."""
    path = folder / "adapter_config.json"
    if (folder / "config.json").is_file() or not path.is_file():
        return
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        settings = None
    base = settings.get("base_model_name_or_path") if isinstance(settings, Mapping) else None
    raise InputError(
        "model",
        folder.resolve().name,
        f"the folder holds a PEFT adapter of {Path(str(base)).name!r}, not a model: merge them by "
        f"peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload(), then "
        + _BOOT.format("model").removeprefix("use "),
    )
