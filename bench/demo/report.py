"""Turns answers and counters into the report: percentiles, comparison, table, JSON.

Pure but for `describe_machine` and `describe_commit`. The shape of the JSON is the return type of
`Run.to_json` plus what `build` adds.
"""

import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.demo.client import Answer
from bench.demo.metrics import Counters
from bench.percentile import percentile


def spread_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile in milliseconds."""
    return {f"p{p}": round(1000 * percentile(seconds, p), 2) for p in (50, 99)}


@dataclass(frozen=True)
class Run:
    """One server's share of the report."""

    name: str
    answers: Sequence[Answer]
    counters: Counters
    # From the first request sent to the last answer complete.
    wall_s: float
    boot_s: float

    @property
    def ttft_s(self) -> list[float]:
        """Time to first token of every request."""
        return [answer.ttft_s for answer in self.answers]

    @property
    def tpot_s(self) -> list[float]:
        """Time per output token of every request that has more than one token."""
        return [answer.tpot_s for answer in self.answers if answer.tpot_s is not None] or [0.0]

    @property
    def output_tokens(self) -> int:
        """Tokens generated over all requests."""
        return sum(answer.output_tokens for answer in self.answers)

    def to_json(self) -> dict:
        """JSON form of this run; `_s` and `_ms` name units, hit rates are shares of 1."""
        return {
            "name": self.name,
            "requests": len(self.answers),
            "ttft_ms": spread_ms(self.ttft_s),
            "tpot_ms": spread_ms(self.tpot_s),
            "throughput_tok_s": round(self.output_tokens / self.wall_s, 2),
            "hit_rate": {tier: round(v, 4) for tier, v in self.counters.hit_rate().items()},
            "tokens_loaded": round(self.counters.loaded_tokens),
            "bytes_saved": round(self.counters.saved_bytes),
            "prompt_tokens": sum(answer.prompt_tokens for answer in self.answers),
            "output_tokens": self.output_tokens,
            "wall_s": round(self.wall_s, 2),
            "boot_s": round(self.boot_s, 2),
            "samples": [
                {
                    "conversation": answer.conversation,
                    "turn": answer.turn,
                    "prompt_tokens": answer.prompt_tokens,
                    "output_tokens": answer.output_tokens,
                    "ttft_ms": round(1000 * answer.ttft_s, 2),
                    "tpot_ms": None if answer.tpot_s is None else round(1000 * answer.tpot_s, 2),
                    # Tells whether two reports, taken at different times, agree.
                    "output_sha256": hashlib.sha256(repr(answer.output).encode()).hexdigest(),
                }
                for answer in self.answers
            ],
        }


def differences(first: Run, second: Run) -> list[str]:
    """Where two runs of the same workload answered differently, in words; empty is good."""
    found = []
    for one, other in zip(first.answers, second.answers, strict=True):
        if one.output == other.output:
            continue
        found.append(
            f"conversation {one.conversation + 1}, turn {one.turn + 1}: "
            f"{first.name} ({one.prompt_tokens} prompt tokens) said {one.text!r}, "
            f"{second.name} ({other.prompt_tokens}) said {other.text!r}"
        )
    return found


def describe_machine() -> dict[str, str | int | float]:
    """What the numbers were taken on; memory in GiB."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def describe_commit(repository: Path) -> str | None:
    """The checked-out commit, marked when files differ from it; None outside a checkout."""
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def build(runs: Sequence[Run], **context: object) -> dict:
    """The whole report; `outputs_identical` is None when there is only one run."""
    identical = not differences(runs[0], runs[1]) if len(runs) > 1 else None
    return {"outputs_identical": identical, "runs": [run.to_json() for run in runs], **context}


def percent(share: float) -> str:
    """A share of 1 for a table."""
    return f"{100 * share:.1f} %"


def table(report: dict) -> str:
    """The report for a person: one column per run and, with two, how they compare."""
    runs = report["runs"]
    tiers = list(dict.fromkeys(tier for run in runs for tier in run["hit_rate"]))
    computed = [1 - sum(run["hit_rate"].values()) for run in runs]
    rows: list[tuple[str, list[str], str]] = []

    def measured(label: str, values: list[float], digits: int) -> None:
        ratio = f"x {values[1] / values[0]:.2f}" if len(values) > 1 and values[0] else ""
        rows.append((label, [f"{value:,.{digits}f}" for value in values], ratio))

    for metric in ("ttft", "tpot"):
        for rank in ("p50", "p99"):
            values = [run[f"{metric}_ms"][rank] for run in runs]
            measured(f"{metric.upper()} {rank} (ms)", values, 1)
    measured("output throughput (tok/s)", [run["throughput_tok_s"] for run in runs], 1)
    for tier in tiers:
        shares = [percent(run["hit_rate"].get(tier, 0.0)) for run in runs]
        label = "gpu prefix cache" if tier == "gpu" else f"kvtide {tier}"
        rows.append((f"prompt tokens from {label}", shares, ""))
    rows.append(("prompt tokens computed", [percent(share) for share in computed], ""))
    rows.append(("tokens loaded", [f"{run['tokens_loaded']:,}" for run in runs], ""))
    rows.append(("MiB saved", [f"{run['bytes_saved'] / 2**20:,.1f}" for run in runs], ""))
    rows.append(("wall time (s)", [f"{run['wall_s']:.1f}" for run in runs], ""))

    width = max(len(label) for label, _, _ in rows)
    lines = [f"{'':{width}}" + "".join(f"{run['name']:>12}" for run in runs)]
    for label, cells, ratio in rows:
        cell_text = "".join(f"{cell:>12}" for cell in cells)
        lines.append(f"{label:{width}}{cell_text}{ratio:>9}".rstrip())
    return "\n".join(lines)
