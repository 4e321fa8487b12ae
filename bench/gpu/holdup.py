"""`python -m bench.gpu.holdup`: how long a short load waits for long ones that are on their way.

A load of 16 tokens of a model of Llama-3.1-8B's shape, alone and while loads of 8,192 tokens each
run. It is to be no more than 5 ms longer then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from kvtide import _native

from bench.gpu.rig import Layout, Rig

LAYERS = 32
LAYOUT = Layout("8b", (-1, 8, 16, 256), order=(0, 2, 1, 3))
LONG_BLOCKS, SHORT_BLOCKS = 512, 1
REPEATS = 40
TIMEOUT_S = 10.0


class Loads:
    """Prompts that can be loaded again and again."""

    def __init__(self, rig: Rig, long_loads: int) -> None:
        self.rig = rig
        sizes = [LONG_BLOCKS] * long_loads + [SHORT_BLOCKS]
        self.jobs: list[tuple[_native.Load, bytes]] = []
        first = 1
        for seed, size in enumerate(sizes):
            blocks = list(range(first, first + size))
            first += size
            sequence = rig.sequence(size, seed)
            rig.save(sequence, blocks)
            self.jobs.append(rig.begin_load(sequence, blocks))

    def short_load_ms(self, repeat: int) -> float:
        """Starts the long loads, and a while later the short one, which is timed."""
        worker = self.rig.worker
        jobs = range((repeat + 1) << 8, ((repeat + 1) << 8) + len(self.jobs))
        for job, (_, moves) in zip(jobs[:-1], self.jobs[:-1], strict=True):
            worker.load_async(job, 0, moves, False)
        # At another place of a slice each time.
        time.sleep(0.003 + repeat * 1.7e-4)
        start = time.perf_counter()
        worker.load_async(jobs[-1], 0, self.jobs[-1][1], False)
        waiting, taken = set(jobs), 0.0
        while waiting:
            for job, failed, damaged, _, _ in worker.take_loads():
                assert not failed
                assert not damaged
                waiting.discard(job)
                if job == jobs[-1]:
                    taken = (time.perf_counter() - start) * 1e3
                    assert len(waiting) == len(self.jobs) - 1, "the long loads had ended"
            assert time.perf_counter() - start < TIMEOUT_S, f"loads {waiting} have not ended"
        return taken


def main() -> None:
    """See the module's documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", help="write the rows to this file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for long_loads in (0, 1, 2, 4):
        with Rig(LAYOUT, LAYERS, LONG_BLOCKS * long_loads + 2, long_loads + 0.1) as rig:
            loads = Loads(rig, long_loads)
            taken = [loads.short_load_ms(repeat) for repeat in range(REPEATS)]
        row = {"long": long_loads, "p50_ms": statistics.median(taken), "max_ms": max(taken)}
        rows.append(row)
        figures = f"{row['p50_ms']:.2f} ms, at most {row['max_ms']:.2f} ms"
        print(f"beside {long_loads} long loads: {figures}", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
