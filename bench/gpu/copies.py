"""`python -m bench.gpu.copies`: rates of every route, by size of the contiguous pieces.

Whole loads and saves through a worker are timed, checksums and hand-over included: 1 GiB of
scattered blocks of 32 layers, K and V apart, so a piece is half of a block's bytes in one layer.
Loads are from rows that lie next to each other, as those of a prompt that was saved at once; in
stretches, as those of answers that were computed side by side; or apart, none next to another.
"both" saves and loads whole rows at once, and adds up their bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu.rig import APART, Layout, Rig

LAYERS = 32
BYTES = 1 << 30
REPEATS = 21
PIECES_KIB = (8, 16, 32, 64)
ROUTES = {
    "save": ("dma", "staged:4", "staged:64", "kernel:2", "kernel:4"),
    "load together": ("dma", "staged:4", "staged:64"),
    "load stretches": ("dma", "staged:4", "staged:64"),
    "load apart": ("dma", "staged:4", "staged:64"),
    "layered together": ("auto", "dma", "staged:64", "kernel:4", "kernel:8"),
    "layered stretches": ("auto", "dma", "staged:64", "kernel:4", "kernel:8"),
    "layered apart": ("auto", "dma", "staged:64", "kernel:4", "kernel:8"),
    "both": ("staged:64",),
}
"""Of what is measured → routes."""


def layout_of(piece_kib: int) -> Layout:
    """A layer whose K and V of one block are a piece each."""
    return Layout(f"{piece_kib} KiB", (2, -1, 16, 1, piece_kib << 10 >> 5))


def rate(seconds: list[float]) -> float:
    """Median in GB/s."""
    return BYTES / statistics.median(seconds) / 1e9


class Bench:
    """One rig with all its blocks saved."""

    def __init__(self, piece_kib: int, **routes: str) -> None:
        layout = layout_of(piece_kib)
        self.count = BYTES // (LAYERS * layout.layer_bytes())
        # Room for a save of everything beside what is held.
        self.rig = Rig(layout, LAYERS, self.count + 1, BYTES / (1 << 30) * 2.2, **routes)
        self.blocks = random.Random(0).sample(range(1, self.count + 1), k=self.count)

    def saves(self) -> list[float]:
        """Seconds of saves, each of fresh keys into rows that hold older ones."""
        seconds = []
        for seed in range(1, REPEATS + 2):
            sequence = self.rig.sequence(self.count, seed)
            [(job, moves, _)] = self.rig.pool.plan_saves([(sequence, 0, self.blocks)])
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.rig.worker.begin_step([(job, moves)])
            for layer in range(LAYERS):
                self.rig.worker.layer_computed(layer)
            self.rig.worker.end_step()
            self.rig.worker.finish_saves([job])
            seconds.append(time.perf_counter() - start)
            self.rig.pool.poll()
            self.rig.pool.clear()
        return seconds[1:]

    def loads(self, layered: bool, rows: str) -> list[float]:
        """Seconds of loads of everything."""
        sequence, one_in = self.rig.sequence(self.count), 1
        match rows:
            case "together":
                self.rig.save(sequence, self.blocks)
            case "stretches":
                self.rig.save_in_stretches(sequence, self.blocks)
            case _:
                sequence, one_in = self.rig.save_apart(self.blocks), APART
        seconds = []
        for _ in range(REPEATS + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            failed, damaged, _ = self.rig.load(sequence, self.blocks, layered, one_in)
            seconds.append(time.perf_counter() - start)
            assert not failed
            assert not damaged
        return seconds[1:]

    def both(self) -> list[float]:
        """Seconds of a load of half of the blocks beside a save of the other half."""
        half = self.count // 2
        loaded, saved = self.blocks[:half], self.blocks[half:]
        sequence = self.rig.sequence(half)
        self.rig.save(sequence, loaded)
        seconds = []
        for seed in range(1, REPEATS + 2):
            fresh = self.rig.sequence(half, seed)
            [(job, moves, _)] = self.rig.pool.plan_saves([(fresh, 0, saved)])
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.rig.worker.save_now([(job, moves)])
            failed, damaged, _ = self.rig.load(sequence, loaded)
            self.rig.worker.finish_saves([job])
            seconds.append(time.perf_counter() - start)
            assert not failed
            assert not damaged
            self.rig.pool.poll()
        return seconds[1:]

    def close(self) -> None:
        self.rig.__exit__()


def measure(piece_kib: int, wanted: list[str], routes: list[str]) -> list[dict[str, Any]]:
    """The routes for pieces of one size."""
    rows = []

    def add(what: str, route: str, seconds: list[float]) -> None:
        rows.append({"what": what, "piece_kib": piece_kib, "route": route, "gb_s": rate(seconds)})
        print(f"{piece_kib:4} KiB {what:17} {route:10} {rate(seconds):6.1f} GB/s", flush=True)

    for what in wanted:
        for route in [route for route in ROUTES[what] if route in routes]:
            pinned = {f"gpu_{w}_route": "dma" for w in ("save", "load", "layered")}
            changed = ("save", "load") if what == "both" else (what.split()[0],)
            if route == "auto":
                del pinned["gpu_load_route"]  # Its rate says how much goes with one launch.
            bench = Bench(piece_kib, **(pinned | {f"gpu_{w}_route": route for w in changed}))
            if what == "save":
                seconds = bench.saves()
            elif what == "both":
                seconds = bench.both()
            else:
                kind, rows_lie = what.split()
                seconds = bench.loads(kind == "layered", rows_lie)
            add(what, route, seconds)
            bench.close()
    bench = Bench(piece_kib)
    print(bench.rig.worker.about, flush=True)
    bench.close()
    return rows


def main() -> None:
    """See the module's documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--pieces", type=int, nargs="*", default=PIECES_KIB, help="KiB")
    parser.add_argument("--what", nargs="*", default=list(ROUTES), choices=ROUTES)
    known = sorted({route for routes in ROUTES.values() for route in routes})
    parser.add_argument("--routes", nargs="*", default=known, choices=known)
    arguments = parser.parse_args()
    rows = []
    for piece in arguments.pieces:
        rows += measure(piece, arguments.what, arguments.routes)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
