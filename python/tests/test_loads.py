"""Loads on the scheduler's side: their board cells, their ends, their deadline."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from kvtide._native import BOARD_CELLS, Settings
from kvtide.loads import LoadLedger, Part
from kvtide.messages import StepPlan, WorkerReport
from kvtide.requests import RequestState

TIMEOUT_S = 3
WHOLE: Part = (b"moves", None, True)


class Native:
    """Pool and segment: what the loads amount to, and what the board says; counts the calls."""

    def __init__(self) -> None:
        self.board: dict[tuple[int, int], int | None] = {}
        self.calls: list[str] = []

    def plan_loads(self, loads: list[Any], more: list[Any], at_most: int) -> list[Any]:
        self.calls.append("plan_loads")
        parts = [each.next_part() if isinstance(each, Streaming) else each for each in loads]
        for each in more:
            parts.append(each.next_part() if at_most > 0 else None)
            at_most -= parts[-1] is not None
        return parts

    def ended_loads(self, loads: list[tuple[int, int]]) -> list[int | None]:
        self.calls.append("ended_loads")
        return [self.board.get(load) for load in loads]


@pytest.fixture
def native() -> Native:
    """See `Native`."""
    return Native()


@pytest.fixture
def ledger(native: Any) -> LoadLedger:
    """The loads of an engine of two ranks."""
    settings = Settings(f'{{"load_timeout_ms": {TIMEOUT_S * 1000}}}', {})
    return LoadLedger(settings, native, native, 2, idle_blocks=True)


def add(ledger: LoadLedger, request_id: str, plan: Any = WHOLE) -> RequestState:
    """Begins an async load of which the pool says so much."""
    request: Any = SimpleNamespace(request_id=request_id)
    sequence: Any = None
    state = RequestState(request, sequence)
    ledger.add_async(state, plan, [7, 8])
    return state


def step(ledger: LoadLedger, now: float = 0.0) -> StepPlan:
    """What the workers are given in the next step."""
    plan = StepPlan()
    ledger.plan_step(plan, now)
    return plan


def test_a_step_makes_one_call_for_all_loads_that_begin_and_one_for_all_that_end(
    native: Native, ledger: LoadLedger
) -> None:
    for i in range(5):
        add(ledger, f"r{i}")
    ledger.add_layered(WHOLE, [9])  # type: ignore[arg-type]
    assert ledger.take_targets() == [7, 8] * 5 + [9]
    plan = step(ledger)
    assert [load.request_id for load in plan.loads] == [f"r{i}" for i in range(5)]
    assert plan.layered is not None
    assert native.calls == ["plan_loads"]
    assert ledger.take_ended() == set()
    native.board = {(load.cell, load.job): 0 for load in plan.loads[:3]}
    assert ledger.take_ended() == {"r0", "r1", "r2"}
    assert native.calls == ["plan_loads", "ended_loads", "ended_loads"]
    assert len(ledger) == 2
    # What has begun is not planned again.
    assert step(ledger) == StepPlan()
    assert native.calls[3:] == []


def test_every_load_has_a_cell_and_a_job_of_its_own(native: Native, ledger: LoadLedger) -> None:
    jobs: set[int] = set()
    for _ in range(2):
        for i in range(BOARD_CELLS):
            assert ledger.has_room()
            add(ledger, f"r{i}")
        assert not ledger.has_room()
        loads = step(ledger).loads
        assert {load.cell for load in loads} == set(range(BOARD_CELLS))
        jobs |= {load.job for load in loads}
        native.board = {(load.cell, load.job): 0 for load in loads}
        assert len(ledger.take_ended()) == BOARD_CELLS
    assert len(jobs) == 2 * BOARD_CELLS
    assert 0 not in jobs


def test_a_load_that_waits_for_saves_has_no_cell_and_does_not_end(ledger: LoadLedger) -> None:
    add(ledger, "r", plan=None)
    assert step(ledger) == StepPlan()
    assert ledger.take_ended() == set()
    assert "r" in ledger


def test_a_failed_load_ends_with_the_reports_of_the_ranks_on_which_it_failed(
    native: Native, ledger: LoadLedger
) -> None:
    state = add(ledger, "r")
    [load] = step(ledger).loads
    native.board = {(load.cell, load.job): 1}
    assert ledger.take_ended() == set(), "vLLM does not know of the bad blocks yet"
    ledger.take_report(WorkerReport(failed={load.job: 1, load.job + 9: 1}))
    assert ledger.take_ended() == {"r"}
    assert state.load_failed


def test_a_load_that_has_lost_blocks_fails_on_every_rank(
    native: Native, ledger: LoadLedger
) -> None:
    state = add(ledger, "r", plan=(b"", 7, True))
    [load] = step(ledger).loads
    assert load.lost_block == 7
    assert state.load_failed
    native.board = {(load.cell, load.job): 0}
    for _ in range(2):
        assert ledger.take_ended() == set()
        ledger.take_report(WorkerReport(failed={load.job: 1}))
    assert ledger.take_ended() == {"r"}


class Streaming(list):
    """A load of which the pool says so much, one part or None at a time."""

    def next_part(self) -> Part | None:
        return self.pop(0) if self else None


def test_a_load_goes_in_parts_and_ends_with_the_last(native: Native, ledger: LoadLedger) -> None:
    parts: Any = Streaming([(b"one", None, False), None, (b"two", None, True)])
    add(ledger, "r", parts)
    [one] = step(ledger).loads
    native.board = {(one.cell, one.job): 0}
    assert ledger.take_ended() == set(), "more is to come"
    assert step(ledger) == StepPlan()
    [two] = step(ledger).loads
    assert (one.moves, two.moves) == (b"one", b"two")
    assert one.job != two.job
    assert ledger.take_ended() == set()
    native.board = {(two.cell, two.job): 0}
    assert ledger.take_ended() == {"r"}
    assert step(ledger) == StepPlan()


def test_nothing_follows_a_part_that_has_failed(native: Native, ledger: LoadLedger) -> None:
    parts: Any = Streaming([(b"one", None, False), (b"two", None, False), (b"three", None, True)])
    state = add(ledger, "r", parts)
    [one], [two] = step(ledger).loads, step(ledger).loads
    ledger.take_report(WorkerReport(failed={one.job: 1}))
    assert state.load_failed
    assert step(ledger) == StepPlan()
    native.board = {(one.cell, one.job): 1}
    assert ledger.take_ended() == set(), "the second part is still written"
    native.board = {(two.cell, two.job): 0}
    assert ledger.take_ended() == {"r"}


def test_a_late_load_is_cancelled_with_all_of_its_parts(native: Native, ledger: LoadLedger) -> None:
    parts: Any = Streaming([(b"one", None, False), (b"two", None, False)])
    add(ledger, "r", parts)
    jobs = [step(ledger).loads[0].job for _ in range(2)]
    cancelled = [each for plan in steps_until(ledger, 0.5, 10) for each in plan.cancelled]
    assert cancelled == [(jobs[0], "r", [7, 8]), (jobs[1], "r", [])]
    for job in jobs:
        assert ledger.take_ended() == set()
        ledger.take_report(WorkerReport(cancelled={job: 2}))
    assert ledger.take_ended() == {"r"}
    del native


@pytest.mark.parametrize("parts_before", [0, 2])
def test_what_is_left_of_a_load_is_given_up_with_its_request(
    native: Native, ledger: LoadLedger, parts_before: int
) -> None:
    parts: Any = Streaming([(b"part", None, False)] * parts_before)
    add(ledger, "r", parts)
    begun = [step(ledger).loads[0] for _ in range(parts_before)]
    assert step(ledger) == StepPlan()
    parts.append((b"more", None, True))
    ledger.give_up("r")
    ledger.give_up("unknown")
    [last] = step(ledger).loads
    assert (last.moves, last.lost_block) == (b"", None), "it only ends the load"
    assert step(ledger) == StepPlan()
    native.board = {(load.cell, load.job): 0 for load in begun}
    assert ledger.take_ended() == set()
    native.board = {(last.cell, last.job): 0}
    assert ledger.take_ended() == {"r"}


def test_a_part_is_late_by_itself(native: Native, ledger: LoadLedger) -> None:
    add(ledger, "r", Streaming([(b"part", None, False)] * 100))  # type: ignore[arg-type]
    plans = steps_until(ledger, 0.0, TIMEOUT_S + 1)
    cancelled = [each for plan in plans for each in plan.cancelled]
    assert cancelled, "later parts do not make the first one younger"
    del native


def test_parts_of_one_load_take_no_cell_that_another_load_needs(
    native: Native, ledger: LoadLedger
) -> None:
    parts: Any = Streaming([(b"part", None, False)] * (2 * BOARD_CELLS))
    add(ledger, "long", parts)
    [first] = step(ledger).loads
    for _ in range(BOARD_CELLS - 3):
        assert step(ledger).loads
    for name in "ab":
        assert ledger.has_room()
        add(ledger, name)
    assert not ledger.has_room()
    assert [load.request_id for load in step(ledger).loads] == ["a", "b"]
    assert step(ledger).loads == [], "there is no cell left"
    native.board = {(first.cell, first.job): 0}
    assert ledger.take_ended() == set()
    assert [load.request_id for load in step(ledger).loads] == ["long"]


def steps_until(ledger: LoadLedger, now: float, end: float) -> list[StepPlan]:
    """Steps of half a second."""
    return [step(ledger, now + i / 2) for i in range(int((end - now) * 2) + 1)]


def test_a_late_load_is_cancelled_once_and_ends_with_every_ranks_answer(
    native: Native, ledger: LoadLedger
) -> None:
    state = add(ledger, "r")
    [load] = step(ledger).loads
    plans = steps_until(ledger, 0.5, 10)
    [cancelled] = [each for plan in plans for each in plan.cancelled]
    assert cancelled == (load.job, "r", [7, 8])
    assert plans[TIMEOUT_S * 2 - 1].cancelled == [cancelled]
    assert state.load_failed
    # The board does not end it any more: a rank that ended it before may have reported nothing.
    native.board = {(load.cell, load.job): 0}
    for _ in range(2):
        assert ledger.take_ended() == set()
        ledger.take_report(WorkerReport(cancelled={load.job: 1}))
    assert ledger.take_ended() == {"r"}


def test_a_late_load_that_has_ended_unseen_is_not_cancelled(
    native: Native, ledger: LoadLedger
) -> None:
    state = add(ledger, "r")
    [load] = step(ledger).loads
    native.board = {(load.cell, load.job): 0}
    assert not any(plan.cancelled for plan in steps_until(ledger, 0.5, 10))
    assert not state.load_failed
    assert ledger.take_ended() == {"r"}


def test_time_in_which_nobody_looks_does_not_make_a_load_late(ledger: LoadLedger) -> None:
    add(ledger, "r")
    step(ledger)
    assert step(ledger, 1000.0).cancelled == []


def test_a_layered_load_is_pinned_until_every_rank_has_ended_it(ledger: LoadLedger) -> None:
    class Pinned(tuple):
        """A load that says when it is dropped."""

        def __del__(self) -> None:
            dropped.append(1)

    dropped: list[int] = []
    ledger.add_layered(Pinned(WHOLE), [9])  # type: ignore[arg-type]
    layered = step(ledger).layered
    assert layered is not None
    for _ in range(2):
        assert not dropped
        ledger.take_report(WorkerReport(ended={layered.job: 1}))
    assert dropped


def test_moves_of_one_steps_layered_loads_are_one_load(ledger: LoadLedger) -> None:
    ledger.add_layered((b"one", None, True), [1])  # type: ignore[arg-type]
    ledger.add_layered((b"two", None, True), [2])  # type: ignore[arg-type]
    layered = step(ledger).layered
    assert layered is not None
    assert (layered.moves, layered.behind_steps) == (b"onetwo", False)
    assert step(ledger).layered is None
