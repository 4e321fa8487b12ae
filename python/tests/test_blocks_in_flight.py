"""Blocks that are being copied while vLLM takes them away: preemption, eviction, reset, abort.

vLLM frees a running request's blocks without asking the connector. Copies are slowed down here (the
copy threads get what the computing thread leaves of its core), so that they are in flight when it
does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import cycle

import pytest
from engines.client import EngineError, EngineProcess
from engines.compare import assert_same, cached_tokens
from engines.config import BLOCK_TOKENS, LAYERS
from engines.freeze import frozen
from engines.matrix import (
    ALL_MODES,
    BOTH_RUNNERS,
    V1_ASYNC,
    V1_JOINING,
    V1_SYNC,
    V2_ASYNC,
    V2_LAYERED,
    each_length,
    on,
)
from engines.workloads import (
    CROWD,
    LONG,
    MIXED,
    OTHER,
    PRESSED,
    STREAM,
    Reference,
    pressed_lengths,
    token_ids,
    vllm_version,
)


@pytest.fixture
def slow_copies(engine: EngineProcess) -> Iterator[EngineProcess]:
    """The engine, with copies that are overtaken by steps."""
    assert engine.starve_copies(True) == 2
    yield engine
    if engine.is_alive():
        engine.starve_copies(False)


@each_length
@on(*ALL_MODES)
def test_preempted_requests_give_the_same(
    slow_copies: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    engine = slow_copies
    before = engine.counts()
    lengths = pressed_lengths(max_tokens)
    ids = [engine.submit(*each) for each in zip(PRESSED, lengths, strict=True)]
    engine.step(until_done=True)
    assert_same(engine.results(ids), reference(PRESSED), "preempted while cold")
    assert ids[-1] in engine.recorded("preempted"), "the test does not test anything"
    engine.settle()
    assert engine.reset()
    again = engine.generate(PRESSED, lengths)
    assert_same(again, reference(PRESSED), "reloaded")
    # With one token, what is loaded is also done before the others grow.
    assert engine.recorded("preempted") or max_tokens == 1, "the test does not test anything"
    after = engine.counts()
    assert after["saved_blocks"] > before.get("saved_blocks", 0)
    assert after.get("load_failures", 0) == before.get("load_failures", 0)


@on(*ALL_MODES)
def test_blocks_that_vllm_reuses_at_once_are_saved_whole(
    slow_copies: EngineProcess, reference: Reference
) -> None:
    """Ten prompts of 3 blocks, one after the other, through 24 blocks that they fill twice."""
    engine = slow_copies
    before = engine.counts()
    for prompt, max_tokens in zip(STREAM, cycle([1, 1, 32]), strict=False):
        output = engine.generate([prompt], max_tokens)
        assert_same(output, reference([prompt]), f"cold, {max_tokens} tokens")
        assert engine.reset()
    engine.settle()
    assert engine.reset()
    for number, prompt in enumerate(STREAM):
        assert_same(engine.generate([prompt]), reference([prompt]), f"reloaded {number}")
        assert engine.reset()
    engine.settle()
    after = engine.counts()
    assert after.get("load_failures", 0) == before.get("load_failures", 0)
    assert after.get("failed_blocks", 0) == before.get("failed_blocks", 0)
    assert after["gauge_saving"] == 0


@pytest.mark.parametrize("how", ["evicted", "reset"])
@each_length
@on(V1_ASYNC, V2_LAYERED)
def test_a_step_waits_for_the_save_of_a_block_that_it_overwrites(
    engine: EngineProcess, reference: Reference, max_tokens: int, how: str
) -> None:
    """Finished requests: vLLM reuses their blocks while the copy out stands still, be it that it
    evicts them or that its prefix cache was reset."""
    engine.settle()
    before = engine.counts()
    with frozen(engine.pid, "-save"):
        cold = engine.generate([LONG], max_tokens)
        assert_same(cold, reference([LONG]), "computed, not yet saved")
        if how == "reset":
            assert engine.reset(), "no request holds blocks"
        engine.begin("generate", STREAM[:6])
        assert engine.is_blocked(), "11 of 24 blocks were taken, 24 more are needed"
    assert_same(engine.end(), reference(STREAM[:6]), "computed after the saves")
    engine.settle()
    assert engine.counts()["waited_saves"] > before.get("waited_saves", 0)
    assert engine.reset()
    again = engine.generate([LONG], 4)
    assert_same(again, reference([LONG]), "what was saved is what was computed")
    assert cached_tokens(again) == [320]


@each_length
@on(*BOTH_RUNNERS)
def test_a_preempted_request_keeps_its_blocks_until_they_are_saved(
    engine: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    """Running requests: preemption takes their blocks while the copy out stands still."""
    engine.settle()
    before = engine.counts()
    lengths = pressed_lengths(max_tokens)
    with frozen(engine.pid, "-save"):
        engine.begin("generate", PRESSED, lengths)
        assert engine.is_blocked(), "the requests need more blocks than there are"
        time.sleep(0.5)
    assert_same(engine.end(), reference(PRESSED), "preempted")
    assert engine.recorded("preempted")
    engine.settle()
    assert engine.counts()["waited_saves"] > before.get("waited_saves", 0)
    assert engine.reset()
    assert_same(engine.generate(PRESSED, 4), reference(PRESSED), "reloaded")
    engine.settle()
    assert engine.counts().get("load_failures", 0) == before.get("load_failures", 0)


@each_length
@on(*BOTH_RUNNERS)
def test_blocks_that_are_still_being_saved_are_never_loaded_layer_by_layer(
    engine: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    """A layered load cannot be taken back, and a save may yet fail."""
    engine.settle()
    before = engine.counts()
    with frozen(engine.pid, "-save"):
        cold = engine.generate([LONG], max_tokens)
        assert_same(cold, reference([LONG]), "computed, not yet saved")
        assert engine.reset()
        again = engine.submit(LONG, max_tokens)
        engine.step(3)
        assert engine.statuses()[again] == "WAITING_FOR_REMOTE_KVS"
    engine.step(until_done=True)
    assert_same(engine.results([again]), reference([LONG]), "loaded once it was saved")
    engine.settle()
    after = engine.counts()
    assert after["loaded_tokens_async"] - before.get("loaded_tokens_async", 0) == 320
    assert after.get("loaded_tokens_layered", 0) == before.get("loaded_tokens_layered", 0)
    assert engine.recorded("bad_blocks") == []


@each_length
@on(*BOTH_RUNNERS)
def test_loads_begin_in_the_only_call_for_them_even_after_the_forward_pass(
    engine: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    """vLLM asks once a step; since 0.29 after the forward pass, unless a load is layered. Both
    supported versions promise that no step in flight uses the blocks that they hand out."""
    engine.generate([LONG])
    engine.settle()
    assert engine.reset()
    running = engine.submit(OTHER, 32)
    engine.step(3)
    engine.recorded("starts")
    late = engine.submit(LONG, max_tokens)
    engine.step(until_done=True)
    outputs = engine.results([running, late])
    assert_same(outputs, reference([OTHER, LONG]), "one loads while the other computes")
    [start] = engine.recorded("starts")
    layered = engine.config.load == "layered"
    version = tuple(int(part) for part in vllm_version().split(".")[:2])
    after_forward = version >= (0, 29) and not layered
    assert start == {
        "layered": layered,
        "planned": 1,
        "behind_steps": False,
        "begun": 1,
        "layers_computed": LAYERS if after_forward else 0,
    }


@each_length
@on(V1_JOINING)
def test_a_request_that_waits_in_vain_for_a_save_computes_for_itself(
    engine: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    engine.settle()
    before = engine.counts()
    with frozen(engine.pid, "-save"):
        # The first one keeps its blocks until the second is done: none is overwritten meanwhile.
        first = engine.submit(LONG, 40)
        engine.step(5)
        second = engine.submit(LONG, max_tokens)
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


@each_length
@on(*ALL_MODES)
def test_resetting_while_requests_run_and_save_keeps_outputs(
    slow_copies: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    engine, prompts = slow_copies, [LONG, CROWD[0], MIXED[3]]
    ids = [engine.submit(prompt, max_tokens) for prompt in prompts]
    for number, steps in enumerate((2, 1) if max_tokens == 1 else (2, 5, 9)):
        engine.step(steps)
        done = engine.reset(running=True, connector=number == 1)
        loading = "WAITING_FOR_REMOTE_KVS" in engine.statuses().values()
        # See Engine.reset: what matters is that all were preempted, and go on rightly.
        assert done or loading or engine.config.async_scheduling
        assert "RUNNING" not in engine.statuses().values()
    engine.step(until_done=True)
    assert_same(engine.results(ids), reference(prompts), "reset on the way")
    assert len(engine.recorded("preempted")) >= 2, "the test does not test anything"
    engine.settle()
    assert engine.reset()
    assert_same(engine.generate(prompts, max_tokens), reference(prompts), "reloaded")


@each_length
@on(*BOTH_RUNNERS)
def test_aborting_a_running_request_leaves_the_engine_sound(
    slow_copies: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    engine = slow_copies
    engine.settle()
    free = engine.counts()["free_blocks"]
    for steps in (1, 2, 3, 4):
        doomed, other = engine.submit(LONG, max_tokens), engine.submit(OTHER, 12)
        engine.step(steps)
        engine.abort([doomed])
        engine.step(until_done=True)
        assert_same(engine.results([other]), reference([OTHER]), "beside an aborted request")
    engine.settle()
    assert engine.counts()["free_blocks"] == free
    assert engine.reset()
    outputs = engine.generate([LONG, OTHER], max_tokens)
    assert_same(outputs, reference([LONG, OTHER]), "afterwards")


@on(*BOTH_RUNNERS)
def test_blocks_of_a_step_that_fails_are_not_kept(engine: EngineProcess) -> None:
    failed = engine.counts().get("failed_blocks", 0)
    engine.break_layer(LAYERS // 2)
    request = engine.submit(LONG)
    with pytest.raises(EngineError, match="broken by the test"):
        engine.step(until_done=True)
    engine.abort([request])
    engine.settle()
    counts = engine.counts()
    assert counts["gauge_held"] == 0
    assert counts["failed_blocks"] > failed
    engine.kill()  # vLLM never frees all blocks of a step that failed.


@on(V1_SYNC)
def test_an_exception_of_the_program_around_the_engine_spoils_no_step(
    engine: EngineProcess,
) -> None:
    engine.generate_while_handling_an_exception([LONG])
    engine.settle()
    assert engine.counts()["gauge_held"] == len(token_ids(LONG)) // BLOCK_TOKENS


@each_length
@pytest.mark.parametrize("slow", [True, False], ids=["slow-load", "quick-load"])
@on(V1_ASYNC, V2_ASYNC)
def test_an_aborted_load_reports_one_end_and_gives_its_blocks_back(
    engine: EngineProcess, reference: Reference, slow: bool, max_tokens: int
) -> None:
    engine.generate([LONG])
    engine.settle()
    assert engine.reset()
    engine.recorded("received")
    free = engine.counts()["free_blocks"]
    engine.hold_loads(slow)
    doomed = engine.submit(LONG, max_tokens)
    engine.step(1)
    assert engine.statuses().get(doomed) == "WAITING_FOR_REMOTE_KVS", "it is not loading"
    engine.abort([doomed])
    other = engine.submit(OTHER, max_tokens)
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
    assert engine.recorded("received") == [doomed]
    assert engine.reset()
    again = engine.generate([LONG], max_tokens)
    assert_same(again, reference([LONG]), "the same prompt afterwards")


@each_length
@on(V1_ASYNC, V2_ASYNC)
def test_requests_wait_for_slow_loads_without_holding_up_others(
    engine: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    engine.generate([LONG])
    engine.settle()
    assert engine.reset()
    engine.hold_loads(True)
    waiting = engine.submit(LONG, max_tokens)
    quick = engine.submit(OTHER, max_tokens)
    engine.step(max_tokens + 4)
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
    for prompt, max_tokens in zip((*STREAM[:3], LONG), cycle([1, 32]), strict=False):
        engine.generate([prompt], max_tokens)
        assert engine.reset()
        output = engine.generate([prompt], max_tokens)
        assert_same(output, reference([prompt]), f"right behind its save, {max_tokens} tokens")
    assert engine.recorded("bad_blocks") == []
