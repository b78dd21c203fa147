"""Memorized paragraphs and their corrupted versions (PMP): found here, or those of a file."""

from __future__ import annotations

import dataclasses

import torch

import memcircuits as mc
from memcircuits.evidence.triggers.pairs import CleanCorrupted, most_destructive_pairs
from memcircuits.evidence.triggers.perturbation import Perturbation


def found_pairs(model: object, memorized: mc.Paragraphs, tried: Perturbation) -> CleanCorrupted:
    """The most destructive replacement of each paragraph, at any position but the first.

    The authors' code leaves position 0 as it is: it is their unperturbed baseline.
    """
    em, nll = tried.em.clone(), tried.nll.clone()
    em[:, 0], nll[:, 0] = memorized.n_continuation, 0.0
    return most_destructive_pairs(model, memorized, tried.replacements, em, nll)


def given_pairs(memorized: mc.Paragraphs, perturbed: mc.Paragraphs) -> CleanCorrupted:
    """Pairs from a file of perturbed paragraphs, such as the authors' `perturbed_mem_toks.pt`.

    A perturbed paragraph belongs to the memorized one whose prefix differs in a single token. The
    continuations are those of the file.

    Raises:
        InputError: if lengths differ or no paragraph has a version with another continuation.
    """
    if (memorized.n_prefix, memorized.ids.shape[1]) != (perturbed.n_prefix, perturbed.ids.shape[1]):
        raise mc.InputError("--perturbed", repr(perturbed), f"give paragraphs like {memorized!r}")
    prefixes, n = perturbed.ids[:, : perturbed.n_prefix], memorized.n_prefix
    clean, rows = [], []
    for i, ids in enumerate(memorized.ids):
        one_token = (prefixes != ids[:n]).sum(-1) == 1
        another_text = (perturbed.continuation != ids[n:]).any(-1)
        found = (one_token & another_text).nonzero().flatten().tolist()
        if found:
            clean.append(i)
            rows.append(found[0])
    if not clean:
        remedy = "none is a memorized paragraph with one prefix token replaced"
        raise mc.InputError("--perturbed", f"{len(perturbed)} paragraphs", remedy)
    originals, corrupted = memorized[clean], perturbed[rows]
    position = (corrupted.ids != originals.ids)[:, :n].long().argmax(-1)
    differs = corrupted.continuation != originals.continuation
    first = differs.long().argmax(-1)
    columns = {
        "position": position,
        "replacement": corrupted.ids[torch.arange(len(clean)), position],
        "em": first,  # greedy text of the perturbed prefix equals the clean one up to here
        "first_impacted": first,
    }
    metadata = {name: tuple(values.tolist()) for name, values in columns.items()}
    return CleanCorrupted(originals, dataclasses.replace(corrupted, metadata=metadata))
