"""The adapter: one view of every architecture and class, checked against plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from memcircuits.base.errors import InputError
from memcircuits.base.heads import Head
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from tests import matrix
from tests.helpers import models as zoo
from tests.helpers.calls import public_functions
from tests.helpers.variants import EVERY_MODEL, model, needs_hooked_transformer


@pytest.mark.parametrize("analysis", matrix.ANALYSES)
@pytest.mark.parametrize(("name", "variant"), EVERY_MODEL)
def test_analysis_agrees_with_plain_pytorch(name, variant, analysis):
    model(name, variant)
    off = matrix.compared(name, variant, analysis)
    assert off is None or off <= matrix.ANALYSES[analysis].tolerance


@needs_hooked_transformer
@pytest.mark.parametrize("analysis", matrix.ANALYSES)
@pytest.mark.parametrize("basis", ["raw", "folded"])
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_classes_agree_in_the_same_basis(name, basis, analysis):
    line = matrix.ANALYSES[analysis]
    if name in line.refused:
        pytest.skip("the analysis refuses this architecture: tried against plain PyTorch")
    pair = [matrix.measured(name, f"{kind} {basis}", analysis) for kind in matrix.CLASSES]
    assert matrix.difference(*pair, line.relative) <= line.tolerance


def test_every_public_analysis_is_in_the_matrix():
    # Of a text or of an edit, not of paragraphs: held against brute force elsewhere.
    others = {"document_map", "audit_edit"}
    in_matrix = {name.partition(",")[0] for name in matrix.ANALYSES}
    assert public_functions() - in_matrix == others


def test_matrix_sees_a_difference():
    """A comparison that accepts anything would pass the tests above."""
    same = {"em": torch.tensor([3, 4]), "nll": torch.tensor([1.0, 2.0])}
    assert matrix.difference(same, same, False) == 0
    assert matrix.difference(same, same | {"em": torch.tensor([3, 5])}, False) == float("inf")
    assert matrix.difference(same, {"em": same["em"]}, False) == float("inf")
    off = same | {"nll": torch.tensor([1.0, 2.5])}
    assert matrix.difference(off, same, False) == pytest.approx(0.5)
    assert matrix.difference(off, same, True) == pytest.approx(0.25)


@pytest.mark.parametrize(("name", "variant"), EVERY_MODEL)
def test_tokens_equal_to_special_ones_are_ordinary(name, variant):
    """Rows of BOS, EOS and padding ids get the logits of the plain model: nothing is masked."""
    adapter = adapt(model(name, variant))
    ids = torch.tensor([[0, 0, 5, 0, 1, 1, 7, 0], [1, 2, 3, 0, 0, 0, 4, 1]])
    with adapter.preserving_state(), torch.no_grad():
        plain = matrix.plain(name).model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        )
        result = adapter.forward(ids).log_softmax(-1)
    assert (result - plain.logits.log_softmax(-1)).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "variant"), EVERY_MODEL)
def test_reading_and_positions(name, variant):
    adapter = adapt(model(name, variant))
    ids = zoo.random_ids(2, 9)
    names = [hook_name("z", layer) for layer in range(adapter.n_layers)]
    with adapter.preserving_state():
        whole = adapter.run(ids, read=names)
        part = adapter.run(ids, positions=slice(4, None))
    assert torch.allclose(whole.logits[:, 4:], part.logits, atol=1e-5)
    if variant.endswith("raw"):
        for ours, theirs in zip(whole.cache.values(), matrix.plain(name).z(ids), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_unknown_hook_is_refused(neo):
    with pytest.raises(InputError, match=r"hook: 'blocks.0.nothing'"):
        adapt(neo).run(zoo.random_ids(1, 4), read=["blocks.0.nothing"])
    with pytest.raises(InputError, match="hook"):
        adapt(neo).run(zoo.random_ids(1, 4), edit={"blocks.99.attn.hook_z": lambda z: z})


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3, dtype=torch.long), "integer ids"),
        (torch.zeros(2, 3), "integer ids"),
        (torch.zeros(1, zoo.N_CTX + 1, dtype=torch.long), "context is 128"),
        (torch.tensor([[0, zoo.D_VOCAB]]), f"token id {zoo.D_VOCAB}"),
        (torch.tensor([[0, -1]]), "token id -1"),
    ],
)
def test_unusable_tokens(neo, tokens, message):
    with pytest.raises(InputError, match=message):
        adapt(neo).check_tokens(tokens)


def test_heads():
    assert str(Head(1, 2)) == "L1H2"
    assert Head.parse(" l10h3 ") == Head(10, 3)
    for text in ("", "L1", "H1L2", "L-1H2", "L1H2H3", "1.2"):
        with pytest.raises(InputError, match="L1H2"):
            Head.parse(text)
