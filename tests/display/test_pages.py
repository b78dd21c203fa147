"""Pages are complete, small, and give hostile text no way in.

The central test renders a page twice, with plain and with hostile text, and parses both: the
elements and attribute names must be the same. Whatever text can do to a page it must do by adding
an element or an attribute, so equal structure means that it stayed text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memcircuits.display.pages import (
    Attention,
    AttentionView,
    Bars,
    Facts,
    Heatmap,
    Lines,
    Number,
    Numbers,
    Page,
    Prose,
    Scatter,
    Strip,
    Table,
    Tokens,
    code,
    emphasis,
    link,
    strong,
)
from memcircuits.display.pages.page import circuitsvis_bundle
from memcircuits.display.pages.svg import log_ticks, ticks
from memcircuits.display.palette import N_LEVELS, classes, level
from memcircuits.display.text import clean, json_block, number, short, visible

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--",
    "<!--<script>",
    "]]>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='",
    "\x00",
    "\u2028",
    "\u2029\u0085",
    "\u202eelbadaernu\u202c",
    "\u05e9\u05dc\u05d5\u05dd",
    "\ud83d",  # half an emoji
    "👩‍👩‍👧‍👦",
    "\u0301",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;&amp;",
    "x" * 10_000,
    "",
    " ",
    "\n\r\t",
    "${alert(1)}`",
    "__proto__",
]


def make_patterns(heads: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Causal attention that is different for each head."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2.0 * torch.randn(heads, tokens, tokens, generator=generator)
    future = torch.ones(tokens, tokens).triu(1).bool()
    return scores.masked_fill(future, -torch.inf).softmax(-1)


def make_view(
    heads: int = 3, n: int = 8, tokens: list[str] | None = None, **kwargs
) -> AttentionView:
    tokens = tokens or [f" w{i}" for i in range(n)]
    n = len(tokens)
    rarity = np.linspace(1, 9, n)
    log_prob = -np.linspace(0, 2, n)
    log_prob[0] = np.nan  # nothing comes before the first token
    strips = {
        "unigram rarity": Strip(rarity, "nats"),
        "log-probability": Strip(log_prob, "nats", reverse=True),
    }
    names = [f"L{h // 8}H{h % 8}" for h in range(heads)]
    return AttentionView(make_patterns(heads, n), names, tokens, n // 2, strips, **kwargs)


def make_page(text: str, tokens: list[str]) -> Page:
    """A page with every block, and ``text`` wherever text can go."""
    columns = {"name": [text, f"not {text}"], "x": [1, 2], "y": [0.5, 2.0], "set": [text, text]}
    frame = pd.DataFrame(columns, dtype=object)  # pandas' own strings refuse half an emoji
    frame["low"], frame["high"] = frame.y - 0.1, frame.y + 0.1
    view = make_view(tokens=tokens, title=text, provenance={text or "k": text})
    return Page(
        text,
        [
            Numbers([Number(text, text, text)], title=text, note=text),
            Prose([text, [text, strong(text), emphasis(text), code(text)]], title="a"),
            Facts({text or "k": text}, [text], title="b"),
            Table(frame, labels={"name": text}, help={"x": text}, title="c"),
            Heatmap([[1.0, -2.0]], text, text, row_names=[text], hover=[[text, text]]),
            Lines(frame, "x", "y", "set", "low", "high", text, text, text, title="d"),
            Bars(frame, "name", "y", "set", "low", "high", text, text, text),
            Tokens(tokens, Strip(np.arange(len(tokens)), text), text, 1),
            Attention(view, title=text),
        ],
        lead=text,
        footer=text,
    )


class Structure(HTMLParser):
    """The elements of a page with the names of their attributes, and its data blocks."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, ...]] = []
        self.data: list[str] = []
        self._in_data = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, *[name for name, _ in attrs]))
        self._in_data = tag == "script" and ("type", "application/json") in attrs
        if self._in_data:
            self.data.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False

    def handle_comment(self, data: str) -> None:
        self.elements.append(("comment",))

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data[-1] += data


def without_bundle(html: str) -> str:
    return html.replace(circuitsvis_bundle(), "")


def plain_structure(text: str) -> list[tuple[str, ...]]:
    """The page's elements when text of that length (it decides which labels fit) is harmless."""
    return Structure(without_bundle(make_page("w" * len(text), ["a"] * 3).render())).elements


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_hostile_text_adds_no_element(text: str) -> None:
    html = make_page(text or "plain", [text, "b", text]).render()
    assert Structure(without_bundle(html)).elements == plain_structure(text or "plain")
    html.encode("utf-8")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=30)), min_size=4, max_size=4))
def test_generated_text_adds_no_element(texts: list[str]) -> None:
    html = make_page(texts[0] or "plain", texts[1:]).render()
    structure = Structure(without_bundle(html))
    assert structure.elements == plain_structure(texts[0] or "plain")
    data = [json.loads(block) for block in structure.data]
    assert data[0]["tokens"] == [visible(t, 16, tell=False) for t in texts[1:]]


@given(
    st.recursive(st.text() | st.integers(), lambda s: st.lists(s) | st.dictionaries(st.text(), s))
)
def test_json_block_is_inert_and_lossless(data: object) -> None:
    block = str(json_block(data))
    assert json.loads(block) == data
    assert block.isascii()
    assert not set("<>&") & set(block)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_block_refuses_what_json_lacks(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        json_block([value])


@given(st.text())
def test_cleaned_text_is_encodable_and_has_no_controls(text: str) -> None:
    for readable in (clean(text), visible(text)):
        readable.encode("utf-8")
        assert not re.search(
            r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\ud800-\udfff]", readable
        )


def test_tokens_show_what_cannot_be_seen() -> None:
    assert visible(" the\n") == "·the⏎"
    assert visible("a\r") == "a⟨U+000D⟩"
    assert visible("") == "∅"
    assert visible("\x00\u2028") == "⟨U+0000⟩⟨U+2028⟩"
    assert visible("\u0301") == "◌\u0301"
    assert visible("x" * 10_000) == "x" * 60 + "… (10,000 characters)"
    assert clean("plain text\n") == "plain text\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.41963, "0.420"),
        (-0.0001, "\u22121.00e\u221204"),
        (-0.002, "\u22120.002"),
        (12.345, "12.3"),
        (1234567.8, "1.23e+06"),
        (3.0, "3"),
        (-1200.0, "\u22121,200"),
        (float("nan"), "\u2013"),
    ],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text


def test_short_numbers_lose_zeros() -> None:
    assert [short(v) for v in (0.4, 1.0, 0.25, 10.0, -0.5)] == [
        "0.4",
        "1",
        "0.25",
        "10",
        "\u22120.5",
    ]


# ---- the policy ----


def hashes(html: str, tag: str) -> set[str]:
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    return {
        "'sha256-" + base64.b64encode(hashlib.sha256(b.encode()).digest()).decode() + "'"
        for b in bodies
    }


def test_policy_admits_these_scripts_and_styles_only() -> None:
    html = make_page("plain", ["a", "b", "c"]).render()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    assert policy
    rules = {rule.split()[0]: set(rule.split()[1:]) for rule in policy[1].split("; ")}
    assert rules["default-src"] == {"'none'"}
    assert rules["connect-src"] == {"'none'"}
    assert rules["script-src"] == hashes(html, "script")
    assert len(rules["script-src"]) == 2
    assert rules["style-src"] == hashes(html, "style")
    assert "unsafe" not in policy[1]
    own = without_bundle(html)
    assert not re.search(
        r"<[^>]*\s(style|on\w+)=", re.sub(r"<(script|style)>.*?</\1>", "", own, flags=re.S)
    )


def test_bundle_comes_once_with_its_licence_and_only_when_needed() -> None:
    two = Page("p", [Attention(make_view()), Attention(make_view())]).render()
    assert two.count("var CircuitsVis=") == 1
    assert two.count("Permission is hereby granted") == 1
    assert "sourceMappingURL" not in two
    none = Page("p", [Prose(["text"])]).render()
    assert "var CircuitsVis=" not in none
    assert len(none) < 80_000


def test_no_address_but_those_we_link_to() -> None:
    html = without_bundle(make_page("plain", ["a", "b", "c"]).render())
    assert not re.findall(r'(?:src|href|action)="(?!#|data:,")[^"]*"', html)


@pytest.mark.parametrize(
    "href", ["javascript:alert(1)", "http://example.org", "//example.org", "data:x"]
)
def test_links_are_https(href: str) -> None:
    with pytest.raises(ValueError, match="href"):
        link("text", href)


# ---- attention views ----


@pytest.mark.parametrize(("heads", "limit"), [(12, 3_000_000), (144, 6_000_000)])
def test_size_of_a_page_of_100_tokens(heads: int, limit: int) -> None:
    assert len(make_view(heads, 100).to_html().encode()) < limit


def test_patterns_keep_three_decimals() -> None:
    view = make_view(2, 30)
    data = view.context()["data"]
    for head, rows in enumerate(data["patterns"]):
        for query, row in enumerate(rows):
            full = np.zeros(30)
            full[: len(row)] = np.array(row) / 1000
            assert np.abs(full - view.patterns[head, query].numpy()).max() <= 0.0005001
    assert data["causal"]


def test_patterns_of_a_model_that_looks_ahead_are_kept_whole() -> None:
    view = AttentionView(torch.full((1, 4, 4), 0.25), ["L0H0"], list("abcd"))
    data = view.context()["data"]
    assert not data["causal"]
    assert data["patterns"][0][0] == [250] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_patterns_are_taken(dtype: torch.dtype) -> None:
    view = AttentionView(make_patterns(2, 60).to(dtype), ["a", "b"], ["t"] * 60)
    assert len(view.context()["data"]["patterns"]) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_patterns_that_are_no_numbers_are_refused(bad: float) -> None:
    patterns = make_patterns(2, 5)
    patterns[1, 3, 2] = bad
    with pytest.raises(ValueError, match=r"patterns.*L0H1, query 3, key 2.*float32"):
        AttentionView(patterns, ["L0H0", "L0H1"], ["t"] * 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patterns": torch.randn(2, 5, 5)}, "after the softmax"),
        ({"patterns": torch.zeros(2, 5, 4)}, "as many queries as keys"),
        ({"tokens": ["t"] * 4}, "5 positions"),
        ({"head_names": ["a"]}, "2 heads"),
        ({"n_prefix": 6}, "n_prefix"),
        ({"strips": {"s": Strip([1.0])}}, "5 values"),
        ({"strips": {"s": Strip([1.0, 2, 3, 4, float("inf")])}}, "infinite"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    good = {"patterns": make_patterns(2, 5), "head_names": ["a", "b"], "tokens": ["t"] * 5}
    with pytest.raises(ValueError, match=message):
        AttentionView(**(good | change))


def test_figure_of_a_head_by_name_and_place() -> None:
    view = make_view()
    assert (view.figure("L0H1").data[0].z == view.figure(1).data[0].z).sum() == 36
    with pytest.raises(ValueError, match="L0H2"):
        view.figure("L9H9")


def test_notebook_output_is_one_sandboxed_frame() -> None:
    output = make_view(title='"><script>alert(1)</script>')._repr_html_()
    parsed = Structure(output)
    assert [e[0] for e in parsed.elements] == ["iframe"]
    assert 'sandbox="allow-scripts allow-downloads"' in output
    assert "to_html" in output
    assert "http-equiv" in output


def test_a_view_is_called_by_its_heads() -> None:
    view = AttentionView(make_patterns(6, 12), [f"L0H{i}" for i in range(6)], ["t"] * 12)
    assert repr(view) == "<AttentionView: L0H0, L0H1, L0H2, L0H3 and 2 more; 12 tokens>"


def test_saving_replaces_in_one_step(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "page.html"
    page = Page("p", [Prose(["first"])])
    assert page.save(path) == path
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Page("p", [Prose(["second"])]).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_to_html_writes_what_it_returns(tmp_path) -> None:
    view = make_view()
    assert view.to_html(tmp_path / "a.html") == (tmp_path / "a.html").read_text(encoding="utf-8")
    assert view.to_html() == view.to_html()


# ---- blocks ----


def test_table_leaves_rows_out_and_says_so() -> None:
    frame = pd.DataFrame({"em": np.arange(10_000), "text": "x" * 500})
    html = Page("p", [Table(frame, max_rows=300)]).render()
    assert html.count("<tr>") == 301
    assert "The first 300 of 10,000 rows; 9,700 are left out" in html
    assert len(html) < 200_000


def test_table_cells_and_sort_keys() -> None:
    frame = pd.DataFrame(
        {
            "f": [0.123456, np.nan],
            "i": pd.array([1200, None], dtype="Int64"),
            "b": [True, False],
            "t": ["a", None],
        }
    )
    rows = Table(frame).context()["rows"]
    assert [cell["text"] for cell in rows[0]] == ["0.123", "1,200", "yes", "a"]
    assert [cell["text"] for cell in rows[1]] == ["\u2013", "\u2013", "no", "\u2013"]
    assert [cell["sort"] for cell in rows[0]] == ["0.123456", 1200, 1, None]
    assert rows[1][0]["sort"] == rows[1][1]["sort"] == ""


def test_heatmap_marks_gaps_and_scale() -> None:
    values = torch.tensor([[0.1, float("nan")], [-0.4, 0.2]])
    chart = Heatmap(values, marks=torch.tensor([[False, False], [True, False]])).context()["chart"]
    cells = {(c["row"], c["col"]): c for c in chart["cells"]}
    assert [place for place, c in cells.items() if c["marked"]] == [(1, 0)]
    shades = {(0, 0): "d12", (0, 1): "none", (1, 0): "d0", (1, 1): "d15"}
    assert {place: c["shade"] for place, c in cells.items()} == shades
    assert chart["gaps"]
    assert chart["low"] == "\u22120.4"
    assert cells[0, 0]["y"] > cells[1, 0]["y"]  # layer 0 at the bottom
    assert cells[0, 0]["x"] < cells[0, 1]["x"]


def test_small_negative_numbers_keep_their_labels() -> None:
    values = torch.tensor([[-0.0123, 0.002, -0.00004, 0.03]])
    texts = [c["text"] for c in Heatmap(values).context()["chart"]["cells"]]
    assert texts == ["\u22120.012", "0.002", "0.000", "0.030"]


def test_a_column_apart_shares_the_scale() -> None:
    """The darker of two cells has the larger value, wherever it stands; small ones keep colours."""
    names = [["L0H0", "L0H1", "L0.mlp"], ["L1H0", "L1H1", "L1.mlp"]]
    values = [[0.1, 0.2, 0.0], [0.3, 0.4, 4.0]]

    def drawn(scale: Scale) -> dict[str, Any]:
        block = Heatmap(values, cell_names=names, n_apart=1, marks=[(1, 2)], scale=scale)
        html = Page("p", [block]).render()
        for name in (*names[0], *names[1]):
            assert html.count(f'href="#{name}"') == 1
        assert ("square root" in html) == (scale == "square root")
        return block.context()["chart"]

    chart = drawn("square root")
    cells = {c["name"]: c for c in chart["cells"]}
    assert cells["L1.mlp"]["shade"] == "s20"
    assert cells["L1H1"]["shade"] == "s6"  # sqrt(0.4 / 4) of 20 levels
    assert {c["name"]: c["shade"] for c in drawn("linear")["cells"]}["L1H1"] == "s2"
    assert chart["high"] == "4"
    step = cells["L0H1"]["x"] - cells["L0H0"]["x"]
    assert cells["L0.mlp"]["x"] - cells["L0H1"]["x"] == pytest.approx(1.5 * step, abs=0.01)
    assert [c["name"] for c in chart["cells"] if c["marked"]] == ["L1.mlp"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Heatmap([1.0, 2.0]), "row, col"),
        (lambda: Heatmap([[float("inf")]]), "infinite"),
        (lambda: Heatmap([[1.0]], marks=[(0, 3)]), "marks"),
        (lambda: Heatmap([[1.0]], col_names=["a", "b"]), "col_names"),
        (lambda: Heatmap([[1.0]], n_apart=1), "n_apart"),
        (lambda: Lines(pd.DataFrame({"x": [1]}), "x", "why"), "why"),
        (lambda: Lines(pd.DataFrame({"x": [0], "y": [1]}), "x", "y", log_x=True), "log_x"),
        (lambda: Bars(pd.DataFrame({"x": [], "y": []}), "x", "y"), "no rows"),
        (lambda: Table(pd.DataFrame(), page_size=0), "page_size"),
        (lambda: Tokens(["a"], Strip([1.0, 2.0]), "n"), "1 values"),
    ],
)
def test_blocks_refuse_what_they_cannot_draw(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_charts_take_gaps_and_constants() -> None:
    frame = pd.DataFrame({"x": [1, 2, 3, 4], "y": [1.0, np.nan, 1.0, 1.0]})
    runs = Lines(frame, "x", "y").context()["chart"]["series"][0]["runs"]
    assert len(runs) == 2
    html = Page("p", [Lines(frame, "x", "y"), Bars(frame, "x", "y"), Heatmap([[0.0]])]).render()
    assert not re.search(r"\bnan\b", html)


def test_the_diagonal_joins_equal_values() -> None:
    frame = pd.DataFrame({"a": [1.0, 4.0, 9.0], "b": [2.0, 3.0, 2.5]})
    chart = Scatter(frame, "a", "b", diagonal=True).context()["chart"]
    at = {axis: {t["text"]: t["at"] for t in chart[f"{axis}_ticks"]} for axis in "xy"}
    top = max(at["y"], key=float)  # the shorter axis
    ends = {"x1": at["x"]["0"], "y1": at["y"]["0"], "y2": at["y"][top]}
    assert chart["diagonal"].items() >= ends.items()
    slope = (at["x"]["10"] - at["x"]["0"]) / 10
    assert chart["diagonal"]["x2"] == pytest.approx(at["x"]["0"] + slope * float(top), abs=0.1)
    assert 'class="zero diagonal"' in Page("t", [Scatter(frame, "a", "b", diagonal=True)]).render()
    assert Scatter(frame, "a", "b").context()["chart"]["diagonal"] is None
    apart = pd.DataFrame({"a": [1.0, 2.0], "b": [-3.0, -1.0]})
    assert Scatter(apart, "a", "b", diagonal=True).context()["chart"]["diagonal"] is None


@given(
    st.floats(-1e6, 1e6),
    st.floats(0, 1e6).filter(lambda width: width == 0 or width > 1e-6),
)
def test_ticks_cover_the_range(low: float, width: float) -> None:
    marks = ticks(low, low + width)
    assert 2 <= len(marks) <= 14
    slack = 1e-6 * max(1, abs(low), width)
    assert marks[0] <= low + slack
    assert marks[-1] >= low + width - slack


def test_ticks_about_the_smallest_number() -> None:
    assert ticks(5e-324, 5e-324)[-1] == 1


def test_log_ticks_are_the_values_while_few() -> None:
    assert log_ticks([1, 2, 4, 2]) == [1, 2, 4]
    assert log_ticks(range(1, 200)) == [1, 10, 100, 1000]


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(-10, 10))
def test_levels_stay_on_the_scale(value: float, low: float, high: float) -> None:
    index = level(value, low, high)
    assert index is not None
    assert 0 <= index < N_LEVELS
    assert level(float("nan"), low, high) is None


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_on_every_colour_is_readable(mode: str) -> None:
    """WCAG AA: a contrast of 4.5 between text and ground."""

    def luminance(colour: str) -> float:
        colour = colour if len(colour) == 7 else "#" + "".join(c * 2 for c in colour[1:])
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    rules = re.findall(r"background:(#\w+);fill:#\w+;color:(#\w+)", classes(mode))
    assert len(rules) == 2 * N_LEVELS
    for ground, ink in rules:
        bright, dark = sorted((luminance(ground), luminance(ink)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5


def test_importing_pages_is_light() -> None:
    code = "import sys, memcircuits.pages; print({'torch', 'pandas', 'plotly'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
