"""Scores of a continuation: by hand, against torch, and whatever the batches."""

import pytest
import torch

from memcircuits.measure.continuation import largest_two, read_continuation


@pytest.mark.parametrize("d_vocab", [2, 5, 256, 512, 1000])
def test_the_two_largest_logits(d_vocab):
    generator = torch.Generator().manual_seed(d_vocab)
    logits = torch.randn(40, 3, d_vocab, generator=generator)
    index, gap = largest_two(logits)
    top = logits.topk(2)
    assert torch.equal(index, top.indices[..., 0])
    assert torch.equal(gap, top.values[..., 0] - top.values[..., 1])
    ties = torch.randint(0, 3, (200, d_vocab), generator=generator).float()
    first = [row.index(max(row)) for row in ties.tolist()]
    assert largest_two(ties)[0].tolist() == first


def test_scores_do_not_depend_on_the_batch():
    """So many logits that they are not scored at once."""
    logits = torch.randn(3, 2, 2**20, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 2**20, (3, 2), generator=torch.Generator().manual_seed(1))
    together = read_continuation(logits, targets)
    for row in range(3):
        alone = read_continuation(logits[[row]], targets[[row]])
        assert torch.equal(together.log_prob[[row]], alone.log_prob)
        assert torch.equal(together.correct[[row]], alone.correct)
        assert torch.equal(together.margin[[row]], alone.margin)


def test_scores_of_a_hand_worked_continuation():
    logits = torch.tensor([[[0.0, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 3.0]]])
    scores = read_continuation(logits, torch.tensor([[1, 1, 2]]))
    e = torch.e
    expected = [2 - torch.tensor(2 + e**2).log(), -torch.tensor(2 + e).log()]
    torch.testing.assert_close(scores.log_prob[0, :2], torch.stack(expected))
    assert scores.margin.tolist() == [[2.0, 1.0, 3.0]]
    assert scores.em.tolist() == [1]
    assert scores.correct.tolist() == [[True, False, True]]
