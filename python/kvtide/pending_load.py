"""One async load, as the scheduler's side sees it: where it stands, whether it is late."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtide.cancelled import LONGEST_LOOK_S
from kvtide.log import logger
from kvtide.messages import CancelledLoad

if TYPE_CHECKING:
    from kvtide._native import Load
    from kvtide.requests import RequestState


@dataclass(slots=True)
class PendingLoad:
    """An async load from allocation until every rank has ended it."""

    state: RequestState
    load: Load
    blocks: list[int]
    """The engine's blocks that it brings."""
    job: int = 0
    """0 until workers are given it."""
    cell: int = 0
    """Of the board."""
    lost: bool = False
    """Whether blocks were lost before it began: then it fails on every rank."""
    delayed: bool = False
    """Whether it was not begun in the step that gave it its blocks."""
    failures_reported: int = 0
    """Ranks that have reported which blocks failed."""
    waited_s: float = 0.0
    """Since workers were given it, as far as somebody looked."""
    looked: float = 0.0
    """When somebody last did."""
    cancelled: bool = False
    cancelled_ranks: int = 0
    """Ranks that write into its blocks no more since it was cancelled."""

    def is_late(self, now: float, limit_s: float) -> bool:
        """Whether it has taken so long. While no steps run (vLLM is paused, or the whole process is
        stopped), nobody looks, and hardly any time is counted."""
        self.waited_s += min(now - self.looked, LONGEST_LOOK_S)
        self.looked = now
        return self.waited_s >= limit_s

    def cancel(self, request_id: str) -> CancelledLoad:
        """Gives up a load that has not ended in time, whatever the cause.

        From here on only the workers' answers end it. A rank answers when it writes into the blocks
        no more, and gives all of them as bad with its answer; so when all ranks have answered, vLLM
        knows of the bad blocks, and nothing is written behind what is computed in their place. A
        worker that lives answers, or ends the engine (`kvtide.cancelled`).
        """
        self.cancelled = True
        self.state.load_failed = True
        logger.warning(
            "the load of %d blocks of request %s has not ended in time and counts as failed",
            len(self.blocks),
            request_id,
        )
        return CancelledLoad(self.job, request_id, self.blocks)

    def has_ended(self, failures: int | None, ranks: int) -> bool:
        """Whether every rank has ended it, and vLLM knows of all bad blocks. `failures` is what the
        board says: on how many ranks it has failed, or None while it runs."""
        if self.cancelled:
            return self.cancelled_ranks >= ranks
        if failures is None:
            return False
        return self.failures_reported >= (ranks if self.lost else failures)
