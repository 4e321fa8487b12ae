"""Interactive traffic beside a batch, on a mock engine with a stated capacity and priorities.

The engine (`control/batch/examples/mock_upstream/engine.rs`) batches continuously: a step takes 20
ms, 30 µs for each prompt token and 20 µs for each sequence in it; it has 1,024 tokens a step, 128
seats and a cache for 65,536 tokens. It schedules by priority, and what arrives waits for the end
of the step that runs. Interactive requests arrive at random moments, 40 a second, with some 128
tokens of prompt and 16 of answer; they are streamed, and what is timed is the first token. The
batch's requests have some 128 tokens of prompt and 128 of answer, and where priorities are used
the priority 100. With all seats taken by the batch a step takes 26 ms, so that the engine can do
38 of its requests a second.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rig import ended, jsonl, line, mock_upstream, server, upload, wait_until

from bench.percentile import percentile
from bench.provenance import ROOT

ENGINE = ["--forget", "--step-us", "20000", "--prompt-token-us", "30", "--sequence-us", "20"]
ENGINE += ["--step-tokens", "1024", "--seats", "128", "--cache-tokens", "65536"]
RATE_PER_S = 40.0
INTERACTIVE_TOKENS = 16
BATCH_TOKENS = 128
PROMPT = "lorem ipsum " * 32
BATCH_REQUESTS = 20_000
SETTLE_S = 20.0
RESULTS = "kvtide_batch_results_total"


@dataclass
class Interference:
    """Runs without and with a batch, by turns."""

    runs: int
    run_s: float
    priority: bool
    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    batch_per_s: list[float] = field(default_factory=list)

    def measure(self) -> Interference:
        """Takes all samples, in milliseconds."""
        engine = ENGINE if self.priority else [*ENGINE, "--fcfs"]
        options = ["--cancel-grace-s", "1", *(["--priority", "100"] if self.priority else [])]
        with (
            tempfile.TemporaryDirectory(dir=ROOT / "target") as folder,
            mock_upstream(*engine) as mock,
            server(Path(folder) / "data", mock.url, *options) as running,
        ):
            client = running.client()
            requests = [line(str(n), PROMPT) for n in range(BATCH_REQUESTS)]
            for request in requests:
                request["body"]["max_tokens"] = BATCH_TOKENS
            for run in range(self.runs):
                self.alone += asyncio.run(traffic(mock.url, self.run_s, run))
                batch = client.batches.create(
                    input_file_id=upload(client, jsonl(requests)),
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                )
                # Until the batch has found its pace, beside the same traffic.
                asyncio.run(traffic(mock.url, SETTLE_S, -run - 1))
                wait_until("a batch that runs", lambda: running.metric(RESULTS))
                before, began = running.metric(RESULTS), time.monotonic()
                self.beside += asyncio.run(traffic(mock.url, self.run_s, run))
                results = running.metric(RESULTS) - before
                self.batch_per_s.append(results / (time.monotonic() - began))
                now = client.batches.retrieve(batch.id)
                assert now.status == "in_progress", "the batch has ended too early"
                client.batches.cancel(batch.id)
                ended(client, batch)
        return self

    @staticmethod
    def p99_ms(samples: list[float]) -> float:
        """The 99th percentile."""
        return percentile(samples, 99)


async def traffic(url: str, run_s: float, seed: int) -> list[float]:
    """Interactive requests at random moments; milliseconds to the first token of each."""
    chance = random.Random(seed)
    took: list[float] = []
    body = line("x", PROMPT)["body"] | {"max_tokens": INTERACTIVE_TOKENS, "stream": True}
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=60) as client:

        async def ask() -> None:
            began = time.perf_counter()
            path = f"{url}/v1/chat/completions"
            async with client.stream("POST", path, json=body) as answer:
                answer.raise_for_status()
                first = True
                async for _ in answer.aiter_raw():
                    if first:
                        took.append((time.perf_counter() - began) * 1000)
                        first = False

        tasks = []
        until = time.monotonic() + run_s
        while time.monotonic() < until:
            await asyncio.sleep(chance.expovariate(RATE_PER_S))
            tasks.append(asyncio.create_task(ask()))
        await asyncio.gather(*tasks)
    return took
