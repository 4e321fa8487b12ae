"""Async loads that were cancelled and may still write into their blocks."""

from __future__ import annotations

import time

from kvtide._native import KvtideError
from kvtide.messages import CancelledLoad

PATIENCE_S = 300.0
"""A copy that was on the device when its load was cancelled takes milliseconds, and seconds on a
host that swaps. As long as vLLM gives a step by default."""
LONGEST_LOOK_S = 1.0
"""What counts at most between two looks: a process may have been stopped meanwhile, with all its
threads."""


class CancelledLoads:
    """Cancelled loads by job, until they are over.

    Blocks of a load that does not get over cannot be computed, because a copy may still write into
    them: the engine ends then.
    """

    def __init__(self) -> None:
        self._loads: dict[int, CancelledLoad] = {}
        self._waited_s = 0.0
        self._looked = 0.0

    def __contains__(self, job: int) -> bool:
        return job in self._loads

    def add(self, load: CancelledLoad) -> None:
        """The scheduler's side has cancelled it."""
        self._loads[load.job] = load

    def pop(self, job: int) -> CancelledLoad:
        """It is over."""
        self._waited_s = 0.0
        return self._loads.pop(job)

    def check(self) -> None:
        """Called in every step; raises KvtideError if none has got over for too long."""
        if not self._loads:
            return
        now = time.monotonic()
        self._waited_s += min(now - self._looked, LONGEST_LOOK_S)
        self._looked = now
        if self._waited_s > PATIENCE_S:
            stuck = next(iter(self._loads.values()))
            raise KvtideError(
                f"the load of request {stuck.request_id} was cancelled and has not ended for "
                f"{PATIENCE_S:.0f} s: its copy thread is stuck, and its blocks cannot be computed"
            )
