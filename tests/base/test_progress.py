"""Bars: with rate and remaining time on a terminal, nothing in pipes, in tests or on request."""

from __future__ import annotations

import io
import sys
import time

import pytest

import memcircuits as mc
from memcircuits.base.progress import bar
from tests.helpers import models as zoo


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(total: int | None, **options: bool) -> None:
    with bar(total, "scan", unit="row", **options) as progress_bar:
        for _ in range(3):
            progress_bar.update(10)
            time.sleep(0.45)
        progress_bar.update(10)


def test_a_terminal_sees_rate_and_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    work(50)
    output = sys.stderr.getvalue()
    assert "scan:" in output
    assert "row/s" in output
    assert "<00:" in output  # time left
    assert output.endswith("\r")  # nothing is left behind


@pytest.mark.parametrize("options", [{"progress": False}, {}])
def test_silent_on_request_and_in_pipes(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO() if not options else Terminal())
    work(50, **options)
    assert sys.stderr.getvalue() == ""


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with bar(3, "quick") as progress_bar:
        progress_bar.update(3)
    assert sys.stderr.getvalue().strip() == ""


def test_every_part_of_the_main_job_counts_to_its_end(neo, monkeypatch, tmp_path) -> None:
    """Each bar of the ranking and its report reaches its total, so that remaining time is true."""
    bars = []

    class Counted:
        def __init__(self, *, total: int, desc: str, disable: bool, **_: object) -> None:
            self.total, self.what, self.n, self.is_shown = total, desc, 0, not disable

        def __enter__(self):
            if self.is_shown:  # short parts of a larger one show no bar of their own
                bars.append(self)
            return self

        def __exit__(self, *_):
            return None

        def update(self, n: int = 1) -> None:
            self.n += n

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("tqdm.auto.tqdm", Counted)
    ranking = mc.find_memorization_heads(neo, zoo.mixed(neo, n=4), draws=20)
    ranking.to_html(tmp_path / "r.html")
    names = {one.what for one in bars}
    assert {"scan", "ablate", "gradients", "attention", "perturb"} <= names
    assert [(one.what, one.n) for one in bars if one.n != one.total] == []
