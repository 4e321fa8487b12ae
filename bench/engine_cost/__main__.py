"""`python -m bench.engine_cost`: measures and writes `bench/results/engine_cost.json`.

Needs the environment of `make bench`: a vLLM, `kvtide` on the path.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.daemon import Daemon
from bench.engine_cost import lookup, throughput
from bench.provenance import ROOT, provenance

OUT = ROOT / "bench" / "results" / "engine_cost.json"
SECONDS = ROOT / "bench" / "results" / "engine_cost_rounds.json"
"""Seconds of every round of the throughput measurement."""


def tiny_model() -> str:
    """The path of the seeded tiny model."""
    command = [sys.executable, str(ROOT / "python" / "env" / "models.py"), "tiny"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def steps_of(model: str, **variables: str) -> dict[str, float]:
    """What a scheduler's step costs an engine with these variables set."""
    engine = throughput.Engine("steps", model, **variables)
    engine.close()
    return dict(engine.first)


def measure(binary: Path, boots: int, turns: int) -> list[dict[str, Any]]:
    """All rows of the result."""
    model, where = tiny_model(), provenance()
    through_python = lookup.measure()
    print("lookup through Python:", through_python, file=sys.stderr)
    steps = steps_of(model)
    with tempfile.TemporaryDirectory(prefix="kvtide-bench-") as folder:
        daemon = Daemon(binary, Path(folder), 1)
        try:
            shared = steps_of(model, KVTIDE_POOL=daemon.pool)
        finally:
            daemon.close()
    print("scheduler's step:", steps, "through a daemon:", shared, file=sys.stderr)
    rounds = throughput.measure(model, boots, turns)
    kvtide, control = rounds.kvtide, rounds.control
    SECONDS.write_text(json.dumps(rounds.boots) + "\n")
    rows: list[dict[str, Any]] = [
        {
            "name": "hash + lookup of 131,072 tokens through Python",
            "value": through_python["from_tokens_ms"],
            "unit": "ms",
            "must": "≤ 4",
        },
        {
            "name": "index memory for a block",
            "value": through_python["index_bytes_a_block"],
            "unit": "bytes",
            "must": "≤ 160",
        },
        {
            "name": "connector's time in a scheduler step, 64 running, p99",
            "value": steps["p99_us"],
            "unit": "µs",
            "must": "≤ 200",
        },
        {
            "name": "connector's time in a scheduler step, 64 running, p50",
            "value": steps["p50_us"],
            "unit": "µs",
            "must": "",
        },
        {
            "name": "the same through a daemon's pool, p99",
            "value": shared["p99_us"],
            "unit": "µs",
            "must": "≤ 200",
        },
        {
            "name": "the same through a daemon's pool, p50",
            "value": shared["p50_us"],
            "unit": "µs",
            "must": "",
        },
        {
            "name": "vLLM's throughput at 0 % hits, with kvtide to without",
            "value": kvtide.median,
            "unit": f"of baseline (95 %: {kvtide.low:.3f} to {kvtide.high:.3f})",
            "baseline": f"{rounds.tokens_per_s:.0f} tokens/s",
            "must": "≥ 0.97",
        },
        {
            "name": "the same without to without: the method's own error",
            "value": control.median,
            "unit": f"of baseline (95 %: {control.low:.3f} to {control.high:.3f})",
            "baseline": f"{rounds.tokens_per_s:.0f} tokens/s",
            "must": "",
        },
    ]
    return [row | where for row in rows]


def main() -> None:
    """See the module's documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--boots", type=int, default=3, help="boots for the throughput's ratio (default 3)"
    )
    parser.add_argument("--turns", type=int, default=30, help="turns of each boot (default 30)")
    parser.add_argument("--kvtide", type=Path, required=True, help="the program `kvtide`")
    arguments = parser.parse_args()
    rows = measure(arguments.kvtide, arguments.boots, arguments.turns)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    print(f"wrote {OUT.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
