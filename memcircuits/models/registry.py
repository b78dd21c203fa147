"""One adapter and one report per model object, made when a function first meets the model.

Public functions call `adapt(model)` first and pass the adapter inwards. What is remembered is keyed
by the model object by a weak reference: it goes when the model goes.
"""

from __future__ import annotations

import weakref

import torch
from torch import nn

from memcircuits.core.errors import UnsupportedModel
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.validation import ModelReport, run_checks

# What a model raises when its code does not fit TransformerLens's. Not ValueError: an `InputError`
# says already what is wrong.
_CANNOT_RUN = (AttributeError, LookupError, RuntimeError, TypeError)

_ADAPTERS: weakref.WeakKeyDictionary[nn.Module, Adapter] = weakref.WeakKeyDictionary()
_REPORTS: weakref.WeakKeyDictionary[nn.Module, ModelReport] = weakref.WeakKeyDictionary()


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
        return model
    if not isinstance(model, nn.Module) or not hasattr(model, "hook_dict"):
        raise UnsupportedModel(
            "model",
            type(model).__name__,
            "pass a HookedTransformer, a TransformerBridge or what load_model() returns",
        )
    if not hasattr(model, "blocks"):
        raise UnsupportedModel(
            "model", name or type(model).__name__, "it is no stack of decoder blocks"
        )
    if model not in _ADAPTERS:
        try:
            _ADAPTERS[model] = Adapter(model, name=name, revision=revision)
            validate_model(model)
        except BaseException as error:
            _ADAPTERS.pop(model, None)
            if isinstance(error, _CANNOT_RUN) and not isinstance(error, torch.OutOfMemoryError):
                text = " ".join(str(error).split())[:200]
                reason = f"the analyses cannot handle it ({type(error).__name__}: {text})"
                raise UnsupportedModel("model", name or type(model).__name__, reason) from error
            raise
    return _ADAPTERS[model]


def validate_model(model: Model) -> ModelReport:
    """Check a model by trying it, once per model object; later calls return the same report.

    Raises:
        UnsupportedModel: if a statement of `memcircuits.models.validation` does not hold; the
            message says which.
    """
    adapter = adapt(model)
    report = _REPORTS.get(adapter.model)
    if report is None:
        report = _REPORTS[adapter.model] = run_checks(adapter)
    return report
