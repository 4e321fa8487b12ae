"""What is saved, and which saves a step must wait for.

* A save is planned for the step that computes a block (the workers copy each layer when the forward
  pass has written it), or, when its request finishes, for the next step.
* vLLM may hand a block to another request while it is still being copied out. Every step names the
  blocks that it overwrites; the saves that read them end before the step begins. Nothing is held
  back from vLLM's own block pool: eviction, preemption and `reset_prefix_cache` are as without us.

A running request that completes no block costs one comparison in a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.sched.output import SchedulerOutput

    from kvtide._native import Pool, Settings
    from kvtide.events import EventLog
    from kvtide.messages import StepPlan
    from kvtide.requests import RequestState


class Saves:
    """See the module's documentation."""

    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        events: EventLog | None,
        block_tokens: int,
        *,
        consumer: bool,
    ) -> None:
        self._settings = settings
        self._consumer = consumer
        """Whether the engine saves nothing, because others compute for it."""
        self._pool = pool
        self._events = events
        self._block_tokens = block_tokens
        self._epoch = 0
        """Grows when what live requests compute must not be saved any more."""
        self._finished: list[tuple[int, bytes]] = []
        """Saves of requests that have finished since the last step."""

    def begin(self, state: RequestState) -> None:
        """The request begins, or begins anew: nothing that it holds is from before."""
        state.epoch = self._epoch

    def end_epoch(self) -> None:
        """Nothing more is saved of a request until it begins anew."""
        self._epoch += 1

    def clear(self) -> bool:
        """Drops everything; whether the pool knows. Saves in flight end and are then forgotten;
        requests that have begun save nothing more."""
        self.end_epoch()
        known = self._pool.clear()
        if self._events is not None:
            # What is saved from now on must not be mistaken for what was cleared.
            self._events.collect(self._pool)
        return known

    def plan_step(
        self,
        plan: StepPlan,
        output: SchedulerOutput,
        requests: Mapping[str, RequestState],
        overwritten: list[int],
    ) -> None:
        """Enters the saves that the workers begin and those that they wait for. `overwritten` has
        the blocks that the step's loads overwrite; what it computes is added."""
        saving = self._pool.poll()
        advancing = self._follow_blocks(output, requests, overwritten)
        plan.save_now, self._finished = self._finished, []
        if saving and overwritten:
            # Before this step's own saves are planned: their blocks are complete afterwards.
            plan.wait_saves = self._pool.saves_reading(overwritten)
        plan.save_step = self._plan(advancing)

    def finish(self, state: RequestState) -> None:
        """Plans the save of what the request computed and no step has saved."""
        request = state.request
        # The last token was sampled and never computed.
        computed = min(request.num_computed_tokens, request.num_tokens - 1)
        self._finished += self._plan([(state, computed)])
        state.sequence.settle(self._pool)

    def take_events(self) -> list[KVCacheEvent]:
        """What the pool has stored and dropped since the last call."""
        return [] if self._events is None else self._events.take(self._pool)

    def _follow_blocks(
        self,
        output: SchedulerOutput,
        requests: Mapping[str, RequestState],
        overwritten: list[int],
    ) -> list[tuple[RequestState, int]]:
        """Follows the block tables; returns the requests that complete a block in this step, with
        the tokens that will then be computed."""
        advancing = []
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

    def _plan(self, advancing: list[tuple[RequestState, int]]) -> list[tuple[int, bytes]]:
        """The saves of the blocks that are complete when so many tokens of each are computed."""
        due = []
        for state, computed_tokens in advancing:
            blocks = self._take_complete(state, computed_tokens)
            if blocks:
                state.hash_known_tokens()
                due.append((state, state.saved, blocks))
        if not due:
            return []
        plans = self._pool.plan_saves(
            [(state.sequence, first, blocks) for state, first, blocks in due]
        )
        jobs = []
        for (state, first, _), (job, moves, covered) in zip(due, plans, strict=True):
            state.saved = first + covered  # What was not accepted is tried with the next block.
            if job:
                jobs.append((job, moves))
        if jobs and self._events is not None:
            # What the plans have evicted is noted before what they save.
            self._events.collect(self._pool)
            for (state, first, _), (job, _, _) in zip(due, plans, strict=True):
                if job:
                    self._events.note_save(state.request, state.sequence, first, state.saved)
        return jobs

    def _take_complete(self, state: RequestState, computed_tokens: int) -> list[int]:
        """The blocks behind what is saved that are complete with `computed_tokens`."""
        if state.epoch != self._epoch or self._consumer:
            return []
        # Under async scheduling a token is computed before the scheduler knows it.
        known = min(computed_tokens, state.request.num_tokens)
        state.boundary = (known // self._block_tokens + 1) * self._block_tokens
        if not self._settings.save_generated:
            known = min(known, state.request.num_prompt_tokens)
        if state.asked.save_tokens is not None:
            known = min(known, state.asked.save_tokens)
        return state.blocks[state.saved : known // self._block_tokens]
