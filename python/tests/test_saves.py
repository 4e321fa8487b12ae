"""Which blocks are saved in which step, and what a step waits for."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from kvtide._native import Settings
from kvtide.messages import StepPlan
from kvtide.requests import RequestState
from kvtide.saves import Saves
from kvtide.transfer_params import TransferParams

BLOCK = 16


class Sequence:
    """The tokens that were hashed."""

    def __init__(self) -> None:
        self.tokens = 0
        self.settled = False

    def extend(self, tokens: list[int]) -> None:
        self.tokens += len(tokens)

    def settle(self, _pool: object) -> None:
        self.settled = True


class Pool:
    """Accepts at most so many blocks of a save, and has all of its saves in flight."""

    def __init__(self) -> None:
        self.limit = 1000
        self.planned: list[list[tuple[Any, int, list[int]]]] = []
        self.reading: dict[int, int] = {}
        self.cleared = 0

    def poll(self) -> int:
        return len(self.reading)

    def saves_reading(self, blocks: list[int]) -> list[int]:
        return sorted({self.reading[block] for block in blocks if block in self.reading})

    def plan_saves(self, saves: list[tuple[Any, int, list[int]]]) -> list[tuple[int, bytes, int]]:
        self.planned.append(saves)
        plans = []
        for number, (_, _, blocks) in enumerate(saves):
            accepted = blocks[: self.limit]
            job = len(self.planned) * 100 + number if accepted else 0
            self.reading |= dict.fromkeys(accepted, job)
            plans.append((job, bytes(accepted), len(accepted)))
        return plans

    def clear(self) -> None:
        self.cleared += 1


@pytest.fixture
def pool() -> Pool:
    """See `Pool`."""
    return Pool()


def saves_of(pool: Any, events: Any = None, *, consumer: bool = False, **settings: Any) -> Saves:
    """The saves of an engine with these settings."""
    made = Settings(json.dumps(settings), {})
    return Saves(made, pool, events, BLOCK, consumer=consumer)


def request(request_id: str, tokens: int, answer: int = 0) -> RequestState:
    """A request that has its prompt, and so much of its answer."""
    known: Any = SimpleNamespace(
        request_id=request_id,
        num_tokens=tokens + answer,
        num_prompt_tokens=tokens,
        num_computed_tokens=tokens + answer,
        all_token_ids=[0] * (tokens + answer),
    )
    sequence: Any = Sequence()
    return RequestState(known, sequence)


def output(
    new: dict[str, tuple[list[int], int]] | None = None,
    cached: dict[str, tuple[list[int] | None, int]] | None = None,
    resumed: frozenset[str] = frozenset(),
    scheduled: int = 1,
) -> Any:
    """What vLLM says of a step: requests with their blocks and the tokens computed before."""
    new, cached = new or {}, cached or {}
    return SimpleNamespace(
        num_scheduled_tokens=dict.fromkeys([*new, *cached], scheduled),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=(blocks,), num_computed_tokens=computed)
            for name, (blocks, computed) in new.items()
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached),
            new_block_ids=[None if blocks is None else (blocks,) for blocks, _ in cached.values()],
            num_computed_tokens=[computed for _, computed in cached.values()],
            resumed_req_ids=resumed,
        ),
    )


def plan(saves: Saves, states: dict[str, RequestState], step: Any, loads: Any = ()) -> StepPlan:
    """What the workers are given."""
    made = StepPlan()
    saves.plan_step(made, step, states, list(loads))
    return made


def test_all_saves_of_a_step_are_planned_by_one_call(pool: Pool) -> None:
    saves = saves_of(pool)
    states = {name: request(name, 40) for name in "abc"}
    new = {name: ([i * 10, i * 10 + 1, i * 10 + 2], 0) for i, name in enumerate("abc")}
    made = plan(saves, states, output(new=new, scheduled=40))
    # The third block of each is not complete.
    assert made.save_step == [(100, bytes([0, 1])), (101, bytes([10, 11])), (102, bytes([20, 21]))]
    [planned] = pool.planned
    assert [(first, blocks) for _, first, blocks in planned] == [
        (0, [0, 1]),
        (0, [10, 11]),
        (0, [20, 21]),
    ]
    assert [each.tokens for each, _, _ in planned] == [40, 40, 40]


def test_an_engine_that_only_consumes_saves_nothing(pool: Pool) -> None:
    saves = saves_of(pool, consumer=True)
    states = {"a": request("a", 40)}
    assert plan(saves, states, output(new={"a": ([0, 1, 2], 0)}, scheduled=40)).save_step == []
    saves.finish(states["a"])
    assert pool.planned == []


def test_a_request_saves_no_more_than_it_says(pool: Pool) -> None:
    saves = saves_of(pool)
    states = {"a": request("a", 40)}
    states["a"].asked = TransferParams(save_tokens=20)
    plan(saves, states, output(new={"a": ([0, 1, 2], 0)}, scheduled=40))
    [[(_, first, blocks)]] = pool.planned
    assert (first, blocks) == (0, [0])


def test_a_step_that_completes_no_block_asks_for_nothing(pool: Pool) -> None:
    saves = saves_of(pool)
    states = {"a": request("a", 40)}
    plan(saves, states, output(new={"a": ([1, 2, 3], 0)}, scheduled=40))
    states["a"].request.num_tokens = 100
    for computed in range(40, 47):
        assert plan(saves, states, output(cached={"a": (None, computed)})).save_step == []
    assert len(pool.planned) == 1
    assert plan(saves, states, output(cached={"a": (None, 47)})).save_step == [(200, bytes([3]))]


def test_what_the_pool_does_not_accept_is_tried_again_with_the_next_block(pool: Pool) -> None:
    saves = saves_of(pool)
    states = {"a": request("a", 64), "b": request("b", 64)}
    pool.limit = 1
    new = {"a": ([1, 2, 3, 4], 0), "b": ([5, 6, 7, 8], 0)}
    plan(saves, states, output(new=new, scheduled=32))
    assert [state.saved for state in states.values()] == [1, 1]
    pool.limit = 10
    made = plan(saves, states, output(cached={"a": (None, 47), "b": (None, 40)}))
    assert made.save_step == [(200, bytes([2, 3]))], "only a completes another block"


def test_a_step_waits_for_saves_that_read_what_it_overwrites(pool: Pool) -> None:
    saves = saves_of(pool)
    states = {"a": request("a", 32), "b": request("b", 64)}
    plan(saves, states, output(new={"a": ([1, 2], 0)}, scheduled=32))
    pool.reading |= {7: 77, 9: 99}
    # b's first block is a hit and not overwritten; a load overwrites block 7.
    made = plan(saves, states, output(new={"b": ([9, 2, 3, 4], 16)}, scheduled=48), loads=[7])
    assert made.wait_saves == [77, 100]
    assert made.save_step[0][0] == 200, "a step does not wait for its own saves"


def test_a_resumed_request_is_saved_from_its_first_block_on(pool: Pool) -> None:
    saves = saves_of(pool)
    states = {"a": request("a", 32)}
    plan(saves, states, output(new={"a": ([1, 2], 0)}, scheduled=32))
    step = output(cached={"a": ([5, 6], 0)}, resumed=frozenset("a"), scheduled=32)
    assert plan(saves, states, step).save_step == [(200, bytes([5, 6]))]


def test_what_a_request_computed_last_is_saved_with_the_next_step(pool: Pool) -> None:
    saves = saves_of(pool)
    state = request("a", 32, answer=17)
    state.blocks, state.saved = [1, 2, 3, 4], 2
    saves.finish(state)
    assert state.sequence.settled  # type: ignore[attr-defined]
    made = plan(saves, {}, output())
    assert made.save_now == [(100, bytes([3]))]
    assert plan(saves, {}, output()).save_now == []


def test_answers_are_saved_only_where_the_setting_says_so(pool: Pool) -> None:
    saves = saves_of(pool, save_generated=False)
    state = request("a", 32, answer=33)
    state.blocks = [1, 2, 3, 4]
    saves.finish(state)
    assert pool.planned[0][0][2] == [1, 2]


def test_after_a_clear_a_request_saves_nothing_until_it_begins_anew(pool: Pool) -> None:
    saves = saves_of(pool)
    states = {"a": request("a", 32)}
    saves.begin(states["a"])
    saves.clear()
    assert pool.cleared == 1
    step = output(new={"a": ([1, 2], 0)}, scheduled=32)
    assert plan(saves, states, step).save_step == []
    saves.begin(states["a"])
    assert plan(saves, states, step).save_step == [(100, bytes([1, 2]))]


def test_what_plans_evict_is_noted_before_what_they_save(pool: Pool) -> None:
    noted: list[tuple[Any, ...]] = []
    events = SimpleNamespace(
        collect=lambda _pool: noted.append(("collect",)),
        note_save=lambda request, _sequence, first, end: noted.append(
            (request.request_id, first, end)
        ),
    )
    saves = saves_of(pool, events)
    states = {"a": request("a", 32), "b": request("b", 16)}
    new = {"a": ([1, 2], 0), "b": ([3], 0)}
    plan(saves, states, output(new=new, scheduled=32))
    assert noted == [("collect",), ("a", 0, 2), ("b", 0, 1)]
    pool.limit, states["b"].saved = 0, 0
    plan(saves, states, output(new=new, scheduled=32))
    assert len(noted) == 3, "nothing is saved"
