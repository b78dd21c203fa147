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
from .document import DocumentText, Measure, Segment
from .page import Page
from .tokens import Strip, Tokens

__all__ = [
    "Attention",
    "AttentionView",
    "Bars",
    "Block",
    "DocumentText",
    "Facts",
    "Heatmap",
    "Lines",
    "Measure",
    "Number",
    "Numbers",
    "Page",
    "Prose",
    "Segment",
    "Strip",
    "Table",
    "Tokens",
    "code",
    "emphasis",
    "link",
    "strong",
]
