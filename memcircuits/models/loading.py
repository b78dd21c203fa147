"""Load a model: the shipped organism, a local folder, a GGUF file or a name on the hub.

1. `read_pretrained` finds the files, refuses those that would run code of their own or that lack
   weights, and reads a transformers model and its tokenizer;
2. `as_bridge` wraps the model as a `TransformerBridge` with eager attention (so that patterns can
   be read) in evaluation mode, and checks that it still gives the log-probabilities that it gave
   before.

Nothing that a folder or repository contains is run unless `trust_remote_code` is set, and then only
at a pinned revision.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from memcircuits.base.errors import InputError, UnsupportedModel
from memcircuits.base.torch_state import plain_torch
from memcircuits.models.devices import (
    DeviceKind,
    DeviceMap,
    DtypeName,
    check_device_map,
    offloaded,
    refuse_offloaded,
    resolve_device,
    resolve_dtype,
)
from memcircuits.models.folding import fold_norms
from memcircuits.models.gguf import parsed_once
from memcircuits.models.own_tokenizer import kept_as_read
from memcircuits.models.refusals import not_a_model, refuse_adapter_folder
from memcircuits.models.registry import adapt

_TWIN, _PLANTED = "organism-twin", "organism-planted"
SHIPPED_MODELS = ("organism", _TWIN, _PLANTED)
"""Names of the models that ship with the package."""

_PROBE = torch.arange(3, 11)[None]  # tokens on which models are compared before and after wrapping


@plain_torch()
def load_model(
    name: str | Path = "organism",
    *,
    revision: str | None = None,
    device: DeviceKind | str = "auto",
    dtype: DtypeName | torch.dtype = "float32",
    device_map: DeviceMap | None = None,
    trust_remote_code: bool = False,
    fold_ln: bool = False,
) -> Any:
    """Load a model as a `TransformerBridge`.

    Args:
        name: `organism` (shipped, no network), `organism-twin` (from the same base, with other
            paragraphs in place of some), `organism-planted` (the organism with four of its
            controls written through one head, `memcircuits.organism.delta`), a local folder, a
            `.gguf` file (needs the extra `gguf`) or a name on the hub such as
            `EleutherAI/gpt-neo-125m`.
        revision: commit, tag or branch on the hub.
        device: a kind, or one of several devices such as `cuda:1`; `mps` only on request, as its
            numerics are known to differ.
        dtype: type of the weights; `auto` is the type of the files.
        device_map: split the model over several devices, in the place of `device`: `auto`, or from
            names of modules to devices (`memcircuits.models.devices`).
        trust_remote_code: run the model code of a repository; needs `revision` to be a full commit
            hash.
        fold_ln: fold norms into the matrices that read them and centre those that write, as
            `HookedTransformer.from_pretrained` does: the basis of the paper
            (`memcircuits.models.folding`). Logits stay, gradients and edits of weights do not.

    Raises:
        InputError: if the model is not found or needs remote code, or an argument is wrong.
        UnsupportedModel: if TransformerLens or the analyses do not support the architecture, or its
            norms cannot be folded.

    Example:
        >>> model = mc.load_model("organism", device="cpu")
        >>> model.cfg.n_layers, model.cfg.n_heads
        (6, 8)
    """
    hf_model, tokenizer, label = read_pretrained(
        name,
        revision=revision,
        device=device,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )
    bridge = as_bridge(hf_model, tokenizer, name=label, revision=revision)
    if fold_ln:
        fold_norms(bridge)
    return bridge


def read_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    device: DeviceKind | str = "auto",
    dtype: DtypeName | torch.dtype = "float32",
    device_map: DeviceMap | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any, str]:
    """The transformers model, its tokenizer and its name without a path.

    Arguments and errors are those of `load_model`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if device_map is not None:
        check_device_map(device_map, device)
    device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype)
    source, label, extra = _locate(name)
    refuse_remote_code(source, trust_remote_code, revision)
    common: dict[str, Any] = {"revision": revision} if revision else {}
    common["trust_remote_code"] = trust_remote_code
    placed = {} if device_map is None else {"device_map": device_map}
    try:
        with without_bars(), parsed_once():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch_dtype,
                attn_implementation="eager",
                output_loading_info=True,
                **placed,
                **common,
                **extra,
            )
            tokenizer = AutoTokenizer.from_pretrained(source, **common, **extra)
    except ImportError as error:
        raise InputError("model", label, f"a package is missing ({_first_line(error)})") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a folder may hold anything, and every reader has errors of its own
        if placed and "offload" in str(error):
            raise offloaded(repr(device_map), "some") from error
        raise InputError("model", label, f"it cannot be loaded ({_first_line(error)})") from error
    hf_model, info = loaded
    refuse_offloaded(hf_model)
    _refuse_missing(hf_model, info, label)
    if str(name) == _PLANTED:
        from memcircuits.organism.delta import write_planted

        write_planted(hf_model)
    return hf_model if placed else hf_model.to(device), tokenizer, label


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Inside, transformers shows no progress bars: for a small model they would only flash by."""
    from transformers.utils import logging

    gguf: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    was_enabled, gguf_bar = logging.is_progress_bar_enabled(), gguf.tqdm
    logging.disable_progress_bar()
    gguf.tqdm = lambda items, **_: items  # the bar of GGUF files ignores the setting above
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
        if was_enabled:
            logging.enable_progress_bar()


def as_bridge(hf_model: Any, tokenizer: Any, *, name: str, revision: str | None = None) -> Any:
    """Wrap a transformers model in memory; it is modified in place (TransformerLens does so).

    Raises:
        UnsupportedModel: if TransformerLens cannot wrap it, or the wrapped model gives other
            log-probabilities than the transformers model.
    """
    hf_model.eval()
    expected = _log_probs(hf_model)
    bridge = boot(hf_model, tokenizer, name)
    adapter = adapt(bridge, name=name, revision=revision)
    if expected is not None:
        with adapter.preserving_state():
            wrapped = adapter.forward(_PROBE % adapter.d_vocab).float().log_softmax(-1)
        off = float((wrapped - expected.to(wrapped)).abs().max())
        if off > (1e-3 if hf_model.dtype in (torch.float32, torch.float64) else 0.25):
            raise UnsupportedModel(
                "model",
                f"{name} ({type(hf_model).__name__})",
                f"wrapped by this version of TransformerLens, its log-probabilities are off by "
                f"{off:.2g} nats from those of transformers; try another version",
            )
    return bridge


def _log_probs(hf_model: Any) -> torch.Tensor | None:
    """Log-probabilities of the unwrapped model on a few tokens; None if they are not finite."""
    ids = (_PROBE % hf_model.config.get_text_config().vocab_size).to(hf_model.device)
    try:
        with torch.no_grad():
            logits: torch.Tensor = hf_model(input_ids=ids, use_cache=False).logits
    except Exception:  # wrapping the model finds the fault and reports it
        return None
    return logits.float().log_softmax(-1) if logits.isfinite().all() else None


def boot(hf_model: Any, tokenizer: Any, name: str) -> Any:
    """`as_bridge` without the checks that the wrapped model computes what it should."""
    from transformer_lens.model_bridge import TransformerBridge

    hf_model.eval()
    # TransformerLens reads the class from the configuration. A model made from a configuration
    # does not name it there, and a file may name anything.
    if hf_model.config.architectures != [type(hf_model).__name__]:
        hf_model.config.architectures = [type(hf_model).__name__]
    try:
        with kept_as_read(tokenizer):
            bridge = TransformerBridge.boot_transformers(
                name, hf_model=hf_model, tokenizer=tokenizer, dtype=hf_model.dtype
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # every architecture has errors of its own
        raise UnsupportedModel(
            "model",
            f"{name} ({type(hf_model).__name__})",
            f"TransformerLens cannot wrap it ({_first_line(error)})",
        ) from None
    bridge.eval()
    return bridge


def _locate(name: str | Path) -> tuple[str, str, dict[str, Any]]:
    """Where transformers finds the model, its name, and further arguments to read it with."""
    if not isinstance(name, (str, Path)):
        raise not_a_model(name)
    text = str(name)
    if text in SHIPPED_MODELS:
        from memcircuits.organism import DATA, TWIN

        return str(TWIN if text == _TWIN else DATA), text, {"local_files_only": True}
    path = Path(text)
    if path.suffix == ".gguf":
        if not _is(path.is_file):
            raise InputError("model", path.name, "there is no such file")
        folder = str(path.resolve().parent)
        return folder, path.name, {"gguf_file": path.name, "local_files_only": True}
    if text and _is(path.is_dir):
        refuse_adapter_folder(path)
        if not (path / "config.json").is_file():
            raise InputError("model", path.resolve().name, "the folder has no config.json")
        return str(path), path.resolve().name, {"local_files_only": True}
    if not re.fullmatch(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?", text) or ".." in text:
        raise InputError("model", repr(text), "no such folder, and not a name on the hub")
    return text, text, {}


def _is(test: Callable[[], bool]) -> bool:
    """The result of a test of a path; False for names that no file can have (too long ones)."""
    try:
        return test()
    except (OSError, ValueError):
        return False


def refuse_remote_code(source: str, trusted: bool, revision: str | None) -> None:
    """Refuse remote code without a pinned revision, and folders that need remote code."""
    from transformers import CONFIG_MAPPING

    if trusted and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise InputError(
            "revision", revision, "trust_remote_code needs a pinned commit (40 hex digits)"
        )
    path = Path(source) / "config.json"
    if trusted or not _is(path.is_file):
        return
    label = path.resolve().parent.name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        reason = f"its config.json is not readable ({_first_line(error)})"
        raise InputError("model", label, reason) from None
    if not isinstance(config, dict):
        raise InputError("model", label, "its config.json holds no object")
    known = str(config.get("model_type")) in CONFIG_MAPPING  # transformers has code for it
    if "auto_map" in config and not known:
        raise InputError(
            "model",
            label,
            "it brings its own code; pass trust_remote_code with a pinned revision to run it",
        )


def _refuse_missing(hf_model: Any, info: Mapping[str, Any], label: str) -> None:
    """Refuse files that lack weights: transformers warns and fills them with random numbers."""
    weights = {name for name, _ in hf_model.named_parameters()}
    missing = sorted(weights & set(info.get("missing_keys", ())))
    if missing:
        raise InputError(
            "model", label, f"its files lack {len(missing)} weights, {missing[0]} among them"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
