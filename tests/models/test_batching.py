"""Work in batches: one that does not fit into memory is halved, and only that one is redone."""

import pytest
import torch

from memcircuits.models.batching import is_out_of_memory, map_batches


def test_out_of_memory_halves_and_redoes_only_that_batch():
    tried = []

    def work(batch):
        tried.append((batch.start, batch.stop))
        if batch.start >= 4 and batch.stop - batch.start > 2:
            raise torch.OutOfMemoryError("simulated")
        return torch.arange(batch.start, batch.stop)

    assert map_batches(9, 4, work).tolist() == list(range(9))
    assert tried == [(0, 4), (4, 8), (4, 6), (6, 8), (8, 9)]


def test_one_row_that_does_not_fit_is_an_error_with_advice():
    def work(batch):
        raise torch.OutOfMemoryError("simulated")

    with pytest.raises(MemoryError, match="shorter paragraphs, a smaller dtype or another device"):
        map_batches(5, 4, work)


def test_other_errors_are_not_taken_for_memory():
    assert not is_out_of_memory(RuntimeError("sizes do not match"))
    with pytest.raises(RuntimeError, match="sizes"):
        map_batches(2, 2, lambda batch: (_ for _ in ()).throw(RuntimeError("sizes do not match")))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "MPS backend out of memory",
        "DefaultCPUAllocator: can't allocate memory",
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",  # known to accelerate
    ],
)
def test_messages_of_every_device_are_known(message):
    assert is_out_of_memory(RuntimeError(message))
