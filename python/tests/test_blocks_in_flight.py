"""Blocks that are being copied while vLLM takes them away: preemption, eviction, reset, abort.

vLLM frees a running request's blocks without asking the connector. Copies are slowed down here (the
copy threads get what the computing thread leaves of its core), so that they are in flight when it
does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from engines.client import EngineProcess
from engines.compare import assert_same, cached_tokens
from engines.freeze import frozen
from engines.matrix import ALL_MODES, BOTH_RUNNERS, V1_ASYNC, V1_JOINING, V2_ASYNC, on
from engines.workloads import CROWD, LONG, MIXED, OTHER, STREAM, Reference


@pytest.fixture
def slow_copies(engine: EngineProcess) -> Iterator[EngineProcess]:
    """The engine, with copies that are overtaken by steps."""
    assert engine.starve_copies(True) == 2
    yield engine
    if engine.is_alive():
        engine.starve_copies(False)


@on(*ALL_MODES)
def test_preempted_requests_give_the_same(slow_copies: EngineProcess, reference: Reference) -> None:
    engine = slow_copies
    before = engine.counts()
    wanted = reference(CROWD)
    assert_same(engine.generate(CROWD, 40), wanted, "preempted while cold")
    engine.settle()
    assert engine.reset()
    assert_same(engine.generate(CROWD, 40), wanted, "preempted while loading and saving")
    after = engine.counts()
    assert after["preemptions"] > before.get("preemptions", 0), "the test does not test anything"
    assert after["saved_blocks"] > before.get("saved_blocks", 0)
    assert after.get("load_failures", 0) == before.get("load_failures", 0)


@on(*ALL_MODES)
def test_blocks_that_vllm_reuses_at_once_are_saved_whole(
    slow_copies: EngineProcess, reference: Reference
) -> None:
    """Ten prompts of 3 blocks, one after the other, through 24 blocks that they fill twice."""
    engine = slow_copies
    before = engine.counts()
    for number, prompt in enumerate(STREAM):
        assert_same(engine.generate([prompt]), reference([prompt]), f"cold {number}")
        assert engine.reset()
    engine.settle()
    assert engine.reset()
    for number, prompt in enumerate(STREAM):
        assert_same(engine.generate([prompt], 4), reference([prompt]), f"reloaded {number}")
        assert engine.reset()
    engine.settle()
    after = engine.counts()
    assert after.get("load_failures", 0) == before.get("load_failures", 0)
    assert after.get("failed_blocks", 0) == before.get("failed_blocks", 0)
    assert after["gauge_saving"] == 0


@on(*BOTH_RUNNERS)
def test_a_step_waits_for_the_save_of_a_block_that_it_overwrites(
    engine: EngineProcess, reference: Reference
) -> None:
    """Finished requests: vLLM reuses their blocks while the copy out stands still."""
    with frozen(engine.pid, "-save"):
        assert_same(engine.generate(CROWD), reference(CROWD), "computed, not yet saved")
        engine.begin("generate", STREAM[:6])
        assert engine.is_blocked(), "18 of 24 blocks were taken, 18 more are needed"
    assert_same(engine.end(), reference(STREAM[:6]), "computed after the saves")
    engine.settle()
    assert engine.reset()
    again = engine.generate(CROWD, 4)
    assert_same(again, reference(CROWD), "what was saved is what was computed")
    assert cached_tokens(again) == [64] * len(CROWD)


@on(*BOTH_RUNNERS)
def test_a_preempted_request_keeps_its_blocks_until_they_are_saved(
    engine: EngineProcess, reference: Reference
) -> None:
    """Running requests: preemption takes their blocks while the copy out stands still."""
    before = engine.counts()
    with frozen(engine.pid, "-save"):
        engine.begin("generate", CROWD, 40)
        assert engine.is_blocked(), "the requests need more blocks than there are"
        time.sleep(0.5)
    assert_same(engine.end(), reference(CROWD), "preempted")
    engine.settle()
    after = engine.counts()
    assert after["preemptions"] > before.get("preemptions", 0)
    assert after["waited_saves"] > before.get("waited_saves", 0)
    assert engine.reset()
    assert_same(engine.generate(CROWD, 40), reference(CROWD), "reloaded")
    engine.settle()
    assert engine.counts().get("load_failures", 0) == before.get("load_failures", 0)


@on(V1_JOINING)
def test_a_request_that_waits_in_vain_for_a_save_computes_for_itself(
    engine: EngineProcess, reference: Reference
) -> None:
    before = engine.counts()
    with frozen(engine.pid, "-save"):
        # The first one keeps its blocks until the second is done: none is overwritten meanwhile.
        first = engine.submit(LONG, 40)
        engine.step(5)
        second = engine.submit(LONG, 1)
        engine.step(1)
        while second in engine.statuses():
            engine.step(1)
    engine.step(until_done=True)
    outputs = engine.results([first, second])
    assert_same(outputs, reference([LONG, LONG]), "one computed; one waited, then computed")
    engine.settle()
    assert engine.counts()["load_failures"] > before.get("load_failures", 0)
    again = engine.generate([LONG], 4)
    assert_same(again, reference([LONG]), "reloaded")
    assert cached_tokens(again) == [320]


@on(*ALL_MODES)
def test_resetting_while_requests_run_and_save_keeps_outputs(
    slow_copies: EngineProcess, reference: Reference
) -> None:
    engine, prompts = slow_copies, [*CROWD[:2], MIXED[3]]
    ids = [engine.submit(prompt, 24) for prompt in prompts]
    for steps in (2, 5, 9):
        engine.step(steps)
        done = engine.reset(running=True, connector=steps == 5)
        loading = "WAITING_FOR_REMOTE_KVS" in engine.statuses().values()
        # See Engine.reset: what matters is that all were preempted, and go on rightly.
        assert done or loading or engine.config.async_scheduling
        assert "RUNNING" not in engine.statuses().values()
    engine.step(until_done=True)
    assert_same(engine.results(ids), reference(prompts), "reset three times on the way")
    engine.settle()
    assert engine.reset()
    assert_same(engine.generate(prompts, 24), reference(prompts), "reloaded")


@on(*BOTH_RUNNERS)
def test_aborting_a_running_request_leaves_the_engine_sound(
    slow_copies: EngineProcess, reference: Reference
) -> None:
    engine = slow_copies
    engine.settle()
    free = engine.counts()["free_blocks"]
    for steps in (1, 2, 3, 4):
        doomed, other = engine.submit(LONG, 24), engine.submit(OTHER, 12)
        engine.step(steps)
        engine.abort([doomed])
        engine.step(until_done=True)
        assert_same(engine.results([other]), reference([OTHER]), "beside an aborted request")
    engine.settle()
    assert engine.counts()["free_blocks"] == free
    assert engine.reset()
    assert_same(engine.generate([LONG, OTHER], 8), reference([LONG, OTHER]), "afterwards")


@pytest.mark.parametrize("slow", [True, False], ids=["slow-load", "quick-load"])
@on(V1_ASYNC, V2_ASYNC)
def test_an_aborted_load_reports_one_end_and_gives_its_blocks_back(
    engine: EngineProcess, reference: Reference, slow: bool
) -> None:
    engine.generate([LONG])
    engine.settle()
    assert engine.reset()
    engine.recorded("received")
    free = engine.counts()["free_blocks"]
    engine.hold_loads(slow)
    doomed = engine.submit(LONG, 8)
    engine.step(1)
    assert engine.statuses().get(doomed) == "WAITING_FOR_REMOTE_KVS", "it is not loading"
    engine.abort([doomed])
    other = engine.submit(OTHER, 8)
    engine.step(until_done=True)
    assert_same(engine.results([other]), reference([OTHER]), "beside an aborted load")
    if slow:
        held = free - engine.counts()["free_blocks"]
        assert held >= 10, "its blocks are being written to: they must not be free yet"
        assert engine.recorded("received") == []
        engine.hold_loads(False)
    engine.settle()
    assert engine.counts()["free_blocks"] == free
    assert engine.counts()["gauge_loads"] == 0
    if slow:
        assert engine.recorded("received") == [doomed]
    else:
        assert engine.recorded("received").count(doomed) <= 1
    assert engine.reset()
    assert_same(engine.generate([LONG], 8), reference([LONG]), "the same prompt afterwards")


@on(V1_ASYNC, V2_ASYNC)
def test_requests_wait_for_slow_loads_without_holding_up_others(
    engine: EngineProcess, reference: Reference
) -> None:
    engine.generate([LONG])
    engine.settle()
    assert engine.reset()
    engine.hold_loads(True)
    waiting = engine.submit(LONG, 8)
    quick = engine.submit(OTHER, 8)
    engine.step(12)
    assert_same(engine.results([quick]), reference([OTHER]), "while another loads")
    assert engine.statuses()[waiting] == "WAITING_FOR_REMOTE_KVS"
    engine.hold_loads(False)
    engine.step(until_done=True)
    assert_same(engine.results([waiting]), reference([LONG]), "after a slow load")


@on(*BOTH_RUNNERS)
def test_a_prompt_that_is_still_being_saved_is_loaded_or_computed_but_never_wrong(
    slow_copies: EngineProcess, reference: Reference
) -> None:
    """The second request matches blocks whose save is in flight: these can only load async."""
    engine = slow_copies
    for prompt in (*STREAM[:4], LONG):
        engine.generate([prompt])
        assert engine.reset()
        assert_same(engine.generate([prompt], 4), reference([prompt]), "right behind its save")
    assert engine.recorded("bad_blocks") == []
