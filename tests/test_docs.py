"""The code in README and docs runs as it stands, on the shipped model."""

import doctest
import importlib
import importlib.util
import json
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.commands import known_options
from tests.helpers.results import result_types


def blocks(page: Path) -> list[str]:
    """Python blocks of a page, without those under `<!-- notest -->`: they need other weights."""
    fence = r"(?<!<!-- notest -->\n)^```python\n(.*?)^```"
    return re.findall(fence, page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


CODE = {
    page.relative_to(ROOT).as_posix(): code
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if (code := blocks(page))
}


N_RANKED = 5  # memorized paragraphs, and controls, in the rankings of these pages


@pytest.fixture
def fewer_shipped(monkeypatch):
    """A part of what is shipped, and rankings of few: code is run to see that it runs."""
    import memcircuits as mc
    from memcircuits.evidence import find_components, groups

    whole, every = mc.Paragraphs.shipped, {"both": 12, "organism": 12, "twin": 12, "neither": 1}
    select_groups = find_components.select_groups

    def sample(role="all"):
        paragraphs = whole(role)
        roles = enumerate(paragraphs.metadata["role"])
        return paragraphs[[i for i, role in roles if i % every[role] == 0]]

    def few(*arguments, max_paragraphs=None, **options):
        n = min(max_paragraphs or N_RANKED, N_RANKED)
        return select_groups(*arguments, max_paragraphs=n, **options)

    monkeypatch.setattr(mc.Paragraphs, "shipped", staticmethod(sample))
    monkeypatch.setattr(find_components, "select_groups", few)
    monkeypatch.setattr(groups, "MIN_CONTROLS", N_RANKED)


@pytest.mark.slow
@pytest.mark.usefixtures("fewer_shipped")
@pytest.mark.parametrize("page", CODE)
def test_code_blocks_run_and_leave_the_model_as_it_was(page, tmp_path, monkeypatch):
    from memcircuits.models.loading import load_model
    from memcircuits.models.registry import adapt

    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in CODE[page]:
        exec(compile(block, page, "exec"), names)
    shipped = load_model()
    assert adapt(names["model"]).fingerprint() == adapt(shipped).fingerprint()


def test_examples_in_docstrings():
    """They are told of what docs/reference/index.md says: `model`, `memorized` and `control`."""
    import memcircuits as mc

    often = [
        i
        for i, n in enumerate(mc.Paragraphs.shipped("planted").metadata["repetitions"])
        if n == 128
    ]
    given = {
        "mc": mc,
        "model": mc.load_model(device="cpu"),
        "memorized": mc.Paragraphs.shipped("planted")[often[:4]],
        "control": mc.Paragraphs.shipped("control")[:4],
    }
    tried = failed = 0
    for outcome in pkgutil.walk_packages(mc.__path__, "memcircuits."):
        source = importlib.util.find_spec(outcome.name).origin
        if ">>>" in Path(source).read_text(encoding="utf-8"):
            module = importlib.import_module(outcome.name)
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            result = doctest.testmod(module, extraglobs=given, optionflags=flags)
            tried, failed = tried + result.attempted, failed + result.failed
    assert failed == 0
    assert tried > 25


def test_notebooks_are_those_of_their_texts():
    import jupytext

    notebooks = sorted((ROOT / "examples").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        text = jupytext.read(path.with_suffix(".py"))
        cells = [
            [(c.cell_type, c.source) for c in book.cells] for book in (text, jupytext.read(path))
        ]
        assert cells[0] == cells[1], f"jupytext --update --to ipynb examples/{path.stem}.py"


def test_the_map_names_every_folder_in_the_order_of_the_layers():
    import memcircuits

    package = ROOT / "memcircuits"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    named = re.findall(r"^\| `(\w+)` \|", memcircuits.__doc__, flags=re.MULTILINE)
    assert sorted(named) == sorted(folders)
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    layers = [set(layer.split(" | ")) for layer in contract["contracts"][0]["layers"]]
    height = {folder: -i for i, layer in enumerate(layers) for folder in layer}
    assert [height[folder] for folder in named] == sorted(height[folder] for folder in named)


def test_the_reference_has_all_that_is_public():
    import memcircuits

    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    text = "".join(path.read_text(encoding="utf-8") for path in pages)
    entries = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    page = set(entries)
    assert len(entries) == len(page), "each name stands on one page"
    public = set(memcircuits.__all__) - {"__version__"}
    assert public - {entry.rpartition(".")[2] for entry in page} == set()
    assert {f"{cls.__module__}.{cls.__name__}" for cls in result_types().values()} - page == set()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.stem)
def test_fences_name_a_language_and_nothing_else(page):
    """The site's renderer takes other fences as text, and swallows what follows them."""
    for word in re.findall(r"^ *```(.*)$", page.read_text("utf-8"), flags=re.MULTILINE):
        assert re.fullmatch(r"\w*", word), f"{word!r}: `<!-- notest -->` stands above the fence"


def test_commands_in_the_docs_have_the_options_that_are_shown():
    known = known_options()
    shown = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = re.sub(r"\\\n *", "", page.read_text("utf-8"))  # lines that go on
        shown += re.findall(r"(?:^|[`$|]) ?(memcircuits [a-z][^`|\n#]*)", text, flags=re.MULTILINE)
    assert len(shown) > 50
    for line in shown:
        words = line.split()[1:]
        pair = " ".join(words[:2])
        options = known.get(pair, known.get(words[0]))
        if options is None:  # a sentence that begins with the name, or a group
            assert words[0] in {name.partition(" ")[0] for name in known} or "--" not in line, line
            continue
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given - {"--help"} <= set(options), line


def test_the_address_of_the_repository_is_written_everywhere(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import set_repository as setting

    def written(address):
        changes = {
            "pyproject.toml": setting.in_pyproject,
            "mkdocs.yml": setting.in_mkdocs,
            "CITATION.cff": setting.in_citation,
            "README.md": setting.in_readme,
        }
        return {name: change(texts[name], address) for name, change in changes.items()} | {
            "examples/quickstart.py": setting.in_notebook(
                texts["examples/quickstart.py"], address, "quickstart"
            )
        }

    names = ("pyproject.toml", "mkdocs.yml", "CITATION.cff", "README.md", "examples/quickstart.py")
    texts = {name: (ROOT / name).read_text("utf-8") for name in names}
    other = "https://github.com/some/where"
    once = texts = written("https://github.com/an/address")
    texts = written(other)
    assert texts == written(other)
    for name in names:
        assert once[name].replace("an/address", "some/where") == texts[name]
        assert "some/where" in texts[name]
    project = tomllib.loads(texts["pyproject.toml"])
    assert project["project"]["urls"]["Repository"] == other
    hook = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = "![a](docs/x.png)\nA [link](docs/y.md#z) and [one](https://example.org)."
    for line in hook["substitutions"]:
        text = re.sub(line["pattern"], line["replacement"], text)
    assert text == (
        f"![a]({other}/raw/main/docs/x.png)\n\n"
        f"A [link]({other}/blob/main/docs/y.md#z) and [one](https://example.org)."
    )


def test_links_between_pages_resolve():
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_command_line_page_is_current():
    from typer.testing import CliRunner

    from memcircuits.cli import app

    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for command in app.registered_commands:
        name = command.name or command.callback.__name__.replace("_", "-")
        assert f"`memcircuits {name}`" in page
        options = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        for option in set(re.findall(r"--[a-z][a-z-]+", options)) - {"--help"}:
            assert option in page, f"{name} {option}: run the command named in docs/cli.md"


def test_numbers_that_prose_repeats_are_those_of_the_code():
    from memcircuits.editing.audits import verdict
    from memcircuits.measure.document.mapping import SHORT_TEXT

    table = (ROOT / "docs" / "concepts.md").read_text("utf-8").partition("## Erased or hidden")[2]
    assert f"moved less than {verdict.MOVED * 100:.0f} %" in table
    assert f"the depth is below {verdict.BACK}" in table
    assert f"a depth of at least {verdict.DEPTH}" in table
    assert f"no way brings back more than {verdict.SLACK:.0f} tokens more" in table
    assert verdict.LEFT == 0.1
    assert "at most a tenth of the remembered bits" in table
    for page in ("cli.md", "howto.md", "recipes.md"):
        assert f"{SHORT_TEXT:,} tokens" in (ROOT / "docs" / page).read_text("utf-8")


def test_readme_has_the_numbers_of_the_leaderboard(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import make_leaderboard as maker

    readme, table = maker.README.read_text(encoding="utf-8"), maker.kept_table()
    assert maker.START in readme
    assert readme == maker.in_readme(readme, table)
    assert maker.in_readme(readme, "no table") != readme
    assert len(table.splitlines()) == 2 + len(maker.KINDS) + 3


def test_further_kinds_of_trial_take_their_place_on_the_page(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import make_leaderboard

    kept = (
        "# Title\n\n- a\n- block: it was void\n\n**Written: head (2 trials)**\n\n| 1 |\n\n"
        "**Written: block (1 trials)**\n\n| 2 |\n"
    )
    page = "- a\n- b\n\n**Written: block (9 trials)**\n\n| 3 |\n\n**Decoys (2 trials)**\n\n| 4 |\n"
    page += "\n**Evidence added up (of these trials)**\n\n| 5 |\n"
    merged = make_leaderboard.with_kept(page, kept)
    assert merged.splitlines()[:5] == ["# Title", "", "- a", "- b", ""]
    tables = [line for line in merged.splitlines() if line.startswith(("**", "|"))]
    assert tables == [
        "**Written: head (2 trials)**", "| 1 |", "**Written: block (9 trials)**", "| 3 |",
        "**Decoys (2 trials)**", "| 4 |",
    ]  # fmt: skip


def test_the_leaderboard_is_of_seeds_that_no_method_was_chosen_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import make_leaderboard

    run = {"model": {"name": "tiny", "fingerprint": "0"}, "options": {"n": 1, "seed": 999}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(SystemExit, match="run them with 1000"):
        make_leaderboard.main(str(tmp_path))


def test_the_page_of_models_keeps_the_versions_and_states_the_largest_difference(tmp_path):
    from tests.matrix.page import write

    def section(version, *rows):
        table = ["| architecture | model | scan | edit |", "| --- | --- | --- | --- |", *rows]
        refused = ["Also loaded: A.", "", "| refused at load | reason |", "| --- | --- |"]
        return "\n".join([f"## transformer-lens {version}", "", *table, "", *refused, ""])

    page = tmp_path / "matrix.md"
    write(page, "3.9.0", section("3.9.0", "| neo | raw | 2e-06 | 1e-07 c |"))
    write(
        page, "4.3.0", section("4.3.0", "| neo | raw | 9e-07 | ran |", "| b | raw | 0e+00 | ran |")
    )
    text = page.read_text()
    assert "| scan | 2e-06 | 0e+00 |" in text
    assert "| edit | 1e-07 c | ran |" in text
    write(page, "3.9.0", section("3.9.0", "| neo | raw | 2e-06 | 1e-07 c |"))
    assert page.read_text() == text
