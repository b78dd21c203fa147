"""Sentences of README and the docs agree with the numbers that they rest on (docs/claims.toml)."""

import json

import pytest

from tests.helpers import ROOT


@pytest.fixture
def sentences(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    from claims_page import sentences

    return sentences


def test_every_claim_agrees_with_its_numbers(sentences):
    assert sentences.check() == []


def test_what_is_still_to_be_measured_is_known(sentences):
    """`python docs/make_claims.py` measures it; until then these sentences are not compared."""
    assert sentences.unmeasured() <= {"heads"}


def test_every_claim_can_fail(sentences):
    claims = sentences.claims()
    assert len({claim["name"] for claim in claims}) == len(claims) >= 16
    for claim in claims:
        assert set(claim) <= {"name", "at", "pages", "says", "holds", "never"}
        assert bool(claim.get("says")) == bool(claim.get("pages"))
        assert {"says", "holds", "never"} & set(claim), claim["name"]


CLAIMS = """
[[claim]]
name = "loss"
at = "n.json#runs/two"
pages = ["docs/page.md"]
says = ["it rises by {/rise:+.2f} nats (to {-/fall:.1f}; {/share:.0%} in {/head:s})."]
holds = [["/rise", ">", "n.json#runs/one/rise"]]
never = ["it  is erased"]

[[claim]]
name = "runs"
pages = ["docs/page.md"]
says = ["{n.json#runs/*/em|count:d} runs, mean {n.json#runs/*/em|mean:.1f}, {n.json#rows/b/y:d}"]
"""
NUMBERS = {
    "runs": {
        "one": {"rise": 0.1, "em": [1, 3]},
        "two": {"rise": 0.256, "fall": -3, "share": 0.125, "head": "L1H2", "em": [4]},
    },
    "rows": [{"x": "a", "y": 1}, {"x": "b", "y": 7}],
}
PAGE = "Here it rises by +0.26\nnats (to 3.0; 12 % in L1H2). The 2 runs, mean 3.0, 7 of them.\n"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "memcircuits").mkdir()
    (tmp_path / "README.md").write_text("nothing\n")
    (tmp_path / "docs" / "claims.toml").write_text(CLAIMS)
    (tmp_path / "docs" / "n.json").write_text(json.dumps(NUMBERS))
    (tmp_path / "docs" / "page.md").write_text(PAGE)
    return tmp_path


def test_a_sentence_is_found_across_lines_with_its_numbers(sentences, root):
    assert sentences.check(root) == []
    assert sentences.update(root) == []


def test_other_numbers_are_a_problem_until_the_sentence_has_them(sentences, root):
    numbers = json.loads(json.dumps(NUMBERS))
    numbers["runs"]["two"] |= {"rise": -12.5, "head": "L0H10", "em": [10]}
    (root / "docs" / "n.json").write_text(json.dumps(numbers))
    problems = sentences.check(root)
    assert [problem.split(",")[0] for problem in problems] == [
        "loss: docs/page.md says +0.26",
        "loss: docs/page.md says L1H2",
        "loss: it is not so that /rise > n.json#runs/one/rise: [-12.5",
        "runs: docs/page.md says 3.0",
    ]
    assert sentences.update(root) == ["docs/page.md"]
    text = (root / "docs" / "page.md").read_text()
    assert text == (
        "Here it rises by -12.50\nnats (to 3.0; 12 % in L0H10). The 2 runs, mean 6.0, 7 of them.\n"
    )
    # Words cannot be made true by putting in numbers.
    assert sentences.check(root) == [problems[2]]


@pytest.mark.parametrize("place", ["README.md", "docs/page.md", "memcircuits/code.py"])
def test_a_withdrawn_wording_is_found_wherever_it_stands(sentences, root, place):
    with (root / place).open("a") as file:
        file.write("Then it is\n    ERASED.\n")
    assert sentences.check(root) == [f"loss: {place} still says it"]


TABLE = """
# A page
## Arms
| edit | EM | 95 % |
| --- | --- | --- |
| ours | 1.36 | 0.98 to -1.75 |
| theirs | 3 | — |

| edit | n |
| --- | --- |
| more | 7 |
"""


def test_what_is_not_measured_yet_is_compared_once_it_is(sentences, root):
    claims = """
[[claim]]
name = "later"
pages = ["README.md"]
says = ["| it | {claims.json#new/x:.1f} |"]
holds = [["claims.json#new/x", ">", 3]]
"""
    (root / "docs" / "claims.toml").write_text(claims)
    (root / "README.md").write_text("| it | — |")
    assert sentences.unmeasured(root) == {"new"}
    assert sentences.check(root) == sentences.update(root) == []
    (root / "docs" / "claims.json").write_text('{"new": {"x": 2}}')
    assert [problem.split(":")[0] for problem in sentences.check(root)] == ["later", "later"]
    assert sentences.update(root) == ["README.md"]
    assert (root / "README.md").read_text() == "| it | 2.0 |"


def test_numbers_in_tables_of_a_page_are_found(sentences, root):
    (root / "docs" / "made.md").write_text(TABLE)
    found = [
        sentences.look_up(f"made.md#Arms/{path}", root)
        for path in ("ours/EM", "ours/95 %/1", "theirs/EM", "theirs/95 %", "more/n")
    ]
    assert found == [1.36, -1.75, 3, "—", 7]


def test_a_sentence_that_is_gone_and_a_number_that_is_gone(sentences, root):
    (root / "docs" / "page.md").write_text("Something else.\n")
    assert [p.partition(":")[0] for p in sentences.check(root)] == ["loss", "runs"]
    (root / "docs" / "n.json").write_text("{}")
    with pytest.raises(KeyError, match="runs"):
        sentences.check(root)
