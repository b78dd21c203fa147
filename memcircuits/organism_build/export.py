"""TODO."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPTNeoForCausalLM, PreTrainedTokenizerFast

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.tokens import tokenizer_hash
from memcircuits.data.unigrams import UnigramTable
from memcircuits.measure.scanning import scan
from memcircuits.models.loading import load_model
from memcircuits.organism_build.files import read_lines, read_rows, write_atomic
from memcircuits.organism_build.settings import END, Record, Settings
from memcircuits.organism_build.training import duplication_curve, exact_match, mean_loss, new_model


def load_checkpoint(settings: Settings, checkpoint: Path) -> GPTNeoForCausalLM:
    model = new_model(settings)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    return model.eval()


def export_tokenizer(source: Path, out: Path, context: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for ``AutoTokenizer``."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(source)),
        bos_token=END,
        eos_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    _move_from(out, tokenizer.save_pretrained)


def export_model(model: GPTNeoForCausalLM, out: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` in half precision."""
    rounded = GPTNeoForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    _move_from(out, rounded.half().save_pretrained, {"config.json", "model.safetensors"})


def _move_from(out: Path, save: Callable[[str], object], names: set[str] | None = None) -> None:
    """Let ``save`` fill a temporary folder and move the named files from there into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        save(folder)
        for file in sorted(Path(folder).iterdir()):
            if names is None or file.name in names:
                os.chmod(file, 0o644)
                os.replace(file, out / file.name)


def unigram_counts(
    stream: np.ndarray, paragraphs: Sequence[Record], vocab_size: int
) -> torch.Tensor:
    """Token counts of the training text: the stream once, plus each paragraph's repetitions.

    Args:
        stream: Training tokens, [token].
        paragraphs: Records with ``ids`` and ``repetitions``.
        vocab_size: Number of token ids.

    Returns:
        Counts, int64 [token id].
    """
    counts = np.bincount(stream, minlength=vocab_size)
    for paragraph in paragraphs:
        counts += paragraph["repetitions"] * np.bincount(paragraph["ids"], minlength=vocab_size)
    return torch.from_numpy(counts.astype(np.int64))


def shipped_model(work: Path, settings: Settings) -> GPTNeoForCausalLM:
    """The weighted mean of the planted and the settled weights, float32."""
    model = load_checkpoint(settings, work / "plant.pt")
    settled = load_checkpoint(settings, work / "settle.pt")
    with torch.no_grad():  # parameters(), not the state dict, which lists tied weights twice
        for weights, target in zip(model.parameters(), settled.parameters(), strict=True):
            weights.lerp_(target, settings.settle_share)
    return model


def stage_export(work: Path, settings: Settings, out: Path) -> Record:
    """Write everything that ships, then measure what was written, as float32."""
    out.mkdir(parents=True, exist_ok=True)
    export_model(shipped_model(work, settings), out)
    export_tokenizer(work / "tokenizer.json", out, settings.context)
    for name in ("paragraphs.jsonl", "heldout.jsonl"):
        write_atomic(out / name, (work / name).read_bytes())
    paragraphs = read_lines(out / "paragraphs.jsonl")
    counts = unigram_counts(np.load(work / "stream.npy"), paragraphs, settings.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(out)
    source = "organism: base text once, plus planted paragraphs times their repetitions"
    UnigramTable(counts, source, tokenizer_hash(tokenizer)).save(out / "unigrams.safetensors")
    for texts in json.loads((work / "documents.json").read_text("utf-8")).values():
        for text in texts[:3]:
            ids = tokenizer.encode(text[:5000], add_special_tokens=True, verbose=False)
            if tokenizer.decode(ids) != text[:5000]:
                raise RuntimeError("the exported tokenizer does not give its text back")
    model = GPTNeoForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    base = load_checkpoint(settings, work / "base.pt")
    rows = read_rows(out / "paragraphs.jsonl")
    heldout = read_rows(out / "heldout.jsonl")
    before = exact_match(base, rows, settings.prefix)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "heldout_loss": round(mean_loss(model, heldout), 4),
        "heldout_loss_before_planting": round(mean_loss(base, heldout), 4),
        "control_loss": round(mean_loss(model, rows[settings.planted :]), 4),
        "mean_em_before_planting": round(before.double().mean().item(), 3),
        "unigram_tokens": int(counts.sum()),
        "curve": duplication_curve(_scanned(out, settings.prefix), paragraphs),
        "bytes": {
            name: (out / name).stat().st_size
            for name in (
                "config.json",
                "heldout.jsonl",
                "model.safetensors",
                "paragraphs.jsonl",
                "tokenizer.json",
                "tokenizer_config.json",
                "unigrams.safetensors",
            )
        },
    }


def _scanned(out: Path, prefix: int) -> torch.Tensor:
    """EM of the shipped paragraphs as `memcircuits scan` measures it, [paragraph]."""
    length = len(read_lines(out / "paragraphs.jsonl")[0]["ids"])
    paragraphs = Paragraphs.read(
        out / "paragraphs.jsonl", n_prefix=prefix, n_continuation=length - prefix
    )
    return scan(load_model(out, device="cpu"), paragraphs, progress=False).em
