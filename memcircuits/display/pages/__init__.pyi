from .attention import Attention, AttentionView
from .blocks import (
    Block,
    Facts,
    Number,
    Numbers,
    Prose,
    Table,
    code,
    emphasis,
    link,
    strong,
)
from .charts import Bars, Heatmap, Lines
from .page import Page
from .tokens import Strip, Tokens

__all__ = [
    "Attention",
    "AttentionView",
    "Bars",
    "Block",
    "Facts",
    "Heatmap",
    "Lines",
    "Number",
    "Numbers",
    "Page",
    "Prose",
    "Strip",
    "Table",
    "Tokens",
    "code",
    "emphasis",
    "link",
    "strong",
]
