"""`python -m bench.report`: the results of `make bench` as a table in docs/benchmarks.md.

Reads criterion's estimates below the cargo target folder and `bench/results/engine_cost.json`, and
writes `bench/results/foundation.json` and the part of the page between its two markers.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
COPIED_BYTES = 256 << 20
"""What one iteration of `host_copy` copies."""


def criterion_ms(benchmark: str) -> float:
    """Median time of a criterion benchmark in milliseconds."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    estimates = target / "criterion" / benchmark / "new" / "estimates.json"
    return json.loads(estimates.read_text())["median"]["point_estimate"] / 1e6


def rows() -> list[dict[str, Any]]:
    """All rows, in the order of the table."""
    plain = criterion_ms("host_copy/plain")
    gbs = COPIED_BYTES / 1e6
    copies = [
        {
            "name": f"memcpy backend, {direction}, to a plain memcpy of the same bytes",
            "value": plain / criterion_ms(f"host_copy/{direction}"),
            "unit": "of baseline",
            "baseline": f"{gbs / plain:.1f} GB/s",
            "must": "≥ 0.9",
        }
        for direction in ("save", "load")
    ]
    fused = [
        {
            "name": f"memcpy backend, {direction}, checksum fused in",
            "value": gbs / criterion_ms(f"host_copy/{direction}_checksum"),
            "unit": "GB/s",
            "must": "",
        }
        for direction in ("save", "load")
    ]
    lookups = [
        {
            "name": "hash + lookup of a warm prompt of 131,072 tokens, from tokens",
            "value": criterion_ms("prefix_lookup/from_tokens/131072"),
            "unit": "ms",
            "must": "≤ 2",
        },
        {
            "name": "lookup of the same prompt, hashed before",
            "value": criterion_ms("prefix_lookup/hashed_before/131072") * 1e3,
            "unit": "µs",
            "must": "≤ 200",
        },
        {
            "name": "time from tokens, 131,072 tokens to 32,768 (linear is 4)",
            "value": criterion_ms("prefix_lookup/from_tokens/131072")
            / criterion_ms("prefix_lookup/from_tokens/32768"),
            "unit": "times",
            "must": "",
        },
    ]
    engine = json.loads((RESULTS / "engine_cost.json").read_text())
    return [*lookups, *engine[:2], *copies, *fused, *engine[2:]]


def machine() -> str:
    """The processor, its share and the kernel."""
    text = Path("/proc/cpuinfo").read_text()
    model = next(line.split(":")[1].strip() for line in text.splitlines() if "model name" in line)
    return f"{os.cpu_count()} cores of {model}, Linux {platform.release()}"


def commit() -> str:
    """The commit that was measured."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["| | measured | must | baseline |", "|---|---|---|---|"]
    lines += [
        f"| {row['name']} | {row['value']:.3g} {row['unit']} | {row['must']} "
        f"| {row.get('baseline', '')} |"
        for row in results
    ]
    return "\n".join(lines)


def main() -> None:
    """See the module's documentation."""
    where = {"machine": machine(), "commit": commit()}
    results = [row | where for row in rows()]
    (RESULTS / "foundation.json").write_text(
        json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    )
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    caption = f"Medians. `make bench` at `{where['commit']}` on {where['machine']}."
    PAGE.write_text(f"{before}{BEGIN}\n\n{caption}\n\n{table(results)}\n\n{END}{after}")
    print(table(results))


if __name__ == "__main__":
    main()
