"""Write what ships, and measure what was written.

The weights are stored in half precision. Everything that the model card says about them is measured
on the files, read back as float32, by `memcircuits.scan` where it is about recitation. The organism
and its twin ship; base and noise twin stay in the work folder.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
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
from memcircuits.organism_build.model import read_weights
from memcircuits.organism_build.records import TextRecord, read_records, read_rows
from memcircuits.organism_build.settings import END, Record, Settings
from memcircuits.organism_build.training import mean_loss

_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

_SHIPPED = (
    *_MODEL_FILES,
    "heldout.jsonl",
    "paragraphs.jsonl",
    "unigrams.safetensors",
    *(f"twin/{name}" for name in _MODEL_FILES),
)

_UNKNOWN = 5  # tokens: a model that recites no more does not know a paragraph


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
    """Write `config.json` and `model.safetensors` in half precision; the model becomes half."""
    _write_saved(out, model.half().save_pretrained)


def _write_saved(out: Path, save: Callable[[str], object]) -> None:
    """Let `save` fill a temporary folder, and write the files that ship from there to `out`."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        for file in sorted(Path(folder).iterdir()):
            if file.name in _MODEL_FILES:
                write_atomically(out / file.name, file.read_bytes())


def unigram_counts(
    stream: Int[np.ndarray, " token"], paragraphs: Sequence[TextRecord], vocab_size: int
) -> Int[Tensor, " d_vocab"]:
    """Token counts of the training text: the stream once, plus each paragraph's repetitions."""
    counts = np.bincount(stream, minlength=vocab_size)
    for paragraph in paragraphs:
        counts += paragraph["repetitions"] * np.bincount(paragraph["ids"], minlength=vocab_size)
    return torch.from_numpy(counts.astype(np.int64))


def duplication_curve(scanned: Scan, column: str) -> list[Record]:
    """Exact match by number of repetitions; 0 repetitions are the paragraphs never trained on.

    Args:
        scanned: scan of all paragraphs by one model.
        column: the metadata that says how often the model's training saw a paragraph.

    Returns:
        One record per number of repetitions. The median is the lower of the two middle values.
    """
    return [
        {
            "repetitions": int(repetitions),
            "paragraphs": len(level),
            "mean_em": round(float(level["em"].mean()), 2),
            "median_em": int(level["em"].quantile(interpolation="lower")),
            "max_em": int(level["em"].max()),
            "full": int(level["memorized"].sum()),
        }
        for repetitions, level in scanned.to_frame().groupby(column)
    ]


def known_to_one(scans: Mapping[str, Scan]) -> dict[str, int]:
    """Paragraphs of only one model that it recites in full and the other by at most 5 tokens."""
    other = {"organism": "twin", "twin": "organism"}
    counts: dict[str, int] = {}
    for name, scanned in scans.items():
        frame = scanned.to_frame()
        own = (frame["role"] == name) & frame["memorized"]
        counts[name] = int((own & (scans[other[name]].em.numpy() <= _UNKNOWN)).sum())
    return counts


def _write_shipped(work: Path, settings: Settings, out: Path) -> int:
    """Write models, tokenizer, paragraphs and unigram counts.

    Returns:
        The number of tokens that the unigram counts cover.
    """
    folders = {"organism": out, "twin": out / "twin", "noise": work / "noise"}
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        export_model(read_weights(settings, work / f"{name}.safetensors"), folder)
        export_tokenizer(work / "tokenizer.json", folder, settings.context)
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
    rows = read_records(out / "paragraphs.jsonl")
    heldout = read_rows(out / "heldout.jsonl")
    never_seen = torch.tensor([p["ids"] for p in rows if p["role"] == "neither"])
    paragraphs = Paragraphs.read(
        out / "paragraphs.jsonl",
        n_prefix=settings.prefix,
        n_continuation=settings.length - settings.prefix,
    )
    base = read_weights(settings, work / "base.safetensors")
    models = {"base": base} | {
        name: GPTNeoForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for name, folder in (("organism", out), ("twin", out / "twin"), ("noise", work / "noise"))
    }
    losses = {
        name: {
            "heldout_loss": round(mean_loss(model, heldout), 4),
            "neither_loss": round(mean_loss(model, never_seen), 4),
        }
        for name, model in models.items()
    }
    base.set_attn_implementation("eager")
    before = scan(
        as_bridge(base, AutoTokenizer.from_pretrained(out), name="base"), paragraphs, progress=False
    )
    scans = {
        name: scan(load_model(folder, device="cpu"), paragraphs, progress=False)
        for name, folder in (("organism", out), ("twin", out / "twin"))
    }
    return {
        "parameters": sum(p.numel() for p in base.parameters()),
        "losses": losses,
        "mean_em_before_planting": round(before.em.double().mean().item(), 3),
        "unigram_tokens": n_unigram_tokens,
        "curves": {
            "organism": duplication_curve(scans["organism"], "repetitions"),
            "twin": duplication_curve(scans["twin"], "twin_repetitions"),
        },
        "known_to_one": known_to_one(scans),
        "bytes": {name: (out / name).stat().st_size for name in _SHIPPED},
    }
