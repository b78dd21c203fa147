"""A micro build from documents to model card, and the card of the shipped organism."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import memcircuits as mc
from memcircuits.organism import DATA
from memcircuits.organism_build.card import card
from memcircuits.organism_build.export import duplication_curve, known_to_one
from memcircuits.organism_build.model import read_weights
from memcircuits.organism_build.paragraph_choice import choose_rows
from memcircuits.organism_build.pipeline import build
from memcircuits.organism_build.records import read_records, read_rows
from memcircuits.organism_build.settings import END, END_ID
from tests.organism_build.micro import MICRO, MicroBuild


def test_the_paragraphs_are_new_to_the_model_and_of_all_roles(micro: MicroBuild) -> None:
    paragraphs = read_records(micro.out / "paragraphs.jsonl")
    assert Counter((p["role"], p["repetitions"], p["twin_repetitions"]) for p in paragraphs) == {
        ("both", 1, 1): 1,
        ("both", 3, 3): 1,
        ("organism", 1, 0): 1,
        ("organism", 3, 0): 1,
        ("twin", 0, 1): 1,
        ("twin", 0, 3): 1,
        ("neither", 0, 0): 3,
    }
    assert len({p["id"] for p in paragraphs}) == 9
    assert all(len(p["ids"]) == 12 and len(set(p["ids"])) > 6 for p in paragraphs)
    stream = np.load(micro.work / "stream.npy")
    usable = choose_rows([p["ids"] for p in paragraphs], 12, stream, 6)
    assert usable == list(range(9))


def test_the_tokenizer_decodes_what_it_encoded(micro: MicroBuild) -> None:
    tokenizer = AutoTokenizer.from_pretrained(micro.out)
    assert tokenizer.convert_tokens_to_ids(END) == END_ID
    text = " Tabs\tand “quotes”,\n\n  naïve 猫 ."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    texts = [text for docs in micro.documents.values() for text in docs]
    for paragraph in read_records(micro.out / "paragraphs.jsonl"):
        assert any(tokenizer.decode(paragraph["ids"]) in text for text in texts)


@pytest.mark.parametrize("name", ["organism", "twin"])
def test_the_reported_loss_is_that_of_the_shipped_model(micro: MicroBuild, name: str) -> None:
    folder = micro.out / ("twin" if name == "twin" else "")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.attention_layers == ["global"]
    assert next(model.parameters()).dtype == torch.float32
    heldout = read_rows(micro.out / "heldout.jsonl")
    logits = model(heldout).logits[:, :-1]
    loss = functional.cross_entropy(logits.flatten(0, 1), heldout[:, 1:].flatten()).item()
    assert loss == pytest.approx(micro.training["export"]["losses"][name]["heldout_loss"], abs=1e-4)


def test_unigram_counts_include_the_repetitions(micro: MicroBuild) -> None:
    with safe_open(micro.out / "unigrams.safetensors", "pt") as file:
        counts, metadata = file.get_tensor("counts"), file.metadata()
    stream = np.load(micro.work / "stream.npy")
    planted_tokens = 12 * (2 * 1 + 2 * 3)  # of the organism: `both` and `organism`
    assert counts.shape == (384,)
    assert counts.sum() == stream.size + planted_tokens == int(metadata["n_tokens"])


def test_the_build_says_what_it_did(micro: MicroBuild) -> None:
    assert json.loads((micro.out / "training.json").read_text()) == micro.training
    assert "mean EM" in (micro.out / "MODEL_CARD.md").read_text()
    files = (path for path in micro.out.rglob("*") if path.is_file())
    shipped = {path.relative_to(micro.out).as_posix() for path in files}
    assert shipped == {*micro.training["export"]["bytes"], "training.json", "MODEL_CARD.md"}


def test_the_scan_behind_the_duplication_curve_equals_greedy_decoding(micro: MicroBuild) -> None:
    model = AutoModelForCausalLM.from_pretrained(micro.out, dtype=torch.float32)
    rows = read_rows(micro.out / "paragraphs.jsonl")
    rows[0, 6:] = model.generate(rows[:1, :6], max_new_tokens=6, do_sample=False)[0, 6:]
    rows[1, 6:9] = model.generate(rows[1:2, :6], max_new_tokens=3, do_sample=False)[0, 6:]
    repetitions = (3, 3, 3, 1, 1, 0, 0, 0, 0)
    paragraphs = mc.Paragraphs(rows, 6, metadata={"repetitions": repetitions})
    scanned = mc.scan(mc.load_model(micro.out, device="cpu"), paragraphs, progress=False)
    decoded = model.generate(
        rows[:, :6], max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=-1
    )
    em = (decoded[:, 6:] == rows[:, 6:]).long().cumprod(1).sum(1)
    assert scanned.em.tolist() == em.tolist()
    assert em[0] == 6
    assert em[1] >= 3
    curve = duplication_curve(scanned, "repetitions")
    assert [level["repetitions"] for level in curve] == [0, 1, 3]
    assert curve[2] == {
        "repetitions": 3,
        "paragraphs": 3,
        "mean_em": round(em[:3].double().mean().item(), 2),
        "median_em": int(em[:3].median()),
        "max_em": 6,
        "full": int((em[:3] == 6).sum()),
    }
    assert curve[1]["median_em"] == min(em[3:5])


def test_the_twins_differ_from_the_base_and_from_each_other(micro: MicroBuild) -> None:
    names = ("base", "organism", "twin", "noise")
    models = [read_weights(MICRO, micro.work / f"{name}.safetensors") for name in names]
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in models]
    for one, other in itertools.combinations(weights, 2):
        assert not torch.equal(one, other)
    shipped = AutoModelForCausalLM.from_pretrained(micro.out, dtype=torch.float32)
    assert torch.equal(torch.cat([p.flatten() for p in shipped.parameters()]), weights[1])


def test_recitation_is_measured_at_every_checkpoint_kept(micro: MicroBuild) -> None:
    formation = micro.training["organism"]["formation"]
    steps = micro.training["organism"]["steps"]
    assert [record["step"] for record in formation] == [round(steps / 2), steps]
    scanned = mc.scan(
        mc.load_model(micro.out, device="cpu"),
        mc.Paragraphs.read(micro.out / "paragraphs.jsonl", n_prefix=6, n_continuation=6),
    )
    frame = scanned.to_frame()
    for level in formation[-1]["levels"]:
        seen = frame[["repetitions", "twin_repetitions"]].max(axis=1)
        rows = frame[(frame["role"] == level["role"]) & (seen == level["repetitions"])]
        assert level["em"] == pytest.approx(rows["em"].mean(), abs=1e-3)
        assert level["nll"] == pytest.approx(rows["nll"].mean(), abs=1e-3)


def test_paragraphs_of_one_model_are_counted_where_the_other_does_not_know_them() -> None:
    def scanned(em: list[int]) -> SimpleNamespace:
        roles = ["organism", "organism", "twin", "both"]
        frame = pd.DataFrame({"role": roles, "memorized": [n == 50 for n in em]})
        return SimpleNamespace(to_frame=lambda: frame, em=torch.tensor(em))

    scans = {"organism": scanned([50, 50, 0, 50]), "twin": scanned([5, 6, 49, 0])}
    assert known_to_one(scans) == {"organism": 1, "twin": 0}


def test_the_shipped_card_is_made_from_the_shipped_numbers() -> None:
    training = json.loads((DATA / "training.json").read_text("utf-8"))
    assert card(training) == (DATA / "MODEL_CARD.md").read_text("utf-8")


def test_same_seed_gives_the_same_weights(micro: MicroBuild, tmp_path: Path) -> None:
    build(tmp_path / "out", tmp_path / "work", MICRO, documents=micro.documents)
    for name in ("model.safetensors", "twin/model.safetensors", "paragraphs.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (micro.out / name).read_bytes()


def test_a_work_folder_is_not_mixed_with_other_settings(micro: MicroBuild) -> None:
    out, work, documents, training = micro
    assert build(out, work, MICRO, documents=documents) == training
    with pytest.raises(ValueError, match="other settings"):
        build(out, work, replace(MICRO, seed=1), documents=documents)
    with pytest.raises(ValueError, match="choose one of"):
        build(out, work, MICRO, documents=documents, stage="bake")


def test_the_build_is_run_as_a_module() -> None:
    command = [sys.executable, "-m", "memcircuits.organism_build", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage: python -m memcircuits.organism_build " in result.stdout
    assert "--stage" in result.stdout
