"""When recitation forms: exact match at the checkpoints that a planting keeps.

Until its first mistake greedy decoding equals teacher forcing, so one forward pass of a paragraph
gives its exact match.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import GPTNeoForCausalLM

from memcircuits.organism_build.model import read_weights
from memcircuits.organism_build.records import TextRecord
from memcircuits.organism_build.settings import Record, Settings


@torch.no_grad()
def recitation(
    model: GPTNeoForCausalLM, rows: Int[Tensor, "paragraph pos"], n_prefix: int, batch: int = 128
) -> tuple[Int[Tensor, " paragraph"], Float[Tensor, " paragraph"]]:
    """Exact match (tokens) and mean loss (nats/token) of the continuations, on the CPU."""
    em, nll = [], []
    for part in rows.to(model.device).split(batch):
        logits = model(part, use_cache=False).logits[:, n_prefix - 1 : -1].float()
        continuation = part[:, n_prefix:]
        matches = logits.argmax(-1) == continuation
        em.append(matches.long().cumprod(1).sum(1))
        losses = functional.cross_entropy(logits.transpose(1, 2), continuation, reduction="none")
        nll.append(losses.mean(1))
    return torch.cat(em).cpu(), torch.cat(nll).cpu()


def recitation_over_steps(
    checkpoints: Sequence[Path], paragraphs: Sequence[TextRecord], settings: Settings, device: str
) -> list[Record]:
    """Mean exact match and loss of each role and number of repetitions, at each checkpoint.

    Args:
        checkpoints: files `<stage>-step-<step>.safetensors`, in order.
        paragraphs: all paragraphs.
        settings: length of the prefix.
        device: where the models run.
    """
    rows = torch.tensor([p["ids"] for p in paragraphs])
    frame = pd.DataFrame(paragraphs)[["role", "repetitions", "twin_repetitions"]]
    frame["repetitions"] = frame[["repetitions", "twin_repetitions"]].max(axis=1)
    records: list[Record] = []
    for checkpoint in checkpoints:
        model = read_weights(settings, checkpoint, device)
        em, nll = recitation(model, rows, settings.prefix)
        means = frame.assign(em=em.numpy(), nll=nll.double().numpy()).groupby(
            ["role", "repetitions"], sort=False
        )[["em", "nll"]]
        step = int(checkpoint.stem.rsplit("-", 1)[1])
        levels = means.mean().round(3).reset_index().to_dict("records")
        records.append({"step": step, "levels": levels})
    return records
