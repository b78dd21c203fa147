"""`Head`: the name of an attention head, a layer and a place in it.

Users write a head as `Head(1, 2)`, as `"L1H2"` or as `(1, 2)` (`HeadLike`); `Head.of` reads all
three, and `Head.within` refuses a head that a model does not have.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple, TypeAlias

from memcircuits.base.errors import InputError


class Head(NamedTuple):
    """An attention head; its text is `L1H2`.

    Example:
        >>> print(mc.Head(1, 2), mc.Head.parse("L0H5").layer)
        L1H2 0
    """

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read `L1H2`.

        Raises:
            InputError: if `text` is not of that form.
        """
        layer, _, head = text.strip().upper().removeprefix("L").partition("H")
        if not (layer.isdigit() and head.isdigit()):
            raise InputError("head", repr(text), "write it like L1H2")
        return cls(int(layer), int(head))

    @classmethod
    def of(cls, value: Any) -> Head:
        """A head given as `L1H2` or as a pair of layer and head.

        Raises:
            InputError: if it is neither.
        """
        if isinstance(value, str):
            return cls.parse(value)
        try:
            layer, head = value
        except (TypeError, ValueError):
            raise InputError("head", repr(value), "write it like L1H2 or Head(1, 2)") from None
        if not (isinstance(layer, Integral) and isinstance(head, Integral)):
            raise InputError("head", repr(value), "write it like L1H2 or Head(1, 2)")
        return cls(int(layer), int(head))

    def within(self, n_layers: int, n_heads: int, argument: str, owner: str = "there are") -> Head:
        """This head, if a model of this size has it.

        Args:
            n_layers: number of layers.
            n_heads: number of heads per layer.
            argument: name of the argument, for the error.
            owner: beginning of the remedy, for the error.

        Raises:
            InputError: if there is no such head.
        """
        if not (0 <= self.layer < n_layers and 0 <= self.head < n_heads):
            raise InputError(argument, str(self), f"{owner} {n_layers} layers of {n_heads} heads")
        return self


HeadLike: TypeAlias = Head | str | tuple[int, int]
"""A head as users write it: `Head(1, 2)`, `"L1H2"` or `(1, 2)`."""
