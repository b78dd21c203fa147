"""What an installed wheel needs: every import is declared, and extras stay optional."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import memcircuits as mc
from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
# Optional at run time: imported in a function that says what to install, or does without.
OPTIONAL = {"ray", "gguf", "datasets", "accelerate"}


def names(requirements):
    """The packages of a list of requirements, as package indexes write them."""
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}


def imported_packages():
    """Top-level name -> files of the package that import it."""
    found = {}
    for path in (ROOT / "memcircuits").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            else:
                continue
            for module in modules:
                found.setdefault(module.partition(".")[0], set()).add(path.name)
    return found


def test_every_import_is_of_a_package_that_is_declared():
    declared = names(PROJECT["dependencies"])
    distributions = packages_distributions()
    undeclared = {
        module: files
        for module, files in imported_packages().items()
        if module not in sys.stdlib_module_names | OPTIONAL | {"memcircuits"}
        and not declared & {name.lower().replace("_", "-") for name in distributions[module]}
    }
    assert undeclared == {}


def test_every_package_that_is_declared_is_imported():
    distributions = packages_distributions()
    used = {
        name.lower().replace("_", "-")
        for module in imported_packages()
        for name in distributions.get(module, [])
    }
    # circuitsvis is read as a file: its JavaScript is put into the pages.
    assert names(PROJECT["dependencies"]) - used == {"circuitsvis"}


def test_every_package_that_is_declared_is_pinned():
    pinned = names(
        line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line
    )
    assert names([*PROJECT["dependencies"], *EXTRAS]) - pinned == set()


def test_all_public_names_are_imported_without_any_extra():
    optional = names(EXTRAS) - names(PROJECT["dependencies"])
    distributions = packages_distributions()
    blocked = [module for module, of in distributions.items() if optional & {o.lower() for o in of}]
    assert {"ray", "gguf", "kaleido", "nbformat", "pytest"} <= set(blocked)
    script = (
        "import sys\n"
        f"for name in {blocked}: sys.modules[name] = None\n"
        "import memcircuits as mc\n"
        "import memcircuits.cli\n"
        "for name in mc.__all__: getattr(mc, name)\n"
        "print(mc.scan(mc.load_model(device='cpu'), mc.Paragraphs.shipped()[:2], progress=False))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 paragraphs" in done.stdout


def test_the_import_itself_is_light():
    script = (
        "import sys, memcircuits, memcircuits.cli\n"
        "print(sorted({'torch', 'transformer_lens', 'pandas', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]


def test_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {mc.__version__}\n" in citation
