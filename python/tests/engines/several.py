"""Engines of one process: two at once, then a third when they have ended. Prints what was counted.

    python -m engines.several llm|async MODEL

Each engine computes a prompt, forgets it, and loads it from the pool; the first once more when the
second has ended.
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

BLOCKS = 10
"""Whole blocks of LONG."""
LIMIT_S = 120.0
CONFIG = EngineConfig(load="async")


class Started(Protocol):
    """An engine of either kind."""

    def complete(self, tokens: list[int]) -> None:
        """Lets it generate one token."""

    def forget(self) -> None:
        """Empties vLLM's own prefix cache."""

    def close(self) -> None:
        """Ends it."""


def arguments(model: Path) -> dict[str, Any]:
    """Of an engine like any other, with statistics as they are by default."""
    made = CONFIG.llm_arguments(model, new_engine_id())
    return {name: value for name, value in made.items() if name != "disable_log_stats"}


def sampling() -> Any:
    """One token."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=1, detokenize=False)


class Offline:
    """`vllm.LLM` with statistics, which it has not by default."""

    def __init__(self, model: Path) -> None:
        from vllm import LLM

        self._llm = LLM(**arguments(model), disable_log_stats=False)

    def complete(self, tokens: list[int]) -> None:
        self._llm.generate([{"prompt_token_ids": tokens}], sampling(), use_tqdm=False)

    def forget(self) -> None:
        assert self._llm.reset_prefix_cache()

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


class Online:
    """`AsyncLLM` with its defaults."""

    loop = asyncio.new_event_loop()

    def __init__(self, model: Path) -> None:
        self._requests = 0
        self._engine = self.loop.run_until_complete(self._start(arguments(model)))

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
        assert self.loop.run_until_complete(self._engine.reset_prefix_cache())

    def close(self) -> None:
        async def end() -> None:
            self._engine.shutdown()

        self.loop.run_until_complete(end())


def total(name: str) -> float:
    """A metric as it is exposed, over all of its labels."""
    from prometheus_client import REGISTRY

    samples = (sample for metric in REGISTRY.collect() for sample in metric.samples)
    return sum(sample.value for sample in samples if sample.name == name)


def wait_for(engine: Started, name: str, value: float) -> None:
    """Returns when `name` has reached `value`; counts travel with steps, so there are some."""
    limit = time.monotonic() + LIMIT_S
    while total(name) < value:
        assert time.monotonic() < limit, f"{name} is {total(name)}, not {value}"
        engine.complete([5])
        time.sleep(0.05)


def compute_and_load(engine: Started) -> None:
    """Lets an engine compute a prompt and load it again, and waits until both are counted."""
    saved = total("kvtide_saved_blocks_total")
    engine.complete(token_ids(LONG))
    wait_for(engine, "kvtide_saved_blocks_total", saved + BLOCKS)
    load_again(engine)


def load_again(engine: Started) -> None:
    """Lets an engine load what it has in its pool."""
    hits = total("kvtide_hit_tokens_total")
    engine.forget()
    engine.complete(token_ids(LONG))
    wait_for(engine, "kvtide_hit_tokens_total", hits + BLOCKS * BLOCK_TOKENS)


def counted() -> dict[str, float]:
    """What is exposed now."""
    names = ("kvtide_saved_blocks_total", "kvtide_hit_tokens_total", "kvtide_pool_slots")
    return {name: total(name) for name in names}


def main(kind: str, model: Path) -> list[dict[str, float]]:
    """What is exposed after each engine has done its work."""
    start: Any = {"llm": Offline, "async": Online}[kind]
    told = []
    first, second = start(model), start(model)
    for engine in (first, second):
        compute_and_load(engine)
        told.append(counted())
    second.close()
    load_again(first)
    told.append(counted())
    first.close()
    third = start(model)
    compute_and_load(third)
    third.close()
    return [*told, counted()]


if __name__ == "__main__":
    print("counted:", json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
