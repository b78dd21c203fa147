"""Name the repository's address everywhere: python docs/set_repository.py https://github.com/O/NAME.

Writes it into the metadata of the package and of the citation, into the site's header, into the
long description that a package index shows, and as a badge into README and notebooks, which opens a
notebook in Colab. Running it again with another address replaces the first.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ADDRESS = re.compile(r"https://github\.com/([\w.-]+)/([\w.-]+?)(?:\.git|/)?")
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def colab(repository: str, name: str) -> str:
    """The badge that opens a notebook of examples/ in Colab."""
    path = repository.removeprefix("https://github.com/")
    notebook = f"https://colab.research.google.com/github/{path}/blob/main/examples/{name}.ipynb"
    return f"[![Open in Colab]({BADGE})]({notebook})"


def in_pyproject(text: str, repository: str) -> str:
    """The addresses of the project, and absolute links in the long description."""
    urls = {
        "Homepage": repository,
        "Repository": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        "Paper": "https://arxiv.org/abs/2403.19851",
    }
    lines = "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    text = re.sub(r"(?<=\[project\.urls\]\n)(?:.+\n)+", lambda _: lines, text)
    for pattern, new in (
        ("!", rf"![\1]({repository}/raw/main/\2)\n\n"),
        ("(?<!!)", rf"[\1]({repository}/blob/main/\2)"),
    ):
        text = re.sub(
            rf"(pattern = '{re.escape(pattern)}\\\[.*, replacement = )'.*'",
            lambda found, new=new: f"{found[1]}'{new}'",
            text,
        )
    return text


def in_mkdocs(text: str, repository: str) -> str:
    """The link in the header of the site."""
    return re.sub(r'(MEMCIRCUITS_REPOSITORY, )"[^"]*"', rf'\1"{repository}"', text)


def in_citation(text: str, repository: str) -> str:
    """The field `repository-code`."""
    text = re.sub(r"^repository-code: .*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^(license: .*\n)", rf"\1repository-code: {repository}\n", text, flags=re.M)


def in_readme(text: str, repository: str) -> str:
    """The badge of the quickstart, under the title."""
    text = re.sub(r"\n\[!\[Open in Colab\].*\n", "", text)
    return re.sub(
        r"\A(# .*\n)", lambda found: f"{found[1]}\n{colab(repository, 'quickstart')}\n", text
    )


def in_notebook(text: str, repository: str, name: str) -> str:
    """The badge and the line that installs the package, under the title of a notebook's text."""
    text = re.sub(r"#\n# \[!\[Open in Colab\].*\n(?:# .*\n)*", "", text)
    install = f"# On Colab, run `%pip install -q git+{repository}` in a cell of its own first.\n"
    badge = f"#\n# {colab(repository, name)}\n{install}"
    return re.sub(r"(# %% \[markdown\]\n# # .*\n)", lambda found: found[1] + badge, text, count=1)


def main() -> None:
    """Rewrite the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="https://github.com/OWNER/NAME")
    address = parser.parse_args().address
    found = ADDRESS.fullmatch(address)
    if found is None:
        parser.error(f"{address}: give https://github.com/OWNER/NAME, which Colab can open")
    repository = f"https://github.com/{found[1]}/{found[2]}"
    changes = {
        "pyproject.toml": in_pyproject,
        "mkdocs.yml": in_mkdocs,
        "CITATION.cff": in_citation,
        "README.md": in_readme,
    }
    for name, change in changes.items():
        path = ROOT / name
        path.write_text(change(path.read_text("utf-8"), repository), "utf-8")
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        path = notebook.with_suffix(".py")
        text = in_notebook(path.read_text("utf-8"), repository, path.stem)
        path.write_text(text, "utf-8")
    print("now: jupytext --update --to ipynb examples/*.py, and look at git diff")


if __name__ == "__main__":
    main()
