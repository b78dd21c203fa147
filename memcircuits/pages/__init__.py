"""Pages: reports and attention views as single HTML files that work offline.

Compose a :class:`Page` of blocks and save it::

    Page("Report", [Prose(["..."]), Heatmap(scores, title="Heads"), Attention(view)]).save("r.html")

============  ====================================================================================
``text``      the three doors through which untrusted text enters: read this first
``blocks``    what a page is made of: prose, numbers, facts, tables, charts, token strips
``attention`` :class:`AttentionView`: patterns of heads on one paragraph, drawn by CircuitsVis
``page``      :class:`Page`: renders blocks, inlines scripts, sets the content-security-policy
``svg``       positions in small charts; ``palette``: colours as numbered classes
============  ====================================================================================

Everything here takes plain data (arrays, frames, strings); nothing here knows a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import AttentionView as AttentionView
    from .blocks import Attention as Attention
    from .blocks import Bars as Bars
    from .blocks import Block as Block
    from .blocks import Facts as Facts
    from .blocks import Heatmap as Heatmap
    from .blocks import Lines as Lines
    from .blocks import Number as Number
    from .blocks import Numbers as Numbers
    from .blocks import Prose as Prose
    from .blocks import Strip as Strip
    from .blocks import Table as Table
    from .blocks import Tokens as Tokens
    from .blocks import code as code
    from .blocks import emphasis as emphasis
    from .blocks import link as link
    from .blocks import strong as strong
    from .page import Page as Page

_BLOCKS: tuple[str, ...] = (
    "Attention",
    "Bars",
    "Block",
    "Facts",
    "Heatmap",
    "Lines",
    "Number",
    "Numbers",
)
_BLOCKS += ("Prose", "Strip", "Table", "Tokens", "code", "emphasis", "link", "strong")
_HOME = {"AttentionView": "attention", "Page": "page"} | dict.fromkeys(_BLOCKS, "blocks")
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: pandas and torch are slow to import."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
