"""Pages: reports and attention views as single HTML files that work offline.

Compose a `Page` of blocks and save it:

    Page("Report", [Prose(["..."]), Heatmap(scores, title="Heads"), Attention(view)]).save("r.html")

`memcircuits.display.text` says how untrusted text enters a page: read it first. `blocks` are prose,
numbers, facts and tables; `charts` are heatmaps, lines and bars, `scatter` clouds of points, with
coordinates from `svg`; `tokens` is a paragraph with coloured tokens, `passages` a list of recited
texts to search, `document` a text of any length; `attention` shows the patterns of heads on one
paragraph, drawn by CircuitsVis; `edge_graph` draws which component reads which; `explorer` shows
all that is known of the component that the reader clicks; `page` renders blocks with `templates/`
and `static/`, inlines the scripts and sets the content-security-policy. Everything takes plain
data: arrays, frames, strings.

Names are imported when first used (`__init__.pyi`): pandas and torch are slow to import.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
