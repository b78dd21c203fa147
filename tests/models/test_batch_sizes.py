"""How many rows a batch has: by the budget that was given, else by the machine."""

from types import SimpleNamespace

import pytest
import torch

from memcircuits.models import batching
from memcircuits.models.batching import CPU_BATCH, CPU_LAYER, rows_that_fit

N_POS, N_LOGITS = 99, 50
LAYER = N_POS * (6 * 768 + 3 * 3072) * 4 + 3 * 12 * N_POS**2 * 4
LOGITS = 3 * N_LOGITS * 50257 * 4


@pytest.fixture
def adapter(monkeypatch):
    """The shape of GPT-Neo 125M, on a CPU with plenty of memory."""
    monkeypatch.setattr(batching, "free_memory", lambda: 64 * 2**30)
    return SimpleNamespace(
        d_model=768, d_vocab=50257, n_heads=12, n_layers=12, dtype=torch.float32,
        device=torch.device("cpu"), model=SimpleNamespace(cfg=SimpleNamespace(d_mlp=3072)),
    )  # fmt: skip


def test_a_cpu_bounds_one_layer_and_the_whole_batch_each(adapter):
    """Logits of a vocabulary of 50,257 count against the whole, not against one layer's limit."""
    rows = rows_that_fit(adapter, N_POS, N_LOGITS)
    assert rows == CPU_BATCH // (LAYER + LOGITS) == 7
    assert rows_that_fit(adapter, N_POS, 0) == CPU_LAYER // LAYER == 9


def test_a_backward_pass_holds_every_layer(adapter):
    rows = rows_that_fit(adapter, N_POS, N_LOGITS, backward=True)
    assert rows == CPU_BATCH // (12 * LAYER + LOGITS) == 2


def test_a_given_budget_is_all_that_counts(adapter):
    assert rows_that_fit(adapter, N_POS, N_LOGITS, 2**30) == 2**30 // (LAYER + LOGITS)
    assert rows_that_fit(adapter, N_POS, N_LOGITS, 1) == 1
