"""`python -m bench.gpu.replay`: a CUDA graph of small kernels, before and after another stream's.

The graph is like a decoding step: 225 products of 8 rows with one matrix, which stays in the L2
cache, each with an element-wise kernel behind it. Kernels follow each other a little later once a
process has launched some on a further stream, and stay so when the stream is gone.
"""

from __future__ import annotations

import statistics

import torch
from cuda.bindings import driver

PAIRS = 225
REPLAYS = 60
ROUNDS = 4
KERNELS = (0, 1, 2, 5, 20)
"""Launched on the further stream, in all."""
NON_BLOCKING = 1


def captured() -> torch.cuda.CUDAGraph:
    """The graph."""
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    rows = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            _ = rows @ matrix * 0.01
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(PAIRS):
            rows = (rows @ matrix) * 0.01
    graph.keeps = matrix, rows
    return graph


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of a replay: the least of some medians."""
    medians = []
    for _ in range(ROUNDS):
        times = []
        for _ in range(REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        medians.append(statistics.median(times[REPLAYS // 6 :]))
    return min(medians)


def main() -> None:
    """See the module's documentation."""
    graph = captured()
    error, handle = driver.cuStreamCreateWithPriority(NON_BLOCKING, 0)
    assert int(error) == 0, error
    further = torch.cuda.ExternalStream(int(handle))
    values = torch.zeros(100_000, device="cuda")
    launched = 0
    for kernels in KERNELS:
        with torch.cuda.stream(further):
            while launched < kernels:
                values.sin_()
                launched += 1
        torch.cuda.synchronize()
        print(f"{launched:3} kernels on a further stream: {replayed(graph):.3f} ms", flush=True)
    driver.cuStreamDestroy(handle)
    print(f"the stream is gone: {replayed(graph):.3f} ms", flush=True)


if __name__ == "__main__":
    main()
