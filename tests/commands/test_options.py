"""Options of the command line: choices repeat the types that they stand for, and mean one thing."""

from __future__ import annotations

import inspect
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from memcircuits import cli
from memcircuits.commands import common, heads, patch, scan, unlearn
from memcircuits.commands.output import PIPED_WIDTH
from memcircuits.commands.scan_printing import say_missed
from memcircuits.data.formats.text import Txt
from memcircuits.data.normalizing import Normalize
from memcircuits.editing.masks import MASK_STRATEGIES
from memcircuits.evidence.ablation import Mode
from memcircuits.evidence.patching.context import DIRECTIONS
from memcircuits.evidence.patching.metrics import METRIC_UNITS
from memcircuits.evidence.screening import Method
from memcircuits.models.devices import DtypeName
from tests.helpers import models as zoo


def choices_of(command: Any, name: str) -> set[str]:
    """The values that an option of a command takes."""
    parameters = inspect.signature(common.with_options(command), eval_str=True).parameters
    literal = get_args(parameters[name].annotation)[0]
    return set(get_args(literal))


@pytest.mark.parametrize(
    ("command", "name", "values"),
    [
        (heads.heads, "mode", get_args(Mode)),
        (heads.heads, "method", get_args(Method)),
        (heads.heads, "txt", get_args(Txt)),
        (heads.heads, "normalize", get_args(Normalize)),
        (heads.heads, "dtype", get_args(DtypeName)),
        (unlearn.unlearn, "mask", MASK_STRATEGIES),
        (patch.patch, "direction", (*DIRECTIONS, "both")),
        (patch.patch, "metric", METRIC_UNITS),
    ],
)
def test_choices_are_those_of_the_function(command: Any, name: str, values: Any) -> None:
    assert choices_of(command, name) == set(values)


def test_an_option_means_the_same_in_every_command() -> None:
    """One help, up to the commands that say more about their own use of it."""
    shared = (
        "--control",
        "--seed",
        "--txt",
        "--bos",
        "--mode",
        "--match-nll",
        "--json",
    )
    helps: dict[str, set[str]] = defaultdict(set)
    group: Any = typer.main.get_command(cli.app)
    for command in group.commands.values():
        for parameter in getattr(command, "params", ()):
            for name in set(parameter.opts) & set(shared):
                helps[name].add(parameter.help)
    assert {name: len(texts) for name, texts in helps.items()} == dict.fromkeys(shared, 1)


def test_options_know_how_they_are_typed() -> None:
    typed = common.options_of(common.with_options(scan.scan))
    assert typed["n_prefix"] == "--n-prefix"
    assert typed["near_verbatim"] == "--near-verbatim"


@pytest.fixture(scope="module")
def chapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder, and chapters that hold what it recites, behind headings."""
    folder = tmp_path_factory.mktemp("book")
    zoo.save("gpt_neo", folder / "model")
    rows = zoo.mixed(zoo.bridge("gpt_neo"), n=4).ids.tolist()
    (folder / "chapters").mkdir()
    for number in range(2):
        text = " ".join(f"<{i}>" for row in rows[number::2] for i in row)
        (folder / "chapters" / f"chapter{number}.txt").write_text(text)
    return folder


def run(folder: Path, *arguments: str) -> Any:
    lengths = ["--n-prefix", "10", "--n-continuation", "12"]
    command, *more = arguments
    inputs = ["--model", str(folder / "model"), "--paragraphs", str(folder / "chapters")]
    return CliRunner().invoke(cli.app, [command, *inputs, *lengths, *more])


def test_a_folder_of_chapters_works_at_the_first_try(chapters: Path) -> None:
    first = run(chapters, "scan")
    assert first.exit_code == 0, first.output
    assert "Every text file is read as one document" in first.stderr
    assert "2 of 2 rows are longer than 22 tokens" in first.stderr
    assert "--stride 22" in first.stderr
    whole = run(chapters, "scan", "--stride", "22")
    assert "all: 8 windows, 4 memorized" in whole.stdout
    assert "longer than" not in whole.output
    assert "4 are recited to the end of their 12 tokens. They are equally" in whole.stdout
    (following,) = [line for line in whole.stderr.splitlines() if line.startswith("Next: ")]
    assert following.startswith("Next: memcircuits heads ")
    assert following.endswith("--stride 22")
    table = [line for line in whole.stdout.splitlines() if " | " in line]
    assert len(table) == 9  # a heading, and a row for each passage
    assert all(len(line) <= PIPED_WIDTH for line in table)


def test_the_command_that_is_named_next_works(chapters: Path, tmp_path: Path) -> None:
    out = tmp_path / "scan"
    result = run(chapters, "scan", "--stride", "22", "--out", str(out))
    assert result.exit_code == 0, result.output
    (following,) = [line for line in result.stderr.splitlines() if line.startswith("Next: ")]
    words = following.removeprefix("Next: memcircuits ").split()
    ranking = CliRunner().invoke(cli.app, [*words, "--out", str(tmp_path / "heads"), "--quiet"])
    assert ranking.exit_code == 0, ranking.output
    assert "L0H" in ranking.stdout
    assert (tmp_path / "heads" / "report.html").is_file()


def test_verbose_says_how_often_the_model_ran(chapters: Path, tmp_path: Path) -> None:
    """A scan runs the model once on each of the eight windows, in memory and to a folder."""
    for where in ([], ["--out", str(tmp_path / "scan")]):
        result = run(chapters, "scan", "--stride", "22", "--verbose", *where)
        assert result.exit_code == 0, result.output
        assert ": 8.0 forward passes of one row of tokens" in result.stderr
    assert "forward passes" not in run(chapters, "scan", "--stride", "22").stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["heads", "--control", "nofile"], "--control: nofile; there is no such file"),
        (["heads", "--unigrams", "nofile"], "--unigrams: nofile; there is no such file"),
        (["edit", "--rewritten", "nofile", "--stride", "22"], "--rewritten: nofile"),
        (["scan", "--strict", "--txt", "paragraph", "--n-prefix", "9999"], "--paragraphs: chapter"),
        (["unlearn", "--stride", "22", "--heads", "L9H9"], "--heads: L9H9; "),
        (["attention", "--rows", "x", "--stride", "22"], "--rows: x; give an id, or a row"),
    ],
)
def test_errors_name_the_option_that_was_typed(
    chapters: Path, arguments: list[str], says: str
) -> None:
    result = run(chapters, *arguments)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("memcircuits: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"memcircuits: {says}")


def test_stride_and_txt_are_refused_where_they_would_do_nothing() -> None:
    for words in (["--stride", "10"], ["--txt", "document"]):
        result = CliRunner().invoke(cli.app, ["scan", *words])
        assert result.exit_code == 2
        assert f"{words[0]}: {words[1]}; it is about --paragraphs FILE" in result.stderr


@pytest.mark.parametrize(
    ("typed", "completed"), [("memcircuits hea", "heads"), ("memcircuits heads --mod", "--mode")]
)
def test_the_shell_completes_commands_and_options(typed: str, completed: str) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    environment = {"_MEMCIRCUITS_COMPLETE": "complete_bash", **words}
    result = CliRunner().invoke(cli.app, [], prog_name="memcircuits", env=environment)
    assert completed in result.stdout.split()


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("heads", "--paragraphs"),
        ("heads", "--control"),
        ("heads", "--unigrams"),
        ("edit", "--rewritten"),
        ("influence", "--candidates"),
        ("patch", "--corrupted"),
        ("report", "--unigrams"),
        ("unlearn", "--heldout"),
        ("circuit", "--reference"),
    ],
)
def test_a_missing_file_is_refused_before_anything_is_loaded(command: str, option: str) -> None:
    result = CliRunner().invoke(cli.app, [command, option, "nofile"])
    assert result.exit_code == 2
    assert result.stderr == f"memcircuits: {option}: nofile; there is no such file\n"


def test_a_misspelt_file_is_answered_with_the_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "private.csv").write_text("")
    (tmp_path / "privat\x1b.csv").write_text("")  # would move the cursor
    result = CliRunner().invoke(cli.app, ["scan", "--paragraphs", str(tmp_path / "privat.csv")])
    said = "--paragraphs: privat.csv; there is no such file; did you mean private.csv?\n"
    assert result.stderr == f"memcircuits: {said}"
    away = CliRunner().invoke(cli.app, ["scan", "--paragraphs", str(tmp_path / "no" / "a.csv")])
    assert away.stderr == "memcircuits: --paragraphs: a.csv; there is no such file\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["scan", "--model", "organsim"], "--model: organsim; "),
        (["compare", "organism", "organism-twn"], "B: organism-twn; "),
        (["counterfactual", "--twin", "organism-twim"], "--twin: organism-twim; "),
    ],
)
def test_a_misspelt_shipped_model_is_named(words: list[str], says: str) -> None:
    result = CliRunner().invoke(cli.app, [*words, "--quiet"])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"memcircuits: {says}there is no such model; did you mean ")


@pytest.mark.parametrize("stride", [7, 1])
def test_a_scan_says_what_may_begin_between_its_windows(
    stride: int, capsys: pytest.CaptureFixture[str]
) -> None:
    say_missed(np.array([0, 11, 12, 12]), 10, 12, stride)
    said = capsys.readouterr().err
    assert ("1 window is recited nearly in full" in said) == (stride > 1)
    assert ("every 7 tokens: a recited passage of 22 tokens is" in said) == (stride > 1)
    say_missed(np.array([0, 0, 12]), 10, 12, stride)
    said = capsys.readouterr().err
    assert ("one of 28 or more always. --stride 1 finds all" in said) == (stride > 1)
    assert "nearly" not in said
