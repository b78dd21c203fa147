"""Get a model: the shipped organism, a local folder, a GGUF file or a name on the hub.

All come back as a `TransformerBridge` with eager attention (so that patterns can be read), in
evaluation mode. Nothing that a folder or repository contains is run unless `trust_remote_code` is
set, and then only at a pinned revision.
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

from memcircuits.core.errors import InputError, UnsupportedModel, one_of
from memcircuits.models.registry import adapt

_PLANTED = "organism-planted"


_PROBE = torch.arange(3, 11)[None]


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
        name: `organism` (shipped, no network), `organism-planted` (the same with four of its
            controls written through one head, `memcircuits.organism.delta`), a local folder, a
            `.gguf` file (needs the extra `gguf`) or a name on the hub such as
            `EleutherAI/gpt-neo-125m`.
        revision: commit, tag or branch on the hub.
        device: `auto` (CUDA if there is one, else CPU), `cpu`, `cuda`, `cuda:1` or `mps` (only on
            request: its numerics are known to differ).
        dtype: `float32`, `bfloat16` or `float16`.
        trust_remote_code: run the model code of a repository; needs `revision` to be a full commit
            hash.

    Raises:
        InputError: if it is not found, needs remote code, or a value is wrong.
        UnsupportedModel: if TransformerLens or the analyses cannot take the architecture.

    Example:
        >>> model = mc.load_model("organism", device="cpu")
        >>> model.cfg.n_layers, model.cfg.n_heads
        (6, 8)
    """
    hf_model, tokenizer, label = read_pretrained(
        name, revision=revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    return as_bridge(hf_model, tokenizer, name=label, revision=revision)


def read_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
) -> tuple[Any, Any, str]:
    """The transformers model, its tokenizer and a name without the path, see `load_model`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = resolve_device(device)
    torch_dtype = _resolve_dtype(dtype)
    source, label, extra = _locate(name)
    _refuse_remote_code(source, trust_remote_code, revision)
    common: dict[str, Any] = {"revision": revision} if revision else {}
    common["trust_remote_code"] = trust_remote_code
    try:
        with without_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch_dtype,
                attn_implementation="eager",
                output_loading_info=True,
                **common,
                **extra,
            )
            tokenizer = AutoTokenizer.from_pretrained(source, **common, **extra)
    except ImportError as error:
        raise InputError("model", label, f"a package is missing ({_first_line(error)})") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a folder may hold anything, and every reader has its own errors
        raise InputError("model", label, f"it cannot be loaded ({_first_line(error)})") from error
    hf_model, info = loaded
    _refuse_missing(hf_model, info, label)
    if str(name) == _PLANTED:
        from memcircuits.organism.delta import write_planted

        write_planted(hf_model)
    return hf_model.to(device), tokenizer, label


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Silence transformers' bars over tensors: loading a small model shows them for an instant."""
    from transformers.utils import logging

    gguf: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    shown, bars = logging.is_progress_bar_enabled(), gguf.tqdm
    logging.disable_progress_bar()
    gguf.tqdm = lambda items, **_: items  # this one asks nobody whether it is wanted
    try:
        yield
    finally:
        gguf.tqdm = bars
        if shown:
            logging.enable_progress_bar()


def as_bridge(hf_model: Any, tokenizer: Any, *, name: str, revision: str | None = None) -> Any:
    """Wrap a transformers model in memory; it is modified in place (TransformerLens does so).

    Raises:
        UnsupportedModel: if TransformerLens cannot wrap it, or then answers otherwise than
            transformers does.
    """
    hf_model.eval()
    expected = _log_probs(hf_model)
    bridge = boot(hf_model, tokenizer, name)
    adapter = adapt(bridge, name=name, revision=revision)
    if expected is not None:
        with adapter.preserving_state():
            found = adapter.forward(_PROBE % adapter.d_vocab).float().log_softmax(-1)
        off = float((found - expected.to(found)).abs().max())
        if off > (1e-3 if hf_model.dtype in (torch.float32, torch.float64) else 0.25):
            raise UnsupportedModel(
                "model",
                f"{name} ({type(hf_model).__name__})",
                f"wrapped by this version of TransformerLens, its log-probabilities are off by "
                f"{off:.2g} nats from those of transformers; try another version",
            )
    return bridge


def _log_probs(hf_model: Any) -> torch.Tensor | None:
    """What the unwrapped model answers to a few tokens, if it is a finite answer."""
    ids = (_PROBE % hf_model.config.get_text_config().vocab_size).to(hf_model.device)
    try:
        with torch.no_grad():
            logits: torch.Tensor = hf_model(input_ids=ids, use_cache=False).logits
    except Exception:  # what is wrong with it is found, and said, where it is wrapped
        return None
    return logits.float().log_softmax(-1) if logits.isfinite().all() else None


def boot(hf_model: Any, tokenizer: Any, name: str) -> Any:
    """`as_bridge` without the checks that the model computes what it should."""
    from transformer_lens.model_bridge import TransformerBridge

    hf_model.eval()
    # A model made from a configuration does not say, and one made from a file may say nonsense.
    if hf_model.config.architectures != [type(hf_model).__name__]:
        hf_model.config.architectures = [type(hf_model).__name__]
    try:
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=hf_model, tokenizer=tokenizer, dtype=hf_model.dtype
        )
    except (
        ValueError,
        NotImplementedError,
        LookupError,
        AttributeError,
        TypeError,
        AssertionError,
    ) as error:
        raise UnsupportedModel(
            "model",
            f"{name} ({type(hf_model).__name__})",
            f"TransformerLens cannot wrap it ({_first_line(error)})",
        ) from None
    bridge.eval()
    return bridge


def resolve_device(device: str) -> str:
    """`auto` becomes `cuda` or `cpu`; an unavailable device is an error."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cpu"]
    here += ["cuda", *(f"cuda:{i}" for i in range(n_cuda))] if n_cuda else []
    here += ["mps"] if torch.backends.mps.is_available() else []
    one_of("device", device.partition(":")[0], ("auto", "cpu", "cuda", "mps"))
    if device not in here:
        raise InputError("device", device, f"torch finds no such device; use {', '.join(here)}")
    return device


def _resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    one_of("dtype", dtype, _DTYPES)
    return _DTYPES[dtype]


def _locate(name: str | Path) -> tuple[str, str, dict[str, Any]]:
    """Where transformers finds the model, what it is called, and further arguments it needs."""
    text = str(name)
    if text in ("organism", _PLANTED):
        from memcircuits.organism import DATA

        return str(DATA), text, {"local_files_only": True}
    path = Path(text)
    if path.suffix == ".gguf":
        if not _is(path.is_file):
            raise InputError("model", path.name, "there is no such file")
        found = path.resolve()
        return str(found.parent), path.name, {"gguf_file": path.name, "local_files_only": True}
    if text and _is(path.is_dir):
        if not (path / "config.json").is_file():
            raise InputError("model", path.resolve().name, "the folder has no config.json")
        return str(path), path.resolve().name, {"local_files_only": True}
    if not re.fullmatch(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?", text) or ".." in text:
        raise InputError("model", repr(text), "no such folder, and not a name on the hub")
    return text, text, {}


def _is(test: Callable[[], bool]) -> bool:
    """False for names that no file can have (too long, for one)."""
    try:
        return test()
    except (OSError, ValueError):
        return False


def _refuse_remote_code(source: str, trusted: bool, revision: str | None) -> None:
    """Remote code needs a pinned revision; a folder that cannot do without it is refused."""
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
    known = str(config.get("model_type")) in CONFIG_MAPPING  # then transformers' own code is used
    if "auto_map" in config and not known:
        raise InputError(
            "model",
            label,
            "it brings its own code; pass trust_remote_code with a pinned revision to run it",
        )


def _refuse_missing(hf_model: Any, info: Mapping[str, Any], label: str) -> None:
    """Weights that the files lack would be random numbers: transformers only warns."""
    weights = {name for name, _ in hf_model.named_parameters()}
    missing = sorted(weights & set(info.get("missing_keys", ())))
    if missing:
        raise InputError(
            "model", label, f"its files lack {len(missing)} weights, {missing[0]} among them"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
