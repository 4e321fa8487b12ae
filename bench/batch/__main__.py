"""`python -m bench.batch`: measures the batch API on release builds; rows go to results/batch.json.

Everything runs on this machine: the server, the mock upstream
(`control/batch/examples/mock_upstream`) and this driver. Run it in the environment of
`provision.py batch`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import page
from bench.provenance import ROOT, provenance
from bench.report import table

BINARIES = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve() / "release"
os.environ.setdefault("KVTIDE_CONTROL_BINARIES", str(BINARIES))
sys.path.insert(0, str(ROOT / "control" / "tests" / "batch"))

from rig import Server, ended, jsonl, line, mock_upstream, server, submit  # noqa: E402

from bench.batch.interactive import Interference  # noqa: E402

OUT = ROOT / "bench" / "results" / "batch.json"
REQUESTS = 50_000
LARGE_BYTES = 200_000_000
SMALL_BYTES = 12_000_000
PATIENCE_S = 600.0
MIB = 1 << 20


def input_file(size: int) -> bytes:
    """An input file of `REQUESTS` lines that has `size` bytes, or a little less."""
    bare = len(jsonl([line(f"request-{0:06}", "")]))
    content = "lorem ipsum " * (size // REQUESTS // 12 + 1)
    text = content[: size // REQUESTS - bare]
    return jsonl([line(f"request-{n:06}", text) for n in range(REQUESTS)])


def peak_bytes(running: Server) -> int:
    """The most memory that the server's process ever had."""
    assert running.process is not None
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def echo(size: int) -> dict[str, float]:
    """One batch against an upstream that answers at once, from its creation to its end."""
    with (
        tempfile.TemporaryDirectory(dir=ROOT / "target") as folder,
        mock_upstream("--forget") as mock,
        server(Path(folder) / "data", mock.url) as running,
    ):
        client = running.client()
        content = input_file(size)
        batch = submit(client, content)
        began = time.monotonic()
        batch = ended(client, batch, patience_s=PATIENCE_S)
        took = time.monotonic() - began
        counts = batch.request_counts
        assert counts is not None
        assert counts.completed == REQUESTS, batch
        return {
            "s": took,
            "validation_s": running.metric("kvtide_batch_validation_seconds_sum"),
            "peak_mib": peak_bytes(running) / MIB,
        }


def row(name: str, value: float, unit: str, must: str, baseline: str = "") -> dict[str, Any]:
    """A row of the table."""
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "must": must,
        "baseline": baseline,
        **provenance(),
    }


def measured(rounds: int) -> list[dict[str, Any]]:
    """Medians of so many batches of either size."""
    small = [echo(SMALL_BYTES) for _ in range(rounds)]
    large = [echo(LARGE_BYTES) for _ in range(rounds)]

    def median(results: list[dict[str, float]], name: str) -> float:
        return statistics.median(result[name] for result in results)

    return [
        row("batch of 50,000 requests, 12 MB, echo upstream", median(small, "s"), "s", "≤ 10"),
        row("the same, 200 MB", median(large, "s"), "s", ""),
        row("create to validated, 12 MB", median(small, "validation_s"), "s", "≤ 0.3"),
        row("create to validated, 200 MB", median(large, "validation_s"), "s", "≤ 1.5"),
        row("peak memory of the server, 200 MB", median(large, "peak_mib"), "MiB", "≤ 128"),
    ]


def interference(runs: int, run_s: float, priority: bool) -> list[dict[str, Any]]:
    """How much longer interactive callers wait beside a batch, and what the batch gets done."""
    found = Interference(runs, run_s, priority).measure()
    alone, beside = found.p99_ms(found.alone), found.p99_ms(found.beside)
    how = "" if priority else ", an engine without priorities"
    baseline = f"{alone:.1f} ms alone, {len(found.alone)} and {len(found.beside)} samples"
    longer = 100 * (beside / alone - 1)
    ttft = f"interactive TTFT, p99, while a batch runs{how}"
    medians = [statistics.median(samples) for samples in (found.alone, found.beside)]
    return [
        row(ttft, longer, "% longer", "≤ 5" if priority else "", baseline),
        row(
            f"the same, median{how}",
            100 * (medians[1] / medians[0] - 1),
            "% longer",
            "",
            f"{medians[0]:.1f} ms alone",
        ),
        row(
            f"the batch meanwhile{how}",
            statistics.mean(found.batch_per_s),
            "requests/s",
            "",
            "38 if it filled the engine",
        ),
    ]


def main() -> None:
    """See the module's documentation."""
    parser = argparse.ArgumentParser(prog="python -m bench.batch", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="batches of each size")
    parser.add_argument(
        "--runs", type=int, default=5, help="pairs of runs without and with a batch"
    )
    parser.add_argument("--run-s", type=float, default=28, help="seconds of one run")
    parser.add_argument("--only", choices=["echo", "interactive"], help="measure only this")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.only != "interactive":
        rows += measured(options.rounds)
    if options.only != "echo":
        for priority in (True, False):
            rows += interference(options.runs, options.run_s, priority)
    if options.only:
        print(table(rows))
        return
    OUT.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    machines = " and ".join(sorted({row["machine"] for row in rows}))
    caption = f"By `make bench-batch` on {machines}, everything on the same cores."
    page.replace("batch", f"{caption}\n\n{table(rows)}")
    print(table(rows))


if __name__ == "__main__":
    main()
