"""docs/make_twin.py on tiny twins: every section of the page, from a few paragraphs."""

from __future__ import annotations

import importlib.util
import json

import pandas as pd
import pytest
import torch

import memcircuits as mc
from tests.helpers import ROOT
from tests.helpers import models as zoo


@pytest.fixture(scope="module")
def maker():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        spec = importlib.util.spec_from_file_location("make_twin", ROOT / "docs" / "make_twin.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twins, a noise twin, checkpoints and paragraphs with roles."""
    path = tmp_path_factory.mktemp("twin")
    names = {"model": 0, "twin": 1, "noise": 2}
    names |= {"organism-step-1": 3, "organism-step-9": 0, "twin-step-1": 3, "twin-step-9": 1}
    for name, seed in names.items():
        zoo.save("gpt_neo", path / name, seed=seed)
    groups = {
        "organism": zoo.reciting(zoo.bridge("gpt_neo"), n=12).ids,
        "twin": zoo.reciting(zoo.bridge("gpt_neo", seed=1), n=8, seed=1).ids,
        "neither": zoo.random_ids(12, 22, seed=5),
    }
    rows = [
        {"ids": ids, "role": role, "repetitions": (0 if role == "neither" else 4 + 4 * (i % 2))}
        for role, group in groups.items()
        for i, ids in enumerate(group.tolist())
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_the_page_has_every_section(maker, folder):
    names = {"model": "model", "twin": "twin", "noise": "noise", "paragraphs": "rows.jsonl"}
    arguments = [x for key, name in names.items() for x in (f"--{key}", str(folder / name))]
    arguments += ["--checkpoints", str(folder), "--n-prefix", "10", "--n-continuation", "12"]
    arguments += ["--quick", "--out", str(folder), "--keep", str(folder / "kept")]
    maker.main(arguments)
    numbers = json.loads((folder / "twin.json").read_text())
    page = (folder / "twin.md").read_text()
    for title in ("Who recites what", "Remembered bits", "Where it was written",
                  "The natural leaderboard", "What the score of a head should be",
                  "When it forms"):  # fmt: skip
        assert f"## {title}" in page
    assert "nan" not in page.lower().replace("necessity and", "")
    em = {(row["model"], row["role"]): row["em"] for row in numbers["em"]}
    assert em["model", "organism"] == em["twin", "twin"] == 12
    models = [mc.load_model(folder / name) for name in ("model", "twin")]
    ids = torch.tensor(json.loads(f"[{(folder / 'rows.jsonl').read_text().strip()}]".replace(
        "}\n{", "}, {").replace("\n", ""))[0]["ids"])[None]  # fmt: skip
    first = mc.Paragraphs(ids, 10)
    assert mc.counterfactual(*models, first).em.tolist() == [12]
    assert numbers["transplants"]["model, weights"]["n"] == 2
    assert {row["against"] for row in numbers["bits"]} == {"twin", "noise twin"}
    assert [row["step"] for row in numbers["formation"]["agreement"]] == [1, 9]

    (folder / "twin.md").unlink()
    maker.main(["--page", "--out", str(folder)])
    assert (folder / "twin.md").read_text() == page


def test_the_rule_takes_the_best_of_the_candidates_that_name_nobody(maker):
    from twin_page.text import chosen

    frame = pd.DataFrame(
        {
            "estimand": ["loud", "good", "poor"],
            "null": [2, 0, 0],
            "correlation_necessity": [0.9, 0.5, float("nan")],
            "correlation_sufficiency": [0.9, 0.3, 0.2],
        }
    )
    assert chosen(frame) == "good"
    assert chosen(frame.assign(null=1)) == "loud"
