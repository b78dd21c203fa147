"""What became of the rows that were read: how many were skipped, and how many were cut."""

from __future__ import annotations

from collections.abc import Mapping

from memcircuits.data.windows import Cut


def row_counts(n_rows: int, cuts: Cut) -> dict[str, int]:
    """Numbers of rows: all, too short for a window, unusable otherwise, longer than their window.

    Args:
        n_rows: number of rows that were read.
        cuts: what was cut from them.
    """
    n_short = sum(row.short for row in cuts.bad)
    return {
        "rows": n_rows,
        "short": n_short,
        "unusable": len(cuts.bad) - n_short,
        "longer": cuts.n_longer,
    }


def row_notes(
    counts: Mapping[str, int], length: int, first: str = "", *, remedy: bool = True
) -> tuple[str, ...]:
    """What the reader must know about these rows, in sentences.

    Args:
        counts: as `row_counts` gives them.
        length: tokens of a window.
        first: what is wrong with the first unusable row, if that is known.
        remedy: whether a stride can be given that reads what was not.
    """
    n_rows, n_short = counts["rows"], counts["short"]
    n_unusable, n_longer = counts["unusable"], counts["longer"]
    notes = []
    if n_short:
        notes.append(
            f"{n_short:,} of {n_rows:,} rows are too short for {length} tokens and were skipped."
        )
    if n_unusable:
        reason = f"; the first: {first}" if first else ""
        notes.append(f"{n_unusable:,} of {n_rows:,} rows cannot be used and were skipped{reason}.")
    if n_longer:
        others = f"; stride={length} (--stride {length}) reads the others" if remedy else ""
        notes.append(
            f"{n_longer:,} of {n_rows:,} rows are longer than {length} tokens, and only their "
            f"first window was read{others}."
        )
    return tuple(notes)
