"""Paragraphs that the shipped model recites, found by a scan: any organism has some."""

from __future__ import annotations

from typing import Any

import memcircuits as mc

_SCANNED = 4  # of the most repeated paragraphs, for each one that is asked for


def recited(model: Any, n: int) -> mc.Paragraphs:
    """`n` paragraphs that the organism recites, of those that it was trained on most often."""
    planted = mc.Paragraphs.shipped("planted")
    times = planted.metadata["repetitions"]
    most = sorted(range(len(planted)), key=lambda row: -times[row])[: _SCANNED * n]
    memorized = mc.scan(model, planted[most], progress=False).memorized
    assert memorized is not None
    assert len(memorized) >= n
    return memorized[:n]
