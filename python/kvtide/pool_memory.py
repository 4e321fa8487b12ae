"""Which memory the pool has, and whether the engine's workers have it, too.

An engine's own pool has one as long as the engine lives. A daemon may come after the engine, or
make its memory anew. Then the scheduler's side goes over to the new memory when no load and no save
uses the last one, says so with the next plan, and offers nothing until the workers of all ranks
have their places there (`attacher.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtide.log import logger

if TYPE_CHECKING:
    from kvtide._native import Daemon, Pool, Segment
    from kvtide.messages import StepPlan


class PoolMemory:
    """See the module's documentation."""

    def __init__(self, pool: Pool, segment: Segment | None, daemon: Daemon | None) -> None:
        self._pool = pool
        self._segment = segment
        self._daemon = daemon
        self._admitted = segment is not None
        self._to_tell = False
        """Whether workers have not been told of the segment."""
        if daemon is not None and segment is not None and not segment.has_all_workers:
            self._await_workers()

    @property
    def segment(self) -> Segment | None:
        """The memory; None before the daemon has come."""
        return self._segment

    def _await_workers(self) -> None:
        self._pool.admit(False)
        self._admitted, self._to_tell = False, True

    def change(self) -> bool:
        """Goes over to other memory that the daemon has, if nothing uses the last one any more."""
        segment = self._pool.change_memory()
        if segment is None:
            return False
        self._segment = segment
        self._await_workers()
        return True

    def look(self) -> None:
        """Takes note of workers that have come."""
        segment = self._segment
        if self._admitted or segment is None or self._daemon is None:
            return
        if segment.has_all_workers:
            self._admitted = True
            self._pool.admit(True)

    def plan_step(self, plan: StepPlan) -> None:
        """Enters the memory, if workers are to attach to it."""
        if self._to_tell and self._segment is not None:
            self._to_tell = False
            plan.memory = self._segment.nonce

    def refuse_strangers(self, nonces: set[int]) -> bool:
        """Whether workers turn out to have another segment than this engine's own: then they load
        nothing that was saved, and nobody sees what they save. Opening a segment excludes it; this
        notices it all the same."""
        segment = self._segment
        if self._daemon is not None or segment is None or nonces <= {segment.nonce}:
            return False
        if not self._admitted:
            return False
        self._admitted = False
        self._pool.admit(False)
        logger.error(
            "engine_id: the workers do not have this scheduler's pool %s, so nothing is loaded "
            "or saved from now on. Give each engine its own `engine_id` and start it again",
            segment.path,
        )
        return True
