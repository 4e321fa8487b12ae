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

BASELINE = (
    "The baseline is vLLM's own offloading, measured in the same sitting, or what the row names; "
    "of copies, the driver's own batched copies of the same pieces (the route `dma`); where every "
    "prefix is still on the GPU, vLLM without a connector."
)
OUT = ROOT / "bench" / "results" / "gpu.json"


Found = dict[str, dict[str, Any]]
"""Engine → key → value, as `bench.gpu` writes them."""

LOOP = "closed loop, {}8k reloaded + {} new tokens, {} output tokens: "
ORDINARY = {"shape": "8b", "tp": 1, "new_tokens": 1024}
SHAPES = {"70b": "70B shape, TP {tp}, "}
WORKLOADS = [
    # Title, key, unit, must, aim; the baseline is the same key of vLLM's OffloadingConnector.
    ("8k-token prompt reloaded, 1 output token, idle engine", "reload_ms", "ms", "≤ 34", "≤ 28"),
    (
        "16 x 8k x 32 tokens reloaded, GPU pool of 6 prompts",
        "batch_reload_s",
        "s",
        "≤ 1.1",
        "≤ 0.85",
    ),
    ("16 new prompts, slowdown against no offload", "new_cost", "%", "≤ 1", "≤ 0.3"),
    ("8 new prompts, slowdown by saving them, one engine", "saving_cost", "%", "", ""),
    ("8 decoders + an 8k reload each 250 ms: TTFT p50", "mixed_ttft_p50_ms", "ms", "≤ 52", "≤ 42"),
    (
        "8 decoders + an 8k reload each 250 ms: decoders' ITL p99",
        "mixed_itl_p99_ms",
        "ms",
        "≤ 15",
        "≤ 12",
    ),
]
SCALES = {"%": 100}
"""Unit → by what a measured value is multiplied, if by anything."""
SHARING = "p50 per token of decoders over a step that computes a prompt and the one before"
HIT = "requests per second if every prefix were still on the GPU, which bounds them"
CLOSED_LOOP = [
    # Title, key, unit, must and aim against vLLM's OffloadingConnector and against `sync`.
    ("requests per second", "requests_s", "1/s", "≥ 1.1 times", "≥ 1.25 times", "≥ 1.2 times"),
    ("TTFT p50", "ttft_p50_ms", "ms", "", "", "no worse"),
    (SHARING, "shared_p50_ms", "ms", "", "", "better"),
    ("TPOT p50 of whole requests", "tpot_p50_ms", "ms", "", "", "better"),
]


def end_to_end(found: Found) -> list[dict[str, Any]]:
    """Rows of the workloads under vLLM. Baselines are vLLM's own OffloadingConnector, and kvtide in
    its mode `sync` where the row says so."""
    ours, native, none = (found.get(name, {}) for name in ("kvtide", "native", "none"))
    rows = [
        (title, key, native.get(key), unit, must, aim) for title, key, unit, must, aim in WORKLOADS
    ]
    encoded = found.get("kvtide-fp8", {}).get("reload_ms")
    if encoded is not None:
        title = f"{WORKLOADS[0][0]}, rows in fp8"
        ours = ours | {"fp8_reload_ms": encoded}
        rows.insert(1, (title, "fp8_reload_ms", native.get("reload_ms"), "ms", "≤ 26", "≤ 20"))
    workload = ORDINARY | found.get("workload", {})
    shape = SHAPES.get(workload["shape"], "").format(**workload)
    new = f"{workload['new_tokens'] >> 10}k" if workload["new_tokens"] >= 1024 else "512"
    for output in (64, 16):
        loop = LOOP.format(shape, new, output)
        hit = f"loop{output}_hit_requests_s"
        rows.append((loop + HIT, hit, none.get(hit), "1/s", "", ""))
        for what, key, unit, must, aim, must_sync in CLOSED_LOOP:
            ours_key, sync_key = f"loop{output}_{key}", f"loop{output}_sync_{key}"
            aim_sync = "≥ 25 % better" if must_sync in ("≥ 1.2 times", "better") else ""
            rows.append((loop + what, ours_key, native.get(ours_key), unit, must, aim))
            title = f"{loop}{what}, against `load: sync`"
            rows.append((title, ours_key, ours.get(sync_key), unit, must_sync, aim_sync))
    return [
        {
            "name": name,
            "value": ours[key] * SCALES.get(unit, 1),
            "unit": unit,
            "baseline": baseline and baseline * SCALES.get(unit, 1),
            "must": must,
            "aim": aim,
        }
        for name, key, baseline, unit, must, aim in rows
        if key in ours and ("sync" not in name or baseline is not None)
    ]


def copies(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the copies alone."""
    h2d = {8: ("≥ 45", "≥ 50"), 16: ("≥ 48", "≥ 50"), 32: ("≥ 50", "≥ 50")}
    d2h = dict.fromkeys((8, 16, 32), ("≥ 50", "≥ 52"))
    needs = {("save", "kernel:4"): d2h, ("both", "staged:64"): {32: ("≥ 75", "≥ 80")}}
    titles = {
        ("save", "kernel:4"): "scattered D2H by 4 SMs, checksum and hand-over included",
        ("both", "staged:64"): "both directions at once, rows of 2 MiB, total",
    }
    lie = {"together": "together", "stretches": "in stretches of eight", "apart": "apart"}
    for place, words in lie.items():
        title = f"scattered H2D of rows that lie {words}, checksum and hand-over included, by"
        routes = {
            (f"load {place}", "staged:4"): "copy engine and 4 SMs",
            (f"layered {place}", "kernel:4"): "4 SMs alone",
            (f"layered {place}", "kernel:8"): "8 SMs alone",
        }
        needs |= dict.fromkeys(routes, h2d)
        # What is aimed at is the rate that few SMs reach.
        needs[f"layered {place}", "kernel:8"] = {kib: (must, "") for kib, (must, _) in h2d.items()}
        titles |= {route: f"{title} {by}" for route, by in routes.items()}
    batched = {
        (row["what"], row["piece_kib"]): row["gb_s"] for row in measured if row["route"] == "dma"
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
                    "baseline": batched.get((row["what"], row["piece_kib"])),
                    "must": bounds[0],
                    "aim": bounds[1],
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| | measured | baseline | must | aim | commit |", "|---|---|---|---|---|---|"]
    for row in rows:
        baseline = "" if row["baseline"] is None else f"{row['baseline']:.3g}"
        lines.append(
            f"| {row['name']} | {row['value']:.3g} {row['unit']} | {baseline} | {row['must']} "
            f"| {row['aim']} | `{row['commit']}` |"
        )
    return "\n".join(lines)


def main() -> None:
    """See the module's documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, made_by in (("--found", "bench.gpu"), ("--copies", "bench.gpu.copies")):
        parser.add_argument(
            name,
            nargs=2,
            action="append",
            default=[],
            metavar=("JSON", "COMMIT"),
            help=f"what {made_by} wrote and the commit it ran at; rows of a later one replace "
            "those of an earlier one, and all replace those of the committed results",
        )
    parser.add_argument(
        "--machine", required=True, help="GPU, driver, cores; rows of other machines stay beside"
    )
    arguments = parser.parse_args()
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for kind, read in (("found", end_to_end), ("copies", copies)):
        for path, commit in getattr(arguments, kind):
            where = {"machine": arguments.machine, "commit": commit}
            measured = json.loads(Path(path).read_text())
            said = measured["workload"]["commit"] if kind == "found" else commit
            if said != commit:
                parser.error(f"--found {path} {commit}: the file says that {said} was measured")
            for row in read(measured):
                rows[row["name"], arguments.machine] = row | where
    for row in json.loads(OUT.read_text()):
        rows.setdefault((row["name"], row["machine"]), row)
    OUT.write_text(json.dumps(list(rows.values()), indent=2, ensure_ascii=False) + "\n")
    by_machine: dict[str, list[dict[str, Any]]] = {}
    for row in rows.values():
        by_machine.setdefault(row["machine"], []).append(row)
    tables = [f"On {machine}:\n\n{table(each)}" for machine, each in by_machine.items()]
    page.replace("gpu", "\n\n".join([f"Medians. {BASELINE}", *tables]))
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
