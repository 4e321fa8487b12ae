"""An async load that does not end counts as failed after a while, and its request computes."""

from __future__ import annotations

import time
from contextlib import ExitStack

import psutil
import pytest
from engines.client import EngineProcess
from engines.compare import assert_same
from engines.freeze import frozen, threads_named
from engines.matrix import (
    TP2_IMPATIENT,
    V1_IMPATIENT,
    V1_IMPATIENT_STRICT,
    V2_IMPATIENT,
    each_length,
    on,
)
from engines.workloads import LONG, OTHER, Reference

LONG_BLOCKS = 10
LIMIT_S = 60.0


def save_long(engine: EngineProcess) -> None:
    """Saves LONG and empties vLLM's own cache."""
    engine.generate([LONG])
    engine.settle()
    assert engine.reset()
    engine.recorded("bad_blocks")


def run_to_end(engine: EngineProcess) -> None:
    """Runs steps until no request is left; steps without work are too short to be counted."""
    limit = time.monotonic() + LIMIT_S
    while engine.statuses():
        assert time.monotonic() < limit, engine.statuses()
        engine.step(10)


def step_past_the_deadline(engine: EngineProcess) -> None:
    """Runs steps for longer than a load may take."""
    limit = time.monotonic() + 2.0
    while time.monotonic() < limit:
        engine.step(10)


@pytest.mark.parametrize("fault", ["lost", "misplaced"])
@each_length
@on(V1_IMPATIENT, V2_IMPATIENT)
def test_a_load_whose_end_is_never_seen_is_computed(
    engine: EngineProcess, reference: Reference, max_tokens: int, fault: str
) -> None:
    save_long(engine)
    before = engine.counts()
    engine.spoil_loads(fault)
    try:
        late = engine.submit(LONG, max_tokens)
        run_to_end(engine)
    finally:
        engine.spoil_loads(None)
    assert_same(engine.results([late]), reference([LONG]), "computed after the deadline")
    assert len(set(engine.recorded("bad_blocks"))) == LONG_BLOCKS
    engine.settle()
    after = engine.counts()
    assert after["load_failures"] - before.get("load_failures", 0) == LONG_BLOCKS
    assert after["gauge_loads"] == 0
    assert engine.reset()
    assert_same(engine.generate([LONG], max_tokens), reference([LONG]), "the next request")


@on(V1_IMPATIENT, V2_IMPATIENT)
def test_others_are_served_while_a_load_does_not_end(
    engine: EngineProcess, reference: Reference
) -> None:
    save_long(engine)
    engine.spoil_loads("lost")
    try:
        late = engine.submit(LONG, 8)
        engine.step(2)
        meanwhile = engine.submit(OTHER, 8)
        engine.step(2)
        statuses = engine.statuses()
        assert statuses[late] == "WAITING_FOR_REMOTE_KVS"
        assert statuses.get(meanwhile) in ("RUNNING", None), statuses
        run_to_end(engine)
    finally:
        engine.spoil_loads(None)
    outputs = engine.results([late, meanwhile])
    assert_same(outputs, reference([LONG, OTHER]), "one of them computed after the deadline")


@on(V1_IMPATIENT, V2_IMPATIENT)
def test_blocks_are_not_computed_before_the_copy_thread_is_done_with_them(
    engine: EngineProcess, reference: Reference
) -> None:
    save_long(engine)
    with frozen(engine.pid, "-load"):
        late = engine.submit(LONG, 8)
        step_past_the_deadline(engine)
        assert list(engine.statuses().values()) == ["WAITING_FOR_REMOTE_KVS"]
        assert engine.recorded("bad_blocks") == [], "the thread may still write into them"
    run_to_end(engine)
    assert_same(engine.results([late]), reference([LONG]), "computed when the thread ran again")
    assert len(set(engine.recorded("bad_blocks"))) == LONG_BLOCKS


@on(V1_IMPATIENT, V1_IMPATIENT_STRICT)
def test_a_load_that_ends_while_no_steps_run_is_not_late(
    engine: EngineProcess, reference: Reference
) -> None:
    save_long(engine)
    with frozen(engine.pid, "-load"):
        late = engine.submit(LONG, 8)
        engine.step(2)
        assert list(engine.statuses().values()) == ["WAITING_FOR_REMOTE_KVS"]
    time.sleep(2.0)  # The load ends at once; its deadline is passed before the next step.
    run_to_end(engine)
    assert engine.recorded("bad_blocks") == []
    assert_same(engine.results([late]), reference([LONG]), "loaded while the engine was paused")


@on(V1_IMPATIENT)
def test_a_request_that_is_aborted_while_its_load_does_not_end_gives_its_blocks_back(
    engine: EngineProcess,
) -> None:
    save_long(engine)
    free = engine.counts()["free_blocks"]
    engine.spoil_loads("lost")
    try:
        late = engine.submit(LONG, 8)
        engine.step(2)
        assert engine.counts()["free_blocks"] < free
        engine.abort([late])
        limit = time.monotonic() + LIMIT_S
        while engine.counts()["free_blocks"] < free:
            assert time.monotonic() < limit, engine.counts()
            engine.step(10)
    finally:
        engine.spoil_loads(None)


@on(V1_IMPATIENT_STRICT)
def test_under_the_policy_that_fails_requests_a_load_that_does_not_end_fails_its_request(
    engine: EngineProcess, reference: Reference
) -> None:
    save_long(engine)
    engine.spoil_loads("lost")
    try:
        late = engine.submit(LONG, 8)
        run_to_end(engine)
    finally:
        engine.spoil_loads(None)
    [failed] = engine.results([late])
    assert failed["reason"] == "error"
    assert_same(engine.generate([OTHER], 8), reference([OTHER]), "the engine goes on")


@on(TP2_IMPATIENT)
def test_a_load_that_one_rank_does_not_end_is_computed_when_all_are_done_with_it(
    engine: EngineProcess, reference: Reference
) -> None:
    save_long(engine)
    before = engine.counts()
    workers = psutil.Process(engine.pid).children(recursive=True)
    with ExitStack() as stack:
        for worker in workers:
            if threads_named(worker.pid, "cpu1-load"):
                stack.enter_context(frozen(worker.pid, "cpu1-load"))
        late = engine.submit(LONG, 8)
        step_past_the_deadline(engine)
        assert list(engine.statuses().values()) == ["WAITING_FOR_REMOTE_KVS"]
    run_to_end(engine)
    assert_same(engine.results([late]), reference([LONG]), "computed when both ranks were done")
    engine.settle()
    failures = engine.counts()["load_failures"] - before.get("load_failures", 0)
    assert failures == 2 * LONG_BLOCKS, "each rank has given up all blocks"
