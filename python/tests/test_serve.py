"""`vllm serve` with kvtide: cached tokens, metrics, events over ZMQ, and a clean end."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq
from engines.client import EngineProcess, Nursery
from engines.config import BLOCK_TOKENS, EngineConfig, new_engine_id
from engines.http import Server
from engines.matrix import TP2, V1_ASYNC, on
from engines.segment_file import held_segment, named_segment
from engines.workloads import FAMILY, LONG, token_ids

SERVED = EngineConfig("v1", load="auto", blocks=48)


class Events:
    """What the server publishes."""

    def __init__(self, endpoint: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(endpoint)
        self._socket.setsockopt_string(zmq.SUBSCRIBE, "kv")

    def take(self, limit_s: float, enough: int) -> list[Any]:
        """Events of the pool until there are `enough`."""
        import msgspec
        from vllm.distributed.kv_events import KVEventBatch

        decoder = msgspec.msgpack.Decoder(KVEventBatch)
        found: list[Any] = []
        limit = time.monotonic() + limit_s
        while len(found) < enough and time.monotonic() < limit:
            if self._socket.poll(200):
                _, _, payload = self._socket.recv_multipart()
                events = decoder.decode(payload).events
                found += [event for event in events if getattr(event, "medium", "") == "CPU"]
        return found

    def close(self) -> None:
        """Stops listening."""
        self._socket.close(0)


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests of this file; the last one ends it."""
    folder = tmp_path_factory.mktemp("serve")
    running = Server(SERVED, tiny_model, new_engine_id(), folder)
    yield running
    running.kill()
    running.named_segment.unlink(missing_ok=True)


def wait_for(server: Server, name: str, value: float) -> dict[str, float]:
    """Metrics once `name` has reached `value`; tiny requests keep the engine stepping."""
    for _ in range(40):
        metrics = server.metrics()
        if metrics.get(name, 0) >= value:
            return metrics
        server.complete([5], 1)
        time.sleep(0.1)
    raise AssertionError(f"{name} does not reach {value}: {metrics.get(name)}")


@pytest.mark.engine
@pytest.mark.usefixtures("no_engine")
def test_a_reload_shows_in_usage_metrics_and_events(server: Server) -> None:
    events = Events(server.events)
    try:
        cold = server.complete(token_ids(LONG), 16)
        wait_for(server, "kvtide_saved_blocks_total", 10)
        server.reset()
        again = server.complete(token_ids(LONG), 16)
        stored = events.take(20, enough=10)
    finally:
        events.close()
    assert again["choices"][0]["text"] == cold["choices"][0]["text"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 320
    metrics = wait_for(server, 'kvtide_hit_tokens_total{tier="host"}', 320)
    loaded = [v for k, v in metrics.items() if k.startswith("kvtide_loaded_tokens_total{")]
    assert sum(loaded) == 320
    assert metrics["kvtide_saved_bytes_total"] >= 10 * SERVED.row_bytes
    assert metrics["kvtide_loaded_bytes_total"] == 10 * SERVED.row_bytes
    assert metrics["kvtide_load_seconds_count"] == 1
    assert metrics["vllm:external_prefix_cache_hits_total"] == 320
    assert metrics["kvtide_pool_slots"] == SERVED.rows
    # A publisher drops what comes before the subscriber is there; the rest is whole.
    assert stored, "no events over ZMQ"
    assert all(len(event.token_ids) == BLOCK_TOKENS for event in stored)


@pytest.mark.engine
def test_another_salt_is_not_served_from_the_pool(server: Server) -> None:
    prompt = token_ids(FAMILY)
    server.complete(prompt, 1, cache_salt="mine")
    wait_for(server, "kvtide_saved_blocks_total", 15)
    server.reset()
    theirs = server.complete(prompt, 1, cache_salt="theirs")
    assert not (theirs["usage"]["prompt_tokens_details"] or {}).get("cached_tokens")
    server.reset()
    mine = server.complete(prompt, 1, cache_salt="mine")
    assert mine["usage"]["prompt_tokens_details"]["cached_tokens"] == 160


@pytest.mark.engine
def test_nothing_is_left_after_the_server_was_told_to_end(server: Server) -> None:
    family = server.family()
    assert len(family) > 1, "scheduler and API have processes of their own"
    assert held_segment(server.engine_id, family).exists()
    assert not server.named_segment.exists(), "a server that is ready has no name to leave behind"
    # vLLM kills the engine's processes here, unless it is started with --shutdown-timeout.
    assert server.stop() == []
    assert not server.named_segment.exists()


@on(TP2)
def test_a_killed_engine_leaves_nothing_behind(engine: EngineProcess) -> None:
    engine.generate([LONG])
    assert engine.segment.exists()
    engine.kill()
    assert not engine.named_segment.exists()


@pytest.mark.engine
@pytest.mark.usefixtures("no_engine")
def test_the_next_start_removes_what_a_crash_during_start_up_left(
    tiny_model: Path, nursery: Nursery
) -> None:
    # A directory of its own: engines of another suite clean up the common one.
    with tempfile.TemporaryDirectory(prefix="kvtide-tests-", dir="/dev/shm") as directory:
        stale = Path(directory) / named_segment(new_engine_id()).name
        stale.write_bytes(b"\0" * 8192)
        settings = json.dumps({"segment_directory": directory})
        engine = EngineProcess(replace(V1_ASYNC, settings=settings), tiny_model, nursery)
        try:
            assert not stale.exists()
            assert str(stale) in engine.log.read_text(), "an operator can read of it"
        finally:
            assert engine.close() == []
