"""Data parallel ranks: each is an engine of its own, with a session in a daemon's pool or a pool of
its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines.config import EngineConfig, new_engine_id
from engines.daemon import Daemon
from engines.http import Server
from engines.matrix import V1_ASYNC
from engines.workloads import LONG, token_ids

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("no_engine")]

RANKS = 2
WHOLE = 320
"""Tokens of `LONG` that can be loaded."""
BLOCKS = 10
"""Blocks that they are."""

Start = Callable[[dict[str, Any]], Server]


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a server with two ranks and kvtide's settings."""
    servers: list[Server] = []

    def start_server(settings: dict[str, Any]) -> Server:
        config: EngineConfig = replace(V1_ASYNC, settings=json.dumps(settings))
        server = Server(config, tiny_model, new_engine_id(), tmp_path, data_parallel=RANKS)
        servers.append(server)
        return server

    yield start_server
    for server in servers:
        server.stop()


def computed(server: Server, rank: int) -> tuple[str, int]:
    """The text that a rank gives for `LONG`, and how many tokens of that were cached."""
    reply = server.complete(token_ids(LONG), 8, rank=rank)
    usage = reply["usage"]
    details = usage["prompt_tokens_details"] or {}
    return reply["choices"][0]["text"], details.get("cached_tokens") or 0


def test_ranks_share_a_daemons_pool_each_with_a_session(start: Start) -> None:
    daemon = Daemon()
    try:
        server = start({"pool": daemon.pool, "pool_required": True})
        status = daemon.wait(lambda status: len(status["sessions"]) == RANKS)
        names = {each["engine_id"] for each in status["sessions"]}
        assert names == {f"{server.engine_id}_dp{rank}" for rank in range(RANKS)}
        text, cached = computed(server, 0)
        assert cached == 0
        daemon.wait(
            lambda status: sum(each["held_blocks"] for each in status["namespaces"]) == BLOCKS
        )
        assert computed(server, 1) == (text, WHOLE), "the other rank loads what the first computed"
    finally:
        daemon.close()


def test_without_a_daemon_each_rank_has_a_pool_of_its_own(start: Start) -> None:
    server = start({})
    text, cached = computed(server, 0)
    assert cached == 0
    assert computed(server, 1) == (text, 0), "the other rank has another pool"
    server.reset()
    assert computed(server, 0) == (text, WHOLE), "the first has its own"
