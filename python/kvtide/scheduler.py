"""The scheduler's side: what to load, what to save, and what must wait for what.

Called on vLLM's scheduler thread, several times a step; what it costs is added to every step, so a
running request that completes no block costs one comparison.

Four rules keep blocks whole:

* A save is planned for the step that computes a block (the workers copy each layer when the forward
  pass has written it), or, when its request finishes, for the next step.
* vLLM may hand a block to another request while it is still being copied out. Every step names the
  blocks that it overwrites; the saves that read them end before the step begins. Nothing is held
  back from vLLM's own block pool: eviction, preemption and `reset_prefix_cache` are as without us.
* A layered load cannot be taken back, so only blocks that are complete in host memory are offered
  for one. All else loads async, where a failure is reported to vLLM and recomputed. If damage is
  found in a layered load after all, everything that may come from it is forgotten (`_contain`).
* Blocks of a request whose load has not ended are never saved.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvtide._native import LOAD_PLACES, CostModel, Load, Pool, Sequence
from kvtide.containment import Containment
from kvtide.events import EventLog
from kvtide.geometry import Geometry, read_settings
from kvtide.loads import PendingLoad
from kvtide.log import logger
from kvtide.messages import AsyncLoad, LayeredLoad, StepPlan, WorkerReport
from kvtide.stats import Stats

if TYPE_CHECKING:
    from vllm.config import SchedulerConfig, VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

GAUGES_PERIOD_S = 1.0
"""Gauges change slowly and cost a message each time they are reported."""
EXPIRY_PERIOD_S = 1.0
"""Between looks for matches that were never used."""


@dataclass(slots=True, eq=False)
class RequestState:
    """One request, from its arrival to its end."""

    request: Request
    sequence: Sequence
    blocks: list[int] = field(default_factory=list)
    """The engine's blocks of this request, in order."""
    saved: int = 0
    """Leading blocks that need no more saving."""
    boundary: int = 0
    """Tokens at which the next block is complete."""
    match: tuple[int, int, bool] | None = None
    """The last answer to vLLM: first block, number of blocks, whether async."""
    epoch: int = 0
    """The scheduler's epoch in which the request last began."""
    load_failed: bool = False
    """Whether its load has failed: it computes then, rather than to try the same again."""
    resident: int = 0
    """Leading tokens that the engine had itself when it last asked."""

    def let_go(self) -> None:
        """Nothing is to be loaded for it now."""
        self.match = None
        self.sequence.release()


class SchedulerSide:
    """See the module's documentation."""

    def __init__(self, config: VllmConfig, kv_cache: KVCacheConfig) -> None:
        settings = read_settings(config)
        geometry = Geometry.of(config, kv_cache, settings)
        self._settings = settings
        self._block_tokens = geometry.block_tokens
        self._ranks = geometry.ranks
        self._shard_bytes = geometry.layers * geometry.row_layer_bytes
        self._step_tokens, self._prompt_tokens = step_limits(config.scheduler_config)
        self._cost = CostModel()
        self._segment = geometry.segment(settings)
        self._events = EventLog.of(config, kv_cache, geometry.block_tokens)
        self._namespace = geometry.namespace(config, settings)
        self._pool = Pool(settings, self._segment, self._events is not None)
        self._requests: dict[str, RequestState] = {}
        self._loads: dict[str, PendingLoad] = {}
        self._places = list(range(LOAD_PLACES))
        """Places of the board that no load has."""
        self._layered_now: list[Load] = []
        self._layered_blocks = 0
        """How many blocks those load."""
        self._admitted: list[int] = []
        """Prompt tokens that each request computes which was admitted to this step."""
        self._layered: dict[int, tuple[list[Load], int]] = {}
        """Layered load job → its leases, and the ranks that have not ended it."""
        self._finished_saves: list[tuple[int, bytes]] = []
        self._loading_into: list[int] = []
        """Blocks that this step's loads overwrite."""
        self._running: set[str] = set()
        """Requests of the last step that have not finished since."""
        self._epoch = 0
        """Grows when what live requests compute must not be saved any more."""
        self._containment = Containment(geometry.block_tokens)
        self._strangers = False
        """Whether the workers have another segment: then nothing is loaded or saved."""
        self._next_job = 1
        self._stats = Stats()
        self._reported_counters: dict[str, int] = {}
        self._next_gauges = 0.0
        self._next_expiry = 0.0
        self._hands_out_idle = hands_out_idle_blocks(kv_cache)
        self._certain = config.kv_transfer_config.kv_load_failure_policy != "recompute"
        """Whether a load that fails would fail its request: then only verified blocks match."""
        self._verifies = self._certain or settings.verify == "always"
        if self._certain:
            logger.warning(
                'kv_load_failure_policy is not "recompute": every match is verified on the '
                "scheduler's thread, and blocks still being saved are not used. Set it to "
                '"recompute" to avoid both'
            )

    def bind_gpu_block_pool(self, block_pool: BlockPool) -> None:
        """Takes hold of vLLM's own prefix cache, to clear it when it holds damaged bytes."""
        self._containment.bind(block_pool)

    # ---- requests

    def on_new_request(self, request: Request) -> None:
        """Hashes the prompt while the request waits for its turn."""
        if request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None:
            return  # Its bytes are not determined by token ids.
        if request.resumable:
            return  # A session's later chunks bring media items that are not known now.
        lora = request.lora_request
        sequence = self._namespace.sequence(
            self._settings.tenant,
            request.cache_salt,
            None if lora is None else (lora.lora_name, lora.lora_path),
            [
                (item.identifier, item.mm_position.offset, item.mm_position.length)
                for item in request.mm_features
            ],
        )
        sequence.extend(request.prompt_token_ids)
        self._requests[request.request_id] = RequestState(request, sequence)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that can be loaded behind the `num_computed_tokens` that the engine has itself."""
        state = self._requests.get(request.request_id)
        if state is None or self._strangers:
            return 0, False
        state.resident = num_computed_tokens
        state.epoch = self._epoch  # It begins anew: nothing that it holds is from before.
        self._containment.release(request.request_id)
        if self._containment.doubts(num_computed_tokens):
            return None, False
        if request.skip_reading_prefix_cache or state.load_failed:
            state.let_go()
            return 0, False
        first = num_computed_tokens // self._block_tokens
        answer = self._match(state, first)
        if answer is None:
            # More loads would only queue behind each other while holding blocks. It is asked again
            # in the next step.
            state.let_go()
            self._stats.count("deferred_lookups", 1)
            return None, False
        blocks, asynchronous = answer
        if blocks == 0:
            state.let_go()
            return 0, False
        state.match = (first, blocks, asynchronous)
        return blocks * self._block_tokens, asynchronous

    def _match(self, state: RequestState, first: int) -> tuple[int, bool] | None:
        """How many blocks can be loaded from `first` on, and whether async; None if the request has
        to wait for a place to load.

        vLLM asks for the request at the head of its queue in every step. The sequence keeps what it
        has matched and verified for the last answer; what has to wait anyway is not verified.
        """
        tokens = state.request.num_tokens
        # At least one token must be computed, for its logits.
        last = (tokens - 1) // self._block_tokens
        if first >= last:
            return 0, False
        self._hash_known_tokens(state)
        pool, certain = self._pool, self._certain
        places = len(self._loads) < LOAD_PLACES
        if not places and self._loads_only_async():
            # Many may wait like this, and all of them are asked.
            return None if state.sequence.is_held(pool, first, certain) else (0, False)
        # An async load may bring the last token's block too: vLLM computes that token again when
        # the load has ended, in a step of one token, which a decode graph can run.
        end = tokens // self._block_tokens
        blocks, complete = state.sequence.match_blocks(pool, first, end, certain)
        layered = min(blocks, last - first)
        rest = tokens - (first + layered) * self._block_tokens
        asynchronous = not complete or self._prefers_async(layered, rest)
        if asynchronous and not places and blocks:
            return None
        if not asynchronous:
            blocks = layered
        if self._verifies and complete:
            blocks = state.sequence.verify(pool, blocks)
        return blocks, asynchronous

    def _loads_only_async(self) -> bool:
        """Whether anything that is loaded now is loaded async."""
        if self._settings.load != "auto":
            return self._settings.load == "async"
        return bool(self._loads)  # It would share the link with those.

    def _prefers_async(self, blocks: int, rest: int) -> bool:
        """How to load so many blocks of a prompt of which `rest` tokens are to be computed."""
        if self._loads_only_async():
            return True
        if self._settings.load != "auto":
            return False
        # Others would wait with the request for what the step does not hide: those that run, and
        # those that were admitted to the same step.
        alone = not self._running and not self._admitted
        return not alone and not self._cost.hides(*self._layered_cost(blocks, rest))

    def _layered_cost(self, blocks: int, rest: int) -> tuple[int, int, bool]:
        """Bytes that this step's layered loads copy on each rank if these are added, prompt tokens
        that the step computes then, and whether it also computes what is not new in it."""
        tokens = min(sum(self._admitted) + min(rest, self._prompt_tokens), self._step_tokens)
        loading = (self._layered_blocks + blocks) * self._shard_bytes
        return loading, tokens, bool(self._running)

    def _note_admission(self, request: Request, computed: int) -> None:
        """The step computes a request of which so many tokens need not be computed."""
        self._admitted.append(min(request.num_tokens - computed, self._prompt_tokens))

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """The request has its blocks; `num_external_tokens` of them are to be loaded."""
        state = self._requests.get(request.request_id)
        if state is None:
            # What the engine has of it is not known: it is one of the others, and hides nothing.
            self._note_admission(request, request.num_tokens)
            return
        state.blocks = list(blocks.get_block_ids()[0])
        match, state.match = state.match, None
        if num_external_tokens == 0:
            # vLLM has noted as computed what an async load has brought, but not yet its own hit.
            self._note_admission(request, max(state.resident, request.num_computed_tokens))
            state.sequence.release()
            state.load_failed = False
            return
        assert match is not None, "vLLM loads what was not matched"
        first, _, asynchronous = match
        count = num_external_tokens // self._block_tokens
        targets = state.blocks[first : first + count]
        load = state.sequence.begin_load(self._pool, first, targets)
        assert load is not None, "a match is held until it is used"
        self._loading_into.extend(targets)
        if asynchronous:
            self._loads[request.request_id] = PendingLoad(load, targets)
        else:
            self._layered_now.append(load)
            self._layered_blocks += count
            self._note_admission(request, (first + count) * self._block_tokens)
        self._stats.count("hit_tokens", num_external_tokens)
        kind = "loaded_tokens_async" if asynchronous else "loaded_tokens_layered"
        self._stats.count(kind, num_external_tokens)

    def request_finished(self, request: Request) -> None:
        """Plans the save of what the request computed and no step has saved; forgets it."""
        self._running.discard(request.request_id)
        self._containment.release(request.request_id)
        state = self._requests.pop(request.request_id, None)
        if state is None or request.request_id in self._loads:
            return
        # The last token was sampled and never computed.
        computed = min(request.num_computed_tokens, request.num_tokens - 1)
        self._plan_save(state, computed, self._finished_saves)
        state.sequence.settle(self._pool)

    # ---- steps

    def build_connector_meta(self, output: SchedulerOutput) -> StepPlan:
        """Everything that the workers have to do in this step."""
        pool = self._pool
        saving = pool.poll()
        overwritten, self._loading_into = self._loading_into, []
        advancing = self._note_blocks(output, overwritten)
        plan = StepPlan(save_now=self._finished_saves)
        self._finished_saves = []
        if saving and overwritten:
            # Before this step's own saves are planned: their blocks are complete afterwards.
            plan.wait_saves = pool.saves_reading(overwritten)
        for state, tokens in advancing:
            self._plan_save(state, tokens, plan.save_step)
        self._plan_loads(plan)
        self._containment.end_step(output.num_scheduled_tokens)
        self._observe_step(output)
        self._expire_matches()
        return plan

    def _observe_step(self, output: SchedulerOutput) -> None:
        if not self._running:
            self._cost.idle()
        loads, self._layered_blocks = self._layered_blocks > 0, 0
        self._admitted.clear()
        self._running = set(output.num_scheduled_tokens)
        # A decoding request computes one token.
        prompt_tokens = output.total_num_scheduled_tokens - len(self._running)
        self._cost.observe_step(time.monotonic(), prompt_tokens, loads)

    def _note_blocks(
        self, output: SchedulerOutput, overwritten: list[int]
    ) -> list[tuple[RequestState, int]]:
        """Follows the block tables; returns the requests that complete a block in this step, with
        the tokens that will then be computed."""
        advancing = []
        requests = self._requests
        scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            blocks = new.block_ids[0]
            overwritten.extend(blocks[new.num_computed_tokens // self._block_tokens :])
            state = requests.get(new.req_id)
            if state is None:
                continue
            state.blocks = list(blocks)
            state.saved = state.boundary = 0
            advancing.append((state, new.num_computed_tokens + scheduled[new.req_id]))
        cached = output.scheduled_cached_reqs
        resumed = cached.resumed_req_ids
        for request_id, new_blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            state = requests.get(request_id)
            if new_blocks is not None:
                added = new_blocks[0]
                if request_id in resumed:
                    overwritten.extend(added[computed // self._block_tokens :])
                    if state is not None:
                        state.blocks = list(added)
                        state.saved = state.boundary = 0
                else:
                    overwritten.extend(added)
                    if state is not None:
                        state.blocks.extend(added)
            if state is None:
                continue
            tokens = computed + scheduled[request_id]
            if tokens >= state.boundary:
                advancing.append((state, tokens))
        return advancing

    def _plan_save(
        self, state: RequestState, computed_tokens: int, jobs: list[tuple[int, bytes]]
    ) -> None:
        """Appends the save of the blocks that are complete with `computed_tokens`."""
        if state.epoch != self._epoch or self._strangers:
            return
        # Under async scheduling a token is computed before the scheduler knows it.
        known = min(computed_tokens, state.request.num_tokens)
        state.boundary = (known // self._block_tokens + 1) * self._block_tokens
        if not self._settings.save_generated:
            known = min(known, state.request.num_prompt_tokens)
        end = known // self._block_tokens
        first, blocks = state.saved, state.blocks[state.saved : end]
        if not blocks:
            return
        self._hash_known_tokens(state)
        job, moves, covered = state.sequence.plan_save(self._pool, first, blocks)
        state.saved = first + covered  # What was not accepted is tried again with the next block.
        if job:
            jobs.append((job, moves))
            if self._events is not None:
                self._events.collect(self._pool)
                self._events.note_save(state.request, state.sequence, first, state.saved)

    def _plan_loads(self, plan: StepPlan) -> None:
        pool = self._pool
        # Steps in flight do not use blocks that vLLM hands out. But the step's stream is what waits
        # for saves that read them.
        behind_steps = not self._hands_out_idle or bool(plan.wait_saves)
        # Nor do loads follow the digests of a layered one, unless they are layered too.
        behind_all = behind_steps or bool(self._layered or self._layered_now)
        if self._layered_now:
            loads, self._layered_now = self._layered_now, []
            plans = [load.plan(pool) for load in loads]
            # Only complete blocks are offered for a layered load, and they are pinned since.
            assert all(p is not None and not p[1] for p in plans), "a layered load lost blocks"
            job = self._take_job()
            moves = b"".join(moves for moves, _ in filter(None, plans))
            # In "sync" a load is part of its step, as in the connectors that it stands for.
            behind = behind_steps or self._settings.load == "sync"
            plan.layered = LayeredLoad(job, moves, behind)
            self._layered[job] = (loads, self._ranks)
        now = time.monotonic()
        for request_id, pending in self._loads.items():
            if pending.job:
                late = pending.is_late(now, self._settings.load_timeout_s)
                # What has ended is only not seen yet.
                if (
                    late
                    and not pending.cancelled
                    and not pending.has_ended(self._segment, self._ranks)
                ):
                    plan.cancelled.append(pending.cancel(request_id))
                    if request_id in self._requests:
                        self._requests[request_id].load_failed = True
                continue
            planned = pending.load.plan(pool)
            if planned is None:
                pending.delayed = True
                continue  # It waits for a save that is in flight.
            moves, lost = planned
            if lost and request_id in self._requests:
                self._requests[request_id].load_failed = True
            pending.job, pending.place = self._take_job(), self._places.pop()
            pending.looked = now
            pending.lost = bool(lost)
            behind = behind_all or pending.delayed
            plan.loads.append(
                AsyncLoad(pending.job, pending.place, request_id, moves, lost, behind)
            )

    def update_connector_output(self, output: KVConnectorOutput) -> None:
        """Workers have ended loads: their blocks need no pins any more."""
        if isinstance(output.kv_connector_worker_meta, WorkerReport):
            self._take_report(output.kv_connector_worker_meta)
        ended = self.take_ended_loads()
        if ended:
            output.finished_recving = (output.finished_recving or set()) | ended

    def take_ended_loads(self) -> set[str]:
        """Requests whose async load has ended, well or not, on all ranks."""
        ended = set()
        for request_id, pending in self._loads.items():
            if pending.job and pending.has_ended(self._segment, self._ranks):
                ended.add(request_id)
                self._places.append(pending.place)
        for request_id in ended:
            del self._loads[request_id]
        return ended

    def _take_report(self, report: WorkerReport) -> None:
        self._check_segments(report.segments)
        if report.cancelled:
            for pending in self._loads.values():
                pending.cancelled_ranks += report.cancelled.get(pending.job, 0)
        for job, ranks in report.ended.items():
            loads, missing = self._layered.pop(job)
            if missing > ranks:
                self._layered[job] = (loads, missing - ranks)
        for request_id, ranks in report.failed.items():
            if request_id in self._loads:
                self._loads[request_id].failures_reported += ranks
            if request_id in self._requests:
                self._requests[request_id].load_failed = True
        if report.damaged:
            self._pool.drop_damaged(sorted(report.damaged))
            logger.warning("dropped %d corrupt rows (checksum mismatch)", len(report.damaged))
        if report.load_rate is not None:
            self._cost.set_load_rate(report.load_rate)
        if report.spoiled:
            self._contain()

    def _check_segments(self, nonces: set[int]) -> None:
        """Workers that have another segment load nothing that was saved, and nobody sees what they
        save. Opening a segment excludes it; this notices it all the same."""
        if not nonces <= {self._segment.nonce} and not self._strangers:
            self._strangers = True
            logger.error(
                "engine_id: the workers do not have this scheduler's pool %s, so nothing is loaded "
                "or saved from now on. Give each engine its own `engine_id` and start it again",
                self._segment.path,
            )

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
        self._forget_everything()
        self._containment.begin(self._requests)

    def _forget_everything(self) -> None:
        self._epoch += 1
        self._pool.clear()
        if self._events is not None:
            # What is saved from now on must not be mistaken for what was cleared.
            self._events.collect(self._pool)

    def _hash_known_tokens(self, state: RequestState) -> None:
        hashed = state.sequence.tokens
        if hashed < state.request.num_tokens:
            state.sequence.extend(state.request.all_token_ids[hashed:])

    def _take_job(self) -> int:
        self._next_job += 1
        return self._next_job

    def _expire_matches(self) -> None:
        now = time.monotonic()
        if now < self._next_expiry:
            return
        self._next_expiry = now + EXPIRY_PERIOD_S
        for state in self._requests.values():
            if state.match is not None and state.sequence.expire():
                state.match = None

    # ---- the rest

    def take_events(self) -> list[KVCacheEvent]:
        """What the pool has stored and dropped since the last call."""
        return [] if self._events is None else self._events.take(self._pool)

    def take_stats(self) -> Stats | None:
        """What was counted since the last call, or None."""
        now = time.monotonic()
        if now >= self._next_gauges:
            self._next_gauges = now + GAUGES_PERIOD_S
            counters = self._pool.counters()
            for name, value in counters.items():
                self._stats.count(name, value - self._reported_counters.get(name, 0))
            self._reported_counters = counters
            self._stats.gauge(self._pool.gauges() | {"loads": len(self._loads)})
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, Stats()
        return stats

    def reset_cache(self) -> bool:
        """Drops everything. Saves in flight end and are then forgotten, and requests that began
        before save nothing more: the weights may be others now."""
        self._forget_everything()
        logger.info("the pool was cleared")
        return True

    def shutdown(self) -> None:
        """Lets go of the pool; the last process of the engine to do so removes the segment."""
        self._requests.clear()
        self._loads.clear()
        self._layered.clear()
        self._layered_now.clear()
        for name in ("_pool", "_segment"):
            self.__dict__.pop(name, None)


def step_limits(config: SchedulerConfig) -> tuple[int, int]:
    """Tokens that a step computes at most, and of one prompt if the step computes others too."""
    step = config.max_num_scheduled_tokens or config.max_num_batched_tokens
    # vLLM can be told to raise this threshold where few requests wait. Then the step computes more
    # than is predicted, and a load is async that need not be.
    return step, min(config.long_prefill_token_threshold or step, step)


def hands_out_idle_blocks(kv_cache: KVCacheConfig) -> bool:
    """Whether nothing that is on the engine's stream may still use the blocks that vLLM gives to a
    request for a load.

    Both supported versions keep the blocks of a finished or preempted request from others until the
    last step that may use them has ended, for connectors that load. But blocks of a layered load
    are zeroed first, in its own step, where vLLM 0.32 does so (mixed precision).
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    return hasattr(Scheduler, "_drain_deferred_frees") and not kv_cache.needs_kv_cache_zeroing
