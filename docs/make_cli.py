"""Write docs/cli.md from the command line itself: python docs/make_cli.py."""

import re
from pathlib import Path
from typing import Any

import typer
from typer.cli import get_docs_for_click

from memcircuits.cli import app


def main() -> None:
    group: Any = typer.main.get_command(app)
    context = typer.Context(group)
    commands = [group.get_command(context, name) for name in group.list_commands(context)]
    set_short_help(group, context)
    panels: dict[str, list[Any]] = {}
    for command in commands:
        panels.setdefault(command.rich_help_panel, []).append(command)
    parts = [f"# Command line\n\n{group.help}\n\n{OVERVIEW}\n"]
    for panel, members in panels.items():
        parts.append(f"**{panel}**\n\n" + "".join(map(line_of, members)))
    for panel, members in panels.items():
        parts.append(f"## {panel}\n")
        for command in members:
            page = {"obj": command, "ctx": context, "indent": 2, "call_prefix": "memcircuits"}
            parts.append(get_docs_for_click(**page))
    text = "\n".join(parts)
    text = re.sub(r"^Example: (.*)$", r"```console\n$ \1\n```", text, flags=re.MULTILINE)
    text = text.replace("&#x27;", "'").replace("&gt;", ">")
    note = "\nThis page is written by `python docs/make_cli.py`.\n"
    Path(__file__).with_name("cli.md").write_text(text.rstrip() + "\n" + note, encoding="utf-8")


OVERVIEW = """Data goes to stdout or into files, progress to stderr. Exit status: 0 done, 2 bad
input (one line that names argument, value and remedy), 130 interrupted. `memcircuits --version`
prints the version, `memcircuits COMMAND --help` the options."""


def line_of(command: Any) -> str:
    """A command in the overview: its name, with a link, and what it does."""
    name = command.name
    return f"- [`{name}`](#memcircuits-{name}): {command.short_help}\n"


def set_short_help(group: Any, context: Any) -> None:
    """Make the first paragraph of each help what lists show, where Typer would cut it."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        command.short_help = " ".join((command.help or "").partition("\n\n")[0].split())
        if hasattr(command, "list_commands"):
            set_short_help(command, context)


if __name__ == "__main__":
    main()
