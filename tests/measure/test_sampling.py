"""The sampling law against transformers' own sampler, and against the law worked by hand."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import AutoModelForCausalLM

import memcircuits as mc
from memcircuits.measure.recitation_statistics import extraction_probability
from memcircuits.organism import DATA
from tests.helpers import models as zoo

SAMPLERS = {
    "temperature": mc.Sampler(temperature=0.1),
    "top-k": mc.Sampler(top_k=5),
    "top-p": mc.Sampler(top_p=0.3),
    "all three": mc.Sampler(temperature=0.3, top_k=20, top_p=0.8),
}


def sampled(model, prefix, n, n_tokens, sampler, *, seed=0, share_prefix=False):
    """Token ids [sample, pos] that transformers draws after a prefix.

    With `share_prefix` the model reads the prefix once for all samples, not once for each.
    """
    model.generation_config.eos_token_id = None  # no token ends the text
    cache = {}
    if share_prefix:
        with torch.no_grad():
            read = model(prefix[:, :-1], use_cache=True).past_key_values
        read.batch_repeat_interleave(n)
        cache = {"past_key_values": read}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model.generate(
            prefix.expand(n, -1),
            attention_mask=torch.ones(n, prefix.shape[1], dtype=torch.long),
            do_sample=True,
            max_new_tokens=n_tokens,
            temperature=sampler.temperature,
            top_k=sampler.top_k or 0,
            top_p=sampler.top_p,
            pad_token_id=0,
            **cache,
        )[:, prefix.shape[1] :].numpy()


def law_by_hand(logits, sampler):
    """Log-probabilities of one step, token by token, in float64; ties do not occur."""
    scaled = logits.double() / sampler.temperature
    order = scaled.argsort(descending=True).tolist()
    kept = order[: sampler.top_k] if sampler.top_k else order
    total = sum(math.exp(scaled[i]) for i in kept)
    mass, nucleus = 0.0, []
    for i in kept:
        if nucleus and mass >= sampler.top_p < 1:
            break
        nucleus.append(i)
        mass += math.exp(scaled[i]) / total
    total = sum(math.exp(scaled[i]) for i in nucleus)
    law = torch.full_like(scaled, -math.inf)
    for i in nucleus:
        law[i] = scaled[i] - math.log(total)
    return law


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_token_has_the_probability_of_the_law(name):
    logits = 2 * torch.randn(3, 4, 30, generator=torch.Generator().manual_seed(1))
    for token in range(30):
        got = SAMPLERS[name].log_prob(logits, torch.full((3, 4), token))
        expected = [law_by_hand(step, SAMPLERS[name])[token] for step in logits.flatten(0, 1)]
        torch.testing.assert_close(
            got.double(), torch.stack(expected).view(3, 4), atol=1e-5, rtol=1e-6
        )


def test_one_block_gives_what_many_give(monkeypatch):
    logits = torch.randn(3, 4, 30, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(12).view(3, 4)
    whole = SAMPLERS["all three"].log_prob(logits, targets)
    monkeypatch.setattr("memcircuits.measure.sampling._BLOCK", 70)
    assert torch.equal(SAMPLERS["all three"].log_prob(logits, targets), whole)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_of_transformers_appear_as_often_as_the_law_says(neo, name):
    """Of two tokens every pair is known: the law sums to 1, and `generate` draws by it."""
    sampler, n = SAMPLERS[name], 4_000
    prefix = zoo.random_ids(1, 8)
    tokens = torch.arange(zoo.D_VOCAB)
    ids = torch.cat([prefix.expand(zoo.D_VOCAB**2, -1), torch.cartesian_prod(tokens, tokens)], 1)
    pairs = mc.Paragraphs.from_tokens(ids, n_prefix=8)
    p = mc.scan(neo, pairs, sampler=sampler, progress=False).extraction(1).numpy()
    assert p.sum() == pytest.approx(1, abs=1e-4)
    first, second = sampled(zoo.hf_model("gpt_neo"), prefix, n, 2, sampler).T
    counts = np.bincount(first * zoo.D_VOCAB + second, minlength=len(p))
    assert (p[counts > 0] > 0).all()
    frequent = n * p >= 5
    observed = [*counts[frequent], counts[~frequent].sum()]
    expected = [*(n * p[frequent]), n - (n * p[frequent]).sum()]
    assert len(observed) > 10
    if expected[-1] < 1e-3:  # nothing is rare
        observed, expected = observed[:-1], np.array(expected[:-1]) * n / sum(expected[:-1])
    assert scipy.stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [mc.Sampler(temperature=0.7), mc.Sampler(temperature=0.8, top_k=40, top_p=0.95)],
    ids=str,
)
def test_continuations_of_the_organism_in_10_000_samples(sampler):
    """Each of the first eight tokens is reached as often as one forward pass says.

    5,000 samples for each sampler: the share of a token has a standard error below 0.7 %.
    """
    n, n_tokens = 5_000, 8
    organism, paragraphs = mc.load_model(), mc.Paragraphs.shipped()[::12]
    scan = mc.scan(organism, paragraphs, sampler=sampler, progress=False)
    p = scan.token_sampled[:, :n_tokens].double().cumsum(1).exp()
    chosen = int((p[:, -1] - 0.4).abs().argmin())  # neither never nor always
    assert 0.1 < p[chosen, -1] < 0.9
    paragraph = paragraphs[chosen]
    model = AutoModelForCausalLM.from_pretrained(DATA, dtype=torch.float32).eval()
    drawn = np.concatenate(
        [
            sampled(model, paragraph.prefix, 1_000, n_tokens, sampler, seed=seed, share_prefix=True)
            for seed in range(n // 1_000)
        ]
    )
    reached = (drawn == paragraph.continuation[:, :n_tokens].numpy()).cumprod(1).sum(0)
    expected = [round(n * each, 1) for each in p[chosen].tolist()]
    print(f"{sampler}: {reached.tolist()} of {n} samples, {expected} expected")
    for count, probability in zip(reached.tolist(), p[chosen].clamp(max=1).tolist(), strict=True):
        assert scipy.stats.binomtest(count, n, probability).pvalue > 1e-3 / n_tokens


def test_a_token_that_is_not_kept_is_never_drawn(neo):
    paragraphs = zoo.reciting(neo, n=2)
    top = mc.scan(neo, paragraphs, sampler=mc.Sampler(top_k=1))
    assert top.extraction(1).tolist() == [1, 1]
    other = mc.Paragraphs.from_tokens((paragraphs.ids + 1) % zoo.D_VOCAB, n_prefix=10)
    never = mc.scan(neo, other, sampler=mc.Sampler(top_k=1))
    assert never.extraction(10**9).tolist() == [0, 0]
    assert never.samples_needed().tolist() == [math.inf, math.inf]
    assert never.finite.all()


def test_without_a_sampler_the_law_is_the_models_own(neo):
    paragraphs = zoo.mixed(neo)
    plain = mc.scan(neo, paragraphs)
    same = mc.scan(neo, paragraphs, sampler=mc.Sampler())
    assert plain.token_sampled is None
    torch.testing.assert_close(same.sampled_log_prob, plain.sampled_log_prob)
    assert torch.equal(same.em, plain.em)
    frame = mc.scan(neo, paragraphs, sampler=mc.Sampler(top_k=3)).to_frame()
    assert "sampled_log_prob" in frame
    assert "sampled_log_prob" not in plain.to_frame()


def test_the_sampler_is_saved_with_the_scan(neo, tmp_path):
    scan_result = mc.scan(neo, zoo.mixed(neo), sampler=mc.Sampler(top_k=3), near_verbatim=True)
    loaded = type(scan_result).load(scan_result.save(tmp_path / "scan.safetensors"))
    assert loaded.provenance.options["sampler"] == {"temperature": 1, "top_k": 3, "top_p": 1}
    assert loaded.to_frame().equals(scan_result.to_frame())


def test_extraction_in_n_samples():
    log_prob = np.log([1.0, 0.5, 1e-12, 0.0], where=[True] * 3 + [False], out=np.full(4, -np.inf))
    assert extraction_probability(log_prob, 3).tolist() == [1, 0.875, pytest.approx(3e-12), 0]
    with pytest.raises(mc.InputError, match="n: 0"):
        extraction_probability(log_prob, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "greedy decoding"),
        ({"temperature": -1}, "temperature: -1"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"top_k": 0}, "top_k: 0"),
        ({"top_k": 2.5}, "top_k: 2.5"),
        ({"top_p": 0.0}, "top_p: 0.0"),
        ({"top_p": 1.5}, "top_p: 1.5"),
    ],
)
def test_laws_that_do_not_exist_are_refused(options, message):
    with pytest.raises(mc.InputError, match=message):
        mc.Sampler(**options)
