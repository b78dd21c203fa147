"""Two models side by side: passages, paired changes of heads, saved results, what is refused."""

from __future__ import annotations

import dataclasses
import html
import json

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.data.windows import Windows
from memcircuits.evidence.comparisons.heads import head_changes
from memcircuits.evidence.comparisons.result import Comparison
from memcircuits.measure.corpus.scan import scan_to_disk
from tests.helpers import models as zoo

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def pair():
    """Two models of other weights, and paragraphs that each of them recites, with controls."""
    a, b = zoo.bridge("gpt_neo"), zoo.bridge("gpt_neo", seed=1)
    own = [zoo.reciting(model, n=3, n_prefix=10, n_continuation=12) for model in (a, b)]
    random = mc.Paragraphs.from_tokens(zoo.random_ids(4, 22, seed=5), n_prefix=10)
    ids = torch.cat([own[0].ids, own[1].ids, random.ids])
    names = [*(f"a-{i}" for i in range(3)), *(f"b-{i}" for i in range(3)), *random.names]
    return a, b, mc.Paragraphs.from_tokens(ids, n_prefix=10, names=names)


@pytest.fixture(scope="module")
def compared(pair):
    a, b, paragraphs = pair
    return mc.compare(a, b, paragraphs, draws=200, **QUIET)


def test_passages_that_only_one_recites_are_gained_and_lost(pair, compared):
    frame = compared.to_frame().set_index("id")
    assert set(frame.index[frame["passage"] == "lost"]) == {"a-0", "a-1", "a-2"}
    assert set(frame.index[frame["passage"] == "gained"]) == {"b-0", "b-1", "b-2"}
    a, b, paragraphs = pair
    for letter, model in (("a", a), ("b", b)):
        scanned = mc.scan(model, paragraphs, **QUIET).to_frame().set_index("id")
        assert (frame.loc[scanned.index, f"em_{letter}"] == scanned["em"]).all()
        np.testing.assert_allclose(
            frame.loc[scanned.index, f"nll_{letter}"], scanned["nll"], rtol=1e-6
        )


def test_gains_and_losses_are_shown_as_text(compared):
    losses, gains = compared.changes("losses"), compared.changes("gains", 2)
    assert set(losses["id"]) >= {"a-0", "a-1", "a-2"}
    assert (losses["em_b"] < losses["em_a"]).all()
    assert len(gains) == 2
    assert (gains["em_b"] > gains["em_a"]).all()
    row = compared.names.index(gains["id"][0])
    ids = compared.ids[row].tolist()
    shown = gains["text"][0].partition(" | ")
    assert shown[0].endswith(f"<{ids[9]}>")  # these models have no tokenizer
    assert shown[2] == "".join(f"<{i}>" for i in ids[10:])
    with pytest.raises(InputError, match="kind"):
        compared.changes("ties")


def test_the_change_of_a_head_is_that_of_two_ablations(pair, compared):
    a, b, paragraphs = pair
    effects = [mc.ablate_heads(m, paragraphs, **QUIET).samples["nll"] for m in (a, b)]
    change = effects[1] - effects[0]
    expected = change[:6].mean(0) - change[6:].mean(0)
    torch.testing.assert_close(compared.head_change.values, expected, atol=1e-6, rtol=1e-5)
    first = compared.heads_frame().iloc[0]
    assert abs(first["change"]) == pytest.approx(float(expected.abs().max()), rel=1e-5)
    assert (compared.ci[0] <= compared.head_change.values).all()
    assert (compared.head_change.values <= compared.ci[1]).all()


def test_intervals_are_paired_over_groups():
    """Two noisy models that differ by a constant: a paired interval sees the constant only."""
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(30, 1, 2, generator=generator) for name in ("memorized", "control")}
    step = torch.tensor([[0.5, 0.0]])
    effects = {
        "memorized": torch.stack([noise["memorized"], noise["memorized"] + step]),
        "control": torch.stack([noise["control"], noise["control"]]),
    }
    changes = head_changes(effects, draws=500, seed=0)
    torch.testing.assert_close(changes.ci, torch.stack([step, step]), atol=1e-5, rtol=0)
    assert float(changes.p_value[0, 0]) < 0.01 < float(changes.p_value[0, 1])
    scores = changes.scores[1] - changes.scores[0]
    torch.testing.assert_close(scores, step, atol=1e-5, rtol=0)


def test_a_fall_is_as_significant_as_a_rise():
    step = torch.full((20, 1, 1), 0.3)
    zero = torch.zeros(20, 1, 1)
    rise = {"memorized": torch.stack([zero, step]), "control": torch.stack([zero, zero])}
    fall = {"memorized": torch.stack([step, zero]), "control": torch.stack([zero, zero])}
    p = [float(head_changes(effects, draws=300, seed=1).p_value) for effects in (rise, fall)]
    assert p[0] == p[1] < 0.01


def test_the_mean_change_has_scipys_interval(compared):
    change = (compared.em[1] - compared.em[0]).double().numpy()
    mean, low, high = compared.mean_change("em")
    assert mean == pytest.approx(change.mean())
    theirs = bootstrap(
        (change,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(0)
    ).confidence_interval
    spread = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.1 * spread)
    assert high == pytest.approx(theirs.high, abs=0.1 * spread)


def test_copies_count_once(pair):
    a, b, paragraphs = pair
    once = mc.compare(a, b, paragraphs, draws=50, **QUIET)
    copied = paragraphs + mc.Paragraphs(
        paragraphs.ids[:1].expand(5, -1), 10, tuple(f"copy-{i}" for i in range(5))
    )
    often = mc.compare(a, b, copied, draws=50, **QUIET)
    assert often.mean_change("nll")[0] == pytest.approx(once.mean_change("nll")[0], rel=1e-5)
    torch.testing.assert_close(often.head_change.values, once.head_change.values)
    assert int(often.lost.sum()) == 8
    assert any("count once" in note for note in often.notes)


def test_a_model_against_itself_changes_nothing(pair):
    a, _, paragraphs = pair
    same = mc.compare(a, a, paragraphs, draws=50, **QUIET)
    assert not (same.gained | same.lost).any()
    assert same.head_change.values.abs().max() == 0
    assert not same.significant.any()
    assert "a and b have the same weights" in same.notes
    assert same.labels == ("tiny-gpt_neo (a)", "tiny-gpt_neo (b)")


def test_scans_are_matched_by_ids_and_the_rest_is_named(pair):
    a, b, paragraphs = pair
    shuffled = paragraphs[[9, 3, 0, 4, 8]]
    scans = mc.scan(a, paragraphs, **QUIET), mc.scan(b, shuffled, **QUIET)
    result = mc.compare(*scans)
    assert result.names == tuple(paragraphs.names[i] for i in (0, 3, 4, 8, 9))
    whole = mc.compare(a, b, paragraphs, draws=5, **QUIET)
    rows = [whole.names.index(name) for name in result.names]
    assert result.em.tolist() == whole.em[:, rows].tolist()
    assert "5 paragraphs of a are not in b and were left out" in result.notes
    assert not result.has_heads
    with pytest.raises(InputError, match="none compared"):
        result.heads_frame()


def test_scans_on_disk_are_those_in_memory(pair, tmp_path):
    a, b, paragraphs = pair
    rows = [
        {"id": n, "ids": i} for n, i in zip(paragraphs.names, paragraphs.ids.tolist(), strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = [
        scan_to_disk(
            model, tmp_path / "rows.jsonl", tmp_path / name, windows=Windows(10, 12), **QUIET
        )
        for name, model in (("one", a), ("two", b))
    ]
    on_disk = mc.compare(*folders)
    in_memory = mc.compare(mc.scan(a, paragraphs, **QUIET), mc.scan(b, paragraphs, **QUIET))
    assert on_disk.labels == ("one", "two")
    assert on_disk.em.tolist() == in_memory.em.tolist()
    torch.testing.assert_close(on_disk.nll, in_memory.nll, atol=1e-5, rtol=1e-5)


def test_rankings_are_paired_over_what_both_measured(pair):
    a, _, paragraphs = pair
    options = {"draws": 20, **QUIET}
    one = mc.find_memorization_heads(a, paragraphs[[0, 1, 2, 6, 7, 8, 9]], **options)
    same = mc.compare(one, one, draws=50)
    assert same.head_change.values.abs().max() == 0
    assert same.ci.abs().max() == 0  # paired: no noise is left
    torch.testing.assert_close(same.scores[0], one.score, atol=1e-6, rtol=1e-5)
    fewer = mc.find_memorization_heads(a, paragraphs[[0, 1, 6, 7, 8]], **options)
    partly = mc.compare(one, fewer, draws=50)
    assert partly.n_groups == {"memorized": 2, "control": 3}
    assert any("in both rankings" in note for note in partly.notes)
    assert partly.head_change.values.abs().max() < 1e-6


def test_rankings_without_common_paragraphs_have_no_interval(pair):
    a, b, paragraphs = pair
    options = {"draws": 20, **QUIET}
    one = mc.find_memorization_heads(a, paragraphs[[0, 1, 6, 7]], **options)
    other = mc.find_memorization_heads(b, paragraphs[[3, 4, 8, 9]], **options)
    result = mc.compare(one, other)
    torch.testing.assert_close(result.head_change.values, other.score - one.score)
    assert result.ci.isnan().all()
    assert not result.significant.any()
    assert any("without an interval" in note for note in result.notes)
    screened = mc.find_memorization_heads(a, paragraphs, method="screen", **options)
    verified = screened.evidence["verified"].bool()
    partly = mc.compare(screened, screened, draws=20)
    assert (partly.ci[0].isnan() == ~verified).all()
    assert partly.scores[0].isfinite().all()  # those estimated, where not verified
    older = dataclasses.replace(one, samples={})
    assert mc.compare(older, one).ci.isnan().all()


def test_models_of_other_shapes_have_no_heads(pair):
    a, _, paragraphs = pair
    result = mc.compare(a, zoo.bridge("gpt2"), paragraphs, draws=5, **QUIET)
    assert not result.has_heads
    assert "Heads are not compared: a has 4 layers of 4 heads, b has 3 layers of 4 heads." in (
        result.notes
    )
    alone = mc.compare(a, a, paragraphs[6:], draws=5, **QUIET)
    assert not alone.has_heads
    assert any("neither model recites" in note for note in alone.notes)


def test_it_is_saved_and_shown(compared, tmp_path):
    loaded = Comparison.load(compared.save(tmp_path / "compare.safetensors"))
    assert str(loaded) == str(compared)
    assert loaded.to_frame().equals(compared.to_frame())
    assert loaded.model is None
    page = compared.to_html(tmp_path / "compare.html").read_text("utf-8")
    assert "a-0" in page
    assert html.escape(" ".join(compared.texts()[0].split())) in page
    assert loaded.to_html(tmp_path / "again.html").is_file()  # without texts
    assert len(compared.figure().data[0].x) == len(
        compared.to_frame().groupby(["em_a", "em_b"]).size()
    )
    assert compared.heads_figure().data[0].z.shape == tuple(compared.p_value.shape)
    assert "<script>" not in compared._repr_html_()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, p: (a, mc.scan(b, p, **QUIET), p), "b: a scan; a is a model"),
        (lambda a, b, p: (a, b, None), "paragraphs: None; two models need some"),
        (lambda a, b, p: (mc.scan(a, p, **QUIET),) * 2 + (p,), "paragraphs: given; a scan"),
        (lambda a, b, p: (a, "folder", p), "b: str; give a model"),
        (
            lambda a, b, p: (
                mc.scan(a, p, **QUIET),
                mc.scan(b, mc.Paragraphs(p.ids[:, :20], 10), **QUIET),
                None,
            ),
            r"b: 10 \+ 10 tokens",
        ),
        (
            lambda a, b, p: (mc.scan(a, p[:5], **QUIET), mc.scan(b, p[5:], **QUIET), None),
            "none of them is in a",
        ),
        (
            lambda a, b, p: (
                mc.scan(a, p, **QUIET),
                mc.scan(b, dataclasses.replace(p, bos=(0,)), **QUIET),
                None,
            ),
            "tokens in front",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(pair, change, message):
    with pytest.raises(InputError, match=message) as error:
        mc.compare(*change(*pair))
    assert "\n" not in str(error.value)


def test_rankings_of_other_modes_are_refused(pair):
    a, _, paragraphs = pair
    zero = mc.find_memorization_heads(a, paragraphs, draws=5, **QUIET)
    mean = mc.find_memorization_heads(a, paragraphs, mode="mean", draws=5, **QUIET)
    with pytest.raises(InputError, match="ablation: mean; a has zero"):
        mc.compare(zero, mean)
