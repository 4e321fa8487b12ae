"""Interactive traffic beside a batch, on a mock engine with a stated capacity and priorities.

The engine answers 64 requests at once, each in 100 ms; others wait, those of lower `priority`
value first served, as in vLLM. Interactive requests arrive at random moments, 100 a second: a sixth
of what the engine can do. The batch's have priority 100. What is timed is the whole of an answer,
which for an answer of one token is the time to the first.
"""

from __future__ import annotations

import asyncio
import math
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rig import ended, jsonl, line, mock_upstream, server, upload, wait_until

from bench.provenance import ROOT

CAPACITY = 64
SERVICE_MS = 100
RATE_PER_S = 100.0
BATCH_REQUESTS = 50_000
SETTLE_S = 0.5
LIMIT = "kvtide_batch_concurrency_limit"


@dataclass
class Interference:
    """Runs without and with a batch, by turns."""

    runs: int
    run_s: float
    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)

    def measure(self) -> Interference:
        """Takes all samples, in milliseconds."""
        engine = ["--forget", "--capacity", str(CAPACITY), "--service-ms", str(SERVICE_MS)]
        options = ["--priority", "100", "--cancel-grace-s", "1"]
        with (
            tempfile.TemporaryDirectory(dir=ROOT / "target") as folder,
            mock_upstream(*engine) as mock,
            server(Path(folder) / "data", mock.url, *options) as running,
        ):
            client = running.client()
            requests = jsonl([line(str(n)) for n in range(BATCH_REQUESTS)])
            for run in range(self.runs):
                self.alone += asyncio.run(traffic(mock.url, self.run_s, run))
                batch = client.batches.create(
                    input_file_id=upload(client, requests),
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                )
                # Until the batch has found its pace.
                wait_until("a batch at full speed", lambda: running.metric(LIMIT) >= CAPACITY)
                time.sleep(SETTLE_S)
                self.beside += asyncio.run(traffic(mock.url, self.run_s, run))
                now = client.batches.retrieve(batch.id)
                assert now.status == "in_progress", "the batch has ended too early"
                client.batches.cancel(batch.id)
                ended(client, batch)
        return self

    @staticmethod
    def p99_ms(samples: list[float]) -> float:
        """The 99th percentile."""
        return sorted(samples)[math.ceil(len(samples) * 0.99) - 1]


async def traffic(url: str, run_s: float, seed: int) -> list[float]:
    """Interactive requests at random moments; how long each took, in milliseconds."""
    chance = random.Random(seed)
    took: list[float] = []
    body = line("x")["body"]
    limits = httpx.Limits(max_connections=CAPACITY * 4, max_keepalive_connections=CAPACITY * 4)
    async with httpx.AsyncClient(limits=limits, timeout=60) as client:

        async def ask() -> None:
            began = time.perf_counter()
            answer = await client.post(f"{url}/v1/chat/completions", json=body)
            answer.raise_for_status()
            took.append((time.perf_counter() - began) * 1000)

        tasks = []
        until = time.monotonic() + run_s
        while time.monotonic() < until:
            await asyncio.sleep(chance.expovariate(RATE_PER_S))
            tasks.append(asyncio.create_task(ask()))
        await asyncio.gather(*tasks)
    return took
