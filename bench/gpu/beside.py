"""`python -m bench.gpu.beside`: what a layered load costs the step that it goes along with.

The matrix products and attention of a model of Llama-3.1-8B's shape for some new tokens, layer by
layer, each behind its layer's load: 8,192 tokens in scattered blocks of 16, 64 KiB a layer. What a
route takes of the multiprocessors, and of the thread that launches the step, shows in the step. So
does what a load does not bring before it is needed, although it begins while the device still has
a decoding step to run, as under async scheduling.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bench.gpu.rig import APART, BLOCK_TOKENS, Layout, Rig

LAYERS = 32
HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 4096, 14336, 32, 8, 128
LOADED_TOKENS = 8192
REPEATS = 9
ROUTES = ("auto", "kernel:4", "kernel:8", "staged:16", "staged:64", "dma")
ROWS = ("together", "stretches", "apart")
LEAD_MS = 5.0
"""Of the load before its step."""
CYCLES_A_MS = 1.8e6
"""Of an H100 at work, about."""
LAYOUT = Layout("8b", (-1, KV_HEADS, BLOCK_TOKENS, 2 * HEAD), order=(0, 2, 1, 3))


class Model:
    """The parts of a step that take time."""

    def __init__(self, tokens: int) -> None:
        def weight(inputs: int, outputs: int) -> torch.Tensor:
            return torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) * 0.01

        made = [
            (
                weight(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD),
                weight(HEADS * HEAD, HIDDEN),
                weight(HIDDEN, 2 * INNER),
                weight(INNER, HIDDEN),
            )
            for _ in range(LAYERS)
        ]
        self.weights = made
        self.hidden = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        context = LOADED_TOKENS + tokens
        shape = (1, KV_HEADS, context, HEAD)
        self.keys = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        self.values = torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def step(self, before: Callable[[int], None]) -> None:
        """Launches a step; `before` is called before each layer."""
        tokens = self.hidden.shape[0]
        hidden = self.hidden
        for layer, (qkv, out, up, down) in enumerate(self.weights):
            before(layer)
            query = functional.linear(hidden, qkv)[:, : HEADS * HEAD]
            query = query.view(1, tokens, HEADS, HEAD).transpose(1, 2)
            attended = functional.scaled_dot_product_attention(
                query, self.keys, self.values, enable_gqa=True
            )
            attended = attended.transpose(1, 2).reshape(tokens, HEADS * HEAD)
            hidden = hidden + functional.linear(attended, out)
            inner = functional.linear(hidden, up)[:, :INNER]
            hidden = hidden + functional.linear(inner, down)


def timed(
    run: Callable[[], None], lead_ms: float, collect: Callable[[], None] = lambda: None
) -> float:
    """Milliseconds of the device for what `run` launches while it is busy with something else for
    `lead_ms`, in the median. `collect` follows."""
    times = []
    for _ in range(REPEATS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(lead_ms * CYCLES_A_MS))
        begin.record()
        run()
        end.record()
        collect()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


def beside(model: Model, route: str, rows: str, lead_ms: float) -> dict[str, Any]:
    """A step beside a load by `route`, and the same load alone."""
    count = LOADED_TOKENS // BLOCK_TOKENS
    with Rig(LAYOUT, LAYERS, 4 * count, 2.2, gpu_layered_route=route) as rig:
        blocks = random.Random(0).sample(range(1, 4 * count), k=count)
        sequence, one_in = rig.sequence(count), 1
        match rows:
            case "together":
                rig.save(sequence, blocks)
            case "stretches":
                rig.save_in_stretches(sequence, blocks)
            case _:
                sequence, one_in = rig.save_apart(blocks), APART
        launching: list[float] = []
        begun: list[tuple[int, object]] = []
        jobs = itertools.count(1 << 50)

        def step(compute: bool) -> None:
            lease, moves = rig.begin_load(sequence, blocks, one_in)
            job = next(jobs)
            start = time.perf_counter()
            rig.worker.load_layered(job, moves, False)
            launching.append((time.perf_counter() - start) * 1e3)
            if compute:
                model.step(rig.worker.wait_layer)
            else:
                for layer in range(LAYERS):
                    rig.worker.wait_layer(layer)
            rig.worker.end_step()
            begun.append((job, lease))

        def collect() -> None:
            job, _lease = begun.pop()
            failed, damaged, _ = rig.await_load(job)
            assert not failed
            assert not damaged

        return {
            "route": route,
            "rows": rows,
            "lead_ms": lead_ms,
            "step_ms": timed(lambda: step(True), lead_ms, collect),
            "load_ms": timed(lambda: step(False), 0.0, collect),
            "launching_ms": statistics.median(launching),
        }


def main() -> None:
    """See the module's documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--tokens", type=int, default=1024, help="new ones, computed in the step")
    parser.add_argument("--routes", nargs="*", default=ROUTES)
    parser.add_argument("--rows", nargs="*", default=ROWS, choices=ROWS, help="how they lie")
    parser.add_argument("--lead-ms", type=float, default=LEAD_MS)
    arguments = parser.parse_args()
    model = Model(arguments.tokens)
    alone = timed(lambda: model.step(lambda _layer: None), arguments.lead_ms)
    rows: list[dict[str, Any]] = [{"route": "", "step_ms": alone}]
    print(f"{arguments.tokens} tokens alone: {alone:.2f} ms", flush=True)
    for where, route in itertools.product(arguments.rows, arguments.routes):
        row = beside(model, route, where, arguments.lead_ms)
        rows.append(row)
        print(
            f"rows {row['rows']:9} {route:10} step {row['step_ms']:6.2f} ms, "
            f"load alone {row['load_ms']:6.2f} ms, "
            f"of the launching thread {row['launching_ms']:6.2f} ms",
            flush=True,
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
