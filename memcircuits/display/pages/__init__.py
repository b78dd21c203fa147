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
    from memcircuits.display.pages.attention import Attention as Attention
    from memcircuits.display.pages.attention import AttentionView as AttentionView
    from memcircuits.display.pages.blocks import Block as Block
    from memcircuits.display.pages.blocks import Facts as Facts
    from memcircuits.display.pages.blocks import Number as Number
    from memcircuits.display.pages.blocks import Numbers as Numbers
    from memcircuits.display.pages.blocks import Prose as Prose
    from memcircuits.display.pages.blocks import Table as Table
    from memcircuits.display.pages.blocks import code as code
    from memcircuits.display.pages.blocks import emphasis as emphasis
    from memcircuits.display.pages.blocks import link as link
    from memcircuits.display.pages.blocks import strong as strong
    from memcircuits.display.pages.charts import Bars as Bars
    from memcircuits.display.pages.charts import Heatmap as Heatmap
    from memcircuits.display.pages.charts import Lines as Lines
    from memcircuits.display.pages.page import Page as Page
    from memcircuits.display.pages.tokens import Strip as Strip
    from memcircuits.display.pages.tokens import Tokens as Tokens

_MODULES = {
    "attention": ("Attention", "AttentionView"),
    "blocks": ("Block", "Facts", "Number", "Numbers", "Prose", "Table"),
    "charts": ("Bars", "Heatmap", "Lines"),
    "page": ("Page",),
    "tokens": ("Strip", "Tokens"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
_HOME |= dict.fromkeys(("code", "emphasis", "link", "strong"), "blocks")
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: pandas and torch are slow to import."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
