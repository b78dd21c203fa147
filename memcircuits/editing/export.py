"""Write an edited model as a Hugging Face folder that loads without this package.

A booted model cannot be saved by transformers, and several architectures store queries, keys and
values fused in one matrix that TransformerLens takes apart. So the edit is transferred to a
fresh copy of the model. The entry that each edited weight has there is found without knowledge of
the architecture: in a second copy, in float64, every entry of every parameter is set to its running
number, and this copy is booted. The number at a weight's position then identifies its entry.

The folder is written beside its final path, loaded again with transformers, compared with the
edited model, and only then moved there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memcircuits.base.errors import InputError, UnsupportedModel
from memcircuits.base.io import atomic_folder
from memcircuits.editing.edit import Edit
from memcircuits.editing.masks import named_mask
from memcircuits.models.adapter import Adapter
from memcircuits.models.loading import as_bridge, boot, read_pretrained, without_bars
from memcircuits.models.registry import adapt


def check_new(folder: Path, name: str = "folder") -> None:
    """Raise `InputError` unless a folder does not exist yet, or is empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(name, folder.name, "it is not empty; give a new or empty folder")


def export_edit(
    edit: Edit, folder: str | os.PathLike[str], source: str | Path = "organism", **options: Any
) -> Path:
    """Write the model `source` with `edit` as a new Hugging Face folder, and check it.

    Args:
        edit: the change.
        folder: a folder that does not exist yet, or is empty.
        source: what the edited model was loaded from, see `load_model`.
        **options: further arguments of `load_model` (`revision`, `trust_remote_code`).

    Returns:
        The folder.

    Raises:
        InputError: if the folder is not empty, `source` does not have the weights that the edit was
            made for, or the edit was made in folded weights.
        UnsupportedModel: if the exported model differs from the edited one.
    """
    target = Path(folder)
    check_new(target)
    if edit.provenance.basis != "raw":
        raise InputError(
            "edit", "made in folded weights", "only edits of raw weights fit a Hugging Face model"
        )
    # Edit a booted copy: the values before and after, and the logits to expect.
    options = {"dtype": edit.provenance.model["dtype"], **options, "device": "cpu"}
    plain, tokenizer, label = read_pretrained(source, **options)
    booted, _, _ = read_pretrained(source, **options)
    bridge = as_bridge(booted, tokenizer, name=label)
    adapter = adapt(bridge)
    probe = (torch.arange(min(32, adapter.n_ctx)) % adapter.d_vocab)[None]
    with edit.apply(bridge):  # refuses other weights
        mask = named_mask(adapter, edit.indices, edit.n_candidates)
        after = torch.cat([values.double() for values in mask.read()])
        with adapter.preserving_state():
            expected = adapter.forward(probe)
    before = torch.cat([values.double() for values in mask.read()])
    # Write the edited values into a copy without TransformerLens, save it and load it again.
    _write(plain, _entry_numbers(edit, source, options), before, after)
    with atomic_folder(target) as temporary:
        with without_bars():
            plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        edit.save(temporary / "memcircuits_edit.safetensors")
        exported, _, _ = read_pretrained(temporary, **{**options, "revision": None})
        with torch.no_grad():
            logits = exported(probe).logits
        scale = float(expected.abs().max())
        tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
        if not float((logits - expected).abs().max()) <= tolerance * scale:
            raise UnsupportedModel(
                "model", label, "the exported folder has other logits than the edited model"
            )
    return target


def _entry_numbers(edit: Edit, source: str | Path, options: dict[str, Any]) -> Tensor:
    """For each edited weight its running number among all entries of the plain parameters."""
    numbered, tokenizer, label = read_pretrained(source, **{**options, "dtype": "float32"})
    numbered.double()  # exact integers up to 2^53
    start = 0
    with torch.no_grad():
        for parameter in numbered.parameters():
            count = parameter.numel()
            parameter.copy_(torch.arange(start, start + count).view(parameter.shape))
            start += count
    bridge = boot(numbered, tokenizer, label)  # numbers for weights: it computes nothing
    mask = named_mask(Adapter(bridge), edit.indices, edit.n_candidates)
    return torch.cat(mask.read()).long()


def _write(plain: Any, numbers: Tensor, before: Tensor, after: Tensor) -> None:
    """Write the edited values into the plain model, where it holds exactly the unedited ones."""
    start = n_written = 0
    with torch.no_grad():
        for parameter in plain.parameters():
            stop = start + parameter.numel()
            inside = (numbers >= start) & (numbers < stop)
            positions = torch.unravel_index(numbers[inside] - start, parameter.shape)
            if not torch.equal(parameter[positions].double(), before[inside]):
                raise UnsupportedModel(
                    "model", type(plain).__name__, "TransformerLens changes its weights on loading"
                )
            parameter[positions] = after[inside].to(parameter.dtype)
            n_written += int(inside.sum())
            start = stop
    assert n_written == len(numbers), "an edited weight has no entry in the plain model"
