"""`python -m bench.control RAW`: what `make bench-kube` measured, as a table in docs/benchmarks.md.

RAW is the JSON that the benchmark wrote. Writes `bench/results/control.json`, with the machine, the
commit and the load at the end, and the part of the page between its markers.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from bench import page
from bench.provenance import ROOT, provenance

FIGURES = (
    ("all_ready_s", "created to all ready, s", "≤ 20", "≤ 20"),
    ("all_deleted_s", "deleted, none left, s", "≤ 15", "≤ 15"),
    ("create_requests_per_pod", "requests of the controller for each pod created", "≤ 3", "≤ 6"),
    ("delete_requests_per_pod", "the same for each pod deleted", "", ""),
    ("idle_writes_per_minute", "writes a minute when nothing changes", "0", "0"),
    ("idle_cpu_of_a_core", "idle CPU, share of a core", "≤ 0.01", "≤ 0.01"),
    ("peak_rss_mib", "peak memory, MiB", "≤ 128", "≤ 128"),
)


def table(measured: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| 500 RoleSets with 2 pods each | plain pods | must | PodSet + PodGroup | must |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {measured['plain'][key]:.3g} | {plain} "
        f"| {measured['groups'][key]:.3g} | {groups} |"
        for key, name, plain, groups in FIGURES
    ]
    return "\n".join(lines)


def main() -> None:
    """See the module's documentation."""
    measured = json.loads(Path(sys.argv[1]).read_text())
    load = os.getloadavg()[0]
    record = {"measured": measured, "load_average": load, **provenance()}
    results = ROOT / "bench" / "results" / "control.json"
    results.write_text(json.dumps(record, indent=2) + "\n")
    caption = (
        f"One run of `make bench-kube` on {record['machine']}, commit `{record['commit']}`. API "
        f"server, etcd and fake kubelet are on the same cores; load average at the end {load:.1f}."
    )
    page.replace("control", f"{caption}\n\n{table(measured)}")
    print(table(measured))


if __name__ == "__main__":
    main()
