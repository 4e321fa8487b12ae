"""`python -m bench.engine_cost`: measures and writes `bench/results/engine_cost.json`.

Needs the environment of `make bench`: a vLLM, `kvtide` on the path. Throughput is measured in
alternated pairs of processes, so that a machine that slows down over time does not favour one side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.engine_cost import lookup

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "bench" / "results" / "engine_cost.json"


def run_engine(what: str, which: str, model: str) -> Any:
    """The result of one engine in a process of its own."""
    command = [sys.executable, "-m", "bench.engine_cost.engine", what, which, model]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    sys.exit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}")


def tiny_model() -> str:
    """The path of the seeded tiny model."""
    command = [sys.executable, str(ROOT / "python" / "env" / "models.py"), "tiny"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def pairs_of(rates: dict[str, list[float]], pairs: int) -> list[tuple[list[float], list[float]]]:
    """The rounds of each pair: with kvtide, without."""
    rounds = len(rates["vllm"]) // pairs
    cuts = [slice(pair * rounds, (pair + 1) * rounds) for pair in range(pairs)]
    return [(rates["kvtide"][cut], rates["vllm"][cut]) for cut in cuts]


def measure(pairs: int) -> list[dict[str, Any]]:
    """All rows of the result."""
    model = tiny_model()
    through_python = lookup.measure()
    print("lookup through Python:", through_python, file=sys.stderr)
    steps = run_engine("steps", "kvtide", model)
    print("scheduler's step:", steps, file=sys.stderr)
    rates: dict[str, list[float]] = {"vllm": [], "kvtide": []}
    for pair in range(pairs):
        for which in ("vllm", "kvtide") if pair % 2 == 0 else ("kvtide", "vllm"):
            rates[which] += run_engine("throughput", which, model)
            print(f"pair {pair + 1} of {pairs}, {which}: {rates[which][-3:]}", file=sys.stderr)
    baseline = statistics.median(rates["vllm"])
    # Neighbours in time are compared: the machine itself changes more than what is measured.
    ratios = [statistics.median(k) / statistics.median(v) for k, v in pairs_of(rates, pairs)]
    print("ratios of the pairs:", ratios, file=sys.stderr)
    return [
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
            "name": "vLLM's throughput at 0 % hits, with kvtide to without",
            "value": statistics.median(ratios),
            "unit": "of baseline",
            "baseline": f"{baseline:.0f} tokens/s",
            "must": "≥ 0.97",
        },
    ]


def main() -> None:
    """See the module's documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of throughput runs (default 4)")
    arguments = parser.parse_args()
    rows = measure(arguments.pairs)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    print(f"wrote {OUT.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
