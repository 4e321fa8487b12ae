"""KV events of the pool, as vLLM publishes them."""

from __future__ import annotations

from typing import Any

from engines.client import EngineProcess
from engines.config import BLOCK_TOKENS
from engines.matrix import (
    V1_SMALL_POOL,
    V1_STRICT_SMALL_POOL,
    V2_STRICT_SMALL_POOL,
    each_length,
    on,
)
from engines.workloads import FAMILY, PREFIX, STREAM, token_ids

Event = dict[str, Any]
SMALL_POOLS = [V1_SMALL_POOL, V1_STRICT_SMALL_POOL, V2_STRICT_SMALL_POOL]
"""With async scheduling a block is computed before the scheduler knows its last token."""


def of_pool(events: list[Event], kind: str) -> list[Event]:
    """Events of the pool; vLLM's own carry another medium."""
    return [event for event in events if event["medium"] == "CPU" and event["kind"] == kind]


def hashes(events: list[Event]) -> list[Any]:
    """Block hashes in order."""
    return [block for event in events for block in event["block_hashes"]]


def forget_the_past(engine: EngineProcess) -> None:
    """Lets the removals be published that the reset before this test has caused."""
    engine.settle()
    engine.recorded("events")


@each_length
@on(*SMALL_POOLS)
def test_saved_blocks_are_announced_with_the_hashes_that_vllm_uses(
    engine: EngineProcess, max_tokens: int
) -> None:
    forget_the_past(engine)
    [output] = engine.generate([FAMILY], max_tokens)
    engine.settle()
    events = engine.recorded("events")
    stored = of_pool(events, "BlockStored")
    on_gpu = [e for e in events if e["kind"] == "BlockStored" and e["medium"] != "CPU"]
    assert sorted(map(str, hashes(stored))) == sorted(map(str, hashes(on_gpu)))
    assert [event["parent"] for event in stored] == [None, *hashes(stored)[:-1]]
    said = token_ids(FAMILY) + output["tokens"]
    # The last token was sampled and never computed.
    whole = (len(said) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert [token for event in stored for token in event["token_ids"]] == said[:whole]


@on(*SMALL_POOLS)
def test_evicted_blocks_are_announced_once_and_only_after_they_were_stored(
    engine: EngineProcess,
) -> None:
    forget_the_past(engine)
    for prompt in STREAM:
        engine.generate([prompt])
        engine.settle()
    events = engine.recorded("events")
    held: set[str] = set()
    for event in events:
        if event["medium"] != "CPU":
            continue
        for block in map(str, event["block_hashes"]):
            if event["kind"] == "BlockStored":
                assert block not in held, "announced twice"
                held.add(block)
            else:
                held.remove(block)
    assert of_pool(events, "BlockRemoved"), "30 blocks went through a pool of 20"
    assert len(held) == engine.counts()["gauge_held"] <= engine.config.rows


@on(*SMALL_POOLS)
def test_clearing_the_pool_removes_what_was_announced(engine: EngineProcess) -> None:
    forget_the_past(engine)
    engine.generate([PREFIX])
    engine.settle()
    stored = hashes(of_pool(engine.recorded("events"), "BlockStored"))
    assert len(stored) == 2
    assert engine.reset(connector=True)
    engine.settle()
    removed = hashes(of_pool(engine.recorded("events"), "BlockRemoved"))
    assert sorted(map(str, removed)) == sorted(map(str, stored))


@on(*SMALL_POOLS)
def test_blocks_saved_in_the_step_after_a_reset_are_announced(engine: EngineProcess) -> None:
    forget_the_past(engine)
    assert engine.reset(connector=True)
    engine.generate([PREFIX])
    engine.settle()
    assert len(of_pool(engine.recorded("events"), "BlockStored")) == 2
