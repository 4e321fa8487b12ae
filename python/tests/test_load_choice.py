"""How a request's blocks are loaded, by what else goes on and by what loading and computing cost.

The rule is tested on the scheduler's side alone: on a CPU, copies compete with the model, so no
load is hidden there. That both ways load what they should is tested with real engines elsewhere.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from kvtide._native import CostModel, Settings
from kvtide.containment import Containment
from kvtide.messages import StepPlan
from kvtide.scheduler import (
    PendingLoad,
    RequestState,
    SchedulerSide,
    hands_out_idle_blocks,
    step_limits,
)
from kvtide.stats import Stats
from vllm.v1.kv_cache_interface import KVCacheConfig

BLOCK_BYTES = 2 << 20
BLOCKS = 512


def side(load: str = "auto", **state: Any) -> SchedulerSide:
    """A scheduler's side in the middle of its work, loads at 50 GB/s."""
    made = object.__new__(SchedulerSide)
    made._settings = Settings(json.dumps({"load": load, "host_capacity_gb": 1}), {})
    made._shard_bytes = BLOCK_BYTES
    made._step_tokens, made._prompt_tokens = 8192, 8192
    made._pool = None  # type: ignore[assignment]
    made._epoch = 0
    made._requests = {}
    made._running = set()
    made._loads = {}
    made._strangers = False
    made._layered_now = []
    made._layered_blocks = 0
    made._admitted = []
    made._containment = Containment(16)
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


def admit(made: SchedulerSide, tokens: int, resident: int = 0, loaded: int = 0) -> None:
    """Goes through vLLM's calls for a request that is admitted without a load, because the engine
    has so many of its tokens, or because so many were loaded before."""
    request: Any = SimpleNamespace(
        request_id=f"r{len(made._requests)}",
        num_tokens=tokens,
        num_computed_tokens=loaded,
        skip_reading_prefix_cache=True,
    )
    sequence: Any = SimpleNamespace(release=lambda: None)
    blocks: Any = SimpleNamespace(get_block_ids=lambda: ([],))
    made._requests[request.request_id] = RequestState(request, sequence)
    if not loaded:
        assert made.get_num_new_matched_tokens(request, resident) == (0, False)
    made.update_state_after_alloc(request, blocks, 0)


def test_an_idle_engine_loads_in_the_step() -> None:
    assert not side()._prefers_async(BLOCKS, 16)


@pytest.mark.parametrize(
    "state", [{"running": {"other"}}, {"admitted": [16], "layered_blocks": BLOCKS}]
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
    made._layered_blocks, made._admitted = BLOCKS, [1024]
    assert not made._prefers_async(BLOCKS, 1024)
    assert made._prefers_async(BLOCKS, 16)


def test_a_load_that_decode_steps_hide_is_layered_beside_them() -> None:
    made = side(running={"other"})
    teach(made, 26e-6)
    # A quarter of the blocks takes 5.4 ms of 7.
    assert not made._prefers_async(BLOCKS // 4, 1)
    assert made._prefers_async(BLOCKS // 2, 1)
    # Nobody decodes in this step, and a token takes nothing.
    made._running, made._admitted = set(), [1]
    assert made._prefers_async(BLOCKS // 4, 1)


def test_requests_admitted_to_the_step_would_wait_and_their_prompts_hide() -> None:
    made = side()
    teach(made, 26e-6)
    admit(made, 16)
    assert made._prefers_async(BLOCKS, 16)
    # What the engine has, or an async load has brought, is not computed.
    admit(made, 9000, resident=8992)
    admit(made, 9000, loaded=8999)
    assert made._prefers_async(BLOCKS, 16)
    admit(made, 1024)
    assert not made._prefers_async(BLOCKS, 16)
    # The next step has others.
    step: Any = SimpleNamespace(num_scheduled_tokens={}, total_num_scheduled_tokens=0)
    made._observe_step(step)
    admit(made, 16)
    assert made._prefers_async(BLOCKS, 16)


def test_a_request_without_known_tokens_would_wait_too() -> None:
    made = side()
    teach(made, 26e-6)
    embedded: Any = SimpleNamespace(request_id="embedded", num_tokens=8000, num_computed_tokens=0)
    made.update_state_after_alloc(embedded, SimpleNamespace(), 0)  # type: ignore[arg-type]
    assert made._prefers_async(BLOCKS, 16)


def test_a_layered_load_is_admitted_with_the_tokens_behind_it() -> None:
    made = side()
    teach(made, 26e-6)
    request: Any = SimpleNamespace(request_id="r", num_tokens=1040, num_computed_tokens=0)
    sequence: Any = SimpleNamespace(begin_load=lambda _pool, _first, _targets: object())
    blocks: Any = SimpleNamespace(get_block_ids=lambda: ([1, 2],))
    made._requests["r"] = RequestState(request, sequence, match=(0, 1, False))
    made._block_tokens, made._loading_into, made._stats = 16, [], Stats()
    made.update_state_after_alloc(request, blocks, 16)
    assert (made._layered_blocks, made._admitted) == (1, [1024])


def test_computing_hides_no_more_than_a_step_can_hold() -> None:
    made = side(running={"other"}, step_tokens=512)
    teach(made, 26e-6)
    assert made._prefers_async(BLOCKS, 8000)


def test_a_long_prompt_hides_no_more_than_its_share_of_a_step() -> None:
    made = side(running={"other"}, prompt_tokens=512)
    teach(made, 26e-6)
    assert made._prefers_async(BLOCKS, 8000)
    # Two of them have two shares.
    admit(made, 8000)
    assert not made._prefers_async(BLOCKS, 8000)


def limits(**config: int | None) -> tuple[int, int]:
    """The limits that follow from so much of vLLM's configuration."""
    unset = {
        "max_num_batched_tokens": 8192,
        "max_num_scheduled_tokens": None,
        "long_prefill_token_threshold": 0,
    }
    made: Any = SimpleNamespace(**(unset | config))
    return step_limits(made)


def test_the_limits_of_a_step_are_those_of_the_engine() -> None:
    assert limits() == (8192, 8192)
    assert limits(long_prefill_token_threshold=512) == (8192, 512)
    assert limits(max_num_scheduled_tokens=4096) == (4096, 4096)
    assert limits(max_num_scheduled_tokens=256, long_prefill_token_threshold=512) == (256, 256)


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
    idle = {"hands_out_idle": True, "layered": {}}
    assert not behind_steps(side(**idle), PendingLoad(Planned(), []))
    # A save still reads blocks that are overwritten; the step's stream waits for it.
    assert behind_steps(side(**idle), PendingLoad(Planned(), []), wait_saves=[3])
    # The same, but the load begins in a later step, which does not name the save any more.
    assert behind_steps(side(**idle), PendingLoad(Planned(after=1), []), wait_saves=[3])
    # The digests of a layered load are read from blocks that may have been handed on.
    assert behind_steps(side(hands_out_idle=True, layered={5: ([], 1)}), PendingLoad(Planned(), []))
    # This vLLM frees blocks while a step may use them.
    assert behind_steps(side(hands_out_idle=False, layered={}), PendingLoad(Planned(), []))


def layered_behind_steps(made: SchedulerSide, **plan: Any) -> bool:
    """What workers are told of a layered load."""
    made._loads, made._requests, made._pool, made._layered_now = {}, {}, None, [Planned()]
    made._next_job, made._ranks = 1, 1
    step = StepPlan(**plan)
    made._plan_loads(step)
    assert step.layered is not None
    return step.layered.behind_steps


def test_a_layered_load_waits_for_steps_only_where_they_may_use_its_blocks() -> None:
    idle = {"hands_out_idle": True, "layered": {}}
    assert not layered_behind_steps(side(**idle))
    assert layered_behind_steps(side(**idle), wait_saves=[3])
    # It follows an earlier one and its digests anyway.
    assert not layered_behind_steps(side(hands_out_idle=True, layered={5: ([], 1)}))
    assert layered_behind_steps(side(hands_out_idle=False, layered={}))
    assert layered_behind_steps(side("sync", **idle)), "a load of that mode is part of its step"


def test_an_async_load_waits_for_steps_that_a_layered_one_of_its_own_step_is_part_of() -> None:
    made = side(hands_out_idle=True, layered={})
    made._layered_now, made._ranks = [Planned()], 1
    assert behind_steps(made, PendingLoad(Planned(), []))


def test_a_vllm_that_zeroes_blocks_in_the_step_that_reads_them_does_not_hand_out_idle_ones() -> (
    None
):
    config: Any = SimpleNamespace(needs_kv_cache_zeroing=False)
    assert hands_out_idle_blocks(config)
    config.needs_kv_cache_zeroing = True
    assert not hands_out_idle_blocks(config)
    # What is asked for is a part of vLLM's own configuration.
    assert hasattr(KVCacheConfig, "needs_kv_cache_zeroing")
