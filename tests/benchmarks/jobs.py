"""Ours beside the rivals: what each job is, in which units, and which outputs are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import memcircuits as mc
from memcircuits.base.heads import Head
from memcircuits.evidence.ablation import Ablation
from memcircuits.evidence.component_effects import measure_effects
from memcircuits.evidence.component_grid import ComponentGrid
from memcircuits.evidence.gradients.parameters import parameter_gradients
from memcircuits.evidence.patching.sweeps import patch_heads
from memcircuits.evidence.triggers.perturbation import perturb_prefix
from memcircuits.measure.scanning import scan as scan_paragraphs
from memcircuits.models.registry import adapt
from tests.benchmarks import rivals
from tests.benchmarks.subjects import Subject
from tests.benchmarks.timing import Contender, Job

QUIET = {"progress": False}
Heads = list[tuple[int, int]]
_TRIAL = 10  # tokens decoded when batch sizes are tried


def all_jobs(subject: Subject, *, whole: bool) -> list[Job]:
    """The jobs of the table.

    A rival that takes the heads one after the other does some of them in each round, others in the
    next: what a full forward pass costs does not depend on the head.

    Args:
        subject: model and paragraphs.
        whole: sweep over all heads and more paragraphs. Without it our own sweep takes four heads
            each of four layers that are as deep as all on average.
    """
    return [
        scan(subject),
        ablation(subject, whole),
        patching(subject, whole),
        perturbation(subject, whole),
        gradients(subject),
        screening(subject, whole),
    ]


def scan(subject: Subject) -> Job:
    paragraphs, n = subject.paragraphs, len(subject.paragraphs)

    def ours(turn: int | None, setting: Any) -> Tensor:
        scan_result = scan_paragraphs(subject.bridge, paragraphs, **QUIET)
        return torch.stack([scan_result.em.float(), scan_result.nll], -1)

    def decoded(turn: int | None) -> int | None:
        return _TRIAL if turn is None else None

    return Job(
        "scan: EM and NLL",
        "paragraph",
        Contender("memcircuits", ours, n),
        [
            Contender(
                "TransformerLens: generate + forward",
                lambda turn, setting: rivals.scan_lens(
                    setting[1], paragraphs.ids, setting[2], decoded(turn)
                ),
                n,
                forms(subject, n // 2, n),
                8.0,
            ),
            Contender(
                "transformers: generate + forward",
                lambda turn, setting: rivals.scan_transformers(
                    subject.plain, paragraphs.ids, setting, decoded(turn)
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
    heads = swept(subject, whole)

    def ours(turn: int | None, setting: Any) -> Tensor:
        return zero.effects([Head(*head) for head in heads], **QUIET)[..., 0]

    contenders = [one_by_one(subject, paragraphs, heads, whole, 2.0)]
    try:
        wrapped = rivals.nnsight_model(subject.plain, subject.bridge.tokenizer)
    except ImportError:
        pass  # the page says so
    else:
        d_head = subject.plain.config.hidden_size // subject.n_heads
        clean = clean_nll(subject, paragraphs)
        contenders.append(
            Contender(
                "nnsight: one trace per head",
                lambda turn, setting: (
                    rivals.ablate_nnsight(
                        wrapped, paragraphs.ids, setting, share(heads, turn, whole), d_head
                    )
                    - clean
                ),
                len(share(heads, 0, whole)) * len(paragraphs),
                (4, 8),
                2.0,
            )
        )
    return Job(
        "zero-ablate heads",
        "head x paragraph",
        Contender("memcircuits", ours, len(heads) * len(paragraphs)),
        contenders,
        1e-4,
        lambda ours, theirs: (ours[:, positions_of(heads, whole)], theirs),
        note=""
        if whole
        else "ours pays for a clean run in each round of 16 heads; in a sweep it is one for 144",
    )


def one_by_one(
    subject: Subject, paragraphs: mc.Paragraphs, heads: Heads, whole: bool, target: float
) -> Contender:
    """Zero ablation as TransformerLens documents it."""
    clean = clean_nll(subject, paragraphs)
    return Contender(
        "TransformerLens: one hooked forward per head",
        lambda turn, setting: (
            rivals.ablate_lens(setting[1], paragraphs.ids, setting[2], share(heads, turn, whole))
            - clean
        ),
        len(share(heads, 0, whole)) * len(paragraphs),
        forms(subject, 4, 8),
        target,
    )


def clean_nll(subject: Subject, paragraphs: mc.Paragraphs) -> Tensor:
    return scan_paragraphs(subject.bridge, paragraphs, **QUIET).nll[:, None]


def patching(subject: Subject, whole: bool) -> Job:
    copies = 8
    clean = subject.paragraphs[:copies] if whole else subject.paragraphs[:1]
    other = subject.paragraphs.ids.roll(1, 0)[: len(clean), : clean.n_prefix]
    corrupted = mc.Paragraphs.from_tokens(
        torch.cat([other, clean.continuation], 1), n_prefix=clean.n_prefix
    )
    # A single pair is a poor batch for the rival: it gets the same one several times.
    rows, others = (p.ids.repeat(copies // len(clean), 1) for p in (clean, corrupted))
    heads = every(subject)

    def ours(turn: int | None, setting: Any) -> Tensor:
        patches = patch_heads(subject.bridge, clean, corrupted, site="z", **QUIET)
        return (patches.samples["nll"] + patches.base["nll"][:, None, None]).mean(0)

    return Job(
        "exact z patching of heads",
        "head x pair",
        Contender("memcircuits", ours, len(heads) * len(clean)),
        [
            Contender(
                "transformer_lens.patching",
                lambda turn, setting: rivals.patch_lens(
                    setting[1], rows, others, setting[2], share(heads, turn, whole)
                ),
                len(share(heads, 0, whole)) * copies,
                forms(subject, 4, 8),
                2.0,
            )
        ],
        1e-4,
        lambda ours, theirs: (ours.flatten()[positions_of(heads, whole)], theirs),
    )


def screening(subject: Subject, whole: bool) -> Job:
    half = 8 if whole else 2
    memorized, control = subject.paragraphs[:half], subject.paragraphs[-half:]
    both = memorized + control
    sets = [Ablation(subject.bridge, group, mode="zero") for group in (memorized, control)]
    everything = Ablation(subject.bridge, both, mode="zero")
    heads = swept(subject, whole)

    def ours(turn: int | None, setting: Any) -> Tensor:
        grid = ComponentGrid.of(adapt(subject.bridge), ("head",))
        effects = measure_effects(*sets, grid, method="screen", **QUIET)
        nll = [row[:, 0] for samples in effects.samples.values() for row in samples]
        return torch.stack([effects.on_grid(values) for values in nll])

    def score(nll: Tensor) -> Tensor:
        return nll[:half].mean(0) - nll[half:].mean(0)

    def compared(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        if theirs.shape[1] == len(every(subject)):
            best = score(theirs).argsort(descending=True)[:10]
            our_scores = torch.where(ours[0].isnan(), -torch.inf, score(ours)).flatten()
            assert set(our_scores.argsort(descending=True)[:10].tolist()) == set(best.tolist()), (
                "the top ten differ"
            )
        some = heads if theirs.shape[1] == len(heads) else share(heads, 0, whole)
        our_nll = torch.stack([ours[:, layer, head] for layer, head in some], -1)
        seen = ~our_nll[0].isnan()
        return our_nll[:, seen], theirs[:, seen]

    return Job(
        "top 10 heads, verified exactly",
        "head x paragraph",
        Contender("memcircuits: screen", ours, len(every(subject)) * len(both)),
        [
            one_by_one(subject, both, heads, whole, 8.0),
            Contender(
                "memcircuits: sweep",
                lambda turn, setting: everything.effects([Head(*head) for head in heads], **QUIET)[
                    ..., 0
                ],
                len(heads) * len(both),
            ),
        ],
        1e-4,
        compared,
        note=f"{len(both)} paragraphs; ours decides on all heads, having ablated some; compared "
        "are those",
    )


def perturbation(subject: Subject, whole: bool) -> Job:
    paragraphs = subject.paragraphs[: 8 if whole else 1]
    n, n_prefix = len(paragraphs), paragraphs.n_prefix
    width = 4 if whole else 16  # positions in one round of the rival
    drawn: dict[str, Tensor] = {}

    def ours(turn: int | None, setting: Any) -> Tensor:
        perturbation = perturb_prefix(subject.bridge, paragraphs, **QUIET)
        drawn["replacements"] = perturbation.replacements[..., 0]
        return perturbation.em[..., 0].float()

    def positions(turn: int | None) -> list[int]:
        return [(3 * i + 5 * (turn or 0) + 1) % n_prefix for i in range(width)]

    def theirs(turn: int | None, setting: Any) -> Tensor:
        rows = rivals.perturbed(paragraphs.ids, drawn["replacements"], positions(turn))
        decoded = _TRIAL if turn is None else None
        return rivals.scan_lens(setting[1], rows, setting[2], decoded)[:, 0].view(n, width)

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
        note=f"{n} paragraph(s); in each round {width} of the positions of each by the rival",
    )


def gradients(subject: Subject) -> Job:
    paragraphs = subject.paragraphs[:8]

    def ours(turn: int | None, setting: Any) -> Tensor:
        gradients = parameter_gradients(
            subject.bridge, paragraphs, average="paragraph", components=rivals.COMPONENTS, **QUIET
        )
        return torch.stack([gradients.samples[name] for name in rivals.COMPONENTS], 1)

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


def every(subject: Subject) -> Heads:
    """All heads, layer by layer."""
    return [(i, j) for i in range(subject.n_layers) for j in range(subject.n_heads)]


def swept(subject: Subject, whole: bool) -> Heads:
    """The heads of our own sweep."""
    layers, heads = subject.n_layers, subject.n_heads
    if whole:
        return every(subject)
    step = layers // 4
    return [(i, j) for i in range(step // 2, layers, step) for j in range(0, heads, heads // 4)]


def share(heads: Heads, turn: int | None, whole: bool) -> Heads:
    """The heads of a round of a rival."""
    if turn is None:  # a trial
        return heads[:1]
    return [heads[i] for i in positions_of(heads, whole, turn)]


def positions_of(heads: Heads, whole: bool, turn: int = 0) -> list[int]:
    n = min(len(heads), 6 if whole else 2)
    return [(turn + i * len(heads) // n) % len(heads) for i in range(n)]
