"""Clear errors for bad input: every message names the argument, its value and the remedy.

All errors that a caller can cause derive from `InputError`, a `ValueError`; the command line turns
them into one line on stderr and exit status 2.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


class InputError(ValueError):
    """The caller gave something that cannot be used; the message says what is wrong and how to fix it.

    Example:
        >>> mc.scan(model, [])
        Traceback (most recent call last):
        memcircuits.InputError: texts: empty; give at least one paragraph
    """

    def __init__(self, argument: str, value: object, remedy: str) -> None:
        text = value if isinstance(value, str) else repr(value)
        if len(text) > 120:
            text = text[:117] + "..."
        super().__init__(f"{argument}: {text}; {remedy}")
        self.argument = argument
        self._parts = (argument, text, remedy)

    def __reduce__(self) -> tuple[Any, ...]:
        """How it is pickled: errors of worker processes arrive whole."""
        return type(self), self._parts


# Tracebacks and doctests show the public name.
InputError.__module__ = "memcircuits"


class UnsupportedModel(InputError):
    """The model cannot be analysed; the message says which part of it and why."""


def one_of(argument: str, value: Any, allowed: Collection[str]) -> None:
    """Raise `InputError` unless `value` is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise InputError(argument, repr(value), "choose one of " + ", ".join(sorted(allowed)))


def at_least(argument: str, value: int, minimum: int) -> None:
    """Raise `InputError` unless `value` is an integer >= `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InputError(argument, value, f"give an integer of at least {minimum}")


def fraction(argument: str, value: float, *, zero: bool = False) -> None:
    """Raise `InputError` unless `value` lies in (0, 1], or in [0, 1] with `zero`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (value >= 0 if zero else value > 0) or not value <= 1:
        raise InputError(argument, value, f"give a number in {'[' if zero else '('}0, 1]")


def positive(argument: str, value: float) -> None:
    """Raise `InputError` unless `value` is a finite number above 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        raise InputError(argument, value, "give a positive number")


def sequence(argument: str, value: Any) -> None:
    """Raise `InputError` unless `value` is None or several things: a string is one thing."""
    if value is not None and (isinstance(value, str) or not isinstance(value, Collection)):
        raise InputError(argument, repr(value), "give a list")
