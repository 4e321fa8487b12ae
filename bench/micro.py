"""`python -m bench.micro`: criterion's estimates as rows of `bench/results/micro.json`.

Run right behind `cargo bench`, so that the rows carry the commit that was measured.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bench.provenance import ROOT, provenance

OUT = ROOT / "bench" / "results" / "micro.json"
COPIED_BYTES = 256 << 20
"""What one iteration of `host_copy` copies."""


SERVED = {
    "bytes a row beside the rows": "≤ 100",
    "ready again after SIGTERM, greatest": "≤ 2000",
    "ready again after kill -9, greatest": "≤ 2000",
    "idle, an engine attached, no scrub": "≤ 0.5",
    "idle, an engine attached, scrub as by default": "",
    "lookup and pin of 131,072 tokens, alone, p99": "≤ 1000",
    "lookup and pin of 131,072 tokens, beside 8 engines, median": "≤ 300",
    "lookup and pin of 131,072 tokens, beside 8 engines, p99": "≤ 1000",
    "lookups of 128 blocks on two cores": "≥ 100,000",
    "an engine attaches to 10 GiB, greatest": "≤ 1000",
}
"""What `served_pool` tells that is a row, and what it must be."""


def target() -> Path:
    """Where cargo builds."""
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))


def served_pool() -> list[dict[str, Any]]:
    """What the daemon costs as a process."""
    found = json.loads((target() / "served_pool.json").read_text())
    return [
        {
            "name": f"`kvtide serve`: {name}",
            "value": found[name][0],
            "unit": found[name][1],
            "must": must,
        }
        for name, must in SERVED.items()
    ]


def criterion_ms(benchmark: str) -> float:
    """Median time of a criterion benchmark in milliseconds."""
    estimates = target() / "criterion" / benchmark / "new" / "estimates.json"
    return json.loads(estimates.read_text())["median"]["point_estimate"] / 1e6


def rows() -> list[dict[str, Any]]:
    """Lookups, a request that waits, what a full pool and a shared one cost, then copies."""
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
    waiting = [
        {
            "name": f"a request of 4,000 matched tokens that waits for 100 steps, {name}",
            "value": criterion_ms(f"waiting_100_steps/{benchmark}"),
            "unit": "ms",
            "must": "",
        }
        for name, benchmark in (
            ("not verified", "unverified"),
            ("verified at the match", "verified"),
        )
    ]
    full_pool = [
        {
            "name": f"full pool of 65,536 rows: {name}",
            "value": criterion_ms(f"full_pool/{benchmark}") * 1e3,
            "unit": "µs",
            "must": "",
        }
        for name, benchmark in (
            ("planning the save of 128 blocks of a prompt", "prompt_of_128_blocks"),
            ("the same for a block of each of 32 answers", "a_block_of_each_of_32_answers"),
            ("settling a chain of 512 blocks", "settle_of_512_blocks"),
        )
    ]
    embedded = criterion_ms("shared_pool/lookup_131072_embedded") * 1e3
    shared_pool = [
        {
            "name": f"a daemon's pool: {name}",
            "value": criterion_ms(f"shared_pool/{benchmark}") * 1e3,
            "unit": "µs",
            "baseline": f"{embedded:.0f} µs embedded" if "lookup_131072" in benchmark else "",
            "must": must,
        }
        for name, benchmark, must in (
            (
                "lookup of a warm prompt of 131,072 tokens, hashed before",
                "lookup_131072_through_the_daemon",
                "≤ 300",
            ),
            (
                "the same beside 8 engines that look up 128 blocks each for half a core's time",
                "lookup_131072_beside_8_engines",
                "≤ 300",
            ),
            ("lookup of 128 blocks", "lookup_of_128_blocks", "≤ 10"),
            ("asking where 4 blocks of a step go", "where_4_blocks_go", ""),
        )
    ]
    where = provenance()
    parts = (lookups, waiting, full_pool, shared_pool, served_pool(), copies, fused)
    return [row | where for part in parts for row in part]


def main() -> None:
    """See the module's documentation."""
    OUT.write_text(json.dumps(rows(), indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
