"""`python -m bench.report`: the results of `make bench` as a table in docs/benchmarks.md.

Reads `bench/results/micro.json` and `engine_cost.json`, and writes `foundation.json` beside them
and the part of the page between its two markers.
"""

from __future__ import annotations

import json
from typing import Any

from bench import page
from bench.provenance import ROOT

RESULTS = ROOT / "bench" / "results"


def rows() -> list[dict[str, Any]]:
    """All rows, in the order of the table."""
    read = [json.loads((RESULTS / name).read_text()) for name in ("micro.json", "engine_cost.json")]
    return [row for part in read for row in part]


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| | measured | must | baseline | commit |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {row['value']:.3g} {row['unit']} | {row['must']} "
        f"| {row.get('baseline', '')} | `{row['commit']}` |"
        for row in results
    ]
    return "\n".join(lines)


def main() -> None:
    """See the module's documentation."""
    results = rows()
    (RESULTS / "foundation.json").write_text(
        json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    )
    machines = " and ".join(sorted({row["machine"] for row in results}))
    caption = f"Medians, by `make bench` on {machines}; each row with the commit that was measured."
    page.replace("results", f"{caption}\n\n{table(results)}")
    print(table(results))


if __name__ == "__main__":
    main()
