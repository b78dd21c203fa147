"""Ours beside the rivals: what each job is, in which units, and which outputs are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import memcircuits as mc
from memcircuits.ablation import Ablation
from memcircuits.adapter import Head
from memcircuits.gradients import parameter_gradients
from memcircuits.patching import patch_heads
from memcircuits.perturbation import perturb_prefix
from memcircuits.scanning import scan as scan_paragraphs
from memcircuits.screening import head_effects

from . import rivals
from .subjects import Subject
from .timing import Contender, Job

QUIET = {"progress": False}


def all_jobs(subject: Subject, *, whole: bool) -> list[Job]:
    """The jobs of the table.

    Args:
        subject: model and paragraphs.
        whole: sweep over all heads and more positions in each round. Without it every round takes
            one head per layer, others in each round: what one costs does not depend on which it is.
    """
    return [
        scan(subject),
        ablation(subject, whole),
        patching(subject, whole),
        screening(subject, whole),
        perturbation(subject, whole),
        gradients(subject),
    ]


def scan(subject: Subject) -> Job:
    paragraphs, n = subject.paragraphs, len(subject.paragraphs)

    def ours(turn: int | None, setting: Any) -> Tensor:
        found = scan_paragraphs(subject.bridge, paragraphs, **QUIET)
        return torch.stack([found.em.float(), found.nll], -1)

    return Job(
        "scan: EM and NLL",
        "paragraph",
        Contender("memcircuits", ours, n),
        [
            Contender(
                "TransformerLens: generate + forward",
                lambda turn, setting: rivals.scan_lens(setting[1], paragraphs.ids, setting[2]),
                n,
                forms(subject, n // 2, n),
                8.0,
            ),
            Contender(
                "transformers: generate + forward",
                lambda turn, setting: rivals.scan_transformers(
                    subject.plain, paragraphs.ids, setting
                ),
                n,
                (n // 2, n),
                5.0,
            ),
        ],
        1e-4,
        note="EM compared exactly, as the first of the two numbers",
    )


def ablation(subject: Subject, whole: bool) -> Job:
    paragraphs = subject.paragraphs[:8]
    zero = Ablation(subject.bridge, paragraphs, mode="zero")

    def ours(turn: int | None, setting: Any) -> Tensor:
        return zero.effects([Head(*head) for head in heads_of(subject, turn, whole)], **QUIET)[
            ..., 0
        ]

    clean = scan_paragraphs(subject.bridge, paragraphs, **QUIET).nll
    units = len(heads_of(subject, 0, whole)) * len(paragraphs)
    contenders = [
        Contender(
            "TransformerLens: one hooked forward per head",
            lambda turn, setting: (
                rivals.ablate_lens(
                    setting[1], paragraphs.ids, setting[2], heads_of(subject, turn, whole)
                )
                - clean[:, None]
            ),
            units,
            forms(subject, 4, 8),
            2.0,
        )
    ]
    try:
        wrapped = rivals.nnsight_model(subject.plain, subject.bridge.tokenizer)
        contenders.append(
            Contender(
                "nnsight: one trace per head",
                lambda turn, setting: (
                    rivals.ablate_nnsight(
                        wrapped,
                        paragraphs.ids,
                        setting,
                        heads_of(subject, turn, whole),
                        subject.plain.config.hidden_size // subject.n_heads,
                    )
                    - clean[:, None]
                ),
                units,
                (4, 8),
                2.0,
            )
        )
    except ImportError:
        pass  # the page says so
    return Job(
        "zero-ablate heads", "head x paragraph", Contender("memcircuits", ours, units),
        contenders, 1e-4,
    )  # fmt: skip


def patching(subject: Subject, whole: bool) -> Job:
    copies = 8
    clean = subject.paragraphs[:copies] if whole else subject.paragraphs[:1]
    other = subject.paragraphs.ids.roll(1, 0)[: len(clean), : clean.n_prefix]
    corrupted = mc.Paragraphs.from_tokens(
        torch.cat([other, clean.continuation], 1), n_prefix=clean.n_prefix
    )
    # A single pair is a poor batch for the rival: it gets the same one several times.
    rows, others = (p.ids.repeat(copies // len(clean), 1) for p in (clean, corrupted))

    def ours(turn: int | None, setting: Any) -> Tensor:
        found = patch_heads(subject.bridge, clean, corrupted, site="z", **QUIET)
        return (found.samples["nll"] + found.base["nll"][:, None, None]).mean(0)

    def compared(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([ours[head] for head in heads_of(subject, 0, whole)]), theirs

    return Job(
        "exact z patching of heads",
        "head x pair",
        Contender("memcircuits", ours, len(heads_of(subject, 0, True)) * len(clean)),
        [
            Contender(
                "transformer_lens.patching",
                lambda turn, setting: rivals.patch_lens(
                    setting[1], rows, others, setting[2], heads_of(subject, turn, whole)
                ),
                len(heads_of(subject, 0, whole)) * copies,
                forms(subject, 4, 8),
                2.0,
            )
        ],
        1e-4,
        compared,
    )


def screening(subject: Subject, whole: bool) -> Job:
    half = 4 if not whole else 8
    memorized, control = subject.paragraphs[:half], subject.paragraphs[-half:]
    both = memorized + control
    sets = [Ablation(subject.bridge, group, mode="zero") for group in (memorized, control)]
    everything = Ablation(subject.bridge, both, mode="zero")
    every = heads_of(subject, 0, True)
    units = len(heads_of(subject, 0, whole)) * len(both)
    clean = scan_paragraphs(subject.bridge, both, **QUIET).nll

    def score(nll: Tensor) -> Tensor:
        return nll[:half].mean(0) - nll[half:].mean(0)

    def ours(turn: int | None, setting: Any) -> Tensor:
        found = head_effects(*sets, method="screen", **QUIET)
        nll = torch.cat([found.nll["memorized"], found.nll["control"]])
        return nll.where(found.verified, torch.nan)

    def compared(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        heads = heads_of(subject, 0, whole)
        mine = torch.stack([ours[:, layer, head] for layer, head in heads], -1)
        seen = ~mine[0].isnan()
        if whole:
            ranks = [
                torch.where(seen, score(mine), -torch.inf).argsort(descending=True)[:10],
                score(theirs).argsort(descending=True)[:10],
            ]
            assert set(ranks[0].tolist()) == set(ranks[1].tolist()), "the top ten differ"
        return mine[:, seen], theirs[:, seen]

    return Job(
        "top 10 heads, verified exactly",
        "head x paragraph",
        Contender("memcircuits: screen", ours, len(every) * len(both)),
        [
            Contender(
                "TransformerLens: one hooked forward per head",
                lambda turn, setting: (
                    rivals.ablate_lens(
                        setting[1], both.ids, setting[2], heads_of(subject, turn, whole)
                    )
                    - clean[:, None]
                ),
                units,
                forms(subject, 4, 8),
                8.0,
            ),
            Contender(
                "memcircuits: sweep",
                lambda turn, setting: everything.effects(
                    [Head(*head) for head in heads_of(subject, turn, whole)], **QUIET
                )[..., 0],
                units,
            ),
        ],
        1e-4,
        compared,
        note="ours decides on all heads, having ablated some; compared are those",
    )


def perturbation(subject: Subject, whole: bool) -> Job:
    paragraphs = subject.paragraphs[:8] if whole else subject.paragraphs[:2]
    n, n_prefix = len(paragraphs), paragraphs.n_prefix
    width = 4 if whole else 8  # positions in one round of the rival
    drawn: dict[str, Tensor] = {}

    def ours(turn: int | None, setting: Any) -> Tensor:
        found = perturb_prefix(subject.bridge, paragraphs, **QUIET)
        drawn["replacements"] = found.replacements[..., 0]
        return found.em[..., 0].float()

    def positions(turn: int | None) -> list[int]:
        return [(7 * i + 5 * (turn or 0) + 1) % n_prefix for i in range(width)]

    def theirs(turn: int | None, setting: Any) -> Tensor:
        rows = rivals.perturbed(paragraphs.ids, drawn["replacements"], positions(turn))
        return rivals.scan_lens(setting[1], rows, setting[2])[:, 0].view(n, width)

    return Job(
        "perturb every prefix position: EM",
        "paragraph x position",
        Contender("memcircuits", ours, n * n_prefix),
        [
            Contender(
                "TransformerLens: generate + forward per position",
                theirs,
                n * width,
                forms(subject, n * width // 2, n * width),
                10.0,
            )
        ],
        0.0,
        lambda ours, theirs: (ours[:, positions(0)], theirs),
    )


def gradients(subject: Subject) -> Job:
    paragraphs = subject.paragraphs[:8]

    def ours(turn: int | None, setting: Any) -> Tensor:
        found = parameter_gradients(subject.bridge, paragraphs, average="paragraph", **QUIET)
        return torch.stack([found.samples[name] for name in rivals.COMPONENTS], 1)

    return Job(
        "gradients of every head, per paragraph",
        "paragraph",
        Contender("memcircuits", ours, len(paragraphs)),
        [
            Contender(
                "TransformerLens: backward once per paragraph",
                lambda turn, setting: rivals.gradients_lens(setting[1], paragraphs.ids, 1),
                len(paragraphs),
                [(name, model, 1) for name, model in subject.lens],
                2.0,
            )
        ],
        1e-5,
    )


def forms(subject: Subject, *sizes: int) -> list[tuple[str, Any, int]]:
    """TransformerLens's forms of the model, at each batch size."""
    return [(name, model, size) for name, model in subject.lens for size in sizes]


def heads_of(subject: Subject, turn: int | None, whole: bool) -> list[tuple[int, int]]:
    """The heads of a round: all, or one per layer; for a trial two of them."""
    layers, heads = subject.n_layers, subject.n_heads
    if turn is None:
        return [(0, 0), (layers - 1, heads - 1)]
    if whole:
        return [(layer, head) for layer in range(layers) for head in range(heads)]
    return [(layer, (layer + turn) % heads) for layer in range(layers)]
