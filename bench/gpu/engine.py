"""One real vLLM engine on a GPU that runs workloads on demand; started by `bench.gpu`.

Reads one JSON object a line from its standard input, `{"do": NAME, …}`, and answers each with a
line `RESULT …`. Prompts are named by seeds: a seed that was computed before and has left the GPU is
a reload. The pool holds six prompts of 8,192 tokens.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu import models
from bench.gpu.timeline import Timeline

PROMPT_TOKENS = 8192
POOL_PROMPTS = 6
POOL_TOKENS = (PROMPT_TOKENS + 64) * POOL_PROMPTS
BLOCK = 16


def transfer(connector: str, host_gb: float, extra: dict[str, Any]) -> dict[str, Any] | None:
    """vLLM's configuration of a connector."""
    if connector == "none":
        return None
    if connector == "native":
        return {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": int(host_gb * (1 << 30))},
        }
    if connector == "pegaflow":  # Its server was started beside, with its own pool.
        return {
            "kv_connector": "PegaKVConnector",
            "kv_connector_module_path": "pegaflow.connector",
            "kv_role": "kv_both",
        }
    return {
        "kv_connector": "OffloadingConnectorV1Type3",
        "kv_connector_module_path": "kvtide.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"host_capacity_gb": host_gb} | extra,
    }


def prompt(seed: int, tokens: int = PROMPT_TOKENS) -> list[int]:
    """Random tokens; seeds have nothing in common."""
    return random.Random(seed).choices(range(10, 120000), k=tokens)


class Engine:
    """vLLM in this process."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self.options = options
        shape = options.get("shape", "8b")
        configured = transfer(options["connector"], options["host_gb"], options.get("extra", {}))
        started = time.perf_counter()
        self.llm = LLM(
            model=models.write(shape, Path(options["folder"])),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=options.get("max_model_len", 16384),
            max_num_seqs=32,
            num_gpu_blocks_override=options.get("pool_tokens", POOL_TOKENS) // BLOCK,
            gpu_memory_utilization=options.get("utilization", 0.32),
            tensor_parallel_size=options.get("tp", 1),
            enable_prefix_caching=True,
            seed=0,
            compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32]},
            **({"kv_transfer_config": configured} if configured else {}),
        )
        self.boot_s = time.perf_counter() - started
        self.engine = self.llm.llm_engine
        self.counter = 0

    def sampling(self, tokens: int) -> Any:
        """Greedy, of a fixed length."""
        from vllm import SamplingParams

        return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)

    def add(self, tokens: list[int], output: int) -> str:
        """Starts a request."""
        self.counter += 1
        name = f"r{self.counter}"
        self.engine.add_request(name, {"prompt_token_ids": tokens}, self.sampling(output))
        return name

    def generate(self, prompts: list[list[int]], output: int) -> float:
        """Seconds until all of them are answered."""
        start = time.perf_counter()
        for each in prompts:
            self.add(each, output)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return time.perf_counter() - start

    def do_batch(self, seeds: list[int], output: int, tokens: int = PROMPT_TOKENS) -> float:
        """Seconds for prompts at once."""
        return self.generate([prompt(seed, tokens) for seed in seeds], output)

    def do_each(self, seeds: list[int], output: int, tokens: int = PROMPT_TOKENS) -> list[float]:
        """Seconds for each prompt, one after the other."""
        return [self.generate([prompt(seed, tokens)], output) for seed in seeds]

    def do_forget(self) -> bool:
        """Empties the GPU's prefix cache, and nothing else."""
        return bool(self.llm.reset_prefix_cache())

    def do_idle(self, seconds: float) -> None:
        """Lets saves end: an engine without requests takes steps only when one comes."""
        time.sleep(seconds)
        self.generate([prompt(0, 20)], 2)

    def do_mixed(self, seeds: list[int], decoders: int, every_s: float) -> dict[str, Any]:
        """Running decoders, and a prompt arriving now and then."""
        running = {}
        for i in range(decoders):
            running[self.add(prompt(10_000_000 + self.counter + i, 256), 4000)] = []
        for _ in range(20):
            self.engine.step()
        arrivals: dict[str, float] = {}
        ttft: dict[str, float] = {}
        seen = {name: 0 for name in running}
        times: dict[str, list[float]] = {name: [] for name in running}
        pending = list(seeds)
        prompts = [prompt(seed) for seed in seeds]
        start = time.perf_counter()
        while pending or len(ttft) < len(seeds):
            now = time.perf_counter() - start
            due = len(seeds) - len(pending)
            if pending and now >= due * every_s:
                pending.pop(0)
                arrivals[self.add(prompts[due], 1)] = start + due * every_s
            for output in self.engine.step():
                moment = time.perf_counter()
                if output.request_id in times:
                    count = len(output.outputs[0].token_ids)
                    if count > seen[output.request_id]:
                        seen[output.request_id] = count
                        times[output.request_id].append(moment)
                elif output.request_id in arrivals and output.finished:
                    ttft[output.request_id] = moment - arrivals[output.request_id]
        self.engine.abort_request(list(running))
        while self.engine.has_unfinished_requests():
            self.engine.step()
        gaps = [b - a for each in times.values() for a, b in itertools.pairwise(each)]
        return {"ttft": sorted(ttft.values()), "itl": sorted(gaps)}

    def do_load_mode(self, mode: str) -> None:
        """How kvtide loads from now on: one engine in two modes differs in nothing else."""
        from kvtide import _native

        settings = self.options["extra"] | {
            "host_capacity_gb": self.options["host_gb"],
            "load": mode,
        }
        planner = self._planner()
        made = _native.Settings(json.dumps(settings), {})
        planner._matching._settings = planner._loads._settings = made
        self.engine.model_executor.collective_rpc(go_by_layer, args=(mode != "sync",))

    def do_saving(self, on: bool) -> None:
        """Whether kvtide saves from now on."""
        saves = self._planner()._saves
        if on:
            saves.__dict__.pop("_plan", None)
        else:
            saves._plan = lambda *_arguments: []

    def _planner(self) -> Any:
        return self.engine.engine_core.engine_core.scheduler.connector._as_scheduler

    def do_timeline(self, of: dict[str, Any], trace: str | None = None) -> str:
        """Another workload, step by step; the GPU's side goes to the file `trace`."""
        arguments = dict(of)
        do = getattr(self, "do_" + arguments.pop("do"))
        with Timeline(self.engine, trace) as timeline:
            do(**arguments)
        return timeline.table()

    def do_closed_loop(
        self, prefixes: list[int], users: int, requests: int, new_tokens: int, output: int
    ) -> dict[str, Any]:
        """Users who each send the next request when their last is answered: a prefix that left
        the GPU, and new tokens behind it. Answers are of half to one and a half times `output`
        tokens: if all had the same, the users would soon go in step, and nobody would decode
        while another's prompt is loaded. `shared` are the times per token of decoders over two
        steps: one that also computed another request's prompt, and the one before, whose tokens
        the engine hands out only when it has launched the former."""
        made = {seed: prompt(seed) for seed in prefixes}
        started = 0
        live: dict[str, dict[str, Any]] = {}
        done: list[dict[str, Any]] = []
        shared: list[float] = []

        def begin() -> None:
            nonlocal started
            seed = prefixes[started % len(prefixes)]
            tail = prompt(20_000_000 + self.counter * 7 + seed, new_tokens)
            moment = time.perf_counter()
            # Whole periods of the golden ratio spread evenly over any number of requests.
            length = round(output * (0.5 + started * 0.618034 % 1.0))
            name = self.add(made[seed] + tail, max(2, length))
            live[name] = {"begin": moment, "times": []}
            started += 1

        start = time.perf_counter()
        for _ in range(users):
            begin()
        while live:
            begun, decoding = 0, []
            for output_ in self.engine.step():
                request = live.get(output_.request_id)
                if request is None:
                    continue
                times = request["times"]
                if len(output_.outputs[0].token_ids) > len(times):
                    times.append(time.perf_counter())
                    if len(times) == 1:
                        begun += 1
                    elif len(times) > 2:
                        decoding.append((times[-1] - times[-3]) / 2)
                if output_.finished:
                    done.append(live.pop(output_.request_id))
                    if started < requests:
                        begin()
            if begun:
                shared += decoding
        seconds = time.perf_counter() - start
        gaps = [b - a for r in done for a, b in zip(r["times"], r["times"][1:], strict=False)]
        return {
            "seconds": seconds,
            "requests_s": len(done) / seconds,
            "ttft": sorted(r["times"][0] - r["begin"] for r in done),
            "tpot": sorted((r["times"][-1] - r["times"][0]) / (len(r["times"]) - 1) for r in done),
            "itl": sorted(gaps),
            "shared": sorted(shared),
        }


def go_by_layer(_worker: Any, by_layer: bool) -> None:
    """Runs in every worker: whether kvtide keeps step with the layers."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    get_kv_transfer_group()._as_worker._by_layer = by_layer


def answer(result: Any) -> None:
    """Tells the parent, between whatever vLLM prints."""
    print("RESULT " + json.dumps(result), flush=True)


def main() -> None:
    """See the module's documentation."""
    engine = Engine(json.loads(sys.argv[1]))
    answer({"boot_s": engine.boot_s})
    for line in sys.stdin:
        command = json.loads(line)
        do = getattr(engine, "do_" + command.pop("do"))
        answer(do(**command))


if __name__ == "__main__":
    main()
