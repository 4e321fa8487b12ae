"""Damaged rows are noticed, counted and recomputed; nothing that goes wrong fails a request."""

from __future__ import annotations

from engines.client import EngineProcess
from engines.compare import assert_same, differences
from engines.matrix import (
    V1_ASYNC,
    V1_LAYERED,
    V1_STRICT_SMALL_POOL,
    V1_UNVERIFIED,
    V2_ASYNC,
    V2_LAYERED,
    V2_SCRUBBED,
    V2_STRICT_SMALL_POOL,
    V2_UNVERIFIED,
    each_length,
    on,
)
from engines.segment_file import SegmentFile
from engines.workloads import CROWD, FAMILY, LONG, MIXED, OTHER, Reference, token_ids

LONG_BLOCKS = 10


def save(engine: EngineProcess, prompts: list[dict[str, object]]) -> SegmentFile:
    """Fills the pool and empties vLLM's own cache."""
    engine.generate(prompts)
    engine.settle()
    assert engine.reset()
    return SegmentFile(engine.segment, engine.config.row_bytes)


def growth(engine: EngineProcess, before: dict[str, float], name: str) -> float:
    """How much a count has grown."""
    engine.settle()
    return float(engine.counts().get(name, 0) - before.get(name, 0))


@each_length
@on(V1_ASYNC, V2_ASYNC)
def test_a_damaged_row_is_recomputed_and_counted(
    engine: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    file = save(engine, [LONG])
    before = engine.counts()
    damaged = file.sealed_rows()[-1:]
    file.damage(damaged)
    # Other rows in the file may be left from earlier tests; damage all of them if this one was.
    output = engine.generate([LONG], max_tokens)
    if growth(engine, before, "load_failures") == 0:
        assert engine.reset()
        file.damage()
        output = engine.generate([LONG], max_tokens)
    assert_same(output, reference([LONG]), "with damaged rows")
    assert growth(engine, before, "load_failures") >= 1
    assert growth(engine, before, "damaged_blocks") >= 1
    assert engine.reset()
    again = engine.generate([LONG], max_tokens)
    assert_same(again, reference([LONG]), "saved again and reloaded")


@each_length
@on(V1_ASYNC, V2_ASYNC)
def test_requests_survive_the_failure_of_every_load(
    engine: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    prompts = [LONG, *MIXED, OTHER]
    file = save(engine, prompts)
    before = engine.counts()
    file.damage()
    outputs = engine.generate(prompts, max_tokens)
    assert_same(outputs, reference(prompts), "every load failed")
    assert growth(engine, before, "load_failures") >= LONG_BLOCKS
    assert engine.recorded("bad_blocks"), "vLLM was told of the blocks"
    assert engine.counts()["gauge_loads"] == 0


@each_length
@on(V1_ASYNC, V2_ASYNC)
def test_a_load_that_fails_while_others_run_harms_only_itself(
    engine: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    file = save(engine, [LONG])
    before = engine.counts()
    running = [engine.submit(prompt, 32) for prompt in CROWD[:2]]
    engine.step(4)
    file.damage()
    late = engine.submit(LONG, max_tokens)
    engine.step(until_done=True)
    outputs = engine.results([*running, late])
    assert_same(outputs, reference([*CROWD[:2], LONG]), "beside a failing load")
    assert growth(engine, before, "load_failures") >= LONG_BLOCKS


@each_length
@on(V1_LAYERED, V2_LAYERED)
def test_damaged_rows_are_never_offered_for_a_layered_load_under_verify_always(
    engine: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    file = save(engine, [LONG])
    before = engine.counts()
    file.damage()
    outputs = engine.generate([LONG], max_tokens)
    assert_same(outputs, reference([LONG]), "damaged rows")
    assert growth(engine, before, "damaged_blocks") >= 1
    assert growth(engine, before, "layered_failures") == 0
    assert engine.recorded("bad_blocks") == [], "a layered load cannot be taken back"


@each_length
@on(V1_UNVERIFIED, V2_UNVERIFIED)
def test_damage_that_a_layered_load_brought_in_does_not_spread(
    engine: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    """Also a negative control: here damaged bytes do reach the model, and outputs do differ.

    With 32 tokens the first request completes a block behind the damaged ones, vLLM has them all in
    its prefix cache, and the pool would take them from there with checksums that fit.
    """
    file = save(engine, [LONG])
    before = engine.counts()
    file.damage()
    assert differences(engine.generate([LONG], max_tokens), reference([LONG]))
    assert growth(engine, before, "layered_failures") == LONG_BLOCKS
    assert growth(engine, before, "damaged_blocks") == LONG_BLOCKS
    assert engine.recorded("bad_blocks") == [], "a layered load cannot be taken back"
    assert_same(engine.generate([LONG], max_tokens), reference([LONG]), "computed anew")
    engine.settle()
    assert engine.reset()
    again = engine.generate([LONG], max_tokens)
    assert_same(again, reference([LONG]), "saved anew and reloaded")
    assert growth(engine, before, "layered_failures") == LONG_BLOCKS, "it happened once"


@on(V1_UNVERIFIED, V2_UNVERIFIED)
def test_what_a_request_computes_from_damaged_bytes_is_served_to_nobody(
    engine: EngineProcess,
) -> None:
    first = {"prompt_token_ids": [*token_ids(FAMILY), *range(20, 40)]}
    file = save(engine, [FAMILY])
    file.damage()
    (spoiled,) = engine.generate([first], 70)
    tokens = spoiled["tokens"]
    assert isinstance(tokens, list)
    follow_up = {"prompt_token_ids": [*token_ids(first), *tokens, 7]}
    # The first computes the prefix anew; the others hit that, and whatever lies behind it.
    outputs = [engine.generate([follow_up], 4) for _ in range(3)]
    engine.settle()
    assert engine.reset()
    outputs.append(engine.generate([follow_up], 4))
    assert engine.reset(connector=True)
    right = engine.generate([follow_up], 4)
    assert differences(engine.generate([first], 70), [spoiled]), "damage did not reach the model"
    for number, output in enumerate(outputs):
        assert_same(output, right, f"follow-up {number}")


@each_length
@on(V1_STRICT_SMALL_POOL, V2_STRICT_SMALL_POOL)
def test_under_the_policy_that_fails_requests_only_verified_blocks_are_matched(
    engine: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    file = save(engine, [LONG, OTHER])
    assert_same(engine.generate([LONG], max_tokens), reference([LONG]), "reloaded")
    assert engine.reset()
    before = engine.counts()
    file.damage()
    outputs = engine.generate([LONG, OTHER], max_tokens)
    assert_same(outputs, reference([LONG, OTHER]), "damaged rows")
    assert growth(engine, before, "load_failures") == 0
    assert growth(engine, before, "damaged_blocks") >= 1


@on(V2_SCRUBBED)
def test_the_scrub_finds_damaged_rows_before_they_are_asked_for(
    engine: EngineProcess, reference: Reference
) -> None:
    file = save(engine, [LONG])
    before = engine.counts()
    file.damage()
    for _ in range(50):
        if growth(engine, before, "damaged_blocks") >= LONG_BLOCKS:
            break
    else:
        raise AssertionError(f"the scrub found nothing: {engine.counts()}")
    assert_same(engine.generate([LONG], 4), reference([LONG]), "after the scrub")
    assert growth(engine, before, "layered_failures") == 0
