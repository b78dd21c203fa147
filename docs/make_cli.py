"""Write docs/cli.md from the command line itself: python docs/make_cli.py."""

import re
from pathlib import Path

from typer.testing import CliRunner


def main() -> None:
    from typer.cli import app as typer_app

    arguments = ["memcircuits.cli", "utils", "docs", "--name", "memcircuits"]
    text = CliRunner().invoke(typer_app, arguments).stdout
    text = text.replace("# `memcircuits`", "# Command line", 1)
    text = re.sub(r"^Example: (.*)$", r"```console\n$ \1\n```", text, flags=re.MULTILINE)
    text = text.replace("&#x27;", "'").replace("&gt;", ">")
    note = "\nThis page is written by `python docs/make_cli.py`.\n"
    Path(__file__).with_name("cli.md").write_text(text.rstrip() + "\n" + note, encoding="utf-8")


if __name__ == "__main__":
    main()
