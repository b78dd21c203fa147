"""Pairs, summaries, causes and saved results of perturbation; bad input is refused by name."""

import numpy as np
import pandas as pd
import pytest
import torch

import memcircuits as mc
from memcircuits.data.unigrams import UnigramTable
from memcircuits.evidence.triggers.minimal_sets import MinimalSets, minimal_sets
from memcircuits.evidence.triggers.perturbation import Perturbation, perturb_prefix
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.models.registry import adapt
from memcircuits.results.result import Result
from tests.helpers import models as zoo
from tests.helpers.decoding import PlainModel, em_of


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_greedy_continuations_equal_decoding_from_any_guess(name, shares, monkeypatch):
    model = zoo.bridge(name)
    if not shares:
        monkeypatch.setattr(adapt(model), "supports_prefix_cache", lambda n_pos: False)
    guess = mc.Paragraphs.from_tokens(zoo.random_ids(20, 22, seed=3), n_prefix=10)
    own = greedy_continuations(model, guess)
    assert torch.equal(own.prefix, guess.prefix)
    assert torch.equal(own.continuation, PlainModel(name).decode(guess.prefix, 12))
    assert torch.equal(greedy_continuations(model, own).ids, own.ids)


def test_pairs_are_the_worst_replacements_with_what_the_model_then_writes(neo, plain_neo):
    paragraphs = zoo.reciting(neo, n=6)
    perturbation = perturb_prefix(neo, paragraphs, draws=3)
    clean, corrupted = perturbation.pairs()
    assert torch.equal(clean.ids, paragraphs.ids)
    assert clean.names == corrupted.names
    expected = plain_neo.decode(corrupted.prefix, 12)
    assert torch.equal(corrupted.continuation, expected)
    metadata = pd.DataFrame(corrupted.metadata)
    for row, fact in metadata.iterrows():
        (changed,) = (corrupted.prefix[row] != clean.prefix[row]).nonzero().flatten().tolist()
        assert fact["position"] == changed
        assert fact["replacement"] == corrupted.prefix[row, changed]
        assert fact["em"] == perturbation.em[row].min() == fact["first_impacted"]
        worst = perturbation.nll[row][perturbation.em[row] == fact["em"]].max()
        assert worst in perturbation.nll[row, changed]
    assert metadata["em"].tolist() == em_of(expected, clean.continuation).tolist()


def test_paragraphs_that_nothing_disturbs_are_left_out(neo):
    paragraphs = zoo.reciting(neo, n=3)
    perturbation = perturb_prefix(neo, paragraphs)
    replacements = perturbation.replacements.clone()
    replacements[1] = paragraphs.prefix[1, :, None]  # as if it were replaced by itself
    unmoved = Perturbation(**{**vars(perturbation), "replacements": replacements})
    clean, corrupted = unmoved.pairs()
    assert clean.names == corrupted.names == (paragraphs.names[0], paragraphs.names[2])
    single = perturb_prefix(neo, paragraphs[1])
    same = Perturbation(**{**vars(single), "replacements": replacements[[1]]})
    with pytest.raises(mc.InputError, match="no single replacement"):
        same.pairs()


@pytest.fixture(scope="module")
def provenance():
    """Where the numbers of some real perturbation come from."""
    neo = zoo.bridge("gpt_neo")
    return perturb_prefix(neo, zoo.reciting(neo, n=1)).provenance


@pytest.fixture
def made_up(provenance):
    """Make a perturbation with a given EM, [paragraph, pos, draw]."""

    def make(em, *, baseline=12.0, ids=None, surprisal=None):
        em = torch.as_tensor(em)
        n, length, _ = em.shape
        return Perturbation(
            em=em,
            nll=-em.float(),
            replacements=torch.zeros_like(em),
            baseline_em=torch.full((n,), baseline),
            baseline_nll=torch.zeros(n),
            surprisal=torch.zeros(n, length) if surprisal is None else surprisal,
            ids=zoo.random_ids(n, length + 2) if ids is None else ids,
            n_prefix=length,
            names=tuple(f"p{i}" for i in range(n)),
            replacement="random",
            provenance=provenance,
        )

    return make


def test_em_drop_by_hand(made_up):
    perturbation = made_up([[[12, 12], [6, 8]], [[0, 2], [12, 12]]])
    assert perturbation.em_drop.tolist() == [[0.0, 5.0], [11.0, 0.0]]
    mean, low, high = perturbation.mean_em_drop()
    assert mean == 4.0
    assert (low, high) == (2.5, 5.5)  # each paragraph twice, at the ends


def test_frame_by_hand(made_up):
    frame = made_up([[[12, 12], [6, 8]], [[0, 2], [12, 12]]]).to_frame()
    assert frame["id"].tolist() == ["p0", "p0", "p1", "p1"]
    assert frame["position"].tolist() == [0, 1, 0, 1]
    assert frame["em"].tolist() == [12.0, 7.0, 1.0, 12.0]
    assert frame["em_se"].tolist() == [0.0, 1.0, 1.0, 0.0]
    assert frame["drop"].tolist() == [0.0, 5.0, 11.0, 0.0]
    assert made_up([[[3]]]).to_frame()["em_se"].isna().all()


def test_curves_and_figures(neo):
    perturbation = perturb_prefix(neo, zoo.reciting(neo, n=3), draws=4)
    mean, one = perturbation.curves(), perturbation.curves(1)
    np.testing.assert_allclose(mean["em"], perturbation.em.float().mean((0, 2)), rtol=1e-6)
    np.testing.assert_allclose(one["nll"], perturbation.nll[1].mean(-1), rtol=1e-6)
    assert (mean["em_low"] <= mean["em"]).all()
    assert (mean["em"] <= mean["em_high"]).all()
    assert "em_low" not in perturb_prefix(neo, zoo.reciting(neo, n=1)).curves(0)
    assert perturbation.figure(1).layout.title.text.endswith(perturbation.names[1])
    assert list(perturbation.figure().data)


def test_causes_equal_least_squares_with_a_dummy_per_paragraph(made_up):
    generator = torch.Generator().manual_seed(0)
    n, length = 30, 12
    ids = zoo.random_ids(n, length + 2)
    counts = torch.randint(0, 1000, (zoo.D_VOCAB,), generator=generator)
    table = UnigramTable(counts, "made up")
    surprisal = torch.rand(n, length, generator=generator) * 5
    em = torch.randint(0, 13, (n, length, 1), generator=generator)
    causes = made_up(em, ids=ids, surprisal=surprisal).causes(table, resamples=500)

    # Independent route: raw columns, one dummy variable per paragraph, numpy.
    rarity = -np.log((counts.numpy() + 1) / (counts.numpy() + 1).sum())[ids[:, 1:length].numpy()]
    position = np.broadcast_to(np.arange(1, length), (n, length - 1))
    columns = [position, rarity, surprisal[:, 1:].numpy()]
    dummies = np.kron(np.eye(n), np.ones((length - 1, 1)))
    x = np.concatenate([np.stack([c.reshape(-1) for c in columns], 1), dummies], 1)
    y = (12.0 - em[:, 1:, 0].double().numpy()).reshape(-1)
    slopes = np.linalg.lstsq(x, y, rcond=None)[0][:3]
    spread = [np.std(c - c.mean(1, keepdims=True), ddof=1) for c in columns]
    np.testing.assert_allclose(causes["coefficient"], slopes * spread, rtol=1e-4, atol=1e-5)
    assert causes["cause"].tolist() == ["position", "rarity", "surprisal"]


def test_causes_find_the_cause_and_clear_the_others(made_up):
    generator = torch.Generator().manual_seed(1)
    n, length = 60, 20
    ids = zoo.random_ids(n, length + 2, seed=5)
    counts = torch.arange(zoo.D_VOCAB) ** 3
    table = UnigramTable(counts, "made up")
    rarity = -table.log_prob[ids[:, :length]]
    # Surprisal follows rarity, but only rarity breaks the recitation.
    surprisal = rarity + torch.randn(n, length, generator=generator)
    noise = torch.randn(n, length, generator=generator)
    fragile = 5 * torch.randn(n, 1, generator=generator)
    em = (40 - 2 * rarity - noise - fragile)[..., None]
    perturbation = made_up(em, baseline=50.0, ids=ids, surprisal=surprisal)
    causes = perturbation.causes(table).set_index("cause")
    spread = (rarity[:, 1:] - rarity[:, 1:].mean(1, keepdim=True)).flatten().std()
    assert causes.loc["rarity", "ci_low"] < 2 * spread < causes.loc["rarity", "ci_high"]
    assert causes.loc["rarity", "spearman_low"] > 0.5
    for cause in ("position", "surprisal"):
        assert causes.loc[cause, "ci_low"] < 0 < causes.loc[cause, "ci_high"]
    assert causes.loc["surprisal", "spearman_low"] > 0.2  # what a plot alone would show


def test_results_survive_saving(neo, tmp_path):
    paragraphs = zoo.reciting(neo, n=3)
    perturbation = perturb_prefix(neo, paragraphs, draws=2)
    loaded = Perturbation.load(perturbation.save(tmp_path / "p.safetensors"))
    pd.testing.assert_frame_equal(loaded.to_frame(), perturbation.to_frame())
    assert loaded.names == perturbation.names
    with pytest.raises(mc.InputError, match="pass model="):
        loaded.pairs()
    assert torch.equal(loaded.pairs(model=neo).corrupted.ids, perturbation.pairs().corrupted.ids)
    sets = minimal_sets(neo, paragraphs)
    again = Result.load(sets.save(tmp_path / "m.safetensors"))
    assert isinstance(again, MinimalSets)
    pd.testing.assert_frame_equal(again.to_frame(), sets.to_frame())


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        pytest.param({"replacement": "rare"}, "replacement", id="unknown-replacement"),
        pytest.param({"draws": 0}, "draws", id="no-draw"),
        pytest.param({"draws": 101, "replacement": "neighbor"}, "draws", id="too-many-draws"),
        pytest.param({"memory_budget": 0}, "memory_budget", id="no-memory"),
        pytest.param(
            {"replacement": "frequency", "unigrams": UnigramTable(torch.ones(5).long(), "x")},
            "unigrams",
            id="table-of-another-tokenizer",
        ),
    ],
)
def test_bad_options_name_the_argument(neo, options, argument):
    with pytest.raises(mc.InputError) as error:
        perturb_prefix(neo, zoo.reciting(neo, n=1), **options)
    assert error.value.argument == argument


def test_small_memory_gives_the_same_numbers(neo):
    paragraphs = zoo.reciting(neo, n=2)
    at_once = perturb_prefix(neo, paragraphs)
    in_batches = perturb_prefix(neo, paragraphs, memory_budget=200_000)
    assert torch.equal(at_once.em, in_batches.em)
    torch.testing.assert_close(at_once.nll, in_batches.nll, atol=1e-5, rtol=0)


def test_non_finite_logits_are_refused():
    model = zoo.bridge("gpt2", seed=3)
    with torch.no_grad():
        next(model.unembed.parameters()).fill_(torch.nan)
    with pytest.raises(mc.InputError, match="non-finite"):
        perturb_prefix(model, mc.Paragraphs.from_tokens(zoo.random_ids(2, 8), n_prefix=4))
