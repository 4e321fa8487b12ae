"""`python -m bench.gpu.report`: what was measured on a GPU machine, as `gpu.json` and a table.

Takes the files that `bench.gpu` and `bench.gpu.copies` wrote there, and what they were measured on:
a GPU machine may have no git and no way back, so machine and commit are given by whoever ran them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench import page
from bench.provenance import ROOT

OUT = ROOT / "bench" / "results" / "gpu.json"


def end_to_end(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the workloads under vLLM; the baseline is vLLM's own OffloadingConnector."""
    ours, native = found["kvtide"], found.get("native", {})
    wanted = [
        (
            "8k-token prompt reloaded, 1 output token, idle engine",
            "reload_ms",
            "ms",
            "≤ 34",
            "≤ 28",
        ),
        (
            "16 x 8k x 32 tokens reloaded, GPU pool of 6 prompts",
            "batch_reload_s",
            "s",
            "≤ 1.1",
            "≤ 0.85",
        ),
        ("16 new prompts, cost against no offload", "new_cost", "of baseline", "≤ 0.01", "≤ 0.003"),
        (
            "8 decoders + an 8k reload each 250 ms: TTFT p50",
            "mixed_ttft_p50_ms",
            "ms",
            "≤ 52",
            "≤ 42",
        ),
        ("… decoders' ITL p99", "mixed_itl_p99_ms", "ms", "≤ 15", "≤ 12"),
        (
            "closed loop, 8k reloaded + 1k new tokens: requests per second",
            "loop_requests_s",
            "1/s",
            "",
            "",
        ),
        ("… TTFT p50", "loop_ttft_p50_ms", "ms", "", ""),
        ("… TPOT p50", "loop_tpot_p50_ms", "ms", "", ""),
    ]
    return [
        {
            "name": name,
            "value": ours[key],
            "unit": unit,
            "baseline": native.get(key),
            "must": must,
            "aim": aim,
        }
        for name, key, unit, must, aim in wanted
        if key in ours
    ]


def copies(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the copies alone."""
    needs = {
        ("layered", "kernel:4"): {8: ("≥ 45", "≥ 50"), 16: ("≥ 48", "≥ 50"), 32: ("≥ 50", "≥ 50")},
        ("save", "kernel:4"): {8: ("≥ 50", "≥ 52"), 16: ("≥ 50", "≥ 52"), 32: ("≥ 50", "≥ 52")},
        ("load", "staged"): {8: ("", ""), 16: ("", ""), 32: ("", "")},
        ("both", "staged"): {32: ("≥ 75", "≥ 80")},
    }
    titles = {
        ("layered", "kernel:4"): "scattered H2D on 4 SMs, checksum and hand-over included",
        ("save", "kernel:4"): "scattered D2H on 4 SMs, checksum and hand-over included",
        ("load", "staged"): "scattered H2D through copy engine and staging buffer",
        ("both", "staged"): "both directions at once, rows of 2 MiB, total",
    }
    rows = []
    for row in measured:
        bounds = needs.get((row["what"], row["route"]), {}).get(row["piece_kib"])
        if bounds is not None:
            title = titles[row["what"], row["route"]]
            rows.append(
                {
                    "name": f"{title}, {row['piece_kib']} KiB pieces",
                    "value": row["gb_s"],
                    "unit": "GB/s",
                    "baseline": None,
                    "must": bounds[0],
                    "aim": bounds[1],
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| | measured | vLLM's own offloading | must | aim |", "|---|---|---|---|---|"]
    for row in rows:
        baseline = "" if row["baseline"] is None else f"{row['baseline']:.3g}"
        lines.append(
            f"| {row['name']} | {row['value']:.3g} {row['unit']} | {baseline} | {row['must']} "
            f"| {row['aim']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """See the module's documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--found", type=Path, required=True, help="gpu_found.json of bench.gpu")
    parser.add_argument("--copies", type=Path, required=True, help="JSON of bench.gpu.copies")
    parser.add_argument("--machine", required=True, help="GPU, driver, cores")
    parser.add_argument("--commit", required=True, help="the commit that was measured")
    arguments = parser.parse_args()
    where = {"machine": arguments.machine, "commit": arguments.commit}
    found = json.loads(arguments.found.read_text())
    measured = json.loads(arguments.copies.read_text())
    rows = [row | where for row in (*end_to_end(found), *copies(measured))]
    OUT.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    caption = f"Medians, at `{arguments.commit}` on {arguments.machine}."
    page.replace("gpu", f"{caption}\n\n{table(rows)}")
    print(table(rows))


if __name__ == "__main__":
    main()
