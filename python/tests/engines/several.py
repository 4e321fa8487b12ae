"""Two engines of one process, the second started when the first has worked. Prints what each has
loaded, by its metrics.

    python -m engines.several llm|async MODEL

Each engine computes a prompt, forgets it, and loads it from the pool, by turns; the second once
more when the first has ended.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from engines.config import BLOCK_TOKENS, EngineConfig, new_engine_id
from engines.workloads import LONG, token_ids

LOADED_TOKENS = 10 * BLOCK_TOKENS
"""Whole blocks of LONG."""
LIMIT_S = 120.0
HITS = "kvtide_hit_tokens_total"
CONFIG = EngineConfig(load="layered", max_tokens_a_step=384)
"""A prompt, computed or loaded, is one step with output."""


class Started(Protocol):
    """An engine of either kind."""

    name: str
    """Of its model, by which its metrics are told apart."""

    def complete(self, tokens: list[int]) -> None:
        """Lets it generate one token."""

    def forget(self) -> None:
        """Empties vLLM's own prefix cache."""

    def close(self) -> None:
        """Ends it."""


def arguments(model: Path, name: str) -> dict[str, Any]:
    """Of an engine like any other, with statistics as they are by default."""
    made = CONFIG.llm_arguments(model, new_engine_id()) | {"served_model_name": name}
    return {name: value for name, value in made.items() if name != "disable_log_stats"}


def sampling() -> Any:
    """One token."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=1, detokenize=False)


class Offline:
    """`vllm.LLM` with statistics, which it has not by default."""

    def __init__(self, model: Path, name: str) -> None:
        from vllm import LLM

        self.name = name
        self._llm = LLM(**arguments(model, name), disable_log_stats=False)

    def complete(self, tokens: list[int]) -> None:
        self._llm.generate([{"prompt_token_ids": tokens}], sampling(), use_tqdm=False)

    def forget(self) -> None:
        self._llm.reset_prefix_cache()  # False while a step in flight may use blocks.

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


class Online:
    """`AsyncLLM` with its defaults."""

    loop = asyncio.new_event_loop()

    def __init__(self, model: Path, name: str) -> None:
        self.name = name
        self._requests = 0
        self._engine = self.loop.run_until_complete(self._start(arguments(model, name)))

    async def _start(self, made: dict[str, Any]) -> Any:
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        made["kv_transfer_config"] = KVTransferConfig(**made["kv_transfer_config"])
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**made))

    def complete(self, tokens: list[int]) -> None:
        self._requests += 1

        async def all_of_it() -> None:
            prompt = {"prompt_token_ids": tokens}
            async for _ in self._engine.generate(prompt, sampling(), str(self._requests)):
                pass

        self.loop.run_until_complete(all_of_it())

    def forget(self) -> None:
        self.loop.run_until_complete(self._engine.reset_prefix_cache())

    def close(self) -> None:
        async def end() -> None:
            self._engine.shutdown()

        self.loop.run_until_complete(end())


def hits(engine: Started) -> float:
    """Tokens that are exposed as loaded under its name."""
    from prometheus_client import REGISTRY

    samples = (sample for metric in REGISTRY.collect() for sample in metric.samples)
    return sum(
        sample.value
        for sample in samples
        if sample.name == HITS and sample.labels["model_name"] == engine.name
    )


def compute_and_load(engine: Started) -> tuple[str, float]:
    """Lets an engine compute a prompt, and load it until a load is counted; its name and growth.

    vLLM 0.26's `LLM` drops the statistics of steps without output, so the first may be lost.
    """
    before, limit = hits(engine), time.monotonic() + LIMIT_S
    while hits(engine) == before:
        assert time.monotonic() < limit, "no load is counted"
        engine.complete(token_ids(LONG))
        engine.complete([5])  # Counts travel with steps.
        engine.forget()
    return engine.name, hits(engine) - before


def main(kind: str, model: Path) -> list[tuple[str, float]]:
    """What each engine has added to the metrics."""
    start: Any = {"llm": Offline, "async": Online}[kind]
    first = start(model, "one")
    added = [compute_and_load(first)]
    second = start(model, "other")
    added += [compute_and_load(second), compute_and_load(first)]
    first.close()
    added.append(compute_and_load(second))
    second.close()
    return added


if __name__ == "__main__":
    print("added:", json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
