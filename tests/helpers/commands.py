"""The commands of the command line and their options, read from the command line itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from memcircuits import cli


def known_options() -> dict[str, list[str]]:
    """Command -> its options."""

    def walk(command: Any, name: str) -> Iterator[tuple[str, list[str]]]:
        if hasattr(command, "commands"):
            for child, inner in command.commands.items():
                yield from walk(inner, f"{name} {child}".strip())
        else:
            options = [o for p in command.params for o in p.opts if o.startswith("--")]
            yield name, options

    return dict(walk(typer.main.get_command(cli.app), ""))
