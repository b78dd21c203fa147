"""Wrong options are refused like any other bad input: one line on stderr, exit 2.

Typer itself prints a usage line, a hint and a box. These classes of commands print the argument,
the value that was typed, what is wrong with it and where the options are explained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from memcircuits.base.errors import InputError

# Typer carries its own copy of Click in some versions: the class is found through one it exports.
_UsageError: Any = typer.BadParameter.__bases__[0]
T = TypeVar("T")


class Command(TyperCommand):
    """A command whose wrong options are refused in one line."""

    def make_context(self, info_name: Any, args: list[str], *rest: Any, **extra: Any) -> Any:
        """The parsed command line."""
        typed = list(args)  # parsing empties the list
        make = super().make_context
        return _in_one_line(lambda: make(info_name, args, *rest, **extra), typed)


class Group(TyperGroup):
    """A group of commands that refuses an unknown command in one line."""

    def make_context(self, info_name: Any, args: list[str], *rest: Any, **extra: Any) -> Any:
        """The parsed command line."""
        typed = list(args)
        make = super().make_context
        return _in_one_line(lambda: make(info_name, args, *rest, **extra), typed)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the arguments name."""
        resolve = super().resolve_command
        return _in_one_line(lambda: resolve(ctx, args), list(args))


def _in_one_line(parse: Callable[[], T], typed: Sequence[str]) -> T:
    try:
        return parse()
    except _UsageError as error:
        message = _message(error, typed)
    except InputError as error:  # of an option's callback
        message = str(error)
    typer.echo(f"memcircuits: {message}", err=True)
    raise typer.Exit(2)


def _message(error: Any, typed: Sequence[str]) -> str:
    """The argument, its value where one was typed, what is wrong, and where to read on."""
    text = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
    names = getattr(getattr(error, "param", None), "opts", ())
    values = [value for name, value in pairwise(typed) if name in names]
    given = f" (given: {values[0]})" if values and repr(values[0]) not in text else ""
    command = error.ctx.command_path if getattr(error, "ctx", None) else "memcircuits"
    return f"{text}{given}; see {command} --help"
