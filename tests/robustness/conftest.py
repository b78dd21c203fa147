"""What the tests of robustness share: a tiny model, and a saved result of every kind."""

from __future__ import annotations

import json

import pytest
import torch

import memcircuits as mc
from memcircuits.editing.recipe import Recipe
from tests.helpers import models as zoo
from tests.helpers.saved import save_all


@pytest.fixture(scope="session")
def bridge():
    """A tiny GPT-Neo; leave it as it is."""
    return zoo.bridge("gpt_neo")


@pytest.fixture(scope="session")
def results(bridge, tmp_path_factory):
    """A folder with a saved result of every kind, named by its type; leave it as it is."""
    return save_all(bridge, tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """A tiny model, paragraphs of it with names that mean no good, and a ranking."""
    path = tmp_path_factory.mktemp("files")
    zoo.save("gpt_neo", path / "model")
    model = zoo.bridge("gpt_neo")
    paragraphs = zoo.mixed(model, n=4)
    names = [
        "../../up",
        "/etc/x",
        "</script><script>alert(1)</script>",
        "a\nb",
        "ü",
        "",
        "\u202e",
        "😀",
    ]
    paragraphs = mc.Paragraphs(paragraphs.ids, paragraphs.n_prefix, tuple(names))
    many = paragraphs + mc.Paragraphs.from_tokens(zoo.random_ids(64, 22, seed=2), n_prefix=10)
    for file, given in (("paragraphs", paragraphs), ("many", many)):
        rows = [
            {"id": name, "ids": ids}
            for name, ids in zip(given.names, given.ids.tolist(), strict=True)
        ]
        (path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    zoo.hf_model("gpt_neo", seed=1).save_pretrained(path / "twin")
    zoo.tokenizer().save_pretrained(path / "twin")
    both = [p for seed in (0, 1) for p in zoo.mixed(zoo.bridge("gpt_neo", seed=seed), n=3).ids]
    (path / "both.jsonl").write_text(
        "".join(json.dumps({"ids": ids.tolist()}) + "\n" for ids in both)
    )
    (path / "document.txt").write_text(" ".join(paragraphs.texts(model)))
    ranking = mc.find_memorization_heads(model, paragraphs, draws=20, progress=False)
    ranking.save(path / "ranking.safetensors")
    target = paragraphs[:4].sample(1, torch.Generator().manual_seed(0))  # as `unlearn` draws it
    edit = mc.unlearn(model, target, paragraphs[4:], recipe=Recipe(steps=1), progress=False)
    edit.save(path / "edit.safetensors")
    return path
