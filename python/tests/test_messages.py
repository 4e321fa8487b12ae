"""What workers report to the scheduler's side survives being added up and sent."""

from __future__ import annotations

import pickle

import pytest

pytest.importorskip("vllm", reason="no vLLM here: use the Python of provision.py vllm VERSION")

from kvtide.messages import MOVE_BYTES, AsyncLoad, CancelledLoad, StepPlan, WorkerReport, block_of


def test_reports_of_ranks_add_up() -> None:
    one = WorkerReport({7: 1, 8: 1}, {(3, 1)}, {"r": 1}, loading=True)
    other = WorkerReport({7: 1}, {(3, 1), (4, 2)}, {"r": 1, "s": 1})
    both = one.aggregate(other)
    wanted = WorkerReport({7: 2, 8: 1}, {(3, 1), (4, 2)}, {"r": 2, "s": 1}, loading=True)
    assert both == wanted
    assert one.aggregate(WorkerReport()) == one


def test_answers_for_cancelled_loads_and_segments_of_ranks_add_up() -> None:
    one = WorkerReport(cancelled={7: 1}, segments={5})
    both = one.aggregate(WorkerReport(cancelled={7: 1, 8: 1}, segments={6}))
    assert both == WorkerReport(cancelled={7: 2, 8: 1}, segments={5, 6})
    assert not one.is_empty()
    assert WorkerReport().is_empty()


def test_a_plan_survives_the_way_to_another_process() -> None:
    plan = StepPlan([1], [(2, b"a" * MOVE_BYTES)], [(3, b"")], (4, b"x"))
    plan.loads.append(AsyncLoad(5, 0, "r", b"m" * MOVE_BYTES, [9], False))
    plan.cancelled.append(CancelledLoad(4, "q", [1, 2]))
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_the_block_of_a_move_is_its_last_word() -> None:
    words = [[1, 2, 300_000], [4, 5, 6]]
    moves = b"".join(word.to_bytes(4, "little") for move in words for word in move)
    assert [block_of(moves, place) for place in (0, 1)] == [300_000, 6]
