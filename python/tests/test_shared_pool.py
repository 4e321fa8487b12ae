"""Engines on the pool of `kvtide serve`: they share it, and outlive it, as it outlives them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines.client import EngineProcess, Nursery
from engines.compare import assert_same, cached_tokens
from engines.config import EngineConfig
from engines.daemon import Daemon
from engines.matrix import TP2, V1_ASYNC
from engines.workloads import LONG, MIXED, OTHER, Reference

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("no_engine")]

WHOLE = 320
"""Tokens of `LONG` that can be loaded."""
BLOCKS = 10
"""Blocks that they are."""

Start = Callable[..., EngineProcess]


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon that serves."""
    made = Daemon()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def start(daemon: Daemon, tiny_model: Path, nursery: Nursery) -> Iterator[Start]:
    """Starts engines with the daemon's pool; they end with the test."""
    engines: list[EngineProcess] = []

    def start_engine(config: EngineConfig = V1_ASYNC, **settings: Any) -> EngineProcess:
        extra = json.dumps({"pool": daemon.pool} | settings)
        engines.append(EngineProcess(replace(config, settings=extra), tiny_model, nursery))
        return engines[-1]

    yield start_engine
    for engine in engines:
        if engine.is_alive():
            engine.close()


def held(status: dict[str, Any]) -> int:
    """Blocks that all namespaces hold, completely."""
    return sum(each["held_blocks"] - each["saving_blocks"] for each in status["namespaces"])


@contextmanager
def saved(daemon: Daemon, blocks: int) -> Iterator[None]:
    """What happens meanwhile saves so many blocks more."""
    status = daemon.status()
    before = 0 if status is None else held(status)
    yield
    daemon.wait(lambda status: held(status) >= before + blocks)


def test_what_one_engine_computed_another_loads(
    daemon: Daemon, start: Start, reference: Reference
) -> None:
    first, second = start(), start()
    wanted = reference([LONG])
    with saved(daemon, BLOCKS):
        assert_same(first.generate([LONG], 8), wanted, "computed")
    loaded = second.generate([LONG], 8)
    assert_same(loaded, wanted, "loaded")
    assert cached_tokens(loaded) == [WHOLE]
    assert_same(second.generate(MIXED, 32), reference(MIXED), "others, too")


def test_models_share_the_memory_and_nothing_else(
    daemon: Daemon, start: Start, reference: Reference
) -> None:
    first, other = start(), start(weights_revision="another")
    wanted = reference([LONG])
    with saved(daemon, BLOCKS):
        assert_same(first.generate([LONG], 8), wanted, "computed")
    with saved(daemon, BLOCKS):
        computed = other.generate([LONG], 8)
    assert_same(computed, wanted, "computed again")
    assert cached_tokens(computed) == [0]
    status = daemon.wait(lambda status: len(status["namespaces"]) == 2)
    assert all(each["bytes"] > 0 for each in status["namespaces"])


def test_a_prefill_engine_computes_what_a_decode_engine_loads(
    daemon: Daemon, start: Start, reference: Reference
) -> None:
    prefill, decode = start(), start()
    wanted = reference([LONG, OTHER])
    prefill.generate([LONG, OTHER], 1)
    loaded = decode.generate([LONG, OTHER], 32)
    assert_same(loaded, wanted, "decoded elsewhere")
    assert cached_tokens(loaded)[0] == WHOLE


def test_two_ranks_share_a_pool(daemon: Daemon, start: Start, reference: Reference) -> None:
    first = start(TP2)
    wanted = reference([LONG])
    with saved(daemon, BLOCKS):
        assert_same(first.generate([LONG], 8), wanted, "computed")
    first.close()
    second = start(TP2)
    loaded = second.generate([LONG], 8)
    assert_same(loaded, wanted, "loaded")
    assert cached_tokens(loaded) == [WHOLE]


def test_a_killed_engine_gives_back_all_that_it_held(
    daemon: Daemon, start: Start, reference: Reference
) -> None:
    victim, other = start(), start()
    wanted = reference([LONG])
    with saved(daemon, BLOCKS):
        victim.generate([LONG])
    victim.submit(LONG, 32)
    victim.step(2)
    victim.kill()
    killed = time.monotonic()
    daemon.wait(
        lambda status: (
            len(status["sessions"]) == 1
            and all(
                each["pinned_blocks"] == each["saving_blocks"] == 0 for each in status["namespaces"]
            )
        )
    )
    # Half of it may be this test's own questions.
    assert time.monotonic() - killed < 10, "an engine that is gone holds nothing for long"
    loaded = other.generate([LONG], 8)
    assert_same(loaded, wanted, "loaded")
    assert cached_tokens(loaded) == [WHOLE]


def test_an_engine_tells_of_the_blocks_that_it_saves(daemon: Daemon, start: Start) -> None:
    engine = start(replace(V1_ASYNC, kv_events=True))
    with saved(daemon, BLOCKS):
        engine.generate([LONG])
        engine.settle()
    told: list[Any] = []
    limit = time.monotonic() + 60
    while len(told) < BLOCKS and time.monotonic() < limit:
        engine.settle()
        events = engine.recorded("events")
        told += [e for e in events if e["kind"] == "BlockStored" and e["medium"] == "CPU"]
    assert len(told) == BLOCKS


@pytest.mark.parametrize("how", ["killed", "terminated"])
def test_engines_go_on_without_the_daemon_and_find_everything_in_the_next(
    daemon: Daemon, start: Start, reference: Reference, how: str
) -> None:
    engine = start()
    wanted = reference([LONG])
    with saved(daemon, BLOCKS):
        assert_same(engine.generate([LONG], 8), wanted, "computed")
    if how == "killed":
        daemon.kill()
    else:
        assert daemon.terminate() == 0
    for _ in range(3):
        assert engine.reset()
        assert_same(engine.generate([LONG, OTHER], 8), reference([LONG, OTHER]), "alone")
    daemon.start()
    assert held(daemon.wait(lambda status: len(status["sessions"]) == 1)) >= BLOCKS
    loaded = []
    for _ in range(50):
        assert engine.reset()
        loaded = engine.generate([LONG], 8)
        assert_same(loaded, wanted, "whether it was loaded or not")
        if cached_tokens(loaded) == [WHOLE]:
            break
        time.sleep(0.1)
    assert cached_tokens(loaded) == [WHOLE], daemon.log_tail()
    late = start()
    loaded = late.generate([LONG], 8)
    assert_same(loaded, wanted, "in an engine that came later")
    assert cached_tokens(loaded) == [WHOLE]


def test_a_daemon_that_stands_still_holds_nobody_up(
    daemon: Daemon, start: Start, reference: Reference
) -> None:
    engine = start()
    with saved(daemon, BLOCKS):
        engine.generate([LONG])
    daemon.pause(True)
    try:
        for _ in range(3):
            assert engine.reset()
            wanted = reference([LONG, OTHER])
            assert_same(engine.generate([LONG, OTHER], 32), wanted, "beside it")
    finally:
        daemon.pause(False)
    with saved(daemon, 1):
        assert_same(engine.generate(MIXED, 8), reference(MIXED), "when it goes on")
