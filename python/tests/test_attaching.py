"""Engines whose daemon comes later than they, or comes back with memory made anew."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import kvtide.geometry
import pytest
from engines.client import EngineProcess, Nursery
from engines.compare import assert_same, cached_tokens
from engines.config import EngineConfig
from engines.daemon import Daemon
from engines.matrix import TP2, V1_ASYNC, V1_LAYERED, V2_LAYERED, need_triton
from engines.workloads import LONG, MIXED, OTHER, Reference
from kvtide._native import ConfigError, Namespace, Settings
from kvtide._native import Daemon as NativeDaemon

WHOLE = 320
"""Tokens of `LONG` that can be loaded."""
LIMIT_S = 60.0
ROUNDS_WITHOUT = 3
"""Generations without a daemon."""

Start = Callable[..., EngineProcess]
engines = pytest.mark.engine
without_others = pytest.mark.usefixtures("no_engine")


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon that has not been started."""
    made = Daemon(started=False)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def start(daemon: Daemon, tiny_model: Path, nursery: Nursery) -> Iterator[Start]:
    """Starts engines with the daemon's pool; they end with the test."""
    started: list[EngineProcess] = []

    def start_engine(config: EngineConfig, **settings: Any) -> EngineProcess:
        need_triton(config.runner)
        extra = json.dumps({"pool": daemon.pool} | settings)
        started.append(EngineProcess(replace(config, settings=extra), tiny_model, nursery))
        return started[-1]

    yield start_engine
    for engine in started:
        if engine.is_alive():
            engine.close()


@contextmanager
def until(what: str) -> Iterator[Callable[[bool], bool]]:
    """Asks again, for as long as a busy machine may need."""
    limit = time.monotonic() + LIMIT_S

    def is_over(reached: bool) -> bool:
        assert reached or time.monotonic() < limit, f"waited in vain until {what}"
        return reached

    yield is_over


def generate_until_loaded(engine: EngineProcess, reference: Reference) -> None:
    """What is computed is right all along, and is loaded in the end."""
    wanted = reference([LONG])
    with until("it is loaded") as is_over:
        while True:
            assert engine.reset()
            outputs = engine.generate([LONG], 8)
            assert_same(outputs, wanted, "whether it was loaded or not")
            if is_over(cached_tokens(outputs) == [WHOLE]):
                return
            time.sleep(0.02)


@engines
@without_others
@pytest.mark.parametrize("config", [V1_LAYERED, TP2], ids=lambda config: config.name)
def test_an_engine_starts_without_its_daemon_and_attaches_when_that_comes(
    daemon: Daemon, start: Start, reference: Reference, config: EngineConfig
) -> None:
    engine = start(config)
    for _ in range(ROUNDS_WITHOUT):
        assert engine.reset()
        alone = engine.generate([LONG, OTHER], 8)
        assert_same(alone, reference([LONG, OTHER]), "without a daemon")
        assert cached_tokens(alone) == [0, 0]
    assert engine.log.read_text().count("starts without a cache") == 1
    daemon.start()
    generate_until_loaded(engine, reference)
    assert_same(engine.generate(MIXED, 32), reference(MIXED), "and others")
    assert "attached to the daemon" in engine.log.read_text()


@engines
@without_others
@pytest.mark.parametrize(
    "config", [V1_ASYNC, V1_LAYERED, V2_LAYERED, TP2], ids=lambda config: config.name
)
def test_engines_go_over_to_memory_that_was_made_anew(
    daemon: Daemon, start: Start, reference: Reference, config: EngineConfig
) -> None:
    daemon.start()
    engine = start(config)
    generate_until_loaded(engine, reference)
    for capacity, how in (("96MiB", daemon.kill), ("64MiB", daemon.terminate)):
        ids = [engine.submit(prompt, 32) for prompt in MIXED]
        engine.step(2)
        how()
        daemon.configure(capacity)
        engine.step(2)
        daemon.start()
        engine.step(until_done=True)
        assert_same(engine.results(ids), reference(MIXED), "while the daemon was another")
        generate_until_loaded(engine, reference)
    daemon.wait(lambda status: len(status["sessions"]) == 1)


@engines
@without_others
def test_engines_go_over_to_memory_that_a_reboot_would_leave_and_share_it(
    daemon: Daemon, start: Start, reference: Reference
) -> None:
    daemon.start()
    first, second = start(V1_ASYNC), start(V1_ASYNC)
    generate_until_loaded(first, reference)
    daemon.kill()
    daemon.forget()
    daemon.start()
    generate_until_loaded(first, reference)
    first.settle()  # What its last request has left to save goes with the next step.
    assert_same(second.generate([LONG], 8), reference([LONG]), "in another engine")
    generate_until_loaded(second, reference)


def test_an_engine_that_requires_its_daemon_does_not_start_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvtide.geometry, "ATTACH_TIMEOUT_S", 0.05)
    socket = tmp_path / "kvtide.sock"
    namespace = Namespace(
        model="m",
        weights_revision="",
        compute_dtype="",
        kv_dtype="",
        layout="",
        block_tokens=16,
        ranks=1,
        shard_bytes=64,
    )
    daemon = NativeDaemon(socket, "e", namespace, "", 1, 1, 64, False)

    def settings(required: bool) -> Settings:
        return Settings(json.dumps({"pool": f"unix:{socket}", "pool_required": required}), {})

    assert kvtide.geometry.attach(daemon, settings(False)) is None
    with pytest.raises(ConfigError, match="no daemon answers"):
        kvtide.geometry.attach(daemon, settings(True))
