"""A rank's way into the memory of a daemon that has come, or has made its memory anew.

The scheduler's side says with a step's plan which memory its pool has. Then a thread attaches and
maps it, registers it with the GPU, and takes the rank's place in it, by which the scheduler's side
knows that blocks can be loaded and saved again. Until then steps go on without a pool.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvtide._native import ConfigError, KvtideError
from kvtide.log import logger

if TYPE_CHECKING:
    from kvtide._native import Daemon, KvCache, Segment, Worker

RETRY_S = (0.05, 2.0)
"""Between two tries, at first and at most."""
STOP_LIMIT_S = 1.0
"""A daemon that does not answer keeps nobody from ending."""


class Attacher:
    """See the module's documentation."""

    def __init__(self, daemon: Daemon, rank: int, name: str, has: int) -> None:
        self._daemon = daemon
        self._rank = rank
        self._name = name
        """Of the copy threads."""
        self._cache: KvCache | None = None
        self._wanted = 0
        """Nonce of the memory that the scheduler's side has."""
        self._has = has
        """That of the memory in which this rank has its place; 0 for none."""
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        self._found: tuple[Segment, Worker] | None = None

    def begin(self, cache: KvCache, memory: int) -> None:
        """Attaches `cache` to the memory with this nonce. If the daemon has another one by then, it
        is that: the scheduler's side will find it too, and say so."""
        self._cache, self._wanted = cache, memory
        if self._thread is None and self._has != memory:
            self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._attach, name="kvtide-attach", daemon=True)
        self._thread.start()

    def take(self) -> tuple[Segment, Worker] | None:
        """What has been attached since the last call, on the thread that runs the model."""
        if self._thread is None or self._found is None:
            return None
        self._thread.join()  # It has nothing more to do.
        self._thread = None
        found, self._found = self._found, None
        self._cache = found[1].cache
        if self._has != self._wanted:
            self._start()
        return found

    def _attach(self) -> None:
        wait_s, longest_s = RETRY_S
        said = ""
        while not self._end.is_set():
            try:
                segment = self._daemon.attach(self._rank, 0.0, False)
                if segment is not None and segment.nonce != self._has:
                    self._use(segment)
                    return
            except (ConfigError, KvtideError) as error:
                if str(error) != said:  # Who refuses, refuses often.
                    said = str(error)
                    logger.warning("rank %d: %s", self._rank, error)
            self._end.wait(wait_s)
            wait_s = min(2 * wait_s, longest_s)

    def _use(self, segment: Segment) -> None:
        assert self._cache is not None, "it is given first"
        segment.populate(lambda *_: None)
        worker = self._cache.over(segment, self._rank, self._name)
        self._found, self._has = (segment, worker), segment.nonce
        segment.take_place(self._rank)

    def stop(self) -> None:
        """The engine ends."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(STOP_LIMIT_S)
        self._thread = self._found = self._cache = None
