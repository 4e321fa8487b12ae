"""The scheduler's side: what to load, what to save, and what must wait for what.

Called on vLLM's scheduler thread, several times a step; what it costs is added to every step. This
module maps the hooks to those who do the work:

* `requests.py`: the live requests, their hashes and blocks;
* `matching.py`: what can be loaded for a request, and how, by what the step costs (`cost.py`);
* `loads.py`: every load until it has ended;
* `saves.py`: what is saved, and what a step waits for;
* `containment.py`: what may come from damaged bytes;
* `pool_memory.py`: which memory the pool has, and whether the workers have it.

Two rules concern several of them. Blocks of a request whose load has not ended are never saved. If
damage is found in a layered load, everything that may come from it is forgotten (`_contain`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from kvtide._native import Pool
from kvtide.containment import Containment
from kvtide.cost import StepCost, step_limits
from kvtide.events import EventLog
from kvtide.geometry import Geometry, attach, read_settings
from kvtide.loads import LoadLedger, hands_out_idle_blocks
from kvtide.log import logger
from kvtide.matching import Matching
from kvtide.messages import StepPlan, WorkerReport
from kvtide.pool_memory import PoolMemory
from kvtide.requests import Requests
from kvtide.saves import Saves
from kvtide.stats import Stats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

GAUGES_PERIOD_S = 1.0
"""Gauges change slowly and cost a message each time they are reported."""


class SchedulerSide:
    """See the module's documentation."""

    def __init__(self, config: VllmConfig, kv_cache: KVCacheConfig) -> None:
        settings = read_settings(config)
        geometry = Geometry.of(config, kv_cache, settings)
        block_tokens = geometry.block_tokens
        events = EventLog.of(config, kv_cache, block_tokens)
        daemon = geometry.daemon(config, settings)
        segment = attach(daemon, settings) if daemon is not None else geometry.segment(settings)
        if segment is not None:
            pool = Pool(settings, segment, events is not None)
        else:
            assert daemon is not None, "an engine's own segment is there"
            pool = Pool.waiting(settings, daemon)
        self._pool = pool
        self._memory = PoolMemory(pool, segment, daemon)
        namespace = geometry.namespace(config, settings)
        self._stats = Stats()
        self._reported_counters: dict[str, int] = {}
        self._next_gauges = 0.0
        self._requests = Requests(settings, namespace)
        shard_bytes = geometry.layers * geometry.row_layer_bytes
        self._cost = StepCost(shard_bytes, *step_limits(config.scheduler_config))
        self._loads = LoadLedger(
            settings,
            pool,
            segment,
            geometry.ranks,
            idle_blocks=hands_out_idle_blocks(config, kv_cache),
        )
        self._matching = Matching(
            settings,
            pool,
            self._loads,
            self._cost,
            self._stats,
            block_tokens=block_tokens,
            certain=config.kv_transfer_config.kv_load_failure_policy != "recompute",
        )
        self._consumer = not config.kv_transfer_config.is_kv_producer
        self._saves = Saves(settings, pool, events, block_tokens, consumer=self._consumer)
        self._engine_id, self._ranks = geometry.instance, geometry.ranks
        self._containment = Containment(block_tokens)

    def bind_gpu_block_pool(self, block_pool: BlockPool) -> None:
        """Takes hold of vLLM's own prefix cache, to clear it when it holds damaged bytes."""
        self._containment.bind(block_pool)

    # ---- requests

    def on_new_request(self, request: Request) -> None:
        """Hashes the prompt while the request waits for its turn."""
        self._memory.look()
        self._requests.add(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that can be loaded behind the `num_computed_tokens` that the engine has itself."""
        state = self._requests.get(request.request_id)
        if state is None:
            return 0, False
        self._saves.begin(state)
        self._containment.release(request.request_id)
        if self._containment.doubts(num_computed_tokens):
            return None, False
        return self._matching.offer(state, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """The request has its blocks; `num_external_tokens` of them are to be loaded."""
        state = self._requests.get(request.request_id)
        if state is None:
            # What the engine has of it is not known: it is one of the others, and hides nothing.
            self._cost.admit(0)
            return
        state.blocks = list(blocks.get_block_ids()[0])
        self._matching.use_match(state, num_external_tokens)

    def request_finished(self, request: Request) -> dict[str, Any] | None:
        """Plans the save of what the request computed and no step has saved; forgets it. What a
        router of prefill and decode is told, if it has asked."""
        self._cost.forget(request.request_id)
        self._containment.release(request.request_id)
        state = self._requests.pop(request.request_id)
        if request.request_id in self._loads:
            self._loads.give_up(request.request_id)
        elif state is not None:
            self._saves.finish(state)
        if state is None or self._consumer:
            return None
        return state.asked.answer(request, self._engine_id, self._ranks)

    # ---- steps

    def build_connector_meta(self, output: SchedulerOutput) -> StepPlan:
        """Everything that the workers have to do in this step."""
        plan = StepPlan()
        requests = self._requests.states
        if self._pool.has_new_memory():
            self._change_memory()
        self._memory.look()
        self._memory.plan_step(plan)
        self._saves.plan_step(plan, output, requests, self._loads.take_targets())
        now = time.monotonic()
        self._loads.plan_step(plan, now)
        self._containment.end_step(output.num_scheduled_tokens)
        self._cost.end_step(output, now)
        self._requests.expire_matches(now)
        return plan

    def update_connector_output(self, output: KVConnectorOutput) -> None:
        """Workers have ended loads: their blocks need no pins any more."""
        if isinstance(output.kv_connector_worker_meta, WorkerReport):
            self._take_report(output.kv_connector_worker_meta)
        ended = self._loads.take_ended()
        if ended:
            output.finished_recving = (output.finished_recving or set()) | ended

    def _take_report(self, report: WorkerReport) -> None:
        if self._memory.refuse_strangers(report.segments):
            self._saves.end_epoch()  # No request begins any more.
        self._loads.take_report(report)
        if report.damaged:
            self._pool.drop_damaged(sorted(report.damaged))
            logger.warning("dropped %d corrupt rows (checksum mismatch)", len(report.damaged))
        if report.load_rate is not None:
            self._cost.set_load_rate(report.load_rate)
        if report.spoiled:
            self._contain()

    def _change_memory(self) -> None:
        """The daemon has come, or has made its memory anew: goes over to that, as soon as no load
        and no save uses what there was."""
        states = self._requests.states.values()
        for state in states:
            state.let_go()  # vLLM asks again.
        if self._memory.change() and self._memory.segment is not None:
            self._loads.use_segment(self._memory.segment)
            for state in states:
                state.saved = state.boundary = 0

    def _contain(self) -> None:
        """Damaged bytes have reached the engine's KV cache, by a layered load. Everything that may
        have been computed from them is forgotten: the pool, vLLM's prefix cache, and what live
        requests compute from now on. They go on; those that share the damaged blocks may be
        wrong."""
        logger.error(
            "a layered load brought damaged bytes into vLLM's KV cache; the pool and the prefix "
            'cache are dropped. Set "verify": "always" or "load": "async", and check the '
            "host's memory"
        )
        self._saves.clear()
        self._containment.begin(self._requests.states)

    # ---- the rest

    def take_events(self) -> list[KVCacheEvent]:
        """What the pool has stored and dropped since the last call."""
        return self._saves.take_events()

    def take_stats(self) -> Stats | None:
        """What was counted since the last call, or None."""
        now = time.monotonic()
        if now >= self._next_gauges:
            self._next_gauges = now + GAUGES_PERIOD_S
            for notice in self._pool.take_notices():
                logger.warning("%s", notice)
            counters = self._pool.counters()
            for name, value in counters.items():
                self._stats.count(name, value - self._reported_counters.get(name, 0))
            self._reported_counters = counters
            more = {"loads": len(self._loads), "usable": int(self._pool.is_usable)}
            self._stats.gauge(self._pool.gauges() | more)
        return self._stats.take()

    def reset_cache(self) -> bool:
        """Drops everything. Requests that began before save nothing more: the weights may be others
        now."""
        if self._saves.clear():
            logger.info("the pool was cleared")
            return True
        logger.error(
            "the daemon is gone: this engine finds nothing of before any more, but its pool is "
            "cleared only when it is attached again. `kvtide purge` does it without this engine"
        )
        return False

    def shutdown(self) -> None:
        """Lets go of requests, loads and the pool; the last process of the engine to do so removes
        the segment."""
        self.__dict__.clear()
