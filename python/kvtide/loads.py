"""All loads, from allocation until no rank writes into their blocks any more.

Four channels say what becomes of a load, and they meet here:

* the board, where every rank publishes that its part of an async load has ended;
* the workers' reports: layered loads that have ended, async ones that failed or were cancelled;
* vLLM's bad blocks: a rank's come with its report, so a load that has failed ends when every rank
  on which it failed has reported;
* the counts: the gauge of async loads in flight is the ledger's length.

The rows are pinned as long. An async load has a cell of the board from the step that gives it to
the workers until it ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtide._native import BOARD_CELLS
from kvtide.messages import AsyncLoad, LayeredLoad
from kvtide.pending_load import PendingLoad

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvtide._native import Load, Pool, Segment, Settings
    from kvtide.messages import StepPlan, WorkerReport
    from kvtide.requests import RequestState


class LoadLedger:
    """See the module's documentation."""

    def __init__(
        self, settings: Settings, pool: Pool, segment: Segment, ranks: int, *, idle_blocks: bool
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._segment = segment
        self._ranks = ranks
        self._idle_blocks = idle_blocks
        """As from `hands_out_idle_blocks`."""
        self._async: dict[str, PendingLoad] = {}
        """By request."""
        self._capacity = BOARD_CELLS
        self._free_cells = list(range(BOARD_CELLS))
        self._layered_now: list[Load] = []
        """Of the step that is being scheduled."""
        self._layered: dict[int, tuple[list[Load], int]] = {}
        """Job → loads, and the ranks that have not ended it."""
        self._targets: list[int] = []
        """Blocks that this step's loads overwrite."""
        self._next_job = 1

    def __len__(self) -> int:
        """Async loads in flight."""
        return len(self._async)

    def __contains__(self, request_id: str) -> bool:
        """Whether an async load of the request is in flight."""
        return request_id in self._async

    def has_room(self) -> bool:
        """Whether there is a board cell for one more async load."""
        return len(self._async) < self._capacity

    def add_async(self, state: RequestState, load: Load, blocks: list[int]) -> None:
        """The request waits outside the batch until `blocks` are there."""
        self._targets.extend(blocks)
        self._async[state.request.request_id] = PendingLoad(state, load, blocks)

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
        waiting = [each for each in self._async.items() if not each[1].job]
        if not layered and not waiting:
            return
        moves = self._pool.plan_loads([*layered, *(pending.load for _, pending in waiting)])
        # Steps in flight do not use blocks that vLLM hands out. But the step's stream is what waits
        # for saves that read them.
        behind_steps = not self._idle_blocks or bool(plan.wait_saves)
        # Nor do loads follow the digests of a layered one, unless they are layered too.
        behind_all = behind_steps or bool(self._layered or layered)
        if layered:
            plan.layered = self._begin_layered(layered, moves[: len(layered)], behind_steps)
        for (request_id, pending), planned in zip(waiting, moves[len(layered) :], strict=True):
            if planned is None:
                pending.delayed = True  # It waits for a save that is in flight.
            else:
                begun = self._begin_async(request_id, pending, *planned, behind_all, now)
                plan.loads.append(begun)

    def _begin_layered(
        self, loads: list[Load], plans: list[tuple[bytes, list[int]] | None], behind_steps: bool
    ) -> LayeredLoad:
        # Only complete blocks are offered for a layered load, and they are pinned since.
        assert all(p is not None and not p[1] for p in plans), "a layered load lost blocks"
        job = self._take_job()
        self._layered[job] = (loads, self._ranks)
        moves = b"".join(moves for moves, _ in filter(None, plans))
        # In "sync" a load is part of its step, as in the connectors that it stands for.
        return LayeredLoad(job, moves, behind_steps or self._settings.load == "sync")

    def _begin_async(
        self,
        request_id: str,
        pending: PendingLoad,
        moves: bytes,
        lost: list[int],
        behind_all: bool,
        now: float,
    ) -> AsyncLoad:
        pending.job, pending.cell = self._take_job(), self._free_cells.pop()
        pending.looked = now
        if lost:
            pending.lost = pending.state.load_failed = True
        behind = behind_all or pending.delayed
        return AsyncLoad(pending.job, pending.cell, request_id, moves, lost, behind)

    def _cancel_late(self, plan: StepPlan, now: float) -> None:
        limit_s = self._settings.load_timeout_s
        late = [
            (request_id, pending)
            for request_id, pending in self._async.items()
            if pending.job and not pending.cancelled and pending.is_late(now, limit_s)
        ]
        for request_id, pending, has_ended in self._look_up(late):
            if not has_ended:  # What has ended is only not seen yet.
                plan.cancelled.append(pending.cancel(request_id))

    def _take_job(self) -> int:
        self._next_job += 1
        return self._next_job

    # ---- back from the workers

    def take_report(self, report: WorkerReport) -> None:
        """What ranks have reported of loads."""
        if report.cancelled:
            for pending in self._async.values():
                pending.cancelled_ranks += report.cancelled.get(pending.job, 0)
        for job, ranks in report.ended.items():
            loads, missing = self._layered.pop(job)
            if missing > ranks:
                self._layered[job] = (loads, missing - ranks)
        for request_id, ranks in report.failed.items():
            failed = self._async.get(request_id)
            if failed is not None:
                failed.failures_reported += ranks
                failed.state.load_failed = True

    def take_ended(self) -> set[str]:
        """Requests whose async load has ended, well or not, on all ranks."""
        begun = [each for each in self._async.items() if each[1].job]
        ended = {request_id for request_id, _, has_ended in self._look_up(begun) if has_ended}
        for request_id in ended:
            self._free_cells.append(self._async.pop(request_id).cell)
        return ended

    def _look_up(self, begun: list[tuple[str, PendingLoad]]) -> list[tuple[str, PendingLoad, bool]]:
        """Whether each of the loads has ended."""
        if not begun:
            return []
        ends = self._segment.ended_loads([(pending.cell, pending.job) for _, pending in begun])
        return [
            (request_id, pending, pending.has_ended(failures, self._ranks))
            for (request_id, pending), failures in zip(begun, ends, strict=True)
        ]


def hands_out_idle_blocks(kv_cache: KVCacheConfig) -> bool:
    """Whether nothing that is on the engine's stream may still use the blocks that vLLM gives to a
    request for a load.

    Both supported versions keep the blocks of a finished or preempted request from others until the
    last step that may use them has ended, for connectors that load. But blocks of a layered load
    are zeroed first, in its own step, where vLLM 0.32 does so (mixed precision).
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    return hasattr(Scheduler, "_drain_deferred_frees") and not kv_cache.needs_kv_cache_zeroing
