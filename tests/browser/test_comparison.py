"""The page of a comparison in Chromium: no error, and the gained passages by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import memcircuits as mc
from tests.helpers import models as zoo


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    a, b = zoo.bridge("gpt_neo"), zoo.bridge("gpt_neo", seed=1)
    own = [zoo.reciting(model, n=3, n_prefix=10, n_continuation=12) for model in (a, b)]
    ids = torch.cat([own[0].ids, own[1].ids, zoo.random_ids(4, 22, seed=5)])
    paragraphs = mc.Paragraphs.from_tokens(ids, n_prefix=10)
    compared = mc.compare(a, b, paragraphs, draws=20, progress=False)
    return compared.to_html(tmp_path_factory.mktemp("page") / "compare.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_the_gained_passages_are_filtered(
    open_page: Any, path: Path, width: int, scheme: str
) -> None:
    page = open_page(path, viewport={"width": width, "height": 900}, color_scheme=scheme).page
    rows = page.locator("section", has_text="Passages").first.locator("tbody tr:visible")
    assert rows.count() == 10
    page.get_by_label("passage", exact=True).select_option("gained")
    assert rows.count() == 3
    assert all("gained" in text for text in rows.all_text_contents())
    width_of_page = page.evaluate("document.documentElement.scrollWidth")
    assert width_of_page <= width
