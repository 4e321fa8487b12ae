"""All loads, from allocation until no rank writes into their blocks any more.

Four channels say what becomes of a load, and they meet here:

* the board, where every rank publishes that its part of an async load has ended;
* the workers' reports: layered loads that have ended, async ones that failed or were cancelled;
* vLLM's bad blocks: a rank's come with its report, so a load that has failed ends when every rank
  on which it failed has reported;
* the counts: the gauge of async loads in flight is the ledger's length.

The rows are pinned as long. An async load goes to the workers in parts, as its blocks come into
host memory; each part has a cell of the board until it ends. A load that has not begun has one
reserved, so that it never waits for another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from kvtide._native import BOARD_CELLS
from kvtide.messages import AsyncLoad, LayeredLoad
from kvtide.pending_load import LoadPart, PendingLoad

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvtide._native import Load, Pool, Segment, Settings
    from kvtide.messages import StepPlan, WorkerReport
    from kvtide.requests import RequestState


Part: TypeAlias = tuple[bytes, int | None, bool]
"""Moves, the first block that will not be loaded, whether no part follows."""


class LoadLedger:
    """See the module's documentation."""

    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        segment: Segment | None,
        ranks: int,
        *,
        idle_blocks: bool,
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._segment = segment
        self._ranks = ranks
        self._idle_blocks = idle_blocks
        """As from `hands_out_idle_blocks`."""
        self._async: dict[str, PendingLoad] = {}
        """By request."""
        self._unbegun = 0
        """How many of them have not begun: each has a cell reserved."""
        self._free_cells = list(range(BOARD_CELLS))
        self._layered_now: list[Load] = []
        """Of the step that is being scheduled."""
        self._layered: dict[int, tuple[list[Load], int]] = {}
        """Job → loads, and the ranks that have not ended it."""
        self._targets: list[int] = []
        """Blocks that this step's loads overwrite."""
        self._next_job = 1

    def use_segment(self, segment: Segment) -> None:
        """Loads go from this segment on; none is in flight."""
        self._segment = segment

    def __len__(self) -> int:
        """Async loads in flight."""
        return len(self._async)

    def __contains__(self, request_id: str) -> bool:
        """Whether an async load of the request is in flight."""
        return request_id in self._async

    def has_room(self) -> bool:
        """Whether there is a board cell for one more async load."""
        return len(self._async) < BOARD_CELLS and len(self._free_cells) > self._unbegun

    def add_async(self, state: RequestState, load: Load, blocks: list[int]) -> None:
        """The request waits outside the batch until `blocks` are there."""
        self._targets.extend(blocks)
        self._async[state.request.request_id] = PendingLoad(state, load, blocks)
        self._unbegun += 1

    def give_up(self, request_id: str) -> None:
        """The request has ended: what of its load has not begun is not needed."""
        pending = self._async.get(request_id)
        if pending is not None:
            pending.given_up = True

    def add_layered(self, load: Load, blocks: list[int]) -> None:
        """The step that is being scheduled reads `blocks`."""
        self._targets.extend(blocks)
        self._layered_now.append(load)

    def take_targets(self) -> list[int]:
        """Blocks that the loads overwrite which were added since the last call."""
        targets, self._targets = self._targets, []
        return targets

    # ---- to the workers

    def plan_step(self, plan: StepPlan, now: float) -> None:
        """Enters the loads that begin, and those that have not ended in time. All saves that the
        step waits for are in the plan."""
        self._cancel_late(plan, now)
        layered, self._layered_now = self._layered_now, []
        unplanned = [each for each in self._async.items() if not each[1].planned]
        if not layered and not unplanned:
            return
        given_up = [each for each in unplanned if each[1].given_up]
        wanted = [each for each in unplanned if not each[1].given_up]
        first = [each for each in wanted if not each[1].begun]
        more = [each for each in wanted if each[1].begun]
        parts = self._pool.plan_loads(
            [*layered, *(pending.load for _, pending in first)],
            [pending.load for _, pending in more],
            len(self._free_cells) - self._unbegun,
        )
        # Steps in flight do not use blocks that vLLM hands out. But the step's stream is what waits
        # for saves that read them.
        behind_steps = not self._idle_blocks or bool(plan.wait_saves)
        # Nor do loads follow the digests of a layered one, unless they are layered too.
        behind_all = behind_steps or bool(self._layered or layered)
        if layered:
            plan.layered = self._begin_layered(layered, parts[: len(layered)], behind_steps)
        for (request_id, pending), part in zip([*first, *more], parts[len(layered) :], strict=True):
            if part is None:
                pending.delayed = True  # It waits for a save that is in flight.
            else:
                plan.loads.append(self._begin_part(request_id, pending, part, behind_all, now))
        for request_id, pending in given_up:
            if not pending.begun or len(self._free_cells) > self._unbegun:
                # It ends as every load does: when workers have ended what they were given.
                part = (b"", None, True)
                plan.loads.append(self._begin_part(request_id, pending, part, behind_all, now))

    def _begin_layered(
        self, loads: list[Load], parts: list[Part | None], behind_steps: bool
    ) -> LayeredLoad:
        whole = [moves for moves, lost, last in filter(None, parts) if lost is None and last]
        # Only complete blocks are offered for a layered load, and they are pinned since.
        assert len(whole) == len(loads), "a layered load lost blocks"
        job = self._take_job()
        self._layered[job] = (loads, self._ranks)
        moves = b"".join(whole)
        # In "sync" a load is part of its step, as in the connectors that it stands for.
        return LayeredLoad(job, moves, behind_steps or self._settings.load == "sync")

    def _begin_part(
        self, request_id: str, pending: PendingLoad, part: Part, behind_all: bool, now: float
    ) -> AsyncLoad:
        moves, lost, last = part
        job, cell = self._take_job(), self._free_cells.pop()
        behind = behind_all or pending.delayed
        # What comes later, comes behind the step in which vLLM gave the blocks.
        pending.delayed = True
        self._unbegun -= not pending.begun
        pending.add(LoadPart(job, cell, lost is not None, looked=now), last=last)
        return AsyncLoad(job, cell, request_id, moves, lost, behind)

    def _cancel_late(self, plan: StepPlan, now: float) -> None:
        limit_s = self._settings.load_timeout_s
        late = {
            request_id: pending
            for request_id, pending in self._async.items()
            if pending.parts and not pending.cancelled and pending.is_late(now, limit_s)
        }
        running = {request_id for request_id, _, ended in self._look_up(late) if not ended}
        for request_id in running:  # What has ended is only not seen yet.
            plan.cancelled.extend(late[request_id].cancel(request_id))

    def _take_job(self) -> int:
        self._next_job += 1
        return self._next_job

    # ---- back from the workers

    def take_report(self, report: WorkerReport) -> None:
        """What ranks have reported of loads."""
        if report.cancelled or report.failed:
            parts = {part.job: (load, part) for load in self._async.values() for part in load.parts}
            for job, ranks in report.cancelled.items():
                if job in parts:
                    parts[job][1].cancelled_ranks += ranks
            for job, ranks in report.failed.items():
                if job in parts:
                    load, part = parts[job]
                    load.fail(part, ranks)
        for job, ranks in report.ended.items():
            loads, missing = self._layered.pop(job)
            if missing > ranks:
                self._layered[job] = (loads, missing - ranks)

    def take_ended(self) -> set[str]:
        """Requests whose async load has ended, well or not, on all ranks."""
        begun = {request_id: each for request_id, each in self._async.items() if each.parts}
        for request_id, part, has_ended in self._look_up(begun):
            if has_ended:
                begun[request_id].parts.remove(part)
                self._free_cells.append(part.cell)
        ended = {request_id for request_id, each in self._async.items() if each.has_ended()}
        for request_id in ended:
            del self._async[request_id]
        return ended

    def _look_up(self, loads: dict[str, PendingLoad]) -> list[tuple[str, LoadPart, bool]]:
        """The loads' parts, and whether each has ended."""
        parts = [(name, load, part) for name, load in loads.items() for part in load.parts]
        if not parts or self._segment is None:
            return []
        ends = self._segment.ended_loads([(part.cell, part.job) for _, _, part in parts])
        return [
            (
                name,
                part,
                part.cancelled_ranks >= self._ranks
                if load.cancelled
                else part.has_ended(failures, self._ranks),
            )
            for (name, load, part), failures in zip(parts, ends, strict=True)
        ]


def hands_out_idle_blocks(config: VllmConfig, kv_cache: KVCacheConfig) -> bool:
    """Whether nothing that is on the engine's stream may still use the blocks that vLLM gives to a
    request for a load.

    Both supported versions keep the blocks of a finished or preempted request from others until the
    last step that may use them has ended, for connectors that load; a "kv_producer" does not, as
    vLLM sees it. And blocks of a layered load are zeroed first, in its own step, where vLLM 0.32
    does so (mixed precision).
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    keeps = hasattr(Scheduler, "_drain_deferred_frees") and config.kv_transfer_config.is_kv_consumer
    return keeps and not kv_cache.needs_kv_cache_zeroing
