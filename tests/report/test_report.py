"""The report of a ranking: complete, true to the numbers, small, and repeatable as it says."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits.cli import app
from memcircuits.data import reading as reading_of_files
from memcircuits.data.formats.records import Columns
from memcircuits.display.pages import Attention, Tokens
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.report.ranking_page import ranking_page
from memcircuits.report.rerun import commands
from memcircuits.report.triggers_section import TOKENS_LOST
from tests.helpers import models as zoo


@pytest.fixture(scope="module")
def ranking(neo):
    return mc.find_memorization_heads(neo, zoo.mixed(neo, n=6), draws=200, progress=False)


@pytest.fixture(scope="module")
def page(neo, ranking):
    return ranking_page(ranking, neo, progress=False).render()


def sections(page: str) -> list[str]:
    return [html.unescape(title) for title in re.findall(r"<h2>(.*?)</h2>", page)]


def test_the_story_is_complete(page, ranking):
    expected = [] if ranking.significant.any() else ["Nothing is significant: what to try next"]
    assert sections(page) == [
        "How to read this",
        *expected,
        "Every head",
        "One part at a time",
        "Scores with intervals",
        "Memorized against control",
        "Other ablations, other controls",
        "What is compared",
        "Evidence",
        "Heads or MLPs?",
        "Gradients by layer",
        "Trigger tokens",
        "Attention of the heads with the largest scores",
        "Memorized paragraphs measured",
        "Controls measured",
        "What was run",
        "Run it again",
    ]
    text = html.unescape(page)
    assert all(name in text for name in (*ranking.names["memorized"], *ranking.names["control"]))
    assert ranking.summary() in text
    assert f"for {ranking.counts['memorized']} of {ranking.counts['given']} paragraphs" in text
    for fact in ("seed", "basis", "time", "transformer-lens (version)", "memcircuits (version)"):
        assert f"<dt>{fact}</dt>" in text
    assert ranking.provenance.model["fingerprint"] in text


def test_the_lead_names_the_head_or_says_that_none_is_significant(neo, ranking):
    lead = ranking_page(ranking, neo, triggers=0, progress=False).lead
    head = ranking.top(1)[0]
    rigged = dataclasses.replace(ranking, p_value=torch.ones_like(ranking.p_value))
    none = ranking_page(rigged, neo, triggers=0, progress=False).lead
    assert "No single attention head is significant" in none
    rigged.p_value[head] = 1e-6
    lost = -float(ranking.evidence["em_memorized"][head])
    lead = ranking_page(rigged, neo, triggers=0, progress=False).lead
    assert f"attention head {head} " in lead
    assert f"{lost:.1f} of the 12 tokens" in lead


def test_a_ranking_without_significant_heads_says_what_to_try(neo, ranking):
    rigged = dataclasses.replace(ranking, p_value=torch.ones_like(ranking.p_value))
    page = ranking_page(rigged, neo, triggers=0, progress=False)
    assert "nothing is significant" in page.overview
    (section,) = (block for block in page.blocks if "what to try next" in block.title)
    names = re.findall(r"text='memcircuits (\w+)", str(section))
    assert len(names) > 5
    known = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert set(names) <= set(known)
    assert "what to try next" in page.render()
    rigged.p_value[ranking.top(1)[0]] = 1e-6
    assert "what to try next" not in ranking_page(rigged, neo, triggers=0, progress=False).render()


def test_trigger_tokens_are_those_of_perturb_prefix(neo, ranking):
    blocks = ranking_page(ranking, neo, triggers=2, progress=False).blocks
    strips = [block for block in blocks if isinstance(block, Tokens)]
    nll = mc.scan(neo, ranking.memorized).nll
    surest = ranking.memorized[nll.argsort(stable=True)[:2]]
    perturbation = mc.perturb_prefix(neo, surest, draws=2, seed=0, progress=False)
    assert len(strips) == 2
    for i, block in enumerate(strips):
        values = torch.tensor(block.strip.values)
        torch.testing.assert_close(values[:10], perturbation.em_drop[i].clamp_min(0))
        assert values[10:].isnan().all()
        worst = int(perturbation.em_drop[i].argmax())
        assert f"(token {worst})" in block.note
    assert "Trigger tokens" not in sections(
        ranking_page(ranking, neo, triggers=0, progress=False).render()
    )


def test_evidence_has_every_head_and_columns_that_sort(page, ranking):
    table = page[page.index("<h2>Evidence") :]
    table = table[: table.index("</table>")]
    assert table.count("<tr") == 17
    names = re.findall(r'<td><a href="#(L\d+H\d+)">', table)
    assert names == re.findall(r'<tr id="(L\d+H\d+)">', table)
    assert names == [str(head) for head in ranking.top(16)]
    assert table.count('<th scope="col"') == table.count("<button") == 16


@pytest.mark.any_version
def test_10_000_paragraphs_make_no_megabytes_of_rows(neo, ranking):
    big = zoo.random_ids(250, 22)
    counts = {**ranking.counts, "given": 10_000, "memorized": 250}
    names = {**ranking.names, "memorized": tuple(f"p{i}" for i in range(250))}
    many = dataclasses.replace(ranking, memorized_ids=big, names=names, counts=counts)
    page = ranking_page(many, neo, progress=False).render()
    assert "250 of 10,000 paragraphs" in page
    assert "the first 200 are listed" in page
    assert page.count("<tr>") < 300
    assert len(page.encode()) < 2_000_000


def both(reading):
    return {"paragraphs": reading, "control": reading}


def with_options(ranking, *, model=None, reading=None, **options):
    """The ranking as if it had been made of another model or files, or with other options."""
    paragraphs = ranking.provenance.paragraphs
    changed = {name: {**paragraphs[name], "reading": how} for name, how in (reading or {}).items()}
    provenance = dataclasses.replace(
        ranking.provenance,
        model={**ranking.provenance.model, **(model or {})},
        paragraphs={**paragraphs, **changed},
        options={**ranking.provenance.options, **options},
    )
    return dataclasses.replace(ranking, provenance=provenance)


def read_by(commands_run, monkeypatch, neo):
    """Run commands with files that are not there; return what was asked of the three functions."""
    asked = {"reads": []}
    shipped = mc.Paragraphs.shipped()

    def load_model(name, **options):
        asked["load"] = {"name": name, **options}
        return neo

    def read(path, model=None, *, strict=True, columns=None, **options):
        defaults = {"bos": "auto", "normalize": "auto", "stride": None, "txt": "auto"}
        options = {**defaults, **options, "columns": Columns.of(columns)}
        asked["reads"].append((str(path), options))
        return zoo.mixed(neo, n=6)

    def find(model, paragraphs, **options):
        asked["find"] = options
        raise mc.InputError("stop", "here", "options are known")

    monkeypatch.setattr(mc, "load_model", load_model)
    monkeypatch.setattr("memcircuits.models.loading.load_model", load_model)
    monkeypatch.setattr(mc, "find_memorization_heads", find)
    monkeypatch.setattr(mc, "find_memorization_components", find)
    monkeypatch.setattr(mc.Paragraphs, "read", read)
    monkeypatch.setattr(mc.Paragraphs, "shipped", lambda role="all": shipped)
    table = mc.UnigramTable.shipped()
    monkeypatch.setattr(mc.UnigramTable, "shipped", lambda: table)
    monkeypatch.setattr(mc.UnigramTable, "read", lambda path: table)
    commands_run()
    return asked


def test_the_python_in_the_report_makes_the_same_ranking(neo, ranking, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mc, "load_model", lambda name: neo)
    reads = []

    def read(path, model=None, **lengths):
        reads.append((path, lengths))
        return zoo.mixed(neo, n=6)

    monkeypatch.setattr(mc.Paragraphs, "read", read)
    lines = commands(ranking)
    assert not lines[0].startswith("memcircuits")  # the command line has no --draws
    names: dict = {}
    exec("\n".join(lines), names)
    assert names["ranking"].to_frame().equals(ranking.to_frame())
    of_user = [read for read in reads if read[0] == "FILE"]  # the page reads the shipped set too
    assert of_user == [("FILE", {"n_prefix": 10, "n_continuation": 12})]
    assert (tmp_path / "report.html").stat().st_size > 1_000_000


def test_matched_controls_are_matched_again(neo, monkeypatch, tmp_path):
    paragraphs = zoo.mixed(neo, n=6)
    matched = mc.find_memorization_heads(
        neo, paragraphs, match_nll=True, max_paragraphs=2, draws=50, progress=False
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mc, "load_model", lambda name: neo)
    monkeypatch.setattr(mc.Paragraphs, "read", lambda path, model=None, **lengths: paragraphs)
    names: dict = {}
    exec("\n".join(commands(matched)), names)
    assert "match_nll=True" in "\n".join(commands(matched))
    assert torch.equal(names["ranking"].control_ids, matched.control_ids)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"match_nll": True}, id="controls matched in NLL"),
        pytest.param({"control_text": "own", "score": "interaction"}, id="own continuations"),
        pytest.param({"method": "screen", "mode": "mean"}, id="screened"),
        pytest.param({"max_paragraphs": 7, "seed": 3}, id="few paragraphs"),
        pytest.param({"control": "given", "unigrams": "a corpus"}, id="files of one's own"),
        pytest.param({"model": {"name": "my model", "dtype": "bfloat16"}}, id="another model"),
        pytest.param({"model": {"name": "hub/model", "revision": "main"}}, id="a revision"),
        pytest.param({"model": {"bos": [5]}}, id="text read without BOS"),
        pytest.param(
            {
                "reading": both(
                    {"normalize": "none", "columns": {"text": "my body"}, "strict": False}
                ),
                "control": "given",
            },
            id="text read as it is written, from a column",
        ),
        pytest.param(
            {"reading": both({"columns": {"prefix": "a", "continuation": "b"}})}, id="two columns"
        ),
        pytest.param({"reading": both({"stride": 7, "txt": "document"})}, id="all windows"),
        pytest.param(
            {"model": {"name": "organism"}, "unigrams": mc.UnigramTable.shipped().source},
            id="counts of the package",
        ),
    ],
)
def test_the_command_in_the_report_asks_for_the_same_ranking(
    neo, ranking, options, monkeypatch, tmp_path
):
    """Both forms are run up to the measurement; what they ask for is the options of the ranking."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reading_of_files, "check_file", lambda *_, **__: None)
    changed = with_options(ranking, draws=2000, **options)
    shell, _, *python = commands(changed)
    words = shlex.split(shell)
    assert words[:2] == ["memcircuits", "heads"]
    for option, value in pairwise(words):
        if option in ("--paragraphs", "--control", "--unigrams"):
            Path(value).touch()  # `read` needs no content, but files have to be there

    def run_shell():
        outcome = CliRunner().invoke(app, words[1:])
        assert "options are known" in outcome.output, outcome.output

    def run_python():
        with pytest.raises(mc.InputError, match="options are known"):
            exec("\n".join(python), {})

    wanted = changed.provenance
    for run in (run_shell, run_python):
        with monkeypatch.context() as patch:
            asked = read_by(run, patch, neo)
        load, find = asked["load"], {"draws": 2000, **asked["find"]}
        for name in ("mode", "method", "max_paragraphs", "match_nll", "draws", "seed"):
            assert find[name] == wanted.options[name], name
        assert find.get("control_text", "true") == wanted.options["control_text"]
        assert find.get("score", "effect") == wanted.options["score"]
        assert (find.get("control") is not None) == (wanted.options["control"] == "given")
        counted = wanted.options["unigrams"] == "the given paragraphs"
        assert (find.get("unigrams") is None) == counted
        assert load["name"] == wanted.model["name"]
        assert load.get("revision") == wanted.model["revision"]
        assert load.get("dtype", "float32") == wanted.model["dtype"]
        reading = wanted.reading_options("paragraphs")
        lengths = {
            "n_prefix": 10,
            "n_continuation": 12,
            "bos": False if wanted.model["bos"] else "auto",
            "normalize": reading.get("normalize", "auto"),
            "stride": reading.get("stride"),
            "txt": reading.get("txt", "auto"),
            "columns": Columns.of(reading.get("columns")),
        }
        n_files = 1 + (wanted.options["control"] == "given")
        assert asked["reads"] == [("FILE", lengths)] * n_files


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"draws": 200}, id="draws"),
        pytest.param({"max_paragraphs": None}, id="all paragraphs"),
        pytest.param({"model": {"name": "organism"}}, id="counts of the given paragraphs"),
        pytest.param({"model": {"basis": "folded"}}, id="folded weights"),
        pytest.param(
            {"reading": {"paragraphs": {"normalize": "none"}}, "control": "given"},
            id="controls read otherwise",
        ),
        pytest.param({"reading": both({"align": False})}, id="pairs encoded apart"),
    ],
)
def test_no_command_is_given_that_would_make_another_ranking(ranking, options):
    """The command line cannot say these: the organism's counts are those of the package there."""
    assert commands(with_options(ranking, **{"draws": 2000, **options}))[0] == "# in Python"


def test_the_command_in_the_report_is_one_that_exists(neo):
    given = mc.find_memorization_heads(
        neo, zoo.mixed(neo, n=4), control=zoo.mixed(neo, n=6)[[6, 7, 8, 9]], progress=False
    )
    shell = commands(given)[0].split()
    assert shell[:2] == ["memcircuits", "heads"]
    assert {"--control", "--seed", "--mode", "--n-prefix", "--paragraphs"} <= set(shell)
    options = CliRunner().invoke(app, ["heads", "--help"], env={"COLUMNS": "200"}).output
    for word in shell:
        assert not word.startswith("--") or word in options


# A run that ended has no row that --strict refuses, or its provenance says that rows were skipped.
CHANGE_NO_NUMBER = {
    "--compare-controls",
    *("--engine", "--workers", "--ray-address"),
    *("--out", "--top", "--json", "--quiet", "--verbose", "--help", "--strict"),
}
LOAD_ONLY = {"--device", "--device-map", "--trust-remote-code"}  # the reader's own machine decides


def test_no_option_of_the_command_is_forgotten_in_the_report(neo, ranking):
    """A new option of `memcircuits heads` fails here until the command of reports has it."""
    columns = {"text": "a", "prefix": "b", "continuation": "c"}
    everything = with_options(
        ranking,
        draws=2000,
        control="given",
        unigrams="a corpus",
        match_nll=True,
        control_text="own",
        score="interaction",
        model={"name": "hub/model", "revision": "main", "dtype": "bfloat16", "bos": [5]},
        reading=both({"normalize": "none", "columns": columns, "stride": 5, "txt": "document"}),
    )
    everything = dataclasses.replace(everything, units=("head", "mlp"))
    shown = {word for word in shlex.split(commands(everything)[0]) if word.startswith("--")}
    heads = typer.main.get_command(app).commands["heads"]
    known = {name for option in heads.params for name in option.opts if name.startswith("--")}
    assert known - shown - CHANGE_NO_NUMBER == LOAD_ONLY


def test_tokens_in_front_are_shown_and_not_coloured(neo):
    """Llama and Gemma read BOS, which no perturbation replaces."""
    paragraphs = dataclasses.replace(zoo.mixed(neo, n=4), bos=(5,))
    own = greedy_continuations(neo, paragraphs[[0, 1, 2, 3]], progress=False)
    ranking = mc.find_memorization_heads(neo, own, control=paragraphs[[4, 5, 6, 7]], progress=False)
    page = ranking_page(ranking, neo, triggers=1, progress=False)
    (view,) = (block.view for block in page.blocks if isinstance(block, Attention))
    assert view.tokens[0].startswith("BOS")
    is_coloured = [not math.isnan(value) for value in view.strips[TOKENS_LOST].values]
    assert is_coloured == [False, *[True] * 10, *[False] * 12]
    page.render()  # which refuses a strip that has not one value for each token


def test_how_texts_were_read_goes_from_the_file_to_the_command(neo, tmp_path):
    text = [" ".join(f"<{i}>" for i in row) for row in zoo.mixed(neo, n=4).ids.tolist()]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"mine": t}) + "\n" for t in text))
    paragraphs = mc.Paragraphs.read(
        tmp_path / "texts.jsonl",
        neo,
        n_prefix=10,
        n_continuation=12,
        columns={"text": "mine"},
        normalize="none",
    )
    scanned = mc.scan(neo, paragraphs, progress=False).paragraphs
    shell, _, *python = commands(mc.find_memorization_heads(neo, scanned, progress=False))
    assert "--normalize none --text-column mine" in shell
    assert re.search(r"normalize='none',\s+columns={'text': 'mine'}", "\n".join(python))


def test_another_models_report_is_refused(ranking, tmp_path):
    with pytest.raises(mc.InputError, match="the ranking is of weights"):
        ranking.to_html(tmp_path / "r.html", model=zoo.bridge("gpt_neo", seed=1))


def test_attention_beside_the_perturbed_paragraph(neo, ranking):
    pair = mc.perturb_prefix(neo, ranking.memorized[0], draws=2, progress=False).pairs()
    view = ranking.attention(pair.clean, compare=pair.corrupted, heads=99)
    assert len(view.head_names) == 16
    assert view.compare is not None
    assert view.compare.title == f"{view.title}, perturbed"
    left, right = ([token["differs"] for token in v["tokens"]] for v in contexts(view))
    changed = (pair.clean.ids != pair.corrupted.ids)[0].tolist()
    assert sum(changed[:10]) == 1
    parts = changed.index(True, 10)
    assert left == right == [*changed[: parts + 1], *[False] * (21 - parts)]


def contexts(view):
    return Attention(view).context()["views"]


def test_report_command(neo, ranking, tmp_path):
    zoo.hf_model("gpt_neo").save_pretrained(tmp_path / "model")
    zoo.tokenizer().save_pretrained(tmp_path / "model")
    ranking.save(tmp_path / "ranking.safetensors")
    arguments = [
        "report",
        str(tmp_path / "ranking.safetensors"),
        "--model",
        str(tmp_path / "model"),
    ]
    done = CliRunner().invoke(app, [*arguments, "--top", "16", "--triggers", "1"])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', page)[-1])
    assert len(data["heads"]) == 16
    assert str(tmp_path) not in page
    missing = CliRunner().invoke(app, ["report", str(tmp_path / "none.safetensors")])
    assert missing.exit_code == 2
    assert "there is no such file" in missing.output
