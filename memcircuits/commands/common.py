"""How every command is called: options collected in dataclasses, errors reported in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer

_FIRST = ("model", "paragraphs")


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters that are dataclasses are replaced by their fields.

    Typer makes one option from every parameter of a function. Options that several commands share
    would have to be repeated in each of them, so they are fields of a dataclass (`Inputs`,
    `EditOptions`), and a command takes one parameter of that type. The function returned here has a
    parameter for every field, which is what Typer reads; when called, it builds the dataclasses and
    calls the command.

    The model and the paragraphs come first in `--help`, the other fields of `inputs` last.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, tuple[Callable[..., Any], inspect.Signature]] = {}
    for name, parameter in parameters.items():
        group: Any = parameter.annotation
        if isinstance(group, type) and dataclasses.is_dataclass(group):
            groups[name] = group, inspect.signature(group, eval_str=True)
    shared = dict(groups["inputs"][1].parameters) if "inputs" in groups else {}
    own: dict[str, inspect.Parameter] = {}
    for name, parameter in parameters.items():
        if name not in groups:
            own[name] = parameter
        elif name != "inputs":
            own |= groups[name][1].parameters
    first = {name: shared[name] for name in _FIRST if name in shared}
    ordered = first | own | shared
    options = [option.replace(kind=option.KEYWORD_ONLY) for option in ordered.values()]

    @functools.wraps(command)
    def with_single_options(**values: Any) -> None:
        for name, (group, signature) in groups.items():
            fields = {field: values.pop(field) for field in signature.parameters}
            values[name] = group(**fields)
        command(**values)

    with_single_options.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    with_single_options.__annotations__ = {option.name: option.annotation for option in options}
    return with_single_options


def options_of(command: Callable[..., None]) -> dict[str, str]:
    """Name of each parameter of a command, and of its option -> the option as it is typed."""
    options: dict[str, str] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        info = next(iter(getattr(parameter.annotation, "__metadata__", ())), None)
        names = [text for text in getattr(info, "param_decls", None) or () if text[:2] == "--"]
        typed = names[0] if names else "--" + name.replace("_", "-")
        if isinstance(info, typer.models.ArgumentInfo):
            typed = name.upper()
        options |= {name: typed, typed.removeprefix("--").replace("-", "_"): typed}
    return options


@contextlib.contextmanager
def naming(option: str, *arguments: str) -> Iterator[None]:
    """Errors about one of these arguments of a function speak of the option that was typed."""
    from memcircuits.base.errors import InputError

    try:
        yield
    except InputError as error:
        if error.argument not in arguments:
            raise
        raise error.about(option) from None


def _as_typed(remedy: str, options: Mapping[str, str]) -> str:
    """A remedy that speaks of options, not of arguments: `--n-prefix 20`, not `n_prefix=20`.

    Arguments of one word, such as `seed`, are also words of sentences and stay as they are.
    """
    for argument, option in options.items():
        if "_" in argument and option.startswith("--"):
            remedy = re.sub(rf"\b{argument}=", f"{option} ", remedy)
            remedy = re.sub(rf"\b{argument}\b", option, remedy)
    return remedy


@contextlib.contextmanager
def errors_in_one_line(options: Mapping[str, str]) -> Iterator[None]:
    """Turn expected failures into one line on stderr: exit 2 for bad input, 130 for Ctrl-C.

    Args:
        options: argument of a function -> the option that gives it, which the line names.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("memcircuits: interrupted", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader of the output has closed it: `cli.main` ends quietly
        raise
    except (ValueError, MemoryError, OSError) as error:
        from memcircuits.base.errors import InputError

        if isinstance(error, InputError):
            argument = options.get(error.argument, error.argument)
            error = error.about(argument, _as_typed(error.remedy, options))
        elif not isinstance(error, (MemoryError, OSError)):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"memcircuits: {text}", err=True)
        raise typer.Exit(2) from None
