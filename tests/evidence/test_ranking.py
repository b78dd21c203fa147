"""The main function: finds a head that was made to matter, and refuses what it cannot answer."""

import html
import json

import pytest
import torch

import memcircuits as mc
from memcircuits.base.components import Component
from memcircuits.evidence.ablation import Ablation
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.organism import recited


@pytest.fixture(scope="module")
def ranking(neo):
    return mc.find_memorization_heads(neo, zoo.mixed(neo, n=8), draws=300, progress=False)


def test_score_is_memorized_minus_control_ablation(neo, ranking):
    paragraphs = zoo.mixed(neo, n=8)
    memorized = mc.ablate_heads(neo, paragraphs[list(range(8))]).values
    control = mc.ablate_heads(neo, paragraphs[list(range(8, 16))]).values
    torch.testing.assert_close(ranking.score, memorized - control, atol=1e-6, rtol=0)


def test_frame_has_every_head_once_and_in_order(ranking):
    frame = ranking.to_frame()
    assert sorted(zip(frame["layer"], frame["head"], strict=True)) == [
        (layer, head) for layer in range(4) for head in range(4)
    ]
    assert frame["rank"].tolist() == list(range(1, 17))
    assert frame["score"].is_monotonic_decreasing
    assert (frame["ci_low"] <= frame["score"]).all()
    assert (frame["score"] <= frame["ci_high"]).all()
    assert (frame["rank_low"] <= frame["rank"]).all()
    assert (frame["rank"] <= frame["rank_high"]).all()
    assert frame.notna().all().all()
    assert ranking.top(3) == [mc.Head(*row) for row in frame[["layer", "head"]].values[:3]]
    assert str(mc.Head(1, 2)) == "L1H2"


def test_evidence_equals_the_single_analyses(neo, ranking):
    paragraphs = zoo.mixed(neo, n=8)
    gradients = mc.parameter_gradients(neo, paragraphs[list(range(8))])
    torch.testing.assert_close(ranking.evidence["gradient"], gradients.per_head(4))
    assert ranking.layer_share["memorized"] == pytest.approx(gradients.layer_share())
    rare = mc.rare_token_attention(
        neo, paragraphs[list(range(8))], mc.UnigramTable.from_tokens(paragraphs.ids, 101)
    )
    torch.testing.assert_close(ranking.evidence["rare_token_tau"], rare.values)


def test_same_seed_same_bits(neo, ranking):
    again = mc.find_memorization_heads(neo, zoo.mixed(neo, n=8), draws=300, progress=False)
    assert again.to_frame().equals(ranking.to_frame())


def test_a_head_that_only_memorized_paragraphs_need_is_significant(neo, monkeypatch):
    """A positive control with a known answer: the effect of one head is raised by hand."""
    paragraphs = zoo.mixed(neo, n=8)
    plain = Ablation.effects
    memorized = set(map(tuple, zoo.reciting(neo, n=8).ids.tolist()))

    def rigged(ablation, parts, rows=None, **options):
        result = plain(ablation, parts, rows, **options)
        group = ablation.paragraphs.ids[slice(None) if rows is None else rows].tolist()
        is_memorized = torch.tensor([tuple(row) in memorized for row in group])
        rigged_parts = torch.tensor([part == [Component("head", 3, 1)] for part in parts])
        result[..., 0] += 2.0 * is_memorized[:, None] * rigged_parts
        return result

    monkeypatch.setattr(Ablation, "effects", rigged)
    ranking = mc.find_memorization_heads(neo, paragraphs, draws=2000)
    assert ranking.top(1) == [mc.Head(3, 1)]
    assert ranking.significant[3, 1]
    assert ranking.ci[0, 3, 1] > 0
    assert ranking.ranks[:, 3, 1].tolist() == [1, 1]
    # The other heads of a random model are no different from each other.
    assert (ranking.ranks[1] - ranking.ranks[0]).median() > 5
    assert "L3H1" in ranking.summary()


def test_labels_without_meaning_name_no_head(neo):
    """Two halves of one set: hardly ever is a head significant."""
    named = 0
    for seed in range(10):
        model = zoo.bridge("gpt_neo", seed=seed)
        recited = zoo.reciting(model, n=16, seed=seed)
        ranking = mc.find_memorization_heads(
            model, recited[list(range(8))], control=recited[list(range(8, 16))], draws=400
        )
        named += int(ranking.significant.any())
    assert named <= 2


def test_files(ranking, neo, tmp_path):
    ranking.save(tmp_path / "r.safetensors")
    loaded = type(ranking).load(tmp_path / "r.safetensors")
    assert loaded.to_frame().equals(ranking.to_frame())
    assert loaded.summary() == ranking.summary()
    with pytest.raises(mc.InputError, match="pass model="):
        loaded.to_html(tmp_path / "r.html")
    page = ranking.to_html(tmp_path / "r.html").read_text()
    assert "CircuitsVis" in page
    assert html.escape(ranking.summary()) in page
    assert loaded.to_html(tmp_path / "again.html", model=neo).read_text().count("<script") > 1
    data = json.loads(ranking.to_json(tmp_path / "r.json").read_text())
    assert len(data["heads"]) == 16
    assert data["provenance"]["model"]["basis"] == "raw"
    assert str(tmp_path) not in page + json.dumps(data)


def test_inputs_in_every_accepted_form(neo):
    paragraphs = zoo.mixed(neo, n_prefix=50, n_continuation=20)
    texts = paragraphs.texts(neo)
    assert mc.Paragraphs.of(paragraphs.ids, neo).hash == paragraphs.hash
    by_ids = mc.find_memorization_heads(neo, paragraphs.ids, draws=10)
    by_texts = mc.find_memorization_heads(
        neo, mc.Paragraphs.from_texts(texts, neo, n_continuation=20), draws=10
    )
    torch.testing.assert_close(by_ids.score, by_texts.score)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: [], "empty|at least one"),
        (lambda m: ["too short"], "2 tokens"),
        (lambda m: zoo.random_ids(4, 100), "none of 4 is memorized"),
        (lambda m: zoo.mixed(m)[[0]], "0 controls"),
        (lambda m: zoo.mixed(m)[[0, 1, 2]], "0 controls"),
        (lambda m: torch.full((3, 100), 101), "another tokenizer"),
        (lambda m: zoo.random_ids(2, 129), "context is 128"),
        (lambda m: zoo.random_ids(2, 129).float(), "integer"),
        (lambda m: "one string", "list of strings"),
        (lambda m: 7, "list of strings or a LongTensor"),
    ],
)
def test_unusable_paragraphs(neo, make, says):
    with pytest.raises(mc.InputError, match=says):
        mc.find_memorization_heads(neo, make(neo), progress=False)


def test_one_memorized_paragraph_is_enough(neo):
    ranking = mc.find_memorization_heads(neo, zoo.mixed(neo)[[0, 4, 5]], draws=10, progress=False)
    assert ranking.counts["memorized"] == 1
    assert ranking.score.isfinite().all()
    assert any("One independent group of memorized" in note for note in ranking.notes)
    assert ranking.ci.isnan().all()


def test_controls_nearest_in_nll(neo):
    paragraphs = zoo.mixed(neo, n=3)[:3] + mc.Paragraphs.from_tokens(
        zoo.random_ids(40, 22, seed=8), n_prefix=10
    )
    scan_result = mc.scan(neo, paragraphs, progress=False)
    ranking = mc.find_memorization_heads(
        neo, paragraphs, match_nll=True, max_paragraphs=5, draws=10, progress=False
    )
    distance = (scan_result.nll[3:] - scan_result.nll[:3].mean()).abs()
    expected = paragraphs.ids[3:][distance.argsort()[:20].sort().values]
    assert torch.equal(ranking.control_ids, expected)
    (note,) = (note for note in ranking.notes if "nearest in NLL" in note)
    nearest = scan_result.nll[3:][distance.argsort()[:20]].mean()
    gap = abs(float(nearest - scan_result.nll[:3].mean()))
    assert ("the sets still differ in loss" in note) == (gap > 0.2)


def test_controls_must_be_other_paragraphs(neo):
    paragraphs = zoo.mixed(neo)
    with pytest.raises(mc.InputError, match="in the memorized set"):
        mc.find_memorization_heads(neo, paragraphs, control=paragraphs)


def test_what_is_no_model_is_refused():
    with pytest.raises(mc.InputError, match="HookedTransformer"):
        mc.find_memorization_heads(torch.nn.Linear(2, 2), zoo.random_ids(2, 100))
    with pytest.raises(mc.InputError, match="boot_transformers"):
        mc.scan(zoo.hf_model("gpt2"), zoo.random_ids(2, 100))


def test_the_model_is_left_as_it_came(neo):
    adapter = adapt(neo)
    before = adapter.fingerprint()
    neo.train()
    flags = [p.requires_grad for p in neo.parameters()]
    for parameter in list(neo.parameters())[:3]:
        parameter.grad = torch.ones_like(parameter)
    mc.find_memorization_heads(neo, zoo.mixed(neo), draws=10)
    assert adapter.fingerprint() == before
    assert all(m.training for m in neo.modules() if m is not neo) or neo.training
    assert [p.requires_grad for p in neo.parameters()] == flags
    assert all((p.grad == 1).all() for p in list(neo.parameters())[:3])
    for parameter in neo.parameters():
        parameter.grad = None
    neo.eval()


def test_copies_of_a_paragraph_change_nothing_but_the_notes(neo):
    paragraphs, control = zoo.mixed(neo), zoo.mixed(neo)[4:]
    once, copied = (
        mc.find_memorization_heads(neo, paragraphs[rows], control=control, draws=50, progress=False)
        for rows in ([0, 1], [0, 0, 1, 0, 0])
    )
    torch.testing.assert_close(copied.score, once.score)
    torch.testing.assert_close(copied.ci, once.ci)
    assert torch.equal(copied.p_value, once.p_value)
    assert (copied.counts["measured"], copied.counts["groups"]) == (5, 2)
    assert "5 memorized paragraphs are 2 independent groups" in " ".join(copied.notes)
    assert "in 2 and" in copied.summary()


def test_one_paragraph_twenty_times_is_one_paragraph(neo):
    paragraphs, control = zoo.mixed(neo), zoo.mixed(neo)[4:]
    ranking = mc.find_memorization_heads(
        neo, paragraphs[[0] * 20], control=control, draws=200, progress=False
    )
    assert not ranking.significant.any()
    assert ranking.ci.isnan().all()
    assert "20 memorized paragraphs are 1 independent group" in " ".join(ranking.notes)
    assert any(note.startswith("The smallest p-value that 1 against") for note in ranking.notes)


@pytest.mark.slow
def test_a_planted_paragraph_twenty_times_names_no_head():
    """The organism: with its rows as if independent, 47 of 48 heads were significant."""
    model = mc.load_model()
    control = mc.Paragraphs.shipped("control")[:20]
    ranking = mc.find_memorization_heads(
        model, recited(model, 1)[[0] * 20], control=control, draws=500, progress=False
    )
    assert ranking.counts["groups"] == 1
    assert "20 memorized paragraphs are 1 independent group" in " ".join(ranking.notes)
    assert ranking.p_value.min() > 0.02


@pytest.mark.parametrize("mode", ["mean", "resample"])
def test_both_sets_are_ablated_to_a_third_one(neo, mode, monkeypatch):
    """Neither set is replaced by itself, whether other controls remain or half of them are kept."""
    seen = []
    plain = Ablation.__init__

    def record(ablation, model, paragraphs, **options):
        seen.append((paragraphs.ids, options["reference"].ids))
        plain(ablation, model, paragraphs, **options)

    monkeypatch.setattr(Ablation, "__init__", record)
    paragraphs = zoo.mixed(neo, n=2)[:2] + mc.Paragraphs.from_tokens(
        zoo.random_ids(30, 22, seed=8), n_prefix=10
    )
    for control, n_control in ((None, 20), (paragraphs[2:8], 3)):
        mc.find_memorization_heads(
            neo,
            paragraphs[:2] if n_control == 3 else paragraphs,
            control=control,
            mode=mode,
            draws=5,
        )
        (_, reference), (controls, same) = seen[-2:]
        assert torch.equal(reference, same)
        assert len(controls) == n_control
        together = set(map(tuple, controls.tolist())) & set(map(tuple, reference.tolist()))
        assert not together
    with pytest.raises(mc.InputError, match="two to measure and two for reference"):
        mc.find_memorization_heads(neo, paragraphs[:2], control=paragraphs[2:5], mode=mode, draws=5)
