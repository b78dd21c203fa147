"""Screening finds what the sweep finds, says what it skipped, and its estimate is a gradient."""

import dataclasses
import functools

import pytest
import torch

import memcircuits as mc
from memcircuits.base.heads import Head
from memcircuits.evidence import component_effects, screening
from memcircuits.evidence.ablation import Ablation
from memcircuits.evidence.ranking import Ranking
from memcircuits.evidence.screening import ScreenSizes
from memcircuits.measure.continuation import read_continuation
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo


@pytest.mark.parametrize(("mode", "at"), [("zero", 0), ("mean", 0), ("resample", 0), ("zero", 0.1)])
def test_an_attribution_is_the_gradient_along_the_ablation(any_bridge, mode, at):
    """Moving z by a small step towards its replacement changes the NLL by that step's share."""
    paragraphs, adapter = zoo.mixed(any_bridge, n=2), adapt(any_bridge)
    ablation = Ablation(any_bridge, paragraphs, mode=mode)
    attributed = screening.attributions(ablation, at=at, progress=False)
    step = 3e-3 if at else 1e-2  # on the way, kinks of ReLU are near

    def nll(layer, head, size):
        def move(z, this_layer):
            change = replacements[this_layer] - z
            z = z + at * change
            if this_layer == layer:
                z[:, :, head] += size * change[:, :, head]
            return z

        run = adapter.run(
            paragraphs.ids[:, :-1],
            positions=slice(9, None),
            edit={
                hook_name("z", i): functools.partial(move, this_layer=i)
                for i in range(adapter.n_layers)
            },
        )
        return read_continuation(run.logits, paragraphs.continuation).nll

    with adapter.preserving_state():
        names = [hook_name("z", i) for i in range(adapter.n_layers)]
        replacements = list(ablation.replacements(names, slice(0, 4)).values())
        for layer, head in [(0, 0), (1, 3), (2, 1)]:
            rise = (nll(layer, head, step) - nll(layer, head, -step)) / (2 * step)
            torch.testing.assert_close(attributed[:, layer, head], rise, atol=2e-3, rtol=2e-2)
    assert attributed.abs().max() > 1e-2


def test_attributions_do_not_need_trainable_weights(neo):
    paragraphs = zoo.mixed(neo, n=2)
    expected = screening.attributions(Ablation(neo, paragraphs, mode="zero"), progress=False)
    frozen = zoo.bridge("gpt_neo")
    frozen.requires_grad_(False)
    result = screening.attributions(
        Ablation(frozen, paragraphs, mode="zero"), memory_budget=1, progress=False
    )
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())


@pytest.fixture
def narrow(monkeypatch):
    """Numbers of heads that make sense for a model of 16."""
    sizes = ScreenSizes(ranked=3, near_best=3, far_best=1, random=2)
    monkeypatch.setattr(screening, "SIZES", sizes)
    monkeypatch.setattr(component_effects, "SIZES", sizes)
    return sizes


def rankings(model, **options):
    paragraphs = zoo.mixed(model)
    return [
        mc.find_memorization_heads(model, paragraphs, method=method, draws=50, **options)
        for method in ("exact", "screen")
    ]


def test_verified_heads_have_the_numbers_of_the_sweep(neo, narrow):
    exact, screened = rankings(neo)
    seen = screened.evidence["verified"]
    assert exact.evidence["verified"].all()
    assert 5 <= int(seen.sum()) < 16
    torch.testing.assert_close(screened.score[seen], exact.score[seen])
    torch.testing.assert_close(screened.p_value[seen], exact.p_value[seen])
    torch.testing.assert_close(screened.ci[:, seen], exact.ci[:, seen])
    for name in ("em_memorized", "em_control"):
        torch.testing.assert_close(screened.evidence[name][seen], exact.evidence[name][seen])


def test_what_was_not_measured_claims_nothing(neo, narrow):
    _, screened = rankings(neo)
    unseen = ~screened.evidence["verified"]
    assert screened.ci[:, unseen].isnan().all()
    assert (screened.p_value[unseen] == 1).all()
    assert screened.evidence["em_memorized"][unseen].isnan().all()
    frame = screened.to_frame()
    assert (frame["verified"] == ~frame["ci_low"].isna()).all()
    assert not frame.loc[~frame["verified"], "significant"].any()


def test_the_first_heads_are_all_verified_and_the_notes_count(neo, narrow):
    _, screened = rankings(neo)
    seen = screened.evidence["verified"]
    assert all(seen[head] for head in screened.top(3))
    assert f"{int(seen.sum())} of 16 heads were ablated exactly" in " ".join(screened.notes)
    assert "2 heads drawn at random" in " ".join(screened.notes)


def test_heads_come_up_when_an_estimate_was_too_high(neo, monkeypatch, narrow):
    """An estimate that calls unimportant heads the best does not hide the others for long."""
    for module in (screening, component_effects):
        monkeypatch.setattr(module, "SIZES", dataclasses.replace(narrow, random=1))
    paragraphs = zoo.mixed(neo)
    exact = mc.ablate_heads(neo, paragraphs).samples["nll"]
    score = exact[:4].mean(0) - exact[4:].mean(0)
    fake = torch.where(score >= score.flatten().kthvalue(12).values, score, 5.0)

    def wrong(ablation, *_, **options):
        sign = 1 if ablation.paragraphs.names[0].startswith("recited") else 0
        return (sign * fake).expand(4, -1, -1).clone()

    monkeypatch.setattr(screening, "attributions", wrong)
    ranking = mc.find_memorization_heads(neo, paragraphs, method="screen", draws=10)
    order = score.flatten().argsort(descending=True)[:3].tolist()
    assert ranking.top(3) == [Head(i // 4, i % 4) for i in order]


def test_a_screened_ranking_saves_and_reports(neo, narrow, tmp_path):
    _, screened = rankings(neo)
    loaded = Ranking.load(screened.save(tmp_path / "ranking.safetensors"))
    assert torch.equal(loaded.evidence["verified"], screened.evidence["verified"])
    assert dataclasses.replace(screened, model=None).to_json(tmp_path / "r.json").exists()
    text = screened.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "heads were ablated exactly" in text


def test_another_method_is_refused(neo):
    with pytest.raises(mc.InputError, match="method"):
        mc.find_memorization_heads(neo, zoo.mixed(neo), method="guess")
