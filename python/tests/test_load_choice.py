"""How a request's blocks are loaded, by what else goes on and by what loading and computing cost.

The rule is tested on the scheduler's side alone: on a CPU, copies compete with the model, so no
load is hidden there. That both ways load what they should is tested with real engines elsewhere.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from kvtide._native import CostModel, Settings
from kvtide.messages import StepPlan
from kvtide.scheduler import PendingLoad, SchedulerSide

BLOCK_BYTES = 2 << 20
BLOCKS = 512


def side(load: str = "auto", **state: Any) -> SchedulerSide:
    """A scheduler's side in the middle of its work, loads at 50 GB/s."""
    made = object.__new__(SchedulerSide)
    made._settings = Settings(json.dumps({"load": load, "host_capacity_gb": 1}), {})
    made._shard_bytes = BLOCK_BYTES
    made._step_tokens = 8192
    made._running = set()
    made._loads = {}
    made._layered_now = []
    made._layered_size = (0, 0)
    made._cost = CostModel()
    made._cost.set_load_rate(50e9)
    for name, value in state.items():
        setattr(made, f"_{name}", value)
    return made


def teach(made: SchedulerSide, seconds_per_token: float) -> None:
    """Lets it see prompts of 2,000 tokens among steps of 7 ms."""
    now = 0.0
    for tokens in (0, 0, 0, *(2000, 0, 0, 0, 0) * 2):
        made._cost.observe_step(now, tokens, False)
        now += 0.007 + tokens * seconds_per_token


def test_an_idle_engine_loads_in_the_step() -> None:
    assert not side()._prefers_async(BLOCKS, 16)


@pytest.mark.parametrize(
    "state", [{"running": {"other"}}, {"layered_now": [object()], "layered_size": (BLOCKS, 16)}]
)
def test_others_do_not_wait_for_a_load_that_nothing_hides(state: dict[str, Any]) -> None:
    made = side(**state)
    assert made._prefers_async(BLOCKS, 1024), "no rate of computing is known yet"
    teach(made, 26e-6)
    assert made._prefers_async(BLOCKS, 16)


def test_a_load_that_computing_hides_is_layered_beside_others() -> None:
    made = side(running={"other"})
    teach(made, 26e-6)
    # 1 GiB takes 21 ms; a decode step and 1,024 tokens take 34, of which a load may take 27.
    assert not made._prefers_async(BLOCKS, 1024)
    assert made._prefers_async(BLOCKS, 600)
    # A second one in the same step hides behind the computation of both, or not at all.
    made._layered_now, made._layered_size = [object()], (BLOCKS, 1024)
    assert not made._prefers_async(BLOCKS, 1024)
    assert made._prefers_async(BLOCKS, 16)


def test_a_load_that_decode_steps_hide_is_layered_beside_them() -> None:
    made = side(running={"other"})
    teach(made, 26e-6)
    # A quarter of the blocks takes 5.4 ms of 7.
    assert not made._prefers_async(BLOCKS // 4, 1)
    assert made._prefers_async(BLOCKS // 2, 1)
    # Nobody decodes in this step, and a token takes nothing.
    made._running, made._layered_now = set(), [object()]
    assert made._prefers_async(BLOCKS // 4, 1)


def test_computing_hides_no_more_than_a_step_can_hold() -> None:
    made = side(running={"other"}, step_tokens=512)
    teach(made, 26e-6)
    assert made._prefers_async(BLOCKS, 8000)


def test_a_load_does_not_share_the_link_with_async_ones() -> None:
    made = side(loads={"other": object()})
    teach(made, 26e-6)
    assert made._prefers_async(BLOCKS, 8000)


@pytest.mark.parametrize(
    ("load", "asynchronous"), [("layered", False), ("async", True), ("sync", False)]
)
def test_a_setting_overrules_the_prediction(load: str, asynchronous: bool) -> None:
    assert side(load, running={"other"})._prefers_async(BLOCKS, 16) is asynchronous
    assert side(load)._prefers_async(BLOCKS, 16) is asynchronous


class Planned:
    """A load whose moves are known once it was asked for them so many times."""

    def __init__(self, after: int = 0) -> None:
        self._after = after

    def plan(self, _pool: object) -> tuple[bytes, list[int]] | None:
        self._after -= 1
        return None if self._after >= 0 else (b"", [])


def behind_steps(made: SchedulerSide, pending: PendingLoad, **plan: Any) -> bool:
    """What workers are told of an async load when it begins."""
    made._loads, made._requests, made._pool = {"r": pending}, {}, None
    made._next_job, made._places = 1, [0]
    while True:
        step = StepPlan(**plan)
        made._plan_loads(step)
        if step.loads:
            return step.loads[0].behind_steps
        plan = {}


def test_an_async_load_waits_for_steps_only_where_they_may_use_its_blocks() -> None:
    idle = {"frees_late": True, "layered": {}}
    assert not behind_steps(side(**idle), PendingLoad(Planned(), 0))
    # A save still reads blocks that are overwritten; the step's stream waits for it.
    assert behind_steps(side(**idle), PendingLoad(Planned(), 0), wait_saves=[3])
    # The same, but the load begins in a later step, which does not name the save any more.
    assert behind_steps(side(**idle), PendingLoad(Planned(after=1), 0), wait_saves=[3])
    # The digests of a layered load are read from blocks that may have been handed on.
    assert behind_steps(side(frees_late=True, layered={5: ([], 1)}), PendingLoad(Planned(), 0))
    # This vLLM frees blocks while a step may use them.
    assert behind_steps(side(frees_late=False, layered={}), PendingLoad(Planned(), 0))
