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
from .edge_graph import EdgeGraph, GraphEdge
from .explorer import ComponentDetails, Estimate, Explorer, HeadOnParagraph, ParagraphText
from .page import Page
from .passages import Passage, Passages
from .scatter import Scatter
from .tokens import Strip, Tokens

__all__ = [
    "Attention",
    "AttentionView",
    "Bars",
    "Block",
    "ComponentDetails",
    "DocumentText",
    "EdgeGraph",
    "Estimate",
    "Explorer",
    "Facts",
    "GraphEdge",
    "HeadOnParagraph",
    "Heatmap",
    "Lines",
    "Measure",
    "Number",
    "Numbers",
    "Page",
    "ParagraphText",
    "Passage",
    "Passages",
    "Prose",
    "Scatter",
    "Segment",
    "Strip",
    "Table",
    "Tokens",
    "code",
    "emphasis",
    "link",
    "strong",
]
