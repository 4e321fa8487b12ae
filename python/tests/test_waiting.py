"""A request that vLLM asks about in every step costs its lookup and its verification once."""

from __future__ import annotations

from dataclasses import replace

from engines.client import EngineProcess
from engines.compare import assert_same
from engines.matrix import V1_LAYERED, V1_STRICT, V2_STRICT, on
from engines.workloads import CROWD, LONG, OTHER, PREFIX, Reference

LONG_BLOCKS = 10
V1_SHORT_LEASE = replace(V1_STRICT, settings='{"lease_ms": 1}')


def save(engine: EngineProcess, *prompts: dict[str, object]) -> dict[str, float]:
    """Fills the pool and empties vLLM's own cache; the counts by then."""
    engine.generate(list(prompts))
    engine.settle()
    assert engine.reset()
    return engine.counts()


def growth(engine: EngineProcess, before: dict[str, float], name: str) -> float:
    """How much a count has grown, as far as the engine has told."""
    return float(engine.counts().get(name, 0) - before.get(name, 0))


def wait_in_full_queue(engine: EngineProcess) -> tuple[list[str], str]:
    """Lets LONG wait for blocks that others have, at the head of the queue; their ids and its."""
    crowd = [engine.submit(text, 40) for text in CROWD[:4]]
    engine.step(10)  # They have grown by a block each, and LONG does not fit beside them.
    waiting = engine.submit(LONG, 8)
    engine.step(20)
    assert engine.statuses()[waiting] == "WAITING"
    return crowd, waiting


@on(V1_STRICT, V2_STRICT, V1_LAYERED)
def test_what_waits_at_the_head_of_the_queue_is_verified_once(
    engine: EngineProcess, reference: Reference
) -> None:
    before = save(engine, LONG)
    crowd, waiting = wait_in_full_queue(engine)
    assert growth(engine, before, "verified_blocks") == LONG_BLOCKS
    assert growth(engine, before, "hit_tokens") == 0
    engine.step(until_done=True)
    outputs = engine.results([*crowd, waiting])
    assert_same(outputs, reference([*CROWD[:4], LONG]), "after it has waited")
    assert outputs[-1]["cached"] == LONG_BLOCKS * 32
    engine.settle()
    assert growth(engine, before, "verified_blocks") == LONG_BLOCKS


@on(V1_SHORT_LEASE)
def test_a_request_that_waits_longer_than_its_lease_is_matched_again(
    engine: EngineProcess, reference: Reference
) -> None:
    before = save(engine, LONG)
    crowd, waiting = wait_in_full_queue(engine)
    assert growth(engine, before, "verified_blocks") > LONG_BLOCKS
    engine.step(until_done=True)
    outputs = engine.results([*crowd, waiting])
    assert_same(outputs, reference([*CROWD[:4], LONG]), "matched again")
    assert outputs[-1]["cached"] == LONG_BLOCKS * 32


@on(V1_STRICT, V2_STRICT)
def test_a_pool_that_is_cleared_while_a_request_waits_supplies_nothing(
    engine: EngineProcess, reference: Reference
) -> None:
    before = save(engine, LONG)
    crowd, waiting = wait_in_full_queue(engine)
    engine.reset(connector=True)
    engine.step(until_done=True)
    outputs = engine.results([*crowd, waiting])
    assert_same(outputs, reference([*CROWD[:4], LONG]), "computed after the reset")
    engine.settle()
    assert growth(engine, before, "hit_tokens") == 0


@on(V1_STRICT)
def test_what_is_put_off_for_other_loads_is_not_verified_and_holds_up_nobody(
    engine: EngineProcess, reference: Reference
) -> None:
    before = save(engine, PREFIX, LONG)
    engine.limit_loads(1)
    engine.hold_loads(True)
    loading = engine.submit(PREFIX, 8)
    engine.step(3)
    assert engine.statuses()[loading] == "WAITING_FOR_REMOTE_KVS"
    put_off, unknown = engine.submit(LONG, 8), engine.submit(OTHER, 8)
    engine.step(20)
    assert growth(engine, before, "deferred_lookups") >= 10
    assert growth(engine, before, "verified_blocks") == 2, "those of PREFIX"
    assert unknown not in engine.statuses(), "what is not in the pool is computed"
    engine.hold_loads(False)
    engine.step(until_done=True)
    outputs = engine.results([loading, put_off, unknown])
    assert_same(outputs, reference([PREFIX, LONG, OTHER]), "one load after the other")
    assert [output["cached"] for output in outputs] == [64, LONG_BLOCKS * 32, 0]
    engine.settle()
    assert growth(engine, before, "verified_blocks") == 2 + LONG_BLOCKS
    engine.limit_loads(256)
