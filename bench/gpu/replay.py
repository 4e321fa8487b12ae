"""`python -m bench.gpu.replay`: a CUDA graph of small kernels, before and after another stream's.

The graph is like a decoding step: 225 products of 8 rows with one matrix, which stays in the L2
cache, each with an element-wise kernel behind it. It takes longer once a process has launched some
kernels on a third stream, besides the one that replays and the one that was captured. It is timed
on an idle device, launch included, and behind other work, as under async scheduling.
"""

from __future__ import annotations

import statistics

import torch
from cuda.bindings import driver

PAIRS = 225
REPLAYS = 60
ROUNDS = 4
KERNELS = (0, 1, 2, 5, 20)
"""Launched on the third stream, in all."""
NON_BLOCKING = 1
LEAD_CYCLES = 2_000_000
"""Of other work: about a millisecond."""


def captured() -> torch.cuda.CUDAGraph:
    """The graph."""
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    first = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            _ = first @ matrix * 0.01
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rows = first
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(PAIRS):
            rows = (rows @ matrix) * 0.01
    graph.reads = matrix, first
    return graph


def replayed(graph: torch.cuda.CUDAGraph, lead_cycles: int) -> float:
    """Milliseconds of a replay behind other work: the least of some medians."""
    medians = []
    for _ in range(ROUNDS):
        times = []
        for _ in range(REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if lead_cycles > 0:
                torch.cuda._sleep(lead_cycles)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        medians.append(statistics.median(times[REPLAYS // 6 :]))
    return min(medians)


def report(graph: torch.cuda.CUDAGraph, when: str) -> None:
    """Prints a line."""
    idle, busy = replayed(graph, 0), replayed(graph, LEAD_CYCLES)
    print(f"{when:32} {idle:.3f} ms, behind other work {busy:.3f} ms", flush=True)


def main() -> None:
    """See the module's documentation."""
    graph = captured()
    error, handle = driver.cuStreamCreateWithPriority(NON_BLOCKING, 0)
    assert int(error) == 0, error
    third = torch.cuda.ExternalStream(int(handle))
    values = torch.zeros(100_000, device="cuda")
    launched = 0
    for kernels in KERNELS:
        with torch.cuda.stream(third):
            while launched < kernels:
                values.sin_()
                launched += 1
        torch.cuda.synchronize()
        report(graph, f"{launched} kernels on a third stream")
    driver.cuStreamDestroy(handle)
    report(graph, "the stream is gone")


if __name__ == "__main__":
    main()
