"""TODO."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from memcircuits.core.errors import UnsupportedModel
from memcircuits.models.adapter import Adapter
from memcircuits.models.validation import ModelReport, run_checks

# What a model whose code does not fit TransformerLens's raises when it is tried.
_CANNOT_RUN = (AttributeError, LookupError, TypeError, RuntimeError)


_ADAPTERS: weakref.WeakKeyDictionary[nn.Module, Adapter] = weakref.WeakKeyDictionary()


def adapt(model: Any, *, name: str | None = None, revision: str | None = None) -> Adapter:
    """The adapter of a model; made, and the model checked by trying it, once per model object.

    Args:
        model: a `HookedTransformer`, a `TransformerBridge`, or an `Adapter` (returned as it is).
        name: what to call a model that is new here; by default what its configuration says.
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
        from memcircuits.models.registry import validate_model

        try:
            _ADAPTERS[model] = Adapter(model)
            _ADAPTERS[model].name = name or _ADAPTERS[model].name
            _ADAPTERS[model].revision = revision
            validate_model(model)
        except BaseException as error:
            _ADAPTERS.pop(model, None)
            if isinstance(error, _CANNOT_RUN) and not isinstance(error, torch.OutOfMemoryError):
                text = " ".join(str(error).split())[:200]
                reason = f"the analyses cannot handle it ({type(error).__name__}: {text})"
                raise UnsupportedModel("model", name or type(model).__name__, reason) from error
            raise
    return _ADAPTERS[model]


_REPORTS: weakref.WeakKeyDictionary[nn.Module, ModelReport] = weakref.WeakKeyDictionary()


def validate_model(model: Any) -> ModelReport:
    """Check a model by trying it, once per model object; later calls return the same report.

    Args:
        model: HookedTransformer or TransformerBridge.

    Raises:
        UnsupportedModel: if a statement above does not hold; the message says which.
    """
    adapter = adapt(model)
    report = _REPORTS.get(adapter.model)
    if report is None:
        report = _REPORTS[adapter.model] = run_checks(adapter)
    return report
