"""What a scan costs: `python -m tests.benchmarks.capacity` measures and writes docs/capacity.md.

The scan is the one of `memcircuits scan --out`, from text to files: reading, encoding, cutting,
measuring, writing. The corpus is made of the organism's paragraphs in random order. Three jobs,
each in a process of its own: the organism, a random model of the size of GPT-Neo 125M, and 100,000
short windows to see whether memory grows.

Other programs may run on the machine, so the page says how much of it a scan had, and what does not
run on a GPU (everything but the forward passes) is measured in seconds of the processor. On Linux,
`OMP_NUM_THREADS=1 taskset -c 0 chrt -r 5` before the command keeps others off its core.

The numbers lie in docs/capacity.json, to which `tests/benchmarks/kills.py` adds; the page is made
from them alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

from memcircuits.base.io import write_atomically

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # encoding counts as time of the one thread

PAGE = Path(__file__).parents[2] / "docs" / "capacity.md"
PILE_TOKENS = 300e9  # Biderman et al. 2023: the Pile in tokens of the Pythia tokenizer
GPU_FLOPS = 312e12  # an A100's bf16 matrix products, by its maker
GPU_SHARE = 0.2  # assumed, not measured
GPUS = (1, 8, 64)
MODELS = {
    "organism": "the organism",
    "random-125m": "GPT-Neo 125M's shape, random weights",
    "tiny": "two layers of 64 dimensions, random weights",
}


def write_corpus(path: Path, tokens: int, tokenizer: Any) -> None:
    """Documents of about 1,000 tokens: ten of the organism's paragraphs, as text."""
    import memcircuits as mc

    chance = random.Random(0)
    texts = mc.Paragraphs.shipped().texts(tokenizer)
    with path.open("w") as file:
        for i in range(-(-tokens // 1000)):
            text = "\n".join(chance.choices(texts, k=10))
            file.write(json.dumps({"id": i, "text": text}) + "\n")


def measure(name: str, windows: int, length: int, folder: Path) -> dict[str, Any]:
    """Scan a corpus, with the clocks and the memory of the process."""
    from memcircuits.data.formats.listing import find_sources
    from memcircuits.data.formats.sources import read_chunks
    from memcircuits.data.windows import Windows
    from memcircuits.measure.corpus import parts
    from memcircuits.measure.corpus import scan as corpus_scan
    from memcircuits.models.registry import adapt
    from tests.benchmarks.subjects import subject

    model = tiny() if name == "tiny" else subject(name, 2).bridge
    adapter = adapt(model)
    options: dict[str, Any] = {
        "windows": Windows(length // 2, length - length // 2, stride=length),
        "progress": False,
    }
    write_corpus(folder / "first.jsonl", 2000, adapter.tokenizer)
    corpus_scan.scan_to_disk(model, folder / "first.jsonl", folder / "first", **options)
    write_corpus(folder / "corpus.jsonl", int(windows * length * 1.1), adapter.tokenizer)

    resident: list[float] = []
    out = folder / "out"
    n_parts = sum(1 for _ in read_chunks(find_sources(folder / "corpus.jsonl")[0], 100))
    stop = threading.Event()

    def watch() -> None:
        """The most memory held during each tenth of the scan."""
        while not stop.wait(0.02):
            tenth = min(9, 10 * len(list((out / "parts").glob("0*"))) // n_parts)
            resident.extend([0.0] * (tenth + 1 - len(resident)))
            resident[tenth] = max(resident[tenth], mib())

    def clocks() -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), time.thread_time()

    started, in_model = clocks(), 0.0
    prepare_scan, score_paragraphs = corpus_scan.prepare_scan, parts.score_paragraphs

    def prepared(*arguments: Any, **named: Any) -> Any:
        """What is done once, such as hashing the weights, is not a cost of the tokens."""
        nonlocal started
        prepared_scan = prepare_scan(*arguments, **named)
        started = clocks()
        return prepared_scan

    def timed(*arguments: Any, **named: Any) -> Any:
        nonlocal in_model
        began = time.thread_time()
        scores = score_paragraphs(*arguments, **named)
        in_model += time.thread_time() - began
        return scores

    watcher = threading.Thread(target=watch)
    watcher.start()
    with (
        mock.patch.object(corpus_scan, "prepare_scan", prepared),
        mock.patch.object(parts, "score_paragraphs", timed),
    ):
        scan_result = corpus_scan.scan_to_disk(
            model, folder / "corpus.jsonl", out, part_records=100, **options
        )
    wall, process, thread = (now - then for now, then in zip(clocks(), started, strict=True))
    stop.set()
    watcher.join()
    total = scan_result.summary
    size = sum(part.stat().st_size for part in scan_result.parts)
    weights = sum(p.numel() for p in model.original_model.parameters())
    cfg = model.cfg
    embedded = cfg.d_model * (cfg.d_vocab + cfg.n_ctx)
    # Layers see all tokens but a window's last, the unembedding those that predict a continuation.
    per_token = 2 * (weights - embedded) + cfg.d_model * cfg.d_vocab
    per_token += 4 * cfg.n_layers * cfg.d_model * length
    return {
        "name": name,
        "length": length,
        "parameters": weights,
        "windows": total["windows"],
        "memorized": total["memorized"],
        "tokens_per_second": total["tokens"] / wall,
        "cores": process / wall,
        "host_seconds_per_token": (thread - in_model) / total["tokens"],
        "flop_per_token": per_token,
        "bytes_per_window": size / total["windows"],
        "resident_mib": [round(x) for x in resident],
        "batch_size": scan_result.manifest["batch_size"],
        "d_vocab": adapter.d_vocab,
    }


def tiny() -> Any:
    """Two small layers with the organism's vocabulary: quick, where only memory is of interest."""
    from memcircuits.models.loading import as_bridge
    from tests.benchmarks.subjects import random_neo, subject

    tokenizer = subject("organism", 2).bridge.tokenizer
    plain = random_neo(layers=2, heads=4, d_model=64, d_vocab=len(tokenizer))
    return as_bridge(plain, tokenizer, name="tiny")


def mib() -> float:
    """Memory that the process holds (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def setting() -> dict[str, Any]:
    """How this process is run, which those that it starts inherit."""
    real_time = (os.SCHED_RR, os.SCHED_FIFO)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "of_cores": os.cpu_count(),
        "real_time": os.sched_getscheduler(0) in real_time,
    }


def record(page_at: Path, **numbers: Any) -> None:
    """Add numbers to those that lie beside the page, and write the page again."""
    file = page_at.with_suffix(".json")
    data = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    rows = data.get("rows", {}) | numbers.pop("rows", {})
    data |= numbers | {"rows": rows}
    write_atomically(file, json.dumps(data, indent=1) + "\n")
    write_atomically(page_at, page(**data))


def page(
    machine: dict[str, Any],
    setting: dict[str, Any],
    rows: dict[str, dict[str, Any]],
    kills: dict[str, Any] | None = None,
    plans: list[dict[str, Any]] | None = None,
) -> str:
    """docs/capacity.md.

    Args:
        machine: what the scans ran on.
        setting: see `setting`.
        rows: what `measure` returned for each of the three jobs.
        kills: what `tests/benchmarks/kills.py` measured; None if it was not run.
        plans: the same of `tests/benchmarks/plans.py`.
    """
    from tests.benchmarks.page import table

    speeds = table(
        [
            *("model", "parameters", "windows", "tokens/s", "cores it had"),
            *("GFLOP/token", "host, us/token"),
        ],
        (
            [
                MODELS[row["name"]],
                f"{row['parameters'] / 1e6:.1f}M",
                f"{row['windows']:,} of {row['length']} tokens",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['cores']:.2f}",
                f"{row['flop_per_token'] / 1e9:.2g}",
                f"{row['host_seconds_per_token'] * 1e6:.1f}",
            ]
            for row in rows.values()
        ),
    )  # fmt: skip
    big, long = rows["125m"], rows["memory"]
    memory = ", ".join(f"{x:,}" for x in long["resident_mib"])
    grown = long["resident_mib"][-1] - long["resident_mib"][0]
    on_gpu = big["flop_per_token"] / (GPU_FLOPS * GPU_SHARE)
    host = rows["organism"]["host_seconds_per_token"]
    rate = 1 / (on_gpu + host)
    costs = table(
        ["GPUs", "tokens/s", "hours", "GPU hours"],
        (
            [
                str(n),
                f"{rate * n:,.0f}",
                f"{PILE_TOKENS / rate / n / 3600:,.1f}",
                f"{PILE_TOKENS / rate / 3600:,.0f}",
            ]
            for n in GPUS
        ),
    )
    here = PILE_TOKENS / big["tokens_per_second"] / 86400
    terabytes = PILE_TOKENS / big["length"] * big["bytes_per_window"] / 1e12
    return f"""# Capacity

What `memcircuits scan --out` costs. Written by `python -m tests.benchmarks.capacity`.

## Measured

{machine["processor"]}, {threads(machine, setting)}, fp32. Each scan goes from a file of text to a
folder of parts; the text is the organism's paragraphs in random order. The 125M model has the shape
of GPT-Neo 125M and random weights, on which speed does not depend.

A large matrix product ran at {machine["matrix_product_gflops"]:.0f} GFLOP/s. *Cores it had* is the
processor time of the scan over its duration: what is missing to {machine["threads"]} went to others
(at real-time priority, the twentieth that Linux keeps for them), and tokens/s are lower by as much.

{speeds}

*GFLOP/token* is arithmetic, not a measurement: 2 FLOP per weight outside the embeddings, 4 x layers
x d_model x length for attention, and the unembedding at the half of the positions that predict the
continuation. *Host* is everything but the forward passes (reading, encoding, cutting, writing), in
microseconds of one core.

### Memory

A scan of {long["windows"]:,} windows of {long["length"]} tokens ({MODELS[long["name"]]}). The most
that the process held during each tenth of it, in MiB: {memory}; {grown:+,} MiB from the first tenth
to the last.
{survived(kills)}{planned(plans)}
## Estimated: a corpus of the Pile's size

**Nothing was run on a GPU: this is computed from assumptions and the host's time above.**

- {PILE_TOKENS / 1e9:.0f} billion tokens, in windows of {big["length"]} that do not overlap;
- a model of {big["flop_per_token"] / 1e9:.2g} GFLOP per token ({MODELS[big["name"]]});
- GPUs that sustain {GPU_SHARE:.0%} of {GPU_FLOPS / 1e12:.0f} TFLOP/s, an A100's bf16 peak by its
  maker; the share is an assumption;
- one process a GPU, in which the host's work and the GPU's take turns; the host's is that of the
  organism's scan above, the same work at a greater length, so that opening and closing weigh less;
- n GPUs are n times as fast: shards share nothing but the folder.

```text
s/token    = {big["flop_per_token"]:.3g} / ({GPU_SHARE} x {GPU_FLOPS:.3g}) + {host:.2g}
           = {1 / rate:.2g}
tokens/s   = GPUs / (s/token) = {rate:,.0f} x GPUs
hours      = {PILE_TOKENS:.3g} / (tokens/s) / 3600
```

{costs}

Of a token's time the host takes {host * rate:.0%}: more than one process a GPU (`--workers` with
Ray, or more shards) would hide it. On the core measured above the same scan would take
{here:,.0f} days. The parts would take {terabytes:.1f} TB. Replace the rate by your own: every
scan prints its tokens/s, and a scan of one file is enough to know it. Larger models scale with
their GFLOP per token.
"""


def threads(machine: dict[str, Any], setting: dict[str, Any]) -> str:
    """How much of the machine a scan could use."""
    one = machine["threads"] == setting["cores"] == 1
    text = (
        f"one thread of one of {setting['of_cores']} cores"
        if one
        else f"{machine['threads']} threads on {setting['cores']} of {setting['of_cores']} cores"
    )
    return text + " at real-time priority (`chrt -r`)" * setting["real_time"]


def survived(kills: dict[str, Any] | None) -> str:
    """The section about killed scans."""
    if kills is None:
        return ""
    outcome = (
        "every file is the same, byte by byte, and every row is there once"
        if kills["same"]
        else "**the results differ**"
    )
    command = "python -m tests.benchmarks.kills " + " ".join(
        f"--{key} {kills[key]}" for key in ("windows", "kills", "length")
    )
    return f"""
### Killed and resumed

`kill -9` at {kills["kills"]} random moments of a scan of {kills["windows"]:,} windows of
{kills["length"]} tokens by the organism, resumed each time, against the scan that nothing stopped
({kills["rows"]:,} rows in {kills["parts"]} parts, {kills["quarantined"]} unusable rows in
quarantine): {outcome}. Temporary files that the kills left, and the next run removed:
{kills["half_written"]}. Measured by `{command}`.
"""


def planned(plans: list[dict[str, Any]] | None) -> str:
    """The section about what analyses cost."""
    from tests.benchmarks.page import table

    if plans is None:
        return ""
    rows = table(
        ["model", "analysis", "paragraphs", "planned, s", "measured, s", "ratio"],
        (
            [
                MODELS[row["model"]],
                f"`{row['analysis']}`",
                _done_to(row),
                f"{row['planned']:.1f}",
                f"{row['measured']:.1f}",
                f"{row['planned'] / row['measured']:.2f}",
            ]
            for row in plans
        ),
    )
    ratios = [row["planned"] / row["measured"] for row in plans]
    models = dict.fromkeys(row["model"] for row in plans)
    command = " ".join(["python -m tests.benchmarks.plans", *models])
    return f"""
## What an analysis costs

`memcircuits info MODEL --plan` says what the analyses of a model would cost on this machine: it
times their pieces on a few random rows (a forward pass, an edit of a head in the first and in the
last layer, a gradient, a step of unlearning, ...) and adds up as many as an analysis has. Below are
its predictions beside what the analyses took, in seconds of the processor, on one thread
(`{command}`). Planned over measured was {min(ratios):.2f} to
{max(ratios):.2f}.

{rows}
"""


def _done_to(row: dict[str, Any]) -> str:
    """The paragraphs of an analysis."""
    if row["analysis"] == "unlearn":
        return "1"
    scanned = f"{row['scanned']} scanned"
    return scanned if row["analysis"] == "scan" else f"{scanned}, {row['n']} + {row['n']} measured"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.capacity", description=__doc__
    )
    parser.add_argument("--windows", type=int, default=10_000, help="of the organism")
    parser.add_argument("--windows-125m", type=int, default=500)
    parser.add_argument("--windows-memory", type=int, default=100_000, help="of 20 tokens")
    parser.add_argument("--memory-model", choices=["organism", "tiny"], default="organism")
    parser.add_argument("--only", nargs="+", choices=["organism", "125m", "memory"])
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--render", action="store_true", help="the page again, from the numbers")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.render:
        record(given.out)
        return
    if given.job:
        name, windows, length = given.job
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(name, int(windows), int(length), Path(folder))))
        return
    from tests.benchmarks.__main__ import machine

    jobs = {
        "organism": ("organism", given.windows, 100),
        "125m": ("random-125m", given.windows_125m, 100),
        "memory": (given.memory_model, given.windows_memory, 20),
    }
    rows = {}
    for name in given.only or jobs:
        command = [sys.executable, "-m", "tests.benchmarks.capacity", "--job"]
        command += map(str, jobs[name])
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        print(rows[name], file=sys.stderr, flush=True)
    record(given.out, machine=machine(quick=False), setting=setting(), rows=rows)
    print(given.out)


if __name__ == "__main__":
    main()
