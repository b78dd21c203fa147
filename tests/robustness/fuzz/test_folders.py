"""Spoiled folders of a scan and of a benchmark: resumed, or refused by one clear error."""

from __future__ import annotations

import random
from typing import Any

import pytest

import memcircuits as mc
from memcircuits.benchmark.pages import write_leaderboard
from memcircuits.benchmark.paragraph_pool import ParagraphPool
from memcircuits.benchmark.trials import read_trials, run_trials
from memcircuits.data.windows import Windows
from memcircuits.measure.corpus.scan import scan_to_disk
from tests.helpers import models as zoo
from tests.helpers.fuzz import COUNTS, jsonl, only_input_errors, spoiled_folder

pytestmark = pytest.mark.any_version


def test_spoiled_scan_folders(bridge, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_bytes(jsonl([{"ids": row} for row in zoo.mixed(bridge).ids.tolist()]))
    options: dict[str, Any] = {"windows": Windows(n_prefix=10, n_continuation=12)}
    options |= {"part_records": 3, "progress": False}
    scan_to_disk(bridge, source, tmp_path / "good", **options)
    draw = random.Random(5)
    done = 0
    for turn in range(COUNTS["scan folders"]):
        path = spoiled_folder(tmp_path / "good", tmp_path / "folder", draw)
        what = path.name, path.read_bytes()[:1500]
        if turn % 10 == 0:
            path.unlink()
        with only_input_errors("scan folders", what):
            resumed = scan_to_disk(
                bridge, source, tmp_path / "folder", resume=turn % 3 > 0, **options
            )
            assert resumed.summary["memorized"] == 4
            done += 1
    assert 0 < done < COUNTS["scan folders"]


def test_spoiled_trials(bridge, tmp_path):
    many = zoo.mixed(bridge) + mc.Paragraphs.from_tokens(zoo.random_ids(64, 22, 2), n_prefix=10)
    pool = ParagraphPool.of(bridge, many)
    options: dict[str, Any] = {"counts": {"block": 1, "null": 1}, "progress": False}
    run_trials(pool, tmp_path / "good", **options)
    write_leaderboard(read_trials(tmp_path / "good"), tmp_path / "good")
    draw = random.Random(7)
    done = 0
    for _ in range(COUNTS["trials"]):
        path = spoiled_folder(tmp_path / "good", tmp_path / "folder", draw)
        with only_input_errors("trials", (path.name, path.read_bytes()[:1500])):
            run_trials(pool, tmp_path / "folder", **options)  # trials that exist are kept
            write_leaderboard(read_trials(tmp_path / "folder"), tmp_path / "folder")
            done += 1
    assert done < COUNTS["trials"]  # which of them are harmless depends on the seconds in them
