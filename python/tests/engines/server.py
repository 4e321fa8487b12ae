"""What runs in an engine's process: one vLLM engine that does what a test asks, line by line.

vLLM runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), so a test can go step by step and
look at vLLM's scheduler. What kvtide reports to vLLM is recorded on the way; nothing of it is
changed, except that `hold_loads` keeps back reports of ended loads: what a slow copy looks like.
"""

from __future__ import annotations

import collections
import json
import os
import re
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engines.config import EngineConfig

Json = Any
COPY_THREAD = re.compile(r"cpu\d+-(save|load)")


class Engine:
    """One engine; every public method can be called from a test."""

    def __init__(self, config: EngineConfig, model: str, engine_id: str) -> None:
        from vllm import LLM

        if config.connector:
            import kvtide.scheduler

            # Gauges and the pool's counters with every step instead of once a second.
            kvtide.scheduler.GAUGES_PERIOD_S = 0.0
        self._config = config
        self._llm = LLM(**config.llm_arguments(Path(model), engine_id))
        self._engine: Any = self._llm.llm_engine
        self._core: Any = self._engine.engine_core.engine_core
        self._scheduler: Any = self._core.scheduler
        self._counts: collections.Counter[str] = collections.Counter()
        self._gauges: dict[str, int] = {}
        self._recorded: dict[str, list[Json]] = collections.defaultdict(list)
        self._holding = False
        self._outputs: dict[str, Json] = {}
        self._request_number = 0
        self._watch_vllm()
        if config.connector and config.tensor_parallel == 1:
            self._watch_connector()

    def _watch_vllm(self) -> None:
        processor, scheduler = self._engine.output_processor, self._scheduler
        update, preempt = processor.update_scheduler_stats, scheduler._preempt_request
        publish = scheduler.kv_event_publisher.publish

        def update_scheduler_stats(stats: Any) -> None:
            update(stats)
            self._add_stats((stats and stats.kv_connector_stats) or {})

        def preempt_request(request: Any, *rest: Any, **more: Any) -> None:
            self._counts["preemptions"] += 1
            self._recorded["preempted"].append(plain_id(request.request_id))
            preempt(request, *rest, **more)

        def publish_batch(batch: Any) -> None:
            publish(batch)
            self._recorded["events"] += [as_json(event) for event in batch.events]

        processor.update_scheduler_stats = update_scheduler_stats
        scheduler._preempt_request = preempt_request
        scheduler.kv_event_publisher.publish = publish_batch

    def _watch_connector(self) -> None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker: Any = get_kv_transfer_group()
        loads = self._scheduler.connector._as_scheduler._loads
        get_finished, prepare = worker.get_finished, worker.handle_preemptions
        take_ended = loads.take_ended
        get_bad_blocks = worker.get_block_ids_with_load_errors

        def watched_get_finished(ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
            return (None, None) if self._holding else get_finished(ids)

        def watched_take_ended() -> set[str]:
            ended: set[str] = set() if self._holding else take_ended()
            self._recorded["received"] += map(plain_id, sorted(ended))
            return ended

        def watched_get_bad_blocks() -> set[int]:
            bad: set[int] = get_bad_blocks()
            self._recorded["bad_blocks"] += sorted(bad)
            return bad

        def watched_prepare(plan: Any) -> None:
            self._counts["waited_saves"] += len(plan.wait_saves)
            self._counts["layered_loads"] += plan.layered is not None
            self._counts["async_loads"] += len(plan.loads)
            prepare(plan)

        side = worker._as_worker
        copies = CountingWorker(side._worker)
        if side._worker is not None:  # Otherwise its daemon has not come yet.
            side._worker = copies
        bind, start_loads, save_layer = (
            worker.bind_connector_metadata,
            worker.start_load_kv,
            worker.save_kv_layer,
        )
        layers_computed = 0

        def watched_bind(plan: Any) -> None:
            nonlocal layers_computed
            layers_computed = 0
            bind(plan)

        def watched_save_layer(*args: Any, **more: Any) -> None:
            nonlocal layers_computed
            layers_computed += 1
            save_layer(*args, **more)

        def watched_start_loads(*args: Any, **more: Any) -> None:
            plan, begun = side._plan, copies.loads
            start_loads(*args, **more)
            planned = [*plan.loads, *([plan.layered] if plan.layered is not None else [])]
            if planned:
                self._recorded["starts"].append(
                    {
                        "layered": plan.layered is not None,
                        "planned": len(planned),
                        "behind_steps": any(load.behind_steps for load in planned),
                        "begun": copies.loads - begun,
                        "layers_computed": layers_computed,
                    }
                )

        worker.bind_connector_metadata = watched_bind
        worker.save_kv_layer = watched_save_layer
        worker.start_load_kv = watched_start_loads
        worker.get_finished = watched_get_finished
        loads.take_ended = watched_take_ended
        worker.get_block_ids_with_load_errors = watched_get_bad_blocks
        worker.handle_preemptions = watched_prepare

    def _add_stats(self, data: dict[str, Any]) -> None:
        data = data.get("data", data)
        for name, value in data.items():
            if name == "gauges":
                self._gauges = value
            elif isinstance(value, int | float):
                self._counts[name] += value

    # ---- whole generations

    def generate(self, prompts: list[Json], max_tokens: int | list[int] = 1) -> list[Json]:
        """Tokens, their logprobs and the number of cached prompt tokens, for each prompt."""
        if isinstance(max_tokens, int):
            max_tokens = [max_tokens] * len(prompts)
        ids = [self.submit(*each) for each in zip(prompts, max_tokens, strict=True)]
        self.step(until_done=True)
        return self.results(ids)

    def generate_while_handling_an_exception(self, prompts: list[Json]) -> list[Json]:
        """As `generate`, from where a program puts something right."""
        try:
            raise LookupError
        except LookupError:
            return self.generate(prompts)

    def reset(self, running: bool = False, connector: bool = False) -> bool:
        """`reset_prefix_cache` with its two flags.

        With any connector and async scheduling, vLLM preempts the running requests and then says
        that it failed, because it frees their blocks only when the step in flight has ended.
        """
        try:
            return bool(self._llm.reset_prefix_cache(running, connector))
        except RuntimeError as error:
            if not running or "Failed to reset KV cache" not in str(error):
                raise
            return False

    def settle(self) -> None:
        """Lets all saves end, and the scheduler learn of it."""
        for _ in range(100):
            self.generate([{"prompt_token_ids": [5]}])
            if not self._gauges.get("saving"):
                return
        raise AssertionError(f"saves do not end: {self._gauges}")

    # ---- step by step

    def submit(
        self,
        prompt: Json,
        max_tokens: int = 1,
        lora: str | None = None,
        session_id: str | None = None,
        transfer: Json = None,
    ) -> str:
        """Adds a request, if need be for the LoRA adapter in the folder `lora`, or with vLLM's
        `kv_transfer_params`, where its server puts them; returns its id."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        self._request_number += 1
        request_id = f"r{self._request_number}"
        sampling = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            extra_args={"kv_transfer_params": transfer} if transfer is not None else None,
        )
        more: dict[str, Any] = {}
        if lora is not None:
            more["lora_request"] = LoRARequest("adapter", 1, lora)
        if session_id is not None:  # Only newer versions of vLLM have it.
            more["session_id"] = session_id
        self._engine.add_request(request_id, dict(prompt), sampling, **more)
        return request_id

    def step(self, times: int = 1, until_done: bool = False) -> int:
        """Runs steps; returns how many."""
        steps = 0
        while self._engine.has_unfinished_requests() if until_done else steps < times:
            for output in self._engine.step():
                if output.finished:
                    self._outputs[output.request_id] = output_as_json(output)
            steps += 1
            if steps > 5000:
                raise AssertionError(f"5000 steps and still {self.statuses()}")
        return steps

    def abort(self, ids: list[str]) -> None:
        """Aborts requests, as a client does that goes away."""
        self._engine.abort_request(ids)

    def results(self, ids: list[str]) -> list[Json]:
        """What finished requests gave; None for those that did not finish."""
        return [self._outputs.pop(request_id, None) for request_id in ids]

    def statuses(self) -> dict[str, str]:
        """vLLM's status of every request that its scheduler knows."""
        requests = self._scheduler.requests.values()
        return {plain_id(r.request_id): r.status.name for r in requests}

    # ---- looking and meddling

    def counts(self) -> dict[str, float]:
        """Everything counted since the start; gauges as `gauge_…`."""
        gauges = {f"gauge_{name}": value for name, value in self._gauges.items()}
        return {**self._counts, **gauges, "free_blocks": self._free_blocks()}

    def _free_blocks(self) -> int:
        return int(self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def recorded(self, what: str) -> list[Json]:
        """What was seen since the last call: `received`, `bad_blocks` and `events` that the
        connector told vLLM, requests that were `preempted`, or the `starts` of loads."""
        found, self._recorded[what] = self._recorded[what], []
        return found

    def hold_loads(self, hold: bool) -> None:
        """From now on, ended loads are not reported, or are reported again."""
        self._holding = hold

    def limit_loads(self, cells: int) -> None:
        """From now on, so many async loads may be in flight; none is."""
        loads = self._scheduler.connector._as_scheduler._loads
        assert not len(loads), "loads are in flight"
        loads._capacity, loads._free_cells = cells, list(range(cells))

    def starve_copies(self, starve: bool) -> int:
        """Puts the copy threads on the one core that computes, with whatever it leaves over.

        Saves are then still in flight when the next steps begin. Returns the number of threads.
        """
        cores = os.sched_getaffinity(os.getppid())
        mine = {min(cores)} if starve else cores
        found = 0
        for task in Path("/proc/self/task").iterdir():
            tid = int(task.name)
            if COPY_THREAD.match((task / "comm").read_text()):
                found += 1
                os.sched_setscheduler(
                    tid, os.SCHED_IDLE if starve else os.SCHED_OTHER, os.sched_param(0)
                )
            os.sched_setaffinity(tid, mine)
        return found

    def spoil_loads(self, fault: str | None) -> None:
        """From now on, async loads are `lost` on their way to the copy thread, or end `misplaced`:
        not where the scheduler's side looks."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker: Any = get_kv_transfer_group()
        worker._as_worker._worker.fault = fault

    def report_another_segment(self) -> None:
        """The worker reports a segment that is not the scheduler's."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker: Any = get_kv_transfer_group()
        worker._as_worker._report.segments.add(1)

    def break_layer(self, layer: int) -> None:
        """The next step fails when it has computed this layer."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker: Any = get_kv_transfer_group()
        save_layer = worker.save_kv_layer
        index = worker._as_worker._layers

        def failing_save_layer(name: str, *args: Any, **more: Any) -> None:
            save_layer(name, *args, **more)
            if index[name] == layer:
                worker.save_kv_layer = save_layer
                raise RuntimeError("broken by the test")

        worker.save_kv_layer = failing_save_layer

    def scale_layer(self, layer: int, factor: float) -> None:
        """Falsifies one layer of the whole KV cache on the "GPU"."""
        runner = self._core.model_executor.driver_worker.worker.model_runner
        caches = runner.kv_caches
        tensor = list(caches.values() if isinstance(caches, dict) else caches)[layer]
        tensor.mul_(factor)

    def describe(self) -> dict[str, Any]:
        """Which parts of vLLM are in use, so that a test can tell that it tests what it says."""
        config = self._engine.vllm_config
        worker = getattr(self._core.model_executor, "driver_worker", None)
        runner = getattr(getattr(worker, "worker", None), "model_runner", None)
        return {
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "frees_behind_steps": self._scheduler.defer_block_free,
            "batches_at_once": config.max_concurrent_batches,
            "runner": type(runner).__module__,
            "v2": "gpu.model_runner" in type(runner).__module__
            or any("worker.gpu." in base.__module__ for base in type(runner).__mro__),
            "blocks": self._scheduler.kv_cache_config.num_blocks,
        }

    def refusal_of_groups(self) -> str | None:
        """What kvtide has against this engine's groups of KV cache."""
        from kvtide import ConfigError
        from kvtide.geometry import one_group

        try:
            one_group(self._scheduler.kv_cache_config)
        except ConfigError as error:
            return str(error)
        return None

    def close(self) -> None:
        """Shuts the engine down as the end of a program does."""
        self._engine.engine_core.shutdown()


class CountingWorker:
    """kvtide's native worker, which also counts the loads that it was given, and loses them or
    publishes their ends elsewhere if it is told to."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self.loads = 0
        self.fault: str | None = None

    def load_layered(self, *args: Any) -> Any:
        self.loads += 1
        return self._worker.load_layered(*args)

    def load_async(self, *args: Any) -> Any:
        self.loads += 1
        if self.fault == "lost":
            return None
        if self.fault == "misplaced":
            job, cell, *rest = args
            return self._worker.load_async(job, cell ^ 128, *rest)
        return self._worker.load_async(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)


def plain_id(request_id: str) -> str:
    """The id that was submitted; vLLM adds a random suffix inside."""
    return request_id.split("-")[0]


def output_as_json(output: Any) -> Json:
    """What is compared."""
    answer = output.outputs[0]
    tokens = list(answer.token_ids)
    logprobs = [at[token].logprob for at, token in zip(answer.logprobs or (), tokens, strict=True)]
    return {
        "tokens": tokens,
        "logprobs": logprobs,
        "cached": output.num_cached_tokens,
        "reason": answer.finish_reason,
        "transfer": output.kv_transfer_params,
    }


def as_json(event: Any) -> Json:
    """One KV event, with all that is published of it."""
    fields = {name: getattr(event, name) for name in event.__struct_fields__}
    fields["kind"] = type(event).__name__
    return json.loads(json.dumps(fields, default=lambda value: value.hex()))


def answer(engine: Engine | None, line: dict[str, Any]) -> Json:
    """Calls one method."""
    assert engine is not None
    if line["method"].startswith("_"):
        raise ValueError(line["method"])
    return getattr(engine, line["method"])(*line["args"], **line["kwargs"])


def serve(lines: Iterable[str], replies: Any) -> None:
    """Starts the engine that the first line describes, then answers the others in order."""
    engine: Engine | None = None
    for text in lines:
        line = json.loads(text)
        try:
            if line["method"] == "start":
                config = EngineConfig(**line["config"])
                engine = Engine(config, line["model"], line["engine_id"])
                reply = {"value": engine.describe()}
            else:
                reply = {"value": answer(engine, line)}
        except BaseException:
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if line["method"] == "close":
            return
