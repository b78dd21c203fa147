"""The two files of paragraphs that the paper published, where they are available."""

import os
from pathlib import Path

import pytest

import memcircuits as mc
from memcircuits.data.formats.listing import find_sources
from memcircuits.data.formats.records import BadRow
from memcircuits.data.formats.sources import read_rows


def paper_data():
    """The folder of the paper's two files: named by a variable, or `shared/data` further up."""
    folders = [up / "shared" / "data" for up in Path(__file__).resolve().parents]
    if "MEMCIRCUITS_PAPER_DATA" in os.environ:
        folders = [Path(os.environ["MEMCIRCUITS_PAPER_DATA"])]
    return next((folder for folder in folders if (folder / "50_50_preds.pt").is_file()), None)


PAPER = paper_data()


@pytest.mark.skipif(PAPER is None, reason="the paper's files are not here")
def test_the_papers_paragraphs():
    paragraphs = mc.Paragraphs.read(PAPER / "50_50_preds.pt")
    lengths = len(paragraphs), paragraphs.n_prefix, paragraphs.n_continuation
    assert lengths == (442, 50, 50)
    assert int(paragraphs.ids.max()) < 50257
    source = find_sources(PAPER / "mem_strings.csv")[0]
    rows = list(read_rows(source))
    assert len(rows) == 442
    assert not any(isinstance(row, BadRow) for row in rows)
    assert all(row.metadata["em"] == 50.0 for row in rows)
    assert max(row.metadata["count"] for row in rows) == 40382
    assert rows[0].name == "4171"
    assert rows[0].text.startswith("TD>\n</TR>\n</TABLE>\n")

    class Characters:
        """A tokenizer for a file whose own is not available."""

        def encode(self, text, add_special_tokens=True):
            return [ord(letter) for letter in text]

        def decode(self, ids, **_):
            return "".join(map(chr, ids))

    texts = mc.Paragraphs.read(PAPER / "mem_strings.csv", Characters())
    assert len(texts) == 442
    assert texts.texts(Characters())[0] == rows[0].text[:100]
