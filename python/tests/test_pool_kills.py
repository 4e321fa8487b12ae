"""Engines and their daemon are killed at random instants, under load: nobody else is worse off."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines.client import EngineProcess, Nursery
from engines.compare import assert_same, cached_tokens
from engines.daemon import Daemon
from engines.matrix import V1_ASYNC
from engines.workloads import CROWD, LONG, MIXED, OTHER, Reference

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("no_engine")]

KILLS = int(os.environ.get("KVTIDE_POOL_KILLS", "8"))
SEED = int(os.environ.get("KVTIDE_POOL_KILLS_SEED", time.time_ns() % 1_000_000))
ENGINE_EVERY = 4
"""One in so many rounds kills an engine, which takes seconds to replace; the others the daemon."""
WHOLE = 320
"""Tokens of `LONG` that can be loaded."""
LOAD = [LONG, OTHER, *MIXED, *CROWD]


class Engines:
    """One that lives through everything, and one that is killed and replaced."""

    def __init__(self, daemon: Daemon, model: Path, nursery: Nursery) -> None:
        self._daemon, self._model, self._nursery = daemon, model, nursery
        self.survivor = self._start()
        self.victim = self._start()

    def _start(self) -> EngineProcess:
        config = replace(V1_ASYNC, settings=json.dumps({"pool": self._daemon.pool}))
        return EngineProcess(config, self._model, self._nursery)

    def kill_victim(self) -> None:
        """Whatever it is doing."""
        self.victim.kill()
        self.victim.log.unlink(missing_ok=True)

    def replace_victim(self) -> None:
        """By a new one."""
        self.victim = self._start()

    def close(self) -> None:
        """Ends both."""
        for engine in (self.survivor, self.victim):
            if engine.is_alive():
                engine.close()


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon that serves."""
    made = Daemon()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def engines(daemon: Daemon, tiny_model: Path, nursery: Nursery) -> Iterator[Engines]:
    """Two engines on the daemon's pool."""
    both = Engines(daemon, tiny_model, nursery)
    yield both
    both.close()


def holds_nothing(status: dict[str, Any], sessions: int) -> bool:
    """Whether so many engines are there, and nothing is read or being saved."""
    idle = all(each["pinned_blocks"] == each["saving_blocks"] == 0 for each in status["namespaces"])
    return len(status["sessions"]) == sessions and idle


def load_again(engine: EngineProcess, reference: Reference, why: str) -> None:
    """The engine finds `LONG` in the pool, as soon as it is attached."""
    wanted = reference([LONG])
    for _ in range(100):
        assert engine.reset()
        loaded = engine.generate([LONG], 8)
        assert_same(loaded, wanted, "whether it was loaded or not")
        if cached_tokens(loaded) == [WHOLE]:
            return
        time.sleep(0.1)
    raise AssertionError(f"{why}: it is not attached again")


def test_kills_at_random_instants_cost_no_request_and_no_token(
    daemon: Daemon, engines: Engines, reference: Reference
) -> None:
    print(f"KVTIDE_POOL_KILLS_SEED={SEED} KVTIDE_POOL_KILLS={KILLS}")
    chance = random.Random(SEED)
    took = 1.0
    noticed = 0.0
    for number in range(1, KILLS + 1):
        load = chance.sample(LOAD, 6)
        assert engines.survivor.reset()
        assert engines.victim.reset()
        engines.survivor.begin("generate", load, 32)
        others = chance.sample(LOAD, 6)
        engines.victim.begin("generate", others, 32)
        begun = time.monotonic()
        time.sleep(chance.uniform(0, took))
        if number % ENGINE_EVERY == 0:
            engines.kill_victim()
            killed = time.monotonic()
            # The survivor has some blocks pinned meanwhile: only the victim has to be gone.
            daemon.wait(lambda status: len(status["sessions"]) == 1)
            noticed = max(noticed, time.monotonic() - killed)
        elif chance.random() < 0.7:
            daemon.kill()
            time.sleep(chance.uniform(0, 0.3))
            daemon.start()
        else:
            assert daemon.terminate() == 0
            daemon.start()
        assert_same(engines.survivor.end(), reference(load), f"round {number}, survivor")
        took = time.monotonic() - begun if number == 1 else took
        if number % ENGINE_EVERY == 0:
            engines.replace_victim()
        else:
            assert_same(engines.victim.end(), reference(others), f"round {number}, beside it")
        load_again(engines.survivor, reference, f"round {number}")
        daemon.wait(lambda status: holds_nothing(status, 2))
    print(f"a killed engine was noticed within {noticed:.2f} s")
