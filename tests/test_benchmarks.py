"""The benchmark's own arithmetic: turns, ratios, the page; and rivals that give our numbers."""

import json
import time
from xml.etree import ElementTree

import pytest
import torch

from tests.benchmarks import capacity, growth, page, rivals, screens, timing
from tests.benchmarks.jobs import all_jobs
from tests.benchmarks.subjects import N_PREFIX, subject


def sleeping(name, seconds, turns, **options):
    def run(turn, setting):
        turns.append(name)
        time.sleep(seconds if setting is None else setting)
        return torch.ones(3)

    return timing.Contender(name, run, options.pop("units", 1.0), **options)


@pytest.fixture
def awake(monkeypatch):
    """Sleep counts: processor time would not pass."""
    monkeypatch.setattr(timing, "clock", time.perf_counter)


@pytest.mark.usefixtures("awake")
def test_contenders_take_turns_and_ratios_are_per_unit():
    turns = []
    ours = sleeping("ours", 0.02, turns, units=4.0)
    theirs = sleeping("theirs", 0.02, turns, units=1.0, target=2.0)
    result = timing.measure(timing.Job("job", "row", ours, [theirs], 0.0), 3, lambda text: None)
    assert turns == ["ours", "theirs", "ours", "theirs", "theirs", "ours", "ours", "theirs"]
    row = result["rows"][1]
    assert row["ratio"] == pytest.approx(4.0, rel=0.2)
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["difference"] == 0.0


@pytest.mark.usefixtures("awake")
def test_rivals_get_the_setting_that_suits_them():
    fast = sleeping("theirs", None, [], settings=(0.05, 0.01, 0.03))
    assert timing.tuned(fast) == 0.01


def test_arithmetic_is_counted():
    def run(turn, setting):
        return torch.ones(10, 20) @ torch.ones(20, 30)

    job = timing.Job("job", "row", timing.Contender("ours", run, 2.0), [], 0.0)
    result = timing.measure(job, 1, lambda text: None)
    assert result["rows"][0]["gflop_per_unit"] == pytest.approx(2 * 10 * 20 * 30 / 2 / 1e9)


def test_rivals_compute_what_we_compute():
    """Every job of the table, on a toy, without looking at the clock."""
    one = subject("random-tiny", 4)
    for job in all_jobs(one, whole=True):
        ours = job.ours.run(0, job.ours.settings[0])
        for rival in job.rivals:
            for setting in rival.settings:
                our_values, their_values = job.compare(ours, rival.run(0, setting))
                assert our_values.numel(), job.name
                torch.testing.assert_close(our_values, their_values, atol=job.tolerance, rtol=0)


def test_perturbed_rows_differ_in_one_place():
    ids = torch.arange(200).view(2, 100)
    new = 1000 + torch.arange(2 * N_PREFIX).view(2, N_PREFIX)
    rows = rivals.perturbed(ids, new, [3, 7])
    assert rows.shape == (4, 100)
    changed = (rows != ids.repeat_interleave(2, 0)).nonzero()
    assert changed.tolist() == [[0, 3], [1, 7], [2, 3], [3, 7]]
    assert rows[2, 3] == 1000 + N_PREFIX + 3


def test_the_page_and_the_plot():
    row = {
        "name": "them",
        "setting": "batch 8",
        "seconds_per_unit": 0.5,
        "gflop_per_unit": 30.0,
        "gflop_per_second": 60.0,
    }
    beaten = row | {
        "ratio": 2.5, "ratio_low": 2.4, "ratio_high": 2.7, "target": 2.0, "difference": 3e-6,
    }  # fmt: skip
    lines = [
        {"axis": axis, "size": size, "name": name, "seconds": size * cost}
        for axis in ("paragraphs", "layers")
        for size in (1, 2, 4)
        for name, cost in [("memcircuits", 0.01), ("<others>", 0.03)]
    ]
    data = {
        "quick": False,
        "rounds": 5,
        "machine": {
            "processor": "a processor",
            "threads": 2,
            "matrix_product_gflops": 200.0,
            "versions": {"torch": "2"},
        },
        "subjects": {
            "organism": {
                "description": "A model.",
                "n_paragraphs": 8,
                "jobs": {
                    "a job": {
                        "job": "a job",
                        "unit": "row",
                        "note": "",
                        "rows": [row | {"name": "us"}, beaten],
                    }
                },
            }
        },
        "memory": {
            "subject": "organism",
            "peaks": {"run_with_cache": 3 * 2**20, "scan": 2**20},
        },
        "variants": {
            "organism": [{"name": "that", "ratio": 1.5, "difference": 0.02, "em_changed": 3}]
        },
        "screens": [
            {"size": size, "at": at, "share": 0.25 if at else 0.0}
            for size in screens.SIZES
            for at in screens.POINTS
        ],
        "growth": lines,
        "seconds": 600.0,
        "complete": True,
    }
    text = page.markdown(json.loads(json.dumps(data)))
    assert "| a job | them | **2.50x** (2.40 to 2.70) | 2x ✓ | 8.3x | 3.0e-06 | 1.00x |" in text
    assert "| organism | that | 1.50x | 2.0e-02 | 3 |" in text
    assert "| 8 + 8 | 0% | 25% |" in text
    assert "| scan | 1 MiB | 0.33 |" in text
    assert "All took 10 minutes." in text
    assert "Not complete" in page.markdown(data | {"complete": False})
    readme = page.in_findings(f"Before\n{page.START}\nold\n{page.STOP}\nafter", data)
    assert readme.startswith("Before\n")
    assert readme.endswith(f"\n{page.STOP}\nafter")
    assert "| a job | them | 2.5x |" in readme
    assert "old" not in readme
    picture = ElementTree.fromstring(growth.plot(lines))
    assert len(picture.findall("{*}polyline")) == 4


def test_the_published_page_is_made_of_the_published_numbers():
    data = json.loads((page.FINDINGS.parent / page.NUMBERS).read_text(encoding="utf-8"))
    assert not data["quick"]
    text = (page.FINDINGS.parent / page.PAGE).read_text(encoding="utf-8")
    assert text == page.markdown(data)
    findings = page.FINDINGS.read_text(encoding="utf-8")
    assert page.START in findings
    assert findings == page.in_findings(findings, data)


def test_a_capacity_row_is_added_to_those_that_are_kept(tmp_path):
    kept = json.loads(capacity.PAGE.with_suffix(".json").read_text("utf-8"))
    page = tmp_path / "capacity.md"
    page.with_suffix(".json").write_text(json.dumps(kept))
    faster = kept["rows"]["organism"] | {"tokens_per_second": 12_345.0}
    capacity.record(page, rows={"organism": faster}, setting=kept["setting"] | {"cores": 7})
    after = json.loads(page.with_suffix(".json").read_text("utf-8"))
    assert after["rows"] == kept["rows"] | {"organism": faster}
    assert after["setting"]["cores"] == 7
    assert after["kills"] == kept["kills"]
    assert page.read_text("utf-8") == capacity.page(**after)
    assert "12,345" in page.read_text("utf-8")


def test_the_capacity_page_holds_the_numbers_measured():
    numbers = json.loads(capacity.PAGE.with_suffix(".json").read_text("utf-8"))
    assert capacity.PAGE.read_text("utf-8") == capacity.page(**numbers)


def test_the_estimate_by_hand():
    """A microsecond on the GPU and one on the host: half a million tokens/s and GPU."""
    numbers = json.loads(capacity.PAGE.with_suffix(".json").read_text("utf-8"))
    flop = round(capacity.GPU_FLOPS * capacity.GPU_SHARE / 1e6)
    numbers["rows"]["125m"]["flop_per_token"] = flop
    numbers["rows"]["organism"]["host_seconds_per_token"] = 1e-6
    text = capacity.page(**numbers)
    hours = 300e9 / (8 * 500_000) / 3600
    assert f"| 8 | 4,000,000 | {hours:.1f} | {8 * hours:,.0f} |" in text
    assert "the host takes 50%" in text
