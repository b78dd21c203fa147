"""The map of a document, position by position against every window decoded by transformers."""

import html
import json
import re
import shlex

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits.cli import app
from memcircuits.measure.document.document_map import DocumentMap
from memcircuits.measure.document.spans import largest_at_tokens, runs
from memcircuits.organism import DATA
from tests.helpers import models as zoo
from tests.helpers.decoding import PlainModel, em_of
from tests.helpers.document import N_PASSAGES, long_map, words

pytestmark = pytest.mark.any_version

LENGTHS = {"n_prefix": 10, "n_continuation": 12, "progress": False}


@pytest.fixture(scope="module")
def text(neo):
    """Paragraphs that the tiny model recites, between paragraphs that it does not."""
    return words(zoo.mixed(neo, n=3)[[3, 0, 4, 1, 2, 5]])


def windows_of(text, stride):
    """Token ids of every window, and the first character of each word and the one behind it."""
    places = [(int(m[1]), m.start(), m.end()) for m in re.finditer(r"<(\d+)>", text)]
    ids = torch.tensor([place[0] for place in places])
    starts = sorted({*range(0, len(ids) - 21, stride), len(ids) - 22})
    em = {i: recited_from(ids, i) for i in starts}
    nearly = [i for i in starts if max(6, 12 - 2 * stride) <= em[i] < 12] if stride > 1 else []
    near = {i + k for i in nearly for k in range(-max(stride - 1, 12 - em[i]), stride)}
    starts = sorted({*starts, *(near & {*range(len(ids) - 21)})})
    return torch.stack([ids[i : i + 22] for i in starts]), starts, places


def recited_from(ids, start):
    """EM of one window, by transformers, without tokens in front."""
    window = ids[None, start : start + 22]
    return int(em_of(PlainModel("gpt_neo").decode(window[:, :10], 12), window[:, 10:]))


@pytest.mark.parametrize("stride", [1, 4, 11])
def test_recited_characters_are_those_of_brute_force(neo, text, stride):
    mapped = mc.document_map(neo, text, stride=stride, **LENGTHS)
    windows, starts, places = windows_of(text, stride)
    em = em_of(PlainModel("gpt_neo").decode(windows[:, :10], 12), windows[:, 10:])
    assert mapped.starts.tolist() == starts
    assert mapped.measures["em"].tolist() == em.tolist()
    recited = np.zeros(len(text), dtype=bool)
    for start, n in zip(starts, em.tolist(), strict=True):
        if n == 12:
            recited[places[start + 10][1] : places[start + 21][2]] = True
    marked = np.zeros(len(text), dtype=bool)
    for span in mapped.spans:
        assert not marked[span.start - 1]  # the spans are as long as can be
        marked[span.start : span.end] = True
    gaps = [i for i, c in enumerate(text) if c.isspace()]  # between words of a span, or outside
    assert (marked == recited)[np.setdiff1d(np.arange(len(text)), gaps)].all()
    assert mapped.recited.sum() == sum(recited[place[1]] for place in places)
    assert 0 < mapped.recited_share < 1
    n_windows = [
        sum(
            n == 12 and span.first_token <= s + 10 < span.first_token + span.n_tokens
            for s, n in zip(starts, em.tolist(), strict=True)
        )
        for span in mapped.spans
    ]
    assert [span.n_windows for span in mapped.spans] == n_windows


def test_planted_paragraphs_of_the_organism_are_marked_and_controls_are_not():
    """Position by position, by transformers' own forward passes and the words of the text."""
    organism, tokenizer = mc.load_model(), AutoTokenizer.from_pretrained(DATA)
    planted = mc.scan(organism, mc.Paragraphs.shipped("planted")[-6:], progress=False).memorized
    control = mc.Paragraphs.shipped("control")[:2]
    parts = [*control[0].texts(tokenizer), *planted[:2].texts(tokenizer)]
    text = "\n\n".join([*parts, *control[1].texts(tokenizer)])
    mapped = mc.document_map(organism, text, stride=2, progress=False)

    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    model = AutoModelForCausalLM.from_pretrained(DATA).eval()
    expected = np.zeros(len(ids), dtype=bool)
    for start in {*range(0, len(ids) - 99, 2), len(ids) - 100}:
        window = ids[start : start + 100]
        with torch.no_grad():
            greedy = model(window[None]).logits[0, 49:99].argmax(-1)
        if torch.equal(greedy, window[50:]):
            expected[start + 50 : start + 100] = True
    assert (mapped.recited == expected).all()
    assert len(mapped.spans) == 2
    halves = [tokenizer.decode(row).strip() for row in planted[:2].continuation]
    for span, part, half in zip(mapped.spans, parts[1:], halves, strict=True):
        assert half in text[span.start : span.end]
        place = text.index(part)  # nothing of a control is marked
        assert place <= span.start < span.end <= place + len(part)


def test_short_texts_have_a_window_at_every_token_and_others_say_what_may_be_missed(
    neo, monkeypatch
):
    text = words(mc.Paragraphs(zoo.random_ids(3, 22), 10))
    short = mc.document_map(neo, text, **LENGTHS)
    assert short.starts.tolist() == list(range(3 * 22 - 21))
    assert not any("Windows begin" in note for note in short.notes)
    monkeypatch.setattr("memcircuits.measure.document.mapping.SHORT_TEXT", 65)
    long = mc.document_map(neo, text, **LENGTHS)
    assert long.stride == 10
    assert any("one of 31 or more always" in note for note in long.notes)


def test_a_map_goes_on_where_it_stopped(neo, tmp_path, monkeypatch):
    text = words(mc.Paragraphs(zoo.random_ids(30, 22), 10))
    monkeypatch.setattr("memcircuits.measure.document.mapping._WINDOWS_PER_ROW", 16)
    whole = mc.document_map(
        neo, text, folder=tmp_path / "whole", batch_size=8, stride=10, **LENGTHS
    )
    parts = sorted((tmp_path / "whole" / "parts").iterdir())
    assert len(parts) == 5  # four rows of windows, and the one that ends with the text
    before = {part.name: part.stat().st_mtime_ns for part in parts}
    parts[2].unlink()
    again = mc.document_map(
        neo, text, folder=tmp_path / "whole", batch_size=8, stride=10, **LENGTHS
    )
    after = {part.name: part.stat().st_mtime_ns for part in parts}
    assert [name for name in before if before[name] != after[name]] == [parts[2].name]
    pd.testing.assert_frame_equal(again.to_frame(), whole.to_frame())
    with pytest.raises(mc.InputError, match="holds a scan with other"):
        mc.document_map(neo, text + " <1>", folder=tmp_path / "whole", stride=10, **LENGTHS)


def test_windows_have_the_numbers_of_a_scan_behind_the_same_tokens(neo, text):
    """With tokens in front, a sampler and decoding; the text begins with the token in front."""
    text = "<0> " + text
    sampler = mc.Sampler(temperature=0.7, top_k=30)
    options = {"sampler": sampler, "near_verbatim": True}
    mapped = mc.document_map(neo, text, stride=4, bos=True, **options, **LENGTHS)
    windows, starts, _ = windows_of(text, 4)
    paragraphs = mc.Paragraphs.from_tokens(windows, n_prefix=10, bos=[0])
    expected = mc.scan(neo, paragraphs, progress=False, **options)
    assert mapped.starts.tolist() == starts
    for name in ("em", "longest_match", "similarity", "loose_match", "extraction_strength"):
        assert mapped.measures[name].tolist() == getattr(expected, name).tolist()
    for name in ("nll", "log_prob", "sampled_log_prob"):
        torch.testing.assert_close(mapped.measures[name], getattr(expected, name))
    assert mapped.probability_measure == "sampled_log_prob"
    assert mapped.provenance.paragraphs["windows"]["hash"] == paragraphs.hash
    plain = mc.document_map(neo, text, stride=4, **LENGTHS)
    assert plain.measures["em"].tolist() != mapped.measures["em"].tolist()


def test_what_was_normalised_is_noted(neo, text):
    marked = text.replace("\n", "\r\n")
    mapped = mc.document_map(neo, marked, stride=4, **LENGTHS)
    assert mapped.text == text
    assert any("5 line ends" in note for note in mapped.notes)
    assert mc.document_map(neo, marked, normalize="none", **LENGTHS).text == marked


def test_a_passage_between_windows_is_found():
    """A recited paragraph of the organism that none of the first windows begins with."""
    model = mc.load_model("organism")
    paragraphs = mc.Paragraphs.shipped()
    most = max(paragraphs.metadata["repetitions"])
    recited = paragraphs[[paragraphs.metadata["repetitions"].index(most)]].texts(model)[0]
    before, behind = mc.Paragraphs.shipped("control")[:2].texts(model)
    text = f"{before} {recited} {behind}"
    sparse = mc.document_map(model, text, stride=37, progress=False)
    every = mc.document_map(model, text, stride=1, progress=False)
    assert len(sparse.starts) < len(every.starts)
    assert (every.measures["em"][every.starts % 37 == 0] < 50).all()
    assert len(every.spans) == 1
    assert sparse.spans == every.spans


def test_documents_that_are_too_short_are_refused(neo):
    with pytest.raises(mc.InputError, match=r"text has 2 tokens; .* = 22"):
        mc.document_map(neo, "<1> <2>", **LENGTHS)
    with pytest.raises(mc.InputError, match="stride: 0"):
        mc.document_map(neo, "<1> <2>", stride=0, **LENGTHS)


def test_the_largest_value_of_any_window():
    values = np.array([3.0, 1.0, 7.0, 2.0])
    starts, lengths = np.array([0, 2, 3, 8]), np.array([4, 4, 2, 0])
    largest = largest_at_tokens(starts, lengths, values, 10)
    by_hand = [3, 3, 3, 7, 7, 1, np.nan, np.nan, np.nan, np.nan]
    np.testing.assert_array_equal(largest, by_hand)
    assert runs(np.array([1, 1, 0, 0, 1], dtype=bool)) == [(0, 2), (4, 5)]
    assert runs(np.zeros(3, dtype=bool)) == []


def test_a_map_is_saved_and_drawn(tmp_path):
    mapped = long_map(20_000)
    loaded = DocumentMap.load(mapped.save(tmp_path / "map.safetensors"))
    assert loaded.spans == mapped.spans
    pd.testing.assert_frame_equal(loaded.to_frame(), mapped.to_frame())
    longest = mapped.spans_frame().iloc[0]
    assert longest["n_tokens"] == max(span.n_tokens for span in mapped.spans)
    assert mapped.text[longest["start"] : longest["end"]] == longest["text"]
    assert mapped.text.count("\n", 0, longest["start"]) + 1 == longest["line"]
    assert len(mapped.figure().data) == 2
    with pytest.raises(mc.InputError, match="choose one of em"):
        mapped.at_tokens("similarity")


def test_the_command_writes_the_page_and_the_numbers(tmp_path):
    prose = " ".join(
        mc.Paragraphs.shipped("control")[:2].texts(AutoTokenizer.from_pretrained(DATA))
    )
    (tmp_path / "book.txt").write_text(prose)
    arguments = ["map", str(tmp_path / "book.txt"), "--out", str(tmp_path / "map.html"), "--json"]
    result = CliRunner().invoke(app, [*arguments, "-q"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["tables"]["spans"] == []
    written = {"book.txt", "map.html", "map.csv", "map.json", "map.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == written
    content = json.loads((tmp_path / "map.json").read_text())
    assert len(content["windows"]) == json.loads(result.stdout)["values"]["n_windows"]
    refused = CliRunner().invoke(app, ["map", str(tmp_path / "no.txt"), "-q"])
    assert refused.exit_code == 2
    assert "FILE: no.txt; there is no such file" in refused.stderr
    refused = CliRunner().invoke(app, [*arguments[:3], "map.pdf"])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"normalize": "none", "bos": True, "near_verbatim": True}, id="reading"),
        pytest.param({"sampler": mc.Sampler(0.5, 40, 0.9), "stride": 3}, id="sampler"),
    ],
)
def test_the_command_on_the_page_asks_for_the_same_map(neo, text, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my text.txt").write_text(text)
    mapped = mc.document_map(neo, "my text.txt", **{"stride": 4, **LENGTHS, **options})
    page = html.unescape(mapped.to_html(tmp_path / "map.html").read_text())
    command = next(line for line in page.splitlines() if "memcircuits map" in line)
    words = shlex.split(
        re.search(r"memcircuits map .*?--out map.html( --near-verbatim)?", command)[0]
    )
    asked = {}

    def document_map(model, file, **given):
        asked.update(given)
        raise mc.InputError("stop", file.name, "options are known")

    monkeypatch.setattr(mc, "document_map", document_map)
    monkeypatch.setattr("memcircuits.models.loading.load_model", lambda name, **_: neo)
    result = CliRunner().invoke(app, words[1:])
    assert "my text.txt" in result.output
    wanted = {"stride": 4, "bos": "auto", "normalize": "auto", "sampler": None, **options}
    wanted |= {name: LENGTHS[name] for name in ("n_prefix", "n_continuation")}
    wanted.setdefault("near_verbatim", False)
    assert {name: asked[name] for name in wanted} == wanted


def test_the_page_of_a_long_map_has_a_link_to_each_passage(tmp_path):
    mapped = long_map(60_000)
    page = mapped.to_html(tmp_path / "map.html").read_text()
    assert len(mapped.spans) == N_PASSAGES
    for index in range(1, N_PASSAGES + 1):
        assert page.count(f'href="#p{index}"') == page.count(f'id="p{index}"') == 1
