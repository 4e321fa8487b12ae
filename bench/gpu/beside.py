"""`python -m bench.gpu.beside`: what a layered load costs the step that it goes along with.

The matrix products and attention of a model of Llama-3.1-8B's shape for some new tokens, layer by
layer, each behind its layer's load: 8,192 tokens in scattered blocks of 16, 64 KiB a layer. What a
route takes of the multiprocessors, and of the thread that launches the step, shows in the step.
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


def timed(run: Callable[[], None]) -> float:
    """Milliseconds until the device has done it, in the median."""
    times = []
    for _ in range(REPEATS + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def beside(model: Model, route: str, together: bool) -> dict[str, Any]:
    """A step beside a load by `route`, and the same load alone."""
    count = LOADED_TOKENS // BLOCK_TOKENS
    with Rig(LAYOUT, LAYERS, 4 * count, 2.2, gpu_layered_route=route) as rig:
        blocks = random.Random(0).sample(range(1, 4 * count), k=count)
        sequence, one_in = rig.sequence(count), 1
        if together:
            rig.save(sequence, blocks)
        else:
            sequence, one_in = rig.save_apart(blocks), APART
        launching: list[float] = []
        jobs = iter(range(1 << 50, 1 << 51))

        def step(compute: bool) -> None:
            _lease, moves = rig.begin_load(sequence, blocks, one_in)
            job = next(jobs)
            start = time.perf_counter()
            rig.worker.load_layered(job, moves, True)
            launching.append((time.perf_counter() - start) * 1e3)
            if compute:
                model.step(rig.worker.wait_layer)
            else:
                for layer in range(LAYERS):
                    rig.worker.wait_layer(layer)
            rig.worker.end_step()
            failed, damaged, _ = rig.await_load(job)
            assert not failed
            assert not damaged

        return {
            "route": route,
            "rows": "together" if together else "apart",
            "step_ms": timed(lambda: step(True)),
            "load_ms": timed(lambda: step(False)),
            "launching_ms": statistics.median(launching),
        }


def main() -> None:
    """See the module's documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--tokens", type=int, default=1024, help="new ones, computed in the step")
    parser.add_argument("--routes", nargs="*", default=ROUTES)
    arguments = parser.parse_args()
    model = Model(arguments.tokens)
    alone = timed(lambda: model.step(lambda _layer: None))
    rows: list[dict[str, Any]] = [{"route": "", "step_ms": alone}]
    print(f"{arguments.tokens} tokens alone: {alone:.2f} ms", flush=True)
    for together, route in itertools.product((True, False), arguments.routes):
        row = beside(model, route, together)
        rows.append(row)
        print(
            f"rows {row['rows']:8} {route:10} step {row['step_ms']:6.2f} ms, "
            f"load alone {row['load_ms']:6.2f} ms, "
            f"of the launching thread {row['launching_ms']:6.2f} ms",
            flush=True,
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
