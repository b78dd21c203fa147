"""EM from one pass equals greedy decoding; NLL and margins equal plain torch."""

import pytest
import torch

import memcircuits as mc
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo


def greedy_em(hf_model, paragraphs):
    """The definition: decode greedily with transformers, count matches before the first miss."""
    ids = hf_model.generate(
        paragraphs.prefix,
        attention_mask=torch.ones_like(paragraphs.prefix),
        max_new_tokens=paragraphs.n_continuation,
        min_new_tokens=paragraphs.n_continuation,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )[:, paragraphs.n_prefix :]
    return (ids == paragraphs.continuation).long().cumprod(1).sum(1)


@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_em_equals_greedy_decoding(name):
    paragraphs = zoo.mixed(zoo.bridge(name))
    ids = paragraphs.ids.clone()
    ids[0, 15] = (ids[0, 15] + 1) % zoo.D_VOCAB  # a paragraph that breaks in the middle
    paragraphs = mc.Paragraphs.from_tokens(ids, n_prefix=10)
    scan_result = mc.scan(zoo.bridge(name), paragraphs)
    assert scan_result.em.tolist() == greedy_em(zoo.hf_model(name), paragraphs).tolist()
    assert scan_result.em[0] == 5
    assert scan_result.em[1:4].tolist() == [12, 12, 12]


def test_nll_and_margin_equal_plain_torch(neo):
    paragraphs = zoo.mixed(neo)
    scan_result = mc.scan(neo, paragraphs)
    with torch.no_grad():
        logits = zoo.hf_model("gpt_neo")(paragraphs.ids).logits[:, 9:-1]
    log_prob = logits.log_softmax(-1).gather(-1, paragraphs.continuation[..., None])[..., 0]
    torch.testing.assert_close(scan_result.token_log_prob, log_prob, atol=1e-5, rtol=0)
    torch.testing.assert_close(scan_result.nll, -log_prob.mean(1), atol=1e-5, rtol=0)
    top = logits.sort(-1, descending=True).values
    torch.testing.assert_close(
        scan_result.token_margin, top[..., 0] - top[..., 1], atol=1e-5, rtol=0
    )


def test_batches_of_one_equal_one_batch(neo):
    paragraphs = zoo.mixed(neo)
    whole = mc.scan(neo, paragraphs)
    single = mc.scan(neo, paragraphs, batch_size=1)
    torch.testing.assert_close(whole.token_log_prob, single.token_log_prob, atol=1e-5, rtol=0)
    assert torch.equal(whole.em, single.em)


def test_split_into_memorized_and_control(neo):
    scan_result = mc.scan(neo, zoo.mixed(neo))
    assert scan_result.memorized.names == tuple(f"recited-{i}" for i in range(4))
    assert scan_result.control.names == tuple(f"random-{i}" for i in range(4))
    frame = scan_result.to_frame()
    assert {"id", "em", "nll", "log_prob", "memorized"} <= set(frame.columns)
    assert frame["memorized"].tolist() == [True] * 4 + [False] * 4


def test_non_finite_paragraphs_are_set_apart():
    model = zoo.bridge("gpt_neo")
    paragraphs = zoo.mixed(model)
    poisoned = int(paragraphs.ids[0, 0])
    with torch.no_grad():
        embedding = adapt(model).model.original_model.get_input_embeddings()
        weight = getattr(embedding, "original_component", embedding).weight
        weight[poisoned] = float("nan")
    scan_result = mc.scan(model, paragraphs[[0, 4]])
    touched = (paragraphs.ids[[0, 4]] == poisoned).any(1)
    # The poisoned row also unembeds to NaN for that token everywhere: nothing is finite.
    assert not scan_result.finite[touched].any()
    assert not scan_result.is_memorized.any()
    with pytest.raises(mc.InputError, match="non-finite"):
        mc.find_memorization_heads(model, paragraphs)


def test_padding_and_bos_ids_are_ordinary_tokens(neo):
    """Ids that equal the tokenizer's BOS or padding id are neither masked nor prepended to."""
    ids = zoo.random_ids(2, 30)
    ids[:, ::3] = 0
    with torch.no_grad():
        expected = zoo.hf_model("gpt_neo")(ids).logits
    with adapt(neo).preserving_state():
        torch.testing.assert_close(adapt(neo).forward(ids), expected, atol=1e-5, rtol=0)


def test_saved_scans_load_equal(neo, tmp_path):
    scan_result = mc.scan(neo, zoo.mixed(neo))
    scan_result.save(tmp_path / "scan.safetensors")
    loaded = type(scan_result).load(tmp_path / "scan.safetensors")
    assert loaded.to_frame().equals(scan_result.to_frame())
    assert loaded.provenance == scan_result.provenance


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (torch.full((2, 100), 101), "another tokenizer"),
        (torch.zeros(2, 200, dtype=torch.long), "context is 128"),
    ],
)
def test_paragraphs_that_the_model_cannot_take(neo, ids, says):
    with pytest.raises(mc.InputError, match=says):
        mc.scan(neo, ids)


def test_a_short_continuation_is_named(neo):
    ids = zoo.random_ids(3, 20)
    short, long = (mc.Paragraphs.from_tokens(ids, n_prefix=n) for n in (16, 15))
    notes = mc.scan(neo, short, progress=False).notes
    assert any("4 tokens of continuation are often right by chance" in note for note in notes)
    assert not any("by chance" in note for note in mc.scan(neo, long, progress=False).notes)
