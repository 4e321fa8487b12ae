"""How long a worker waits for a cancelled load."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="no vLLM here: use the Python of provision.py vllm VERSION")

import kvtide.cancelled
from kvtide import KvtideError
from kvtide.cancelled import PATIENCE_S, CancelledLoads
from kvtide.messages import CancelledLoad


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """As `time.monotonic`."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of `kvtide.cancelled`."""
    made = Clock()
    monkeypatch.setattr(kvtide.cancelled, "time", made)
    return made


def look(loads: CancelledLoads, clock: Clock, seconds: float) -> None:
    """Steps of half a second."""
    for _ in range(int(seconds * 2)):
        clock.now += 0.5
        loads.check()


def test_a_load_that_does_not_get_over_ends_the_engine(clock: Clock) -> None:
    loads = CancelledLoads()
    loads.add(CancelledLoad(7, "r", [1]))
    look(loads, clock, PATIENCE_S - 2)
    with pytest.raises(KvtideError, match="the load of request r was cancelled"):
        look(loads, clock, 4)


def test_time_without_cancelled_loads_does_not_count(clock: Clock) -> None:
    loads = CancelledLoads()
    for job in (7, 8):
        look(loads, clock, PATIENCE_S)
        loads.add(CancelledLoad(job, "r", [1]))
        look(loads, clock, PATIENCE_S - 2)
        assert loads.pop(job).job == job
        assert job not in loads


def test_time_in_which_the_process_was_stopped_does_not_count(clock: Clock) -> None:
    loads = CancelledLoads()
    loads.add(CancelledLoad(7, "r", [1]))
    look(loads, clock, 2)
    clock.now += 10 * PATIENCE_S
    look(loads, clock, 2)
