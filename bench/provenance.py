"""Where and on what a number was measured: taken when measuring, kept with every row."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WRITTEN_BY_MEASURING = ("bench/results", "docs/benchmarks.md")
"""What a measurement itself changes, which does not make its commit dirty."""


def provenance() -> dict[str, str]:
    """The fields `machine` and `commit` of a result row."""
    return {"machine": machine(), "commit": commit()}


def machine() -> str:
    """The processor, its share and the kernel."""
    text = Path("/proc/cpuinfo").read_text()
    model = next(line.split(":")[1].strip() for line in text.splitlines() if "model name" in line)
    return f"{os.cpu_count()} cores of {model}, Linux {platform.release()}"


def gpu_machine() -> str:
    """The GPUs, their driver and the cores beside them."""
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
        check=True,
        capture_output=True,
        text=True,
    )
    gpus = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    name, driver = gpus[0].split(", ")
    count = "one" if len(gpus) == 1 else str(len(gpus))
    return f"{count} {name}, driver {driver}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit that is checked out, marked if anything measured differs from it."""
    excluded = [f":(exclude){path}" for path in WRITTEN_BY_MEASURING]
    changed = _git("status", "--porcelain", "--", ".", *excluded)
    return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
