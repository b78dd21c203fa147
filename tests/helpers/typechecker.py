"""The checker of annotations that `tests.helpers.shapes` installs."""

import typing

import beartype
import beartype.roar


def checked(function):
    """beartype, except where an annotation is for static checkers only (`Self`, lazy imports)."""
    try:
        typing.get_type_hints(function)
        return beartype.beartype(function)
    except (NameError, beartype.roar.BeartypeDecorHintException):
        return function
