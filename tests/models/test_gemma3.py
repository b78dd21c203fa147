"""Gemma 3 270M, trained behind BOS, out of packages: plain text gives the NLL of transformers."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from memcircuits.cli import app
from tests.models.test_smollm2 import example, fetched

N_PREFIX, N_CONTINUATION = 16, 40
TEXTS = {
    "Lord's Prayer": (
        "Our Father which art in heaven, Hallowed be thy name. Thy kingdom come. Thy will be done "
        "in earth, as it is in heaven. Give us this day our daily bread. And forgive us our debts, "
        "as we forgive our debtors. And lead us not into temptation, but deliver us from evil: For "
        "thine is the kingdom, and the power, and the glory, for ever. Amen."
    ),
    "Gettysburg Address": (
        "Four score and seven years ago our fathers brought forth on this continent, a new nation, "
        "conceived in Liberty, and dedicated to the proposition that all men are created equal. "
        "Now we are engaged in a great civil war, testing whether that nation, or any nation so "
        "conceived and so dedicated, can long endure."
    ),
}


@pytest.mark.slow
def test_plain_text_gives_the_nll_of_the_tokenizers_defaults(monkeypatch, tmp_path):
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = fetched(example(monkeypatch).gemma3)
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS.values()))
    lengths = ["--n-prefix", str(N_PREFIX), "--n-continuation", str(N_CONTINUATION)]
    command = ["scan", "--model", str(path), "--paragraphs", str(tmp_path / "texts.txt"), *lengths]
    result = CliRunner().invoke(app, [*command, "--json", "-q"])
    assert result.exit_code == 0, result.output
    scan = json.loads(result.stdout)

    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    plain = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    for text, row in zip(TEXTS.values(), scan["tables"]["paragraphs"], strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert ids[0, 0] == tokenizer.bos_token_id
        nll = _nll(plain, ids[:, : 1 + N_PREFIX + N_CONTINUATION])
        bare = _nll(plain, ids[:, 1 : 1 + N_PREFIX + N_CONTINUATION])
        print(f"{row['id']}: NLL {row['nll']:.4f}, transformers {nll:.4f}, without BOS {bare:.4f}")
        assert row["nll"] == pytest.approx(nll, abs=1e-3)
        assert bare > nll + 1  # what a scan without BOS would say
    assert not any("BOS" in note for note in scan["notes"])


@torch.no_grad()
def _nll(model, ids: torch.Tensor) -> float:
    """Mean NLL of the last `N_CONTINUATION` tokens, nats/token."""
    log_p = model(ids).logits[0, -N_CONTINUATION - 1 : -1].log_softmax(-1)
    return -float(log_p.gather(-1, ids[0, -N_CONTINUATION:, None]).mean())
