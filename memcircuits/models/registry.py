"""One adapter and one report per model object, made when a function first meets the model.

Public functions call `adapt(model)` first and pass the adapter inwards. What is remembered is keyed
by the model object by a weak reference: it goes when the model goes. It is also forgotten when the
model is no longer what it was (`constitution`): after `model.to(torch.bfloat16)`, say, the model is
tried again, as if it were new.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memcircuits.base.errors import InputError, UnsupportedModel
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.architecture import every_module, every_parameter, is_bridge
from memcircuits.models.refusals import not_a_model
from memcircuits.models.validation import ModelReport, run_checks


@dataclass
class _Known:
    """What is remembered of a model, as long as its constitution stays."""

    constitution: Hashable
    adapter: Adapter
    report: ModelReport


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def constitution(model: Any) -> Hashable:
    """All that an adapter remembers depends on, beside the values of the weights.

    Modules, types and devices of the parameters, how attention is computed, and the basis. Modes
    (training, gradients) do not belong here: an adapter chooses them itself.
    """
    config = getattr(model.original_model, "config", None) if is_bridge(model) else None
    return (
        tuple((id(module), type(module)) for module in every_module(model)),
        tuple((p.dtype, p.device) for p in every_parameter(model)),
        getattr(config, "_attn_implementation", None),
        getattr(model, "_weights_processed", None),
    )


def adapt(model: Model, *, name: str | None = None, revision: str | None = None) -> Adapter:
    """The adapter of a model; made, and the model checked by trying it, once per model object.

    Args:
        model: a `HookedTransformer`, a `TransformerBridge`, or an `Adapter` (returned as it is).
        name: what to call a model that is new here; by default the name in its configuration.
        revision: commit, tag or branch that it came from.

    Raises:
        UnsupportedModel: if `model` is neither, lacks a part that the analyses need, or fails one
            of the checks of `memcircuits.models.validation`.
    """
    if isinstance(model, Adapter):
        name, revision, model = model.name, model.revision, model.model
    if not isinstance(model, nn.Module) or not _has_hooks(model):
        raise not_a_model(model)
    if not hasattr(model, "blocks"):
        raise UnsupportedModel(
            "model", name or type(model).__name__, "it is no stack of decoder blocks"
        )
    known, current = _KNOWN.get(model), constitution(model)
    if known is None or known.constitution != current:
        if known is not None:
            name, revision = known.adapter.name, known.adapter.revision
        _KNOWN.pop(model, None)
        known = _tried(model, name, revision)
        # Trying a model can change it: TransformerLens completes itself in the first pass.
        known.constitution = constitution(model)
        _KNOWN[model] = known
    return known.adapter


def _has_hooks(model: nn.Module) -> bool:
    """Whether the model itself has named activations: wrappers pass on the attributes of others."""
    return hasattr(type(model), "hook_dict") or "hook_dict" in vars(model)


def _tried(model: nn.Module, name: str | None, revision: str | None) -> _Known:
    """The adapter and the report of a model that is new here."""
    try:
        adapter = Adapter(model, name=name, revision=revision)
        return _Known(None, adapter, run_checks(adapter))
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model that does not fit TransformerLens can raise anything
        text = " ".join(str(error).split())[:200]
        reason = (
            f"the analyses cannot handle it ({type(error).__name__}: {text}); use another model"
        )
        raise UnsupportedModel("model", name or type(model).__name__, reason) from error


def validate_model(model: Model) -> ModelReport:
    """Check a model by trying it, once as long as it stays what it is; the report of that.

    Raises:
        UnsupportedModel: if a statement of `memcircuits.models.validation` does not hold; the
            message says which.
    """
    adapter = adapt(model)
    return _KNOWN[adapter.model].report
