"""The command line as a user meets it: exit codes, streams, files, speed of --help."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from memcircuits.base.errors import InputError
from memcircuits.cli import app
from memcircuits.commands import output
from memcircuits.commands.common import errors_in_one_line
from memcircuits.results.result import Result
from tests.helpers import models as zoo

runner = CliRunner()
COMMAND_SCHEMA = json.loads(Path(output.__file__).with_name("output.schema.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model in a folder, and a file of paragraphs that it recites or not."""
    path = tmp_path_factory.mktemp("tiny")
    zoo.hf_model("gpt_neo").save_pretrained(path / "model")
    zoo.tokenizer().save_pretrained(path / "model")
    paragraphs = zoo.mixed(zoo.bridge("gpt_neo"), n=5)
    with (path / "paragraphs.jsonl").open("w") as file:
        for name, ids in zip(paragraphs.names, paragraphs.ids.tolist(), strict=True):
            file.write(json.dumps({"id": name, "ids": ids}) + "\n")
    return path


@pytest.fixture(scope="module")
def options(folder):
    return [
        "--model",
        str(folder / "model"),
        "--paragraphs",
        str(folder / "paragraphs.jsonl"),
        "--n-prefix",
        "10",
        "--n-continuation",
        "12",
    ]


def answer_of(result):
    """What a command printed with --json, which has the published form."""
    data = json.loads(result.stdout)
    jsonschema.validate(data, COMMAND_SCHEMA)
    return data


def test_heads_prints_a_table_and_writes_three_files(options, tmp_path):
    result = runner.invoke(app, ["heads", *options, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "significant" in result.stdout
    assert result.stdout.splitlines()[0].split()[:3] == ["rank", "head", "score"]
    assert len([line for line in result.stdout.splitlines() if line.strip()[:1].isdigit()]) >= 10
    report = (tmp_path / "out" / "report.html").read_text()
    ranking = json.loads((tmp_path / "out" / "ranking.json").read_text())
    assert len(ranking["heads"]) == 16
    assert ranking["counts"]["memorized"] == 5
    assert "connect-src" in report
    assert str(tmp_path) not in report
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert written == ["ranking.json", "ranking.safetensors", "report.html"]


def test_heads_ranks_mlps_and_compares_controls(options, tmp_path):
    out = str(tmp_path / "out")
    arguments = ["heads", *options, "--units", "head,mlp", "--compare-controls", "--out", out]
    result = runner.invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    tables = answer_of(result)["tables"]
    assert len(tables["heads"]) == 20
    assert {row["name"] for row in tables["heads"]} >= {"L0.mlp", "L3H1"}
    assert [row["level"] for row in tables["levels"]] == ["head", "mlp", "all"]
    assert len(tables["controls"]) == 4
    assert "Other controls" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    refused = runner.invoke(app, ["heads", *options, "--units", "heads", "--out", out])
    assert refused.exit_code == 2
    assert "--units" in refused.stderr


def test_scan_as_json_is_json_and_only_json(options):
    result = runner.invoke(app, ["scan", *options, "--json"])
    assert result.exit_code == 0, result.output
    tables = answer_of(result)["tables"]
    assert tables["groups"][0]["memorized"] == 5
    assert [p["em"] for p in tables["paragraphs"][:5]] == [12] * 5


def test_counterfactual_prints_bits_and_shows_the_tokens(options, folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["counterfactual", *options, "--twin", str(folder / "model"), "--out", str(out)]
    result = runner.invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    data = answer_of(result)
    assert [row["remembered"] for row in data["tables"]["paragraphs"]] == [0.0] * 10
    assert sorted(p.name for p in out.iterdir()) == [
        "counterfactual.html",
        "counterfactual.safetensors",
    ]
    assert "&lt;5&gt;" in (out / "counterfactual.html").read_text()
    assert runner.invoke(app, [*arguments, "--by", "x"]).exit_code == 2
    assert runner.invoke(app, ["counterfactual", *options]).exit_code == 2  # has no twin


def test_compare_takes_models_and_saved_results(options, folder, tmp_path):
    model, other = str(folder / "model"), str(tmp_path / "other")
    zoo.hf_model("gpt_neo", seed=1).save_pretrained(other)
    zoo.tokenizer().save_pretrained(other)
    out = tmp_path / "out"
    measured = ["--max-paragraphs", "4", *options[2:]]
    result = runner.invoke(app, ["compare", model, other, *measured, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    tables = answer_of(result)["tables"]
    assert [row["passage"] for row in tables["paragraphs"]].count("lost") == 5
    assert len(tables["heads"]) == 16
    assert sorted(p.name for p in out.iterdir()) == ["compare.html", "compare.safetensors"]
    rows = ["--paragraphs", str(folder / "paragraphs.jsonl")]
    scans = []
    for name in (model, other):
        scans.append(str(tmp_path / f"scan-{len(scans)}"))
        scan = ["scan", "--model", name, *rows, *options[4:], "--out", scans[-1]]
        assert runner.invoke(app, scan).exit_code == 0
    result = runner.invoke(app, ["compare", *scans, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "0 gained, 5 lost, 0 kept" in result.stdout
    for pair in ([scans[0], model], [scans[0], str(out / "compare.safetensors")], [model, other]):
        result = runner.invoke(app, ["compare", *pair, "--out", str(out)])
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1


def test_transplant_prints_a_table_and_writes_a_page(options, folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["--twin", str(folder / "model"), "--units", "head,mlp", "--max-paragraphs", "2"]
    result = runner.invoke(app, ["transplant", *options, *arguments, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    components = answer_of(result)["tables"]["components"]
    assert len(components) == 4 * (4 + 1)
    assert all(row["necessity"] == row["sufficiency"] == 0 for row in components)
    assert sorted(p.name for p in out.iterdir()) == ["transplant.html", "transplant.safetensors"]


def test_the_natural_benchmark_prints_a_leaderboard(options, folder, tmp_path):
    zoo.hf_model("gpt_neo", seed=1).save_pretrained(tmp_path / "twin")
    zoo.tokenizer().save_pretrained(tmp_path / "twin")
    models = [zoo.bridge("gpt_neo"), zoo.bridge("gpt_neo", seed=1)]
    rows = [row for m in models for row in zoo.mixed(m, n=3).ids.tolist()]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps({"ids": row}) + "\n" for row in rows))
    chosen = {"--paragraphs": "both.jsonl", "--twin": "twin", "--out": "out"}
    arguments = [part for key, name in chosen.items() for part in (key, str(tmp_path / name))]
    arguments += ["--quick", "--localizers", "random", "--json", *options[:2], *options[4:]]
    result = runner.invoke(app, ["bench", "natural", *arguments])
    assert result.exit_code == 0, result.output
    leaderboard = answer_of(result)["tables"]["leaderboard"]
    assert {row["direction"] for row in leaderboard} == {"model", "twin"}
    assert "random" in {row["localizer"] for row in leaderboard}


def test_formation_prints_every_step(options, folder, tmp_path):
    out, model = tmp_path / "out", folder / "model"
    arguments = ["--checkpoints", f"0={model},9={model}", "--twins", str(model), "--out", str(out)]
    arguments += ["--control", str(folder / "paragraphs.jsonl"), "--max-paragraphs", "2", "--json"]
    result = runner.invoke(app, ["formation", *options, *arguments])
    assert result.exit_code == 0, result.output
    data = answer_of(result)["tables"]
    assert [row["step"] for row in data["steps"]] == [0, 9]
    assert [row["effect"] for row in data["steps"]] == [0, 0]
    assert data["agreement"][1]["ranking_last"] == pytest.approx(1)
    assert sorted(p.name for p in out.iterdir()) == ["formation.html", "formation.safetensors"]
    wrong = runner.invoke(app, ["formation", *options, "--checkpoints", "x=1"])
    assert wrong.exit_code == 2


def test_perturb_measures_controls_against_their_own_continuation(options, tmp_path):
    out = tmp_path / "out"
    arguments = ["--replacement", "random,second", "--max-paragraphs", "3", "--minimal"]
    result = runner.invoke(app, ["perturb", *options, *arguments, "--json", "--out", str(out)])
    assert result.exit_code == 0, result.output
    data = answer_of(result)["tables"]
    assert [(row["set"], row["replacement"], row["n"]) for row in data["drop"]] == [
        ("memorized", "random", 3), ("control", "random", 3),
        ("memorized", "second", 3), ("control", "second", 3),
    ]  # fmt: skip
    for row in data["drop"]:
        assert row["ci_low"] <= row["em_drop"] <= row["ci_high"]
        saved = f"perturbation-{row['replacement']}-{row['set']}.safetensors"
        loaded = Result.load(out / saved)
        assert loaded.baseline_em.tolist() == [12, 12, 12]
        assert row["em_drop"] == pytest.approx(float(loaded.em_drop.mean()))
    assert len(data["causes"]) == 12
    assert len(data["minimal_sets_memorized"]) == len(data["minimal_sets_control"]) == 3
    worst = data["tokens"][0]
    assert worst["set"] == "memorized"
    assert worst["token"].startswith("<")
    assert worst["em_lost"] == max(r["em_lost"] for r in data["tokens"] if r["set"] == "memorized")
    assert "3 memorized paragraphs: 30 passes" in result.stderr
    page = (out / "triggers.html").read_text()
    # In the contents and above each paragraph.
    assert page.count("EM 12 of 12, second replacement") == 2 * 6
    assert "EM lost" in page


def test_patch_goes_both_ways(options, tmp_path):
    out = tmp_path / "out"
    arguments = ["--site", "q,v,resid_pre", "--metric", "nll", "--max-paragraphs", "2"]
    result = runner.invoke(app, ["patch", *options, *arguments, "--json", "--out", str(out)])
    assert result.exit_code == 0, result.output
    data = answer_of(result)["tables"]
    ways, sites = ("noising", "denoising"), ("q", "v", "resid_pre")
    assert [(row["direction"], row["site"]) for row in data["runs"]] == [
        (way, site) for way in ways for site in sites
    ]
    there, back = data["runs"][0], data["runs"][3]
    assert there["base"] == pytest.approx(back["source"])
    assert there["source"] == pytest.approx(back["base"])
    of_heads = [r for r in data["effects"] if (r["direction"], r["site"]) == ("noising", "q")]
    assert {row["head"] for row in of_heads} == {f"L{i}H{j}" for i in range(4) for j in range(4)}
    assert len(list(out.glob("patch-*.safetensors"))) == 6
    assert {p.name for p in out.glob("*.html")} == {
        f"patch-{way}-{panels}.html" for way in ways for panels in ("q-v", "resid_pre")
    }


def test_core_prints_what_subnetworks_share(options, tmp_path):
    out = tmp_path / "out"
    arguments = ["--seeds", "2", "--steps", "3", "--shuffles", "1"]
    result = runner.invoke(app, ["core", *options, *arguments, "--json", "--out", str(out)])
    assert result.exit_code == 0, result.output
    data = answer_of(result)
    parts, values = data["tables"]["parts"], data["values"]
    assert len(parts) == 20
    in_both = {row["part"] for row in parts if row["core"] == "memorized"}
    assert {p for p in in_both if "H" in p} == set(values["own_heads"])
    assert Result.load(out / "core.safetensors").effective_size.tolist() == values["effective_size"]
    result = runner.invoke(app, ["core", *options, "--sparsity", "1", "--out", str(out)])
    assert result.exit_code == 2
    assert "--sparsity: 1.0; give a number below 1" in result.stderr


def test_lookups_prints_both_kinds_of_neuron(options, tmp_path):
    out = tmp_path / "out"
    arguments = ["--neurons", "2", "--prompts", "4"]
    result = runner.invoke(app, ["lookups", *options, *arguments, "--json", "--out", str(out)])
    assert result.exit_code == 0, result.output
    data = answer_of(result)["tables"]
    assert [row["neurons"] for row in data["kinds"]] == ["next-token", "random", "difference"]
    assert len(data["neurons"]) == len(Result.load(out / "lookups.safetensors").neurons) == 8


def test_info_describes_the_model(folder):
    result = runner.invoke(app, ["info", str(folder / "model"), "--json"])
    assert result.exit_code == 0, result.output
    data = answer_of(result)
    assert {row["check"] for row in data["tables"]["checks"]} == {
        "weights of heads",
        "attention rows",
        "head removal",
        "batching",
        "greedy decoding",
        "plain forward",
    }
    facts = data["values"]
    assert {"q", "k", "v", "z", "resid_pre"} <= set(facts["writable_sites"])
    assert "pattern" not in facts.pop("writable_sites")  # attention that a Bridge only observes
    # The tiny models' tokenizer knows a few words and nothing else.
    assert {"words", "numbers", "Chinese"} <= set(facts.pop("text_not_kept"))
    assert abs(facts.pop("gain_behind_BOS")) < 0.3
    assert facts.pop("tokens_in_front") == []
    assert facts == {
        "tokenizer": "TokenizersBackend",
        "agrees_with_its_file": True,
        "cuts_characters": False,
        "model": "model",
        "revision": None,
        "class": "TransformerBridge",
        "architecture": "GPTNeoForCausalLM",
        "basis": "raw",
        "dtype": "float32",
        "device": facts["device"],
        "layers": 4,
        "query_heads": 4,
        "key_value_heads": 4,
        "d_model": 32,
        "d_head": 8,
        "d_vocab": 101,
        "context": 128,
        "local_layers": [1, 3],
        "parallel_blocks": False,
        "can_restart": True,
        "50_50_fit": True,
        "tolerance": 1e-3,
    }
    shown = runner.invoke(app, ["info", str(folder / "model"), "--n-prefix", "100"])
    assert shown.exit_code == 0, shown.output
    for name, value in facts.items():
        if name not in ("local_layers", "50_50_fit", "revision", "tolerance"):
            printed = {"key_value_heads": "key-value heads"}.get(name, name.replace("_", " "))
            printed = name if name.startswith("d_") else printed
            assert f"{printed:<21} {value}" in shown.stdout
    assert "local layers          1, 3" in shown.stdout
    assert "100 + 50 fit          False" in shown.stdout
    assert "differ (at most 0.001):" in shown.stdout
    decoded = next(x for x in shown.stdout.splitlines() if x.startswith("greedy decoding"))
    assert float(decoded.split()[-1]) <= 1e-3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["heads", "--model", "no/such/folder/here"], "--paragraphs"),
        (["scan", "--paragraphs", "missing.jsonl"], "there is no such file"),
        (["scan", "--device", "tpu"], "--device: 'tpu'; choose one of"),
        (["scan", "--dtype", "int3"], "is not one of 'float32'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, says, folder):
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(folder / "model")]
        if "--paragraphs" not in arguments:
            arguments += ["--paragraphs", str(folder / "paragraphs.jsonl")]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    lines = [x for x in result.stderr.splitlines() if x.startswith("memcircuits: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in result.output


def test_wrong_mode_is_named(options, tmp_path):
    result = runner.invoke(
        app, ["heads", *options, "--mode", "upside-down", "--out", str(tmp_path / "o")]
    )
    assert result.exit_code == 2
    assert "--mode" in result.stderr
    assert "'upside-down' is not one of 'zero', 'mean', 'resample'" in result.stderr
    assert not (tmp_path / "o").exists()


def test_ctrl_c_is_status_130(options, monkeypatch):
    import memcircuits.measure.continuation

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(memcircuits.measure.continuation, "map_batches", interrupted)
    result = runner.invoke(app, ["scan", *options])
    assert result.exit_code == 130


@pytest.mark.any_version
@pytest.mark.parametrize("command", ["scan --json", "scan", "info"])
def test_a_closed_pipe_ends_a_command_without_a_message(command, options):
    """As in `memcircuits scan | head`: the reader has enough, which is no error to speak of."""
    name, *flags = command.split()
    arguments = options[1:2] if name == "info" else options
    run = [sys.executable, "-m", "memcircuits", name, *arguments, *flags, "--quiet"]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 1
    assert "memcircuits:" not in said
    assert "Broken pipe" not in said
    assert "Traceback" not in said


def test_a_table_is_plain_in_a_pipe_and_fitted_on_a_terminal(monkeypatch, capsys):
    frame = pd.DataFrame({"name": ["a [red] one", "b\x1b[31m"], "nll": [1.23456, float("nan")]})
    output.print_table(frame)
    piped = capsys.readouterr().out
    assert piped.splitlines()[0].split() == ["name", "nll"]
    assert "1.235" in piped
    assert not set(piped) & set("\u2500\u2501\u2502\x1b")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    output.print_table(frame)
    lines = capsys.readouterr().out.splitlines()
    assert any("a [red] one" in line and "1.235" in line for line in lines)
    assert all(len(line) <= 60 for line in lines)


def test_the_text_is_shown_whatever_stands_before_it_and_columns_is_heeded(monkeypatch, capsys):
    frame = pd.DataFrame({"id": ["a" * 30], "other": ["b" * 40], "em": [50], "text": ["c" * 200]})
    monkeypatch.delenv("COLUMNS", raising=False)
    output.print_table(frame)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["id", "em", "text"]
    assert "c" * 40 in printed
    assert "Not shown: other" in printed
    assert all(len(line) <= output.PIPED_WIDTH for line in printed.splitlines())
    monkeypatch.setenv("COLUMNS", "140")
    output.print_table(frame)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["id", "other", "em", "text"]
    assert 80 < max(map(len, lines)) <= 140


def test_a_remedy_names_options_and_not_arguments(capsys):
    options = {"n_prefix": "--n-prefix", "seed": "--seed"}
    with pytest.raises(typer.Exit), errors_in_one_line(options):
        raise InputError("n_prefix", 3, "use n_prefix=2, a smaller n_prefix or another seed")
    said = capsys.readouterr().err
    assert said.endswith("use --n-prefix 2, a smaller --n-prefix or another seed\n")


def test_mistakes_in_a_file_are_told_before_a_model_is_loaded(tmp_path):
    (tmp_path / "notes.csv").write_text("record,body\nR1,some text\nR2,other text\n")
    file = ["--paragraphs", str(tmp_path / "notes.csv")]
    for command in (["scan"], ["heads"], ["perturb"]):
        refused = runner.invoke(app, [*command, *file, "--text-column", "bdy"])
        assert refused.exit_code == 2
        assert "its columns are record, body; bdy was asked for" in refused.stderr
        assert "loading" not in refused.stderr
    refused = runner.invoke(app, ["map", str(tmp_path)])
    assert refused.exit_code == 2
    assert "memcircuits scan --paragraphs FOLDER --stride 1 reads a folder" in refused.stderr
    assert "loading" not in refused.stderr


def test_help_imports_nothing_heavy():
    """torch and transformer_lens take seconds: neither --help nor the import may load them."""
    code = (
        "import sys, memcircuits, memcircuits.cli\n"
        "from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(memcircuits.cli.app, ['--help'])\n"
        "assert result.exit_code == 0 and 'heads' in result.output\n"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'pandas', 'plotly', 'scipy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert outcome.stdout.strip() == "[]"


@pytest.mark.parametrize("option", ["--n-prefix", "--n-continuation"])
def test_lengths_that_the_shipped_paragraphs_do_not_have_are_refused(option):
    result = runner.invoke(app, ["scan", option, "10"])
    assert result.exit_code == 2
    assert f"{option}: 10; the shipped paragraphs have 50 + 50 tokens" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["heads", "--max-paragraphs", "0"], "--max-paragraphs.* 2 .given: 0.; see .*heads --help"),
        (["heads", "--nosuch"], "No such option: --nosuch.*heads --help"),
        (["heads", "--max-paragraphs"], "--max-paragraphs.* requires an argument"),
        (["nosuch"], "No such command 'nosuch'"),
        (["bench", "nosuch"], "No such command 'nosuch'; see .*bench --help"),
        (["heads", "a", "b"], "unexpected extra argument"),
        (["heads", "--out", "pyproject.toml"], "--out.*is a file"),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert not result.stdout
    assert result.stderr.count("\n") == 1
    assert re.match(f"memcircuits: .*{said}", result.stderr)


def test_the_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"memcircuits {version('memcircuits')}\n")


def test_help_joins_the_lines_of_a_paragraph() -> None:
    text = CliRunner().invoke(app, ["scan", "--help"], env={"COLUMNS": "80"}).stdout
    assert "parquet files, and a scan that was stopped can be continued" in " ".join(text.split())
    assert all(len(line) <= 80 for line in text.splitlines())
