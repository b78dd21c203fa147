"""TODO."""

from __future__ import annotations

import torch
from torch import Tensor

_WORDS = 2**18  # of 8 bytes: a piece stays in the processor's cache


def checksum(tensor: Tensor) -> tuple[int, ...]:
    """Sum of a tensor's 64-bit words, plain and weighted by place, modulo 2^64; the bytes left."""
    octets = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()
    n = octets.numel() // 8 * 8
    words = octets[:n].view(torch.int64)
    place = torch.arange(1, 1 + min(_WORDS, len(words)), device=words.device)
    plain = weighted = torch.zeros((), dtype=torch.int64, device=words.device)
    for i, piece in enumerate(words.split(_WORDS)):
        total = piece.sum()
        plain = plain + total
        weighted = weighted + (piece * place[: len(piece)]).sum() + i * _WORDS * total
    return int(plain), int(weighted), *octets[n:].tolist()
