"""The page of a scan: the recited passages themselves, and how many there are of what kind.

A passage is *memorized* if its whole continuation is recited, *hardly recited* if it can serve as a
control (at most a fifth), and *partly recited* in between. Nothing is measured here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from memcircuits.data.tokens import TokenizerLike
from memcircuits.display.pages import (
    Bars,
    Block,
    Facts,
    Lines,
    Number,
    Numbers,
    Page,
    Passage,
    Passages,
    Prose,
    Scatter,
    Table,
)
from memcircuits.measure.near_verbatim import NEAR_VERBATIM
from memcircuits.measure.overlapping_windows import are_windows
from memcircuits.measure.recitation_statistics import REPETITION_COLUMNS, em_ranges
from memcircuits.measure.sampling import MOST_SAMPLES, Sampler
from memcircuits.measure.snippets import passage_text

if TYPE_CHECKING:
    import pandas as pd

    from memcircuits.measure.scanning import Scan

MEMORIZED, NEARLY = "memorized", "nearly verbatim"
PARTLY, HARDLY = "partly recited", "hardly recited"

_MAX_PASSAGES = 500
_MAX_POINTS = 2000
_SEEN = (0, 1, 2, 8, 32, 128)  # lower ends of the groups of repetitions


def scan_page(scan: Scan, tokenizer: TokenizerLike | None) -> Page:
    """The page of a scan; without a tokenizer, texts are shown as token ids."""
    frame = _with_kinds(scan)
    shown = scan.longest_rows(_MAX_PASSAGES)
    places = {row: f"#passage-{i}" for i, row in enumerate(shown)}
    blocks: list[Block] = [
        _headline_numbers(scan, frame),
        _how_to_read(scan),
        _passages(scan, frame, shown, tokenizer),
        _em_distribution(scan, frame),
        _em_against_nll(scan, frame, places),
        *_repetitions(scan),
        _controls(frame),
        _facts(scan),
    ]
    n = int(scan.is_memorized.sum())
    n_continuation = scan.token_correct.shape[1]
    return Page(
        title=f"What {scan.provenance.model['name']} recites",
        lead=f"Given the first {scan.n_prefix} tokens, this model writes the next {n_continuation} "
        f"word for word for {n:,} of {len(frame):,} {_noun(scan)}{_in_places(scan)}.",
        blocks=blocks,
        footer="Made by memcircuits.",
    )


def _noun(scan: Scan) -> str:
    """What was scanned, in the plural."""
    return "windows" if are_windows(scan.names) else "passages"


def _in_places(scan: Scan) -> str:
    """In how many places memorized windows lie, where some overlap."""
    n, places = int(scan.is_memorized.sum()), scan.n_places
    if n == places:
        return ""
    return f", which overlap and lie in {places:,} place{'s' if places > 1 else ''}"


def kinds_of(scan: Scan) -> list[str]:
    """What each passage is, by its EM."""
    near = scan.is_near_verbatim
    kinds = np.where(scan.is_control.numpy(), HARDLY, PARTLY)
    if near is not None:
        kinds = np.where(near.numpy(), NEARLY, kinds)
    named: list[str] = np.where(scan.is_memorized.numpy(), MEMORIZED, kinds).tolist()
    return named


def _with_kinds(scan: Scan) -> pd.DataFrame:
    return scan.to_frame().assign(kind=kinds_of(scan))


def _headline_numbers(scan: Scan, frame: pd.DataFrame) -> Numbers:
    n = scan.token_correct.shape[1]
    counts = frame["kind"].value_counts()
    partly = int(counts.get(PARTLY, 0) + counts.get(NEARLY, 0))
    return Numbers(
        [
            Number("Memorized", f"{counts.get(MEMORIZED, 0):,}", f"all {n} tokens recited"),
            Number("Partly recited", f"{partly:,}", f"more than {n // 5} of {n} tokens"),
            Number("Hardly recited", f"{counts.get(HARDLY, 0):,}", "candidates for controls"),
            Number("Mean EM", f"{frame['em'].mean():.1f}", f"of {n} tokens, over all passages"),
        ]
    )


def _how_to_read(scan: Scan) -> Prose:
    n = scan.token_correct.shape[1]
    return Prose(
        [
            f"The model was given the first {scan.n_prefix} tokens of each passage and nothing "
            f"else. EM (exact match, also called prefix-match length) is the number of tokens of "
            f"the true continuation that greedy decoding writes before it differs, from 0 to {n}. "
            "NLL is the mean loss of the true continuation in nats/token; 0 means certain.",
            *about_measures(scan),
            *about_windows(scan),
            *scan.notes,
        ],
        title="How to read it",
    )


def about_measures(scan: Scan) -> list[str]:
    """What is said of each passage beside EM and NLL, where it was measured."""
    said = []
    if scan.token_sampled is not None:
        said.append(
            f"Samples: how many must be drawn ({_sampler(scan)}) until the whole continuation is "
            "one of them with probability 0.9."
        )
    if scan.greedy is not None:
        said.append(
            "Similarity: 1 minus the edits per token that turn the greedy continuation into the "
            f"true one; from {NEAR_VERBATIM:g} on, a passage counts as {NEARLY}."
        )
    return said


def about_windows(scan: Scan) -> list[str]:
    """What a name with @ means, where passages are windows of documents."""
    if not are_windows(scan.names):
        return []
    return [
        "Passages are windows of documents. The number behind @ is the token at which a window "
        "begins with its prefix, and line is that in which its continuation begins. Of windows "
        "that overlap only the best is listed, so that fewer rows are shown than counted; "
        "memcircuits map FILE joins those of one file."
    ]


def _sampler(scan: Scan) -> str:
    """How samples are drawn, in words."""
    options = scan.provenance.options.get("sampler")
    return str(Sampler(**options) if options else Sampler())


def _passages(
    scan: Scan, frame: pd.DataFrame, rows: list[int], tokenizer: TokenizerLike | None
) -> Passages:
    passages = []
    for row in rows:
        em = int(frame["em"][row])
        text = passage_text(scan.ids[row].tolist(), scan.n_prefix, em, tokenizer)
        passages.append(
            Passage(
                name=scan.names[row],
                kind=frame["kind"][row],
                **text._asdict(),
                n_recited=em,
                nll=float(frame["nll"][row]),
                details=_details(scan, row),
            )
        )
    return Passages(
        passages,
        scan.token_correct.shape[1],
        len(frame),
        title=f"The {_noun(scan)}",
        note="What was given is grey; what is recited is underlined; the true text goes on plain."
        + ("" if tokenizer is not None else " Token ids, because the model has no tokenizer."),
    )


def _details(scan: Scan, row: int) -> str:
    """What else was measured of a passage, and what the metadata says, as far as it is short."""
    measured = []
    if scan.token_sampled is not None:
        samples = float(scan.samples_needed()[row])
        measured = [
            f"{samples:,.0f} samples"
            if samples <= MOST_SAMPLES
            else f"over {MOST_SAMPLES:.0e} samples"
        ]
    if (similarity := scan.similarity) is not None:
        measured.append(f"similarity {float(similarity[row]):.2f}")
    known = {key: scan.metadata[key][row] for key in ("role", "source") if key in scan.metadata}
    times = _repetitions_of(scan.metadata, row)
    parts = [str(value) for value in known.values() if value is not None and len(str(value)) < 60]
    own = [(key, scan.metadata[key][row]) for key in scan.own_columns]
    parts = [*measured, *parts, *(f"{key} {value}" for key, value in own if value is not None)]
    return "; ".join(parts + ([f"seen {times:,} times in training"] if times is not None else []))


def _repetitions_of(metadata: Any, row: int) -> int | None:
    key = next((key for key in REPETITION_COLUMNS if key in metadata), None)
    value = None if key is None else metadata[key][row]
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _em_distribution(scan: Scan, frame: pd.DataFrame) -> Bars:
    import pandas as pd

    n = scan.token_correct.shape[1]
    ranges = pd.Series(em_ranges(frame["em"].to_numpy(), n))
    names = list(dict.fromkeys(em_ranges(np.arange(n + 1), n)))
    sets = frame["role"].astype(str) if "role" in frame else pd.Series(["passages"] * len(frame))
    rows = [
        {"em": name, "set": kind, "share": 100 * float((ranges[sets == kind] == name).mean())}
        for kind in dict.fromkeys(sets)
        for name in names
    ]
    return Bars(
        pd.DataFrame(rows),
        x="em",
        y="share",
        by="set",
        x_label="EM (tokens recited)",
        y_label="share of the passages",
        units="%",
        title="How much is recited",
    )


def _em_against_nll(scan: Scan, frame: pd.DataFrame, places: dict[int, str]) -> Scatter:
    finite = frame[scan.finite.numpy()]
    drawn = finite
    if len(finite) > _MAX_POINTS:
        rows = np.random.default_rng(0).choice(len(finite), _MAX_POINTS, replace=False)
        drawn = finite.iloc[np.sort(rows)]
    drawn = drawn.sort_values("em", ascending=False, kind="stable")  # memorized first in the legend
    of_all = "" if len(drawn) == len(finite) else f"{_MAX_POINTS:,} passages drawn at random. "
    return Scatter(
        drawn.assign(href=[places.get(row, "") for row in drawn.index.tolist()]),
        x="nll",
        y="em",
        by="kind",
        label="id",
        href="href",
        x_label="NLL (nats/token)",
        y_label="EM (tokens)",
        title="EM against NLL",
        note=f"{of_all}A mark leads to its passage, where the page has it.",
    )


def _repetitions(scan: Scan) -> list[Block]:
    """The duplication curve, where it is known how often the passages were seen."""
    if not any(key in scan.metadata for key in REPETITION_COLUMNS):
        return []
    frame = scan.by_repetitions()
    frame = frame[frame["repetitions"] > 0]
    if not len(frame):
        return []
    half = 1.96 * frame["em_se"]
    return [
        Lines(
            frame.assign(low=frame["em"] - half, high=frame["em"] + half),
            x="repetitions",
            y="em",
            low="low",
            high="high",
            log_x=True,
            x_label="times seen in training",
            y_label="mean EM",
            units="tokens",
            title="Repetition and recitation",
            note="Means over passages with 1.96 standard errors.",
        )
    ]


def composition_of_controls(frame: pd.DataFrame) -> pd.DataFrame:
    """What the hardly recited passages are: by role and by times seen, as far as these are known.

    Args:
        frame: the table of a scan, with a column `kind`.

    Returns:
        Columns `role` and `seen` (where known), `n`, `em` and `nll` (means).
    """
    controls = frame[frame["kind"] == HARDLY]
    key = next((key for key in REPETITION_COLUMNS if key in controls), None)
    by = ["role"] if "role" in controls else []
    if key is not None and np.issubdtype(controls[key].dtype, np.number):
        group = np.searchsorted(_SEEN, controls[key].fillna(-1), side="right") - 1
        names = ["never", "once", "2 to 7", "8 to 31", "32 to 127", "128 or more"]
        controls = controls.assign(order=group, seen=[names[i] if i >= 0 else "?" for i in group])
        by += ["order", "seen"]
    if not by:
        controls, by = controls.assign(role="passages"), ["role"]
    groups = controls.groupby(by, sort=True, dropna=False)
    table = groups.agg(n=("em", "size"), em=("em", "mean"), nll=("nll", "mean")).reset_index()
    return table.drop(columns="order", errors="ignore")


def _controls(frame: pd.DataFrame) -> Table:
    return Table(
        composition_of_controls(frame),
        labels={"seen": "times seen in training", "em": "mean EM", "nll": "mean NLL"},
        help={
            "role": "what the passages are, by the column role",
            "em": "tokens recited",
            "nll": "nats/token",
        },
        title="What the controls are",
        note="Controls are defined by what the model does, not by what it saw: passages of which "
        "at most a fifth is recited. Where the training text is known, this table says how many of "
        "them were in it.",
    )


def _facts(scan: Scan) -> Facts:
    model, paragraphs = scan.provenance.model, scan.provenance.paragraphs["paragraphs"]
    versions = scan.provenance.versions
    items = {
        "model": model["name"],
        "weights (fingerprint)": model["fingerprint"],
        "architecture": f"{model['architecture']}, as {model['class']}",
        "precision": f"{model['dtype']} on {model['device']}",
        "passages (hash of their tokens)": paragraphs["hash"],
        "tokens": f"{scan.n_prefix} of prefix + {scan.token_correct.shape[1]}",
        **({} if scan.token_sampled is None else {"samples drawn": _sampler(scan)}),
        **{f"{name} (version)": version for name, version in versions.items()},
    }
    return Facts(items, title="What was run")
