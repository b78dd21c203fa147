"""Clear errors for bad input: every message names the argument, its value and the remedy.

All errors that a caller can cause derive from `InputError`, a `ValueError`; the command line turns
them into one line on stderr and exit status 2. The functions below check arguments of public
functions. They raise the error before any work is done, so that a typing mistake does not cost the
minutes of a run.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Self

MAX_LENGTH = 120  # characters of a value in a message


class InputError(ValueError):
    """An argument cannot be used; the message says what is wrong with it and how to fix it.

    Attributes:
        argument: name of the argument.

    Example:
        >>> mc.scan(model, [])
        Traceback (most recent call last):
        memcircuits.InputError: texts: empty; give at least one paragraph
    """

    def __init__(self, argument: str, value: object, remedy: str) -> None:
        text = value if isinstance(value, str) else repr(value)
        if len(text) > MAX_LENGTH:
            text = text[: MAX_LENGTH - 3] + "..."
        super().__init__(f"{argument}: {text}; {remedy}")
        self.argument = argument
        self._parts = (argument, text, remedy)

    @property
    def remedy(self) -> str:
        """What to do."""
        return self._parts[2]

    def about(self, argument: str, remedy: str | None = None) -> Self:
        """The same error with another name of the argument, and perhaps another remedy."""
        return type(self)(argument, self._parts[1], self.remedy if remedy is None else remedy)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the three parts, so that errors of worker processes arrive complete."""
        return type(self), self._parts


# Tracebacks and doctests show the public name.
InputError.__module__ = "memcircuits"


class UnsupportedModel(InputError):
    """A model cannot be analysed; the message names the part that is missing or different."""


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
    above = _is_number(value) and (value >= 0 if zero else value > 0)
    if not (above and value <= 1):
        raise InputError(argument, value, f"give a number in {'[' if zero else '('}0, 1]")


def positive(argument: str, value: float) -> None:
    """Raise `InputError` unless `value` is a finite number above 0."""
    if not (_is_number(value) and 0 < value < float("inf")):
        raise InputError(argument, value, "give a positive number")


def sequence(argument: str, value: Any) -> None:
    """Raise `InputError` unless `value` is None or a collection that is not a string."""
    if value is not None and (isinstance(value, str) or not isinstance(value, Collection)):
        raise InputError(argument, repr(value), "give a list")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
