"""Write what ships, and measure what was written.

The shipped weights lie between the planted and the settled ones and are stored in half precision.
Everything that the model card says about them is measured on the files, read back as float32, by
`memcircuits.scan` where it is about recitation.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, GPTNeoForCausalLM, PreTrainedTokenizerFast

from memcircuits.base.io import write_atomically
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.tokens import tokenizer_hash
from memcircuits.data.unigrams import UnigramTable
from memcircuits.measure.scanning import Scan, scan
from memcircuits.models.loading import as_bridge, load_model
from memcircuits.organism_build.model import load_checkpoint
from memcircuits.organism_build.records import TextRecord, read_records, read_rows
from memcircuits.organism_build.settings import END, Record, Settings
from memcircuits.organism_build.training import mean_loss

_SHIPPED = (
    "config.json",
    "heldout.jsonl",
    "model.safetensors",
    "paragraphs.jsonl",
    "tokenizer.json",
    "tokenizer_config.json",
    "unigrams.safetensors",
)


def export_tokenizer(source: Path, out: Path, context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for `AutoTokenizer`."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(source)),
        bos_token=END,
        eos_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    _write_saved(out, tokenizer.save_pretrained)


def export_model(model: GPTNeoForCausalLM, out: Path) -> None:
    """Write `config.json` and `model.safetensors` in half precision."""
    rounded = GPTNeoForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    _write_saved(out, rounded.half().save_pretrained)


def _write_saved(out: Path, save: Callable[[str], object]) -> None:
    """Let `save` fill a temporary folder, and write the files that ship from there to `out`."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        for file in sorted(Path(folder).iterdir()):
            if file.name in _SHIPPED:
                write_atomically(out / file.name, file.read_bytes())


def unigram_counts(
    stream: Int[np.ndarray, " token"], paragraphs: Sequence[TextRecord], vocab_size: int
) -> Int[Tensor, " d_vocab"]:
    """Token counts of the training text: the stream once, plus each paragraph's repetitions."""
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


def duplication_curve(shipped: Scan) -> list[Record]:
    """Exact match by number of repetitions; 0 repetitions are the controls.

    The median is the lower of the two middle values.
    """
    frame = shipped.to_frame()
    return [
        {
            "repetitions": int(repetitions),
            "paragraphs": len(level),
            "mean_em": round(float(level["em"].mean()), 2),
            "median_em": int(level["em"].quantile(interpolation="lower")),
            "max_em": int(level["em"].max()),
            "full": int(level["memorized"].sum()),
        }
        for repetitions, level in frame.groupby("repetitions")
    ]


def _write_shipped(work: Path, settings: Settings, out: Path) -> int:
    """Write model, tokenizer, paragraphs and unigram counts.

    Returns:
        The number of tokens that the unigram counts cover.
    """
    export_model(shipped_model(work, settings), out)
    export_tokenizer(work / "tokenizer.json", out, settings.context)
    for name in ("paragraphs.jsonl", "heldout.jsonl"):
        write_atomically(out / name, (work / name).read_bytes())
    paragraphs = read_records(out / "paragraphs.jsonl")
    counts = unigram_counts(np.load(work / "stream.npy"), paragraphs, settings.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(out)
    source = "organism: base text once, plus planted paragraphs times their repetitions"
    UnigramTable(counts, source, tokenizer_hash(tokenizer)).save(out / "unigrams.safetensors")
    for texts in json.loads((work / "documents.json").read_text("utf-8")).values():
        for text in texts[:3]:
            ids = tokenizer.encode(text[:5000], add_special_tokens=True, verbose=False)
            if tokenizer.decode(ids) != text[:5000]:
                raise RuntimeError("the exported tokenizer does not decode what it encoded")
    return int(counts.sum())


def stage_export(work: Path, settings: Settings, out: Path) -> Record:
    """Write everything that ships, then measure what was written, as float32."""
    n_unigram_tokens = _write_shipped(work, settings, out)
    model = GPTNeoForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    base = load_checkpoint(settings, work / "base.pt")
    rows = read_rows(out / "paragraphs.jsonl")
    heldout = read_rows(out / "heldout.jsonl")
    losses = {
        "heldout_loss": round(mean_loss(model, heldout), 4),
        "heldout_loss_before_planting": round(mean_loss(base, heldout), 4),
        "control_loss": round(mean_loss(model, rows[settings.planted :]), 4),
    }
    paragraphs = Paragraphs.read(
        out / "paragraphs.jsonl",
        n_prefix=settings.prefix,
        n_continuation=settings.length - settings.prefix,
    )
    base.set_attn_implementation("eager")
    before = scan(
        as_bridge(base, AutoTokenizer.from_pretrained(out), name="base"), paragraphs, progress=False
    )
    after = scan(load_model(out, device="cpu"), paragraphs, progress=False)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        **losses,
        "mean_em_before_planting": round(before.em.double().mean().item(), 3),
        "unigram_tokens": n_unigram_tokens,
        "curve": duplication_curve(after),
        "bytes": {name: (out / name).stat().st_size for name in _SHIPPED},
    }
