"""One async load, as the scheduler's side sees it: where it stands, whether it is late."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvtide.cancelled import LONGEST_LOOK_S
from kvtide.log import logger
from kvtide.messages import CancelledLoad

if TYPE_CHECKING:
    from kvtide._native import Load
    from kvtide.requests import RequestState


@dataclass(slots=True)
class LoadPart:
    """What of a load workers were given at once: a job of its own, with a cell of the board."""

    job: int
    cell: int
    lost: bool
    """Whether it ends with a block that was lost before it began: then it fails on every rank."""
    failures_reported: int = 0
    """Ranks that have reported which blocks failed."""
    cancelled_ranks: int = 0
    """Ranks that write into its blocks no more since it was cancelled."""
    waited_s: float = 0.0
    """Since workers were given it, as far as somebody looked."""
    looked: float = 0.0
    """When somebody last did."""

    def is_late(self, now: float, limit_s: float) -> bool:
        """Whether it has taken so long. While no steps run (vLLM is paused, or the whole process is
        stopped), nobody looks, and hardly any time is counted."""
        self.waited_s += min(now - self.looked, LONGEST_LOOK_S)
        self.looked = now
        return self.waited_s >= limit_s

    def has_ended(self, failures: int | None, ranks: int) -> bool:
        """Whether every rank has ended it, and vLLM knows of all bad blocks. `failures` is what the
        board says: on how many ranks it has failed, or None while it runs."""
        if failures is None:
            return False
        return self.failures_reported >= (ranks if self.lost else failures)


@dataclass(slots=True)
class PendingLoad:
    """An async load from allocation until every rank has ended it.

    It goes in parts, as its blocks come into host memory; several may be in flight.
    """

    state: RequestState
    load: Load
    blocks: list[int]
    """The engine's blocks that it brings."""
    parts: list[LoadPart] = field(default_factory=list)
    """In flight."""
    begun: bool = False
    """Whether workers were given any part."""
    planned: bool = False
    """Whether workers were given the last part, or none follows because one has failed."""
    delayed: bool = False
    """Whether it was not begun in the step that gave it its blocks."""
    given_up: bool = False
    """Whether nobody wants the rest: the request has ended."""
    cancelled: bool = False

    def add(self, part: LoadPart, *, last: bool) -> None:
        """Workers are given a part."""
        self.parts.append(part)
        self.begun = True
        if part.lost:
            self.state.load_failed = True
        self.planned = last

    def fail(self, part: LoadPart, ranks: int) -> None:
        """So many ranks have reported that a part failed. What follows is computed anyway."""
        part.failures_reported += ranks
        self.state.load_failed = self.planned = True

    def is_late(self, now: float, limit_s: float) -> bool:
        """Whether a part has taken so long."""
        late = [part.is_late(now, limit_s) for part in self.parts]
        return any(late)

    def cancel(self, request_id: str) -> list[CancelledLoad]:
        """Gives up a load that has not ended in time, whatever the cause.

        From here on only the workers' answers end it. A rank answers for a part when it writes
        into the blocks no more, and gives all of the load's as bad with its first answer; so when
        all ranks have answered for all parts, vLLM knows of the bad blocks, and nothing is written
        behind what is computed in their place. A worker that lives answers, or ends the engine
        (`kvtide.cancelled`).
        """
        self.cancelled = self.planned = True
        self.state.load_failed = True
        logger.warning(
            "the load of %d blocks of request %s has not ended in time and counts as failed",
            len(self.blocks),
            request_id,
        )
        blocks = [self.blocks, *([] for _ in self.parts[1:])]
        return [
            CancelledLoad(part.job, request_id, bad)
            for part, bad in zip(self.parts, blocks, strict=True)
        ]

    def has_ended(self) -> bool:
        """Whether workers write into its blocks no more."""
        return self.planned and not self.parts
