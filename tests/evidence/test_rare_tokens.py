"""tau-b equals scipy's, the null is calibrated, and a head made to prefer rare tokens is found."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch

import memcircuits as mc
from memcircuits.evidence.rare_tokens import kendall_tau_b
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo


def test_tau_b_equals_scipy_also_with_ties():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, (4, 20))
    y = rng.integers(0, 4, (3, 20))
    ours = kendall_tau_b(torch.tensor(x), torch.tensor(y))
    for i in range(4):
        for j in range(3):
            expected = scipy.stats.kendalltau(x[i], y[j], variant="b").statistic
            assert float(ours[i, j]) == pytest.approx(expected, abs=1e-6)
    assert torch.isnan(kendall_tau_b(torch.ones(5), torch.arange(5)))


def test_hand_made_pattern():
    attention = torch.tensor([0.5, 0.3, 0.1, 0.1])
    counts = torch.tensor([1, 5, 9, 9])
    # Pairs: 5 discordant, 1 tied in both: tau-b = -5 / sqrt(5 * 5).
    assert float(kendall_tau_b(attention, counts)) == pytest.approx(-1.0)


def test_attention_is_the_models_own(neo):
    paragraphs = zoo.mixed(neo)
    result = mc.rare_token_attention(neo, paragraphs, permutations=10)
    with torch.no_grad():
        patterns = zoo.hf_model("gpt_neo")(paragraphs.ids, output_attentions=True).attentions
    for layer, pattern in enumerate(patterns):
        torch.testing.assert_close(
            result.attention[:, layer], pattern[:, :, 10, :10], atol=1e-5, rtol=0
        )
    expected = [
        scipy.stats.kendalltau(result.attention[p, 2, 1], result.counts[p], variant="b").statistic
        for p in range(len(paragraphs))
    ]
    assert result[(2, 1)] == pytest.approx(np.mean(expected), abs=1e-5)
    assert (result.entropy >= 0).all()
    assert (result.entropy <= np.log(10) + 1e-5).all()


def test_a_head_that_prefers_rare_tokens_is_found(neo, monkeypatch):
    paragraphs = zoo.mixed(neo, n=8)
    unigrams = mc.UnigramTable.from_tokens(torch.arange(101).repeat(3), 101)
    counts = torch.arange(1, 102) ** 2
    unigrams = mc.UnigramTable(counts, "made up")
    adapter = adapt(neo)
    plain = adapter.run

    def rigged(tokens, **options):
        run = plain(tokens, **options)
        rarity = 1.0 / counts[tokens].float()
        run.cache[hook_name("pattern", 1)][:, 2] = (rarity / rarity.sum(-1, keepdim=True))[:, None]
        return run

    monkeypatch.setattr(adapter, "run", rigged)
    attention = mc.rare_token_attention(neo, paragraphs, unigrams)
    assert attention[(1, 2)] < -0.95
    assert attention.p_value[1, 2] < 0.01
    assert attention.corrected_p_value[1, 2] < 0.01
    assert (attention.to_frame()["corrected_p_value"] < 0.05).sum() == 1
    assert int(attention.values.argmin()) == 1 * 4 + 2


def test_null_is_calibrated():
    """With random models and random tokens, few heads are called rare-token heads."""
    small = 0
    total = 0
    for seed in range(3):
        model = zoo.bridge("gpt2", seed=seed)
        paragraphs = mc.Paragraphs.from_tokens(zoo.random_ids(12, 60, seed=seed))
        counts = mc.UnigramTable(
            torch.randint(1, 10**6, (101,), generator=torch.Generator().manual_seed(seed)), "noise"
        )
        attention = mc.rare_token_attention(model, paragraphs, counts, seed=seed)
        small += int((attention.p_value < 0.05).sum())
        total += attention.p_value.numel()
    assert small <= 0.2 * total


def test_a_map_of_permuted_counts_frames_a_head_in_one_of_twenty(neo):
    """Each permutation in turn plays the observed map, against all others."""
    result = mc.rare_token_attention(neo, zoo.mixed(neo), permutations=120)
    framed = one_at_a_time = 0
    for i in range(120):
        others = torch.cat([result.null[:i], result.null[i + 1 :]])
        permuted = dataclasses.replace(result, values=result.null[i], null=others)
        framed += bool((permuted.corrected_p_value < 0.05).any())
        one_at_a_time += bool((permuted.p_value < 0.05).any())
    assert 1 <= framed <= 6  # of 120; at most 5 % by construction
    assert one_at_a_time > 30


def test_table_of_another_tokenizer_is_refused(neo):
    with pytest.raises(mc.InputError, match="101"):
        mc.rare_token_attention(
            neo, zoo.mixed(neo), mc.UnigramTable(torch.ones(50, dtype=torch.long), "other")
        )
    foreign = mc.UnigramTable(torch.ones(101, dtype=torch.long), "other", "0123456789abcdef")
    with pytest.raises(mc.InputError, match="made with tokenizer"):
        mc.rare_token_attention(neo, zoo.mixed(neo), foreign)


def test_without_a_table_the_result_says_so(neo):
    attention = mc.rare_token_attention(neo, zoo.mixed(neo), permutations=5)
    assert "counted in the paragraphs" in attention.notes[0]


def test_copies_do_not_narrow_the_null(neo):
    paragraphs = zoo.mixed(neo)[[0] * 8]
    independent = mc.Paragraphs(
        paragraphs.ids, paragraphs.n_prefix, metadata={"group": tuple(range(8))}
    )
    table = mc.UnigramTable.from_tokens(zoo.random_ids(40, 22, seed=8), adapt(neo).d_vocab)
    once, copies, rows = (
        mc.rare_token_attention(neo, given, table, progress=False)
        for given in (paragraphs[:1], paragraphs, independent)
    )
    torch.testing.assert_close(copies.values, once.values)
    spread = {name: float(r.null.std(0).mean()) for name, r in
              {"once": once, "copies": copies, "rows": rows}.items()}  # fmt: skip
    assert 0.8 < spread["copies"] / spread["once"] < 1.25
    assert spread["rows"] / spread["once"] < 0.5  # as if the copies were independent: 1 / sqrt(8)
    assert any("8 given paragraphs are 1 independent group" in note for note in copies.notes)
    frame = copies.by_rank((0, 0), permutations=50)
    assert frame["n"].unique().tolist() == [1]
    np.testing.assert_allclose(
        frame["attention"], once.by_rank((0, 0), permutations=50)["attention"], rtol=1e-5
    )
