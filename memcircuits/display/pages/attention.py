"""Which tokens a head attends to, as CircuitsVis draws it, in a page that is safe and offline.

CircuitsVis draws attention well, but its own export is not made for untrusted text: it inserts
tokens into a script without escaping, one of its views sets them as raw HTML, and its notebook
output loads a script from the network at every display. The page here uses only its bundled script,
inlined once, and passes it data through an escaped JSON block. Three further choices:

* Patterns are stored as thousandths, row by row, without the zeros a causal model has to the right
  of the diagonal: 12 heads x 100 tokens take about 0.2 MB instead of 2.4.
* The page draws thumbnails of the heads in a few milliseconds. CircuitsVis' `AttentionHeads` draws
  only the chosen head (its own selector would redraw every head at each mouse move), and only when
  the reader scrolls to it.
* Below the pattern is the paragraph. A click on a token shows what it attends to under the chosen
  head; the text can be coloured by a number of each token, such as its rarity or log-probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.display.numbers import array
from memcircuits.display.pages.blocks import Block, Facts
from memcircuits.display.pages.page import Page, frame
from memcircuits.display.pages.tokens import Strip, strip_scale, strip_tokens
from memcircuits.display.text import visible

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Attention(Block):
    """An `AttentionView`, drawn when the reader scrolls to it."""

    template: ClassVar[str] = "attention.html.j2"
    scripts: ClassVar[tuple[str, ...]] = ("circuitsvis",)
    view: AttentionView

    def context(self) -> dict[str, Any]:
        """The view, and the one it is compared with."""
        compare = self.view.compare
        if compare is None:
            return {"views": [self.view.context()]}
        return {"views": [self.view.context(compare), compare.context(self.view)]}


@dataclass(frozen=True, eq=False)
class AttentionView:
    """Attention patterns of some heads on one paragraph.

    Attributes:
        patterns: attention probabilities; each row sums to 1 over the keys.
        head_names: one per head, like `"L1H2"`.
        tokens: text of each token, as decoded; newlines and the like are made visible here.
        n_prefix: number of tokens given as prompt; the continuation follows.
        strips: numbers per token by name, for example
            `{"unigram rarity": Strip(values, "nats")}`.
        compare: another view to set beside this one, such as the perturbed paragraph.
        title: heading.
        provenance: what was run, shown under the view.
    """

    patterns: Float[Tensor, "head query key"]
    head_names: Sequence[str]
    tokens: Sequence[str]
    n_prefix: int = 0
    strips: Mapping[str, Strip] = field(default_factory=dict)
    compare: AttentionView | None = None
    title: str = ""
    provenance: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check shapes, numbers and that rows are probabilities.

        Raises:
            InputError: if they do not fit one another, or attention is no probability.
        """
        self._check_shapes()
        self._check_probabilities()
        for name, strip in self.strips.items():
            strip.check(name, len(self.tokens))

    def _check_shapes(self) -> None:
        shape = tuple(self.patterns.shape)
        n_tokens = len(self.tokens)
        if len(shape) != 3 or 0 in shape or shape[1] != shape[2]:
            raise InputError(
                "patterns", f"shape {shape}", "give [head, query, key] with as many queries as keys"
            )
        if shape[1] != n_tokens:
            raise InputError("tokens", f"{n_tokens} entries", f"patterns has {shape[1]} positions")
        if len(self.head_names) != shape[0]:
            raise InputError(
                "head_names", f"{len(self.head_names)} entries", f"patterns has {shape[0]} heads"
            )
        if not 0 <= self.n_prefix <= n_tokens:
            raise InputError("n_prefix", self.n_prefix, f"give 0 to {n_tokens}, the token count")

    def _check_probabilities(self) -> None:
        values = self._array()
        if not np.isfinite(values).all():
            head, query, key = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise InputError(
                "patterns",
                f"{values[head, query, key]} at {self.head_names[head]}, query {query}, key {key}",
                "give probabilities (run the model in float32, or check its attention mask)",
            )
        off = np.abs(values.sum(-1) - 1)
        if values.min() < -1e-3 or off.max() > 0.02:
            head, query = (int(i) for i in np.unravel_index(off.argmax(), off.shape))
            raise InputError(
                "patterns",
                f"{self.head_names[head]}, query {query} sums to {values[head, query].sum():.3g} "
                f"(smallest value anywhere {values.min():.3g})",
                "give attention after the softmax: each row sums to 1",
            )

    def _array(self) -> np.ndarray:
        return array(self.patterns)

    def _thousandths(self) -> list[list[list[int]]]:
        """Patterns as whole thousandths, each row without its trailing zeros."""
        thousandths = np.rint(self._array() * 1000).astype(int)
        return [[np.trim_zeros(row, "b").tolist() for row in head] for head in thousandths]

    def context(self, other: AttentionView | None = None) -> dict[str, Any]:
        """The variables of the attention template; `data` becomes a JSON block.

        Args:
            other: the view beside this one; tokens that differ from it are marked.
        """
        values = self._array()
        data = {
            "heads": [visible(str(name), 24, tell=False) for name in self.head_names],
            "tokens": [visible(token, 16, tell=False) for token in self.tokens],
            "patterns": self._thousandths(),
            "causal": bool(np.abs(np.triu(values, 1)).max() < 5e-4),
            "prefix": self.n_prefix,
            "strips": [
                {"levels": strip.levels(), "scale": strip_scale(strip)}
                for strip in self.strips.values()
            ],
        }
        return {
            "data": data,
            "title": self.title,
            "tokens": strip_tokens(
                self.tokens, self.n_prefix, self.strips, other.tokens if other else None
            ),
            "n_prefix": self.n_prefix,
            "strip_names": [
                f"{name} ({strip.units})" if strip.units else name
                for name, strip in self.strips.items()
            ],
            "scale": strip_scale(next(iter(self.strips.values()))) if self.strips else ["0", "1"],
            "head_names": list(self.head_names),
        }

    def to_html(self, path: str | Path | None = None) -> str:
        """A page of its own: one file, no network, opened by any browser.

        Args:
            path: file to save the page to as well.

        Returns:
            The page.
        """
        facts = [Facts(self.provenance, title="What was run")] if self.provenance else []
        page = Page(self.title or "Attention", [Attention(self), *facts])
        return page.render() if path is None else page.save(path).read_text(encoding="utf-8")

    def __repr__(self) -> str:
        names = ", ".join(str(name) for name in self.head_names[:4])
        others = f" and {len(self.head_names) - 4} more" if len(self.head_names) > 4 else ""
        beside = "" if self.compare is None else ", beside another paragraph"
        return f"<AttentionView: {names}{others}; {len(self.tokens)} tokens{beside}>"

    def _repr_html_(self) -> str:
        """The page in a sandboxed frame: for Lab, classic, VS Code, Colab and saved notebooks.

        See `memcircuits.display.pages.page.frame`.
        """
        return frame(
            self.to_html(), title=self.title or "Attention", height=1500 if self.compare else 1150
        )

    def figure(self, head: int | str = 0) -> Figure:
        """One head's pattern as a plotly heatmap.

        Args:
            head: its name or its place in `head_names`.

        Raises:
            InputError: if there is no such head.
        """
        from memcircuits.display.figures.heatmaps import attention_pattern

        names = list(self.head_names)
        if isinstance(head, str) and head in names:
            head = names.index(head)
        if isinstance(head, str) or not -len(names) <= head < len(names):
            raise InputError("head", repr(head), f"give its place or one of {', '.join(names)}")
        return attention_pattern(
            self._array()[head],
            [visible(token, 16, tell=False) for token in self.tokens],
            n_prefix=self.n_prefix,
            title=f"{names[head]} {self.title}".strip(),
        )
