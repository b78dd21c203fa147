"""Get a model: the shipped organism, a local folder, a GGUF file or a name on the hub.

All come back as a `TransformerBridge` with eager attention (so that patterns can be read), in
evaluation mode. Nothing that a folder or repository contains is run unless `trust_remote_code` is
set, and then only at a pinned revision.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from memcircuits.adapter import adapt
from memcircuits.checks import InputError, UnsupportedModel, one_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str | Path = "organism",
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
) -> Any:
    """Load a model as a `TransformerBridge`.

    Args:
        name: `organism` (shipped, no network), a local folder, a `.gguf` file (needs the extra
            `gguf`) or a name on the hub such as `EleutherAI/gpt-neo-125m`.
        revision: commit, tag or branch on the hub.
        device: `auto` (CUDA if there is one, else CPU), `cpu`, `cuda`, `cuda:1` or `mps` (only on
            request: its numerics are known to differ).
        dtype: `float32`, `bfloat16` or `float16`.
        trust_remote_code: run the model code of a repository; needs `revision` to be a full commit
            hash.

    Raises:
        InputError: if it is not found, needs remote code, or a value is wrong.
        UnsupportedModel: if TransformerLens or the analyses cannot take the architecture.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = resolve_device(device)
    torch_dtype = _resolve_dtype(dtype)
    source, extra = _locate(name)
    _refuse_remote_code(source, trust_remote_code, revision)
    common: dict[str, Any] = {"revision": revision} if revision else {}
    common["trust_remote_code"] = trust_remote_code
    label = "organism" if str(name) == "organism" else Path(str(name)).name
    try:
        hf_model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch_dtype, attn_implementation="eager", **common, **extra
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **common, **extra)
    except ImportError as error:
        raise InputError("model", label, f"a package is missing ({_first_line(error)})") from None
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise InputError("model", label, f"it cannot be loaded ({_first_line(error)})") from None
    except Exception as error:  # safetensors raises its own type for damaged files
        if type(error).__module__.startswith("safetensors"):
            raise InputError("model", label, f"damaged weights ({_first_line(error)})") from None
        raise
    return as_bridge(hf_model.to(device), tokenizer, name=label, revision=revision)


def as_bridge(hf_model: Any, tokenizer: Any, *, name: str, revision: str | None = None) -> Any:
    """Wrap a transformers model in memory; it is modified in place (TransformerLens does so)."""
    from transformer_lens.model_bridge import TransformerBridge

    hf_model.eval()
    try:
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=hf_model, tokenizer=tokenizer, dtype=hf_model.dtype
        )
    except (ValueError, NotImplementedError, KeyError, AttributeError) as error:
        raise UnsupportedModel(
            "model",
            f"{name} ({type(hf_model).__name__})",
            f"TransformerLens cannot wrap it ({_first_line(error)})",
        ) from None
    bridge.eval()
    adapt(bridge, name=name, revision=revision)
    return bridge


def resolve_device(device: str) -> str:
    """`auto` becomes `cuda` or `cpu`; an unavailable device is an error."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    one_of("device", kind, ("cpu", "cuda", "mps"))
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[kind]:
        raise InputError("device", device, "torch finds no such device here; use cpu")
    return device


def _resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    one_of("dtype", dtype, _DTYPES)
    return _DTYPES[dtype]


def _locate(name: str | Path) -> tuple[str, dict[str, Any]]:
    """Where transformers finds the model, and the further arguments it needs."""
    if str(name) == "organism":
        from memcircuits.organism import DATA

        return str(DATA), {"local_files_only": True}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError("model", path.name, "there is no such file")
        return str(path.resolve().parent), {"gguf_file": path.name, "local_files_only": True}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError("model", path.name, "the folder has no config.json")
        return str(path), {"local_files_only": True}
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) or ".." in str(name):
        raise InputError("model", str(name), "no such folder, and not a name on the hub")
    return str(name), {}


def _refuse_remote_code(source: str, trusted: bool, revision: str | None) -> None:
    if trusted and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise InputError(
            "revision", revision, "trust_remote_code needs a pinned commit (40 hex digits)"
        )
    config = Path(source) / "config.json"
    if trusted or not config.is_file():
        return
    try:
        needs = "auto_map" in json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError("model", "config.json", f"not readable ({_first_line(error)})") from None
    if needs:
        raise InputError(
            "model",
            Path(source).name,
            "it brings its own code; pass trust_remote_code with a pinned revision to run it",
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
