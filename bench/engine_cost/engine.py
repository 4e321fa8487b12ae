"""One real vLLM engine with kvtide in a process of its own; prints its results as JSON.

Run by `bench.engine_cost`, with (steps|rounds) MODEL. With `rounds` it computes one round for every
line `SEED (on|off)` of its standard input, with kvtide or without.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

BLOCK_TOKENS = 32
RUNNING = 64
STEPS = 160
WARM_UP_STEPS = 16
PROMPTS = 24
PROMPT_TOKENS = 384
OUTPUT_TOKENS = 32

SCHEDULER_HOOKS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished",
    "take_events",
)


def boot(model: str) -> Any:
    """An engine that computes everything: no prefix is ever repeated."""
    from vllm import LLM

    return LLM(
        model=model,
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        kv_cache_memory_bytes=512 << 20,
        block_size=BLOCK_TOKENS,
        max_num_seqs=RUNNING,
        skip_tokenizer_init=True,
        seed=0,
        kv_transfer_config={
            "kv_connector": "OffloadingConnectorV1Type3",
            "kv_connector_module_path": "kvtide.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"host_capacity_gb": 1},
        },
    )


class Switch:
    """Takes the connector out of the engine between rounds, and puts it back.

    Without it, scheduler and model runner take the paths that they take in an engine that was
    started without a connector.
    """

    def __init__(self, llm: Any) -> None:
        from vllm.distributed.kv_transfer import kv_transfer_state

        self._scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self._state = kv_transfer_state
        self._sides = self._scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT

    def turn(self, on: bool) -> None:
        """No request may be running."""
        scheduler, worker = self._sides if on else (None, None)
        self._scheduler.connector = scheduler
        self._state._KV_CONNECTOR_AGENT = worker


def prompts(seed: int, count: int, tokens: int) -> list[dict[str, list[int]]]:
    """Random prompts; different seeds share no block."""
    rng = random.Random(seed)
    return [{"prompt_token_ids": rng.choices(range(5, 4000), k=tokens)} for _ in range(count)]


def sampling(tokens: int) -> Any:
    """Greedy, of a fixed length."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def round_seconds(llm: Any, seed: int) -> float:
    """The time in which the prompts of one seed are computed, outputs included."""
    work = prompts(seed, PROMPTS, PROMPT_TOKENS)
    start = time.perf_counter()
    llm.generate(work, sampling(OUTPUT_TOKENS), use_tqdm=False)
    return time.perf_counter() - start


def step_times(llm: Any) -> dict[str, float]:
    """Microseconds that the connector's scheduler side takes of a step with 64 running requests."""
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    connector = scheduler.connector
    spent = 0.0

    def timed(hook: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            try:
                return hook(*args)
            finally:
                spent += time.perf_counter() - start

        return call

    for name in SCHEDULER_HOOKS:
        setattr(connector, name, timed(getattr(connector, name)))
    for i, prompt in enumerate(prompts(9, RUNNING, 48)):
        # Spread over the block, so that every step completes some, as in steady state.
        prompt["prompt_token_ids"] = prompt["prompt_token_ids"][: 17 + i % BLOCK_TOKENS]
        engine.add_request(f"r{i}", prompt, sampling(WARM_UP_STEPS + STEPS + 64))
    times = []
    for step in range(WARM_UP_STEPS + STEPS):
        spent = 0.0
        engine.step()
        if step >= WARM_UP_STEPS:
            assert len(scheduler.running) == RUNNING, "all requests must be running"
            times.append(spent * 1e6)
    times.sort()
    return {"p50_us": times[len(times) // 2], "p99_us": times[int(len(times) * 0.99)]}


def main() -> None:
    """See the module's documentation."""
    what, model = sys.argv[1:3]
    llm = boot(model)
    if what == "steps":
        answer(step_times(llm))
        return
    switch = Switch(llm)
    answer("ready")
    for line in sys.stdin:
        seed, state = line.split()
        switch.turn(state == "on")
        answer(round_seconds(llm, int(seed)))


def answer(result: Any) -> None:
    """Tells the parent, between whatever vLLM prints."""
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
