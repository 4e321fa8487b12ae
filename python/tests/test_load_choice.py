"""How a request's blocks are loaded, by what else goes on and by what loading and computing cost.

The rule is tested on the scheduler's side alone: on a CPU, copies compete with the model, so no
load is hidden there. That both ways load what they should is tested with real engines elsewhere.
"""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
from kvtide._native import Settings
from kvtide.cost import StepCost, step_limits
from kvtide.loads import LoadLedger, Part, hands_out_idle_blocks
from kvtide.matching import Matching
from kvtide.messages import StepPlan
from kvtide.requests import Requests, RequestState
from kvtide.scheduler import SchedulerSide
from kvtide.stats import Stats
from vllm.config import KVTransferConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

BLOCK_BYTES = 2 << 20
BLOCKS = 512


class Side:
    """The scheduler's side in the middle of its work, as far as it chooses; loads at 50 GB/s."""

    def __init__(
        self,
        load: str = "auto",
        *,
        step_tokens: int = 8192,
        prompt_tokens: int = 8192,
        idle_blocks: bool = True,
        **state: Any,
    ) -> None:
        settings = Settings(json.dumps({"load": load, "host_capacity_gb": 1}), {})
        pool: Any = SimpleNamespace(
            plan_loads=lambda loads, more, _most: [each.next_part() for each in [*loads, *more]]
        )
        segment: Any = None
        self.cost = StepCost(BLOCK_BYTES, step_tokens, prompt_tokens)
        self.cost.set_load_rate(50e9)
        self.loads = LoadLedger(settings, pool, segment, 1, idle_blocks=idle_blocks)
        self.matching = Matching(
            settings, pool, self.loads, self.cost, Stats(), block_tokens=16, certain=False
        )
        for name, value in state.items():
            part = self.cost if hasattr(self.cost, f"_{name}") else self.loads
            assert hasattr(part, f"_{name}")
            setattr(part, f"_{name}", value)

    def prefers_async(self, blocks: int, rest: int) -> bool:
        """The choice."""
        return self.matching.prefers_async(blocks, rest)


def side(load: str = "auto", **state: Any) -> Side:
    """See `Side`."""
    return Side(load, **state)


def teach(made: Side, seconds_per_token: float) -> None:
    """Lets it see prompts of 2,000 tokens among steps of 7 ms."""
    now = 0.0
    for tokens in (0, 0, 0, *(2000, 0, 0, 0, 0) * 2):
        made.cost._model.observe_step(now, tokens, False)
        now += 0.007 + tokens * seconds_per_token


def admit(made: Side, tokens: int, resident: int = 0, loaded: int = 0) -> None:
    """Goes through vLLM's calls for a request that is admitted without a load, because the engine
    has so many of its tokens, or because so many were loaded before."""
    request: Any = SimpleNamespace(
        request_id="r",
        num_tokens=tokens,
        num_computed_tokens=loaded,
        skip_reading_prefix_cache=True,
    )
    sequence: Any = SimpleNamespace(release=lambda: None)
    state = RequestState(request, sequence)
    if not loaded:
        assert made.matching.offer(state, resident) == (0, False)
    made.matching.use_match(state, 0)


def test_an_idle_engine_loads_in_the_step() -> None:
    assert not side().prefers_async(BLOCKS, 16)


@pytest.mark.parametrize(
    "state", [{"running": {"other"}}, {"admitted": [16], "layered_blocks": BLOCKS}]
)
def test_others_do_not_wait_for_a_load_that_nothing_hides(state: dict[str, Any]) -> None:
    made = side(**state)
    assert made.prefers_async(BLOCKS, 1024), "no rate of computing is known yet"
    teach(made, 26e-6)
    assert made.prefers_async(BLOCKS, 16)


def test_a_load_that_computing_hides_is_layered_beside_others() -> None:
    made = side(running={"other"})
    teach(made, 26e-6)
    # 1 GiB takes 21 ms; a decode step and 1,024 tokens take 34, of which a load may take 27.
    assert not made.prefers_async(BLOCKS, 1024)
    assert made.prefers_async(BLOCKS, 600)
    # A second one in the same step hides behind the computation of both, or not at all.
    made.cost._layered_blocks, made.cost._admitted = BLOCKS, [1024]
    assert not made.prefers_async(BLOCKS, 1024)
    assert made.prefers_async(BLOCKS, 16)


def test_a_load_that_decode_steps_hide_is_layered_beside_them() -> None:
    made = side(running={"other"})
    teach(made, 26e-6)
    # A quarter of the blocks takes 5.4 ms of 7.
    assert not made.prefers_async(BLOCKS // 4, 1)
    assert made.prefers_async(BLOCKS // 2, 1)
    # Nobody decodes in this step, and a token takes nothing.
    made.cost._running, made.cost._admitted = set(), [1]
    assert made.prefers_async(BLOCKS // 4, 1)


def test_requests_admitted_to_the_step_would_wait_and_their_prompts_hide() -> None:
    made = side()
    teach(made, 26e-6)
    admit(made, 16)
    assert made.prefers_async(BLOCKS, 16)
    # What the engine has, or an async load has brought, is not computed.
    admit(made, 9000, resident=8992)
    admit(made, 9000, loaded=8999)
    assert made.prefers_async(BLOCKS, 16)
    admit(made, 1024)
    assert not made.prefers_async(BLOCKS, 16)
    # The next step has others.
    step: Any = SimpleNamespace(num_scheduled_tokens={}, total_num_scheduled_tokens=0)
    made.cost.end_step(step, time.monotonic())
    admit(made, 16)
    assert made.prefers_async(BLOCKS, 16)


def test_a_request_without_known_tokens_would_wait_too() -> None:
    made = side()
    teach(made, 26e-6)
    hooks = object.__new__(SchedulerSide)
    hooks._requests, hooks._cost = Requests(Settings("{}", {}), None), made.cost
    embedded: Any = SimpleNamespace(request_id="embedded", num_tokens=8000, num_computed_tokens=0)
    hooks.update_state_after_alloc(embedded, SimpleNamespace(), 0)  # type: ignore[arg-type]
    assert made.prefers_async(BLOCKS, 16)


def test_a_layered_load_is_admitted_with_the_tokens_behind_it() -> None:
    made = side()
    teach(made, 26e-6)
    request: Any = SimpleNamespace(request_id="r", num_tokens=1040, num_computed_tokens=0)
    sequence: Any = SimpleNamespace(begin_load=lambda _pool, _first, _targets: object())
    made.matching.use_match(RequestState(request, sequence, [1, 2], match=(0, 1, False)), 16)
    assert (made.cost._layered_blocks, made.cost._admitted) == (1, [1024])
    assert made.loads.take_targets() == [1]


def test_computing_hides_no_more_than_a_step_can_hold() -> None:
    made = side(running={"other"}, step_tokens=512)
    teach(made, 26e-6)
    assert made.prefers_async(BLOCKS, 8000)


def test_a_long_prompt_hides_no_more_than_its_share_of_a_step() -> None:
    made = side(running={"other"}, prompt_tokens=512)
    teach(made, 26e-6)
    assert made.prefers_async(BLOCKS, 8000)
    # Two of them have two shares.
    admit(made, 8000)
    assert not made.prefers_async(BLOCKS, 8000)


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
    made = side()
    made.loads.add_async(state_of("other"), Planned(), [])
    teach(made, 26e-6)
    assert made.prefers_async(BLOCKS, 8000)


@pytest.mark.parametrize(
    ("load", "asynchronous"), [("layered", False), ("async", True), ("sync", False)]
)
def test_a_setting_overrules_the_prediction(load: str, asynchronous: bool) -> None:
    assert side(load, running={"other"}).prefers_async(BLOCKS, 16) is asynchronous
    assert side(load).prefers_async(BLOCKS, 16) is asynchronous


class Planned:
    """A load of one part, which has come once it was asked for so many times."""

    def __init__(self, after: int = 0) -> None:
        self._after = after

    def next_part(self) -> Part | None:
        self._after -= 1
        return None if self._after >= 0 else (b"", None, True)


def state_of(request_id: str) -> RequestState:
    """A request that waits for its load."""
    request: Any = SimpleNamespace(request_id=request_id)
    sequence: Any = None
    return RequestState(request, sequence)


def behind_steps(made: Side, load: Planned, **plan: Any) -> bool:
    """Whether workers begin an async load behind the steps."""
    made.loads.add_async(state_of("r"), load, [])
    while True:
        step = StepPlan(**plan)
        made.loads.plan_step(step, 0.0)
        if step.loads:
            return step.loads[0].behind_steps
        plan = {}


def test_an_async_load_waits_for_steps_only_where_they_may_use_its_blocks() -> None:
    idle = {"idle_blocks": True, "layered": {}}
    assert not behind_steps(side(**idle), Planned())
    # A save still reads blocks that are overwritten; the step's stream waits for it.
    assert behind_steps(side(**idle), Planned(), wait_saves=[3])
    # The same, but the load begins in a later step, which does not name the save any more.
    assert behind_steps(side(**idle), Planned(after=1), wait_saves=[3])
    # The digests of a layered load are read from blocks that may have been handed on.
    assert behind_steps(side(idle_blocks=True, layered={5: ([], 1)}), Planned())
    # This vLLM frees blocks while a step may use them.
    assert behind_steps(side(idle_blocks=False, layered={}), Planned())


def layered_behind_steps(made: Side, **plan: Any) -> bool:
    """Whether workers begin a layered load behind the steps."""
    made.loads.add_layered(Planned(), [])
    step = StepPlan(**plan)
    made.loads.plan_step(step, 0.0)
    assert step.layered is not None
    return step.layered.behind_steps


def test_a_layered_load_waits_for_steps_only_where_they_may_use_its_blocks() -> None:
    idle = {"idle_blocks": True, "layered": {}}
    assert not layered_behind_steps(side(**idle))
    assert layered_behind_steps(side(**idle), wait_saves=[3])
    # It follows an earlier one and its digests anyway.
    assert not layered_behind_steps(side(idle_blocks=True, layered={5: ([], 1)}))
    assert layered_behind_steps(side(idle_blocks=False, layered={}))
    assert layered_behind_steps(side("sync", **idle)), "a load of that mode is part of its step"


def test_an_async_load_waits_for_steps_that_a_layered_one_of_its_own_step_is_part_of() -> None:
    made = side()
    made.loads.add_layered(Planned(), [])
    assert behind_steps(made, Planned())


def of_role(role: str) -> Any:
    """vLLM's configuration of an engine."""
    transfer = KVTransferConfig(kv_connector="OffloadingConnectorV1Type3", kv_role=role)
    return SimpleNamespace(kv_transfer_config=transfer)


def test_a_producer_is_given_blocks_that_steps_in_flight_may_use() -> None:
    cache: Any = SimpleNamespace(needs_kv_cache_zeroing=False)
    assert hands_out_idle_blocks(of_role("kv_consumer"), cache)
    assert not hands_out_idle_blocks(of_role("kv_producer"), cache)


def test_a_vllm_that_zeroes_blocks_in_the_step_that_reads_them_does_not_hand_out_idle_ones() -> (
    None
):
    cache: Any = SimpleNamespace(needs_kv_cache_zeroing=False)
    assert hands_out_idle_blocks(of_role("kv_both"), cache)
    cache.needs_kv_cache_zeroing = True
    assert not hands_out_idle_blocks(of_role("kv_both"), cache)
    # What is asked for is a part of vLLM's own configuration.
    assert hasattr(KVCacheConfig, "needs_kv_cache_zeroing")
