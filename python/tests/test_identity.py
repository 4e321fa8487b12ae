"""Outputs with kvtide are the outputs without it: tokens and logprobs, wherever KV came from."""

from __future__ import annotations

from engines.client import EngineProcess
from engines.compare import assert_same, cached_tokens, differences
from engines.config import BLOCK_TOKENS
from engines.matrix import ALL_MODES, BOTH_RUNNERS, EVERYTHING, V1_LAYERED, each_length, on
from engines.workloads import (
    FAMILY,
    FIRST_TURN,
    LONG,
    MIXED,
    PREFIX,
    Reference,
    salted,
    second_turn,
    token_ids,
)


def reloadable(load: str) -> list[set[int]]:
    """Tokens of each prompt of MIXED that a cache can supply: whole blocks, without that of the
    last token if the load is layered."""
    lengths = [len(token_ids(prompt)) for prompt in MIXED]
    layered = [(length - 1) // BLOCK_TOKENS * BLOCK_TOKENS for length in lengths]
    asynchronous = [
        length // BLOCK_TOKENS * BLOCK_TOKENS if blocks else 0
        for length, blocks in zip(lengths, layered, strict=True)
    ]
    used = {"async": [asynchronous], "auto": [layered, asynchronous]}.get(load, [layered])
    return [set(each) for each in zip(*used, strict=True)]


@on(*EVERYTHING)
def test_the_engine_is_what_the_configuration_says(engine: EngineProcess) -> None:
    described, config = engine.description, engine.config
    assert described["async_scheduling"] == config.async_scheduling
    assert described["v2"] == (config.runner == "v2"), described["runner"]
    assert described["blocks"] == config.blocks
    # What kvtide's async loads rest on: blocks that a step in flight may use are not handed out.
    assert described["frees_behind_steps"] == (described["batches_at_once"] > 1)


@each_length
@on(*EVERYTHING)
def test_outputs_are_the_same_cold_warm_and_after_reset(
    engine: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    wanted = reference(MIXED)
    cold = engine.generate(MIXED, max_tokens)
    assert_same(cold, wanted, "cold")
    assert cached_tokens(cold) == [0] * len(MIXED)
    engine.settle()
    assert_same(engine.generate(MIXED, max_tokens), wanted, "warm")
    assert engine.reset()
    before = engine.counts()
    together = engine.generate(MIXED, max_tokens)
    assert_same(together, wanted, "reloaded together")
    loaded = cached_tokens(together)
    allowed = reloadable(engine.config.load)
    assert all(found in each for found, each in zip(loaded, allowed, strict=True)), loaded
    for prompt, right, each in zip(MIXED, wanted, allowed, strict=True):
        assert engine.reset()
        alone = engine.generate([prompt], max_tokens)
        assert_same(alone, [right], "reloaded alone")
        assert cached_tokens(alone)[0] in each
        loaded += cached_tokens(alone)
    engine.settle()
    counts = engine.counts()
    assert counts["hit_tokens"] - before.get("hit_tokens", 0) == sum(loaded)
    assert counts.get("load_failures", 0) == before.get("load_failures", 0)
    assert counts["gauge_loads"] == 0
    assert engine.recorded("bad_blocks") == []


@on(*ALL_MODES)
def test_loads_use_the_configured_mode(engine: EngineProcess, reference: Reference) -> None:
    engine.generate([LONG])
    engine.settle()
    assert engine.reset()
    before = engine.counts()
    assert_same(engine.generate([LONG], 2), reference([LONG]), "reloaded")
    engine.settle()
    after = engine.counts()
    layered, asynchronous = (
        after.get(name, 0) - before.get(name, 0)
        for name in ("loaded_tokens_layered", "loaded_tokens_async")
    )
    # A request that is alone holds nobody up: "auto" loads it layer by layer.
    wanted = (0, 320) if engine.config.load == "async" else (320, 0)
    assert (layered, asynchronous) == wanted


@each_length
@on(*ALL_MODES)
def test_a_chunked_prefill_is_saved_whole(
    engine: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    cold = engine.generate([LONG], max_tokens)
    assert_same(cold, reference([LONG]), "cold, in chunks")
    engine.settle()
    assert engine.reset()
    again = engine.generate([LONG], max_tokens)
    assert_same(again, reference([LONG]), "reloaded")
    assert cached_tokens(again) == [320]


@each_length
@on(*ALL_MODES)
def test_a_load_behind_a_local_hit_fills_the_right_blocks(
    engine: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    """vLLM has the first two blocks itself; `num_computed_tokens` is 0 when it allocates."""
    engine.generate([FAMILY])
    engine.settle()
    assert engine.reset()
    assert_same(engine.generate([PREFIX], 4), reference([PREFIX]), "the prefix alone")
    before = engine.counts()
    output = engine.generate([FAMILY], max_tokens)
    assert_same(output, reference([FAMILY]), "local blocks, then loaded ones")
    assert cached_tokens(output) == [160]
    engine.settle()
    assert engine.counts()["hit_tokens"] - before["hit_tokens"] == 96


@on(*BOTH_RUNNERS)
def test_generated_tokens_are_saved(engine: EngineProcess, reference: Reference) -> None:
    [first] = engine.generate([FIRST_TURN], 48)
    assert_same([first], reference([FIRST_TURN]), "first turn")
    engine.settle()
    assert engine.reset()
    question = second_turn(first)
    again = engine.generate([question], 8)
    assert_same(again, reference([question]), "second turn")
    # 60 tokens of the question and 47 of the answer were computed: 3 blocks, 2 with generated ones.
    assert cached_tokens(again) == [96]


@on(*BOTH_RUNNERS)
def test_salts_do_not_share_blocks(engine: EngineProcess, reference: Reference) -> None:
    mine, theirs = salted(LONG, "mine"), salted(LONG, "theirs")
    engine.generate([mine])
    engine.settle()
    assert engine.reset()
    for other in (theirs, LONG):
        outputs = engine.generate([other], 2)
        assert_same(outputs, reference([LONG]), "another salt")
        assert cached_tokens(outputs) == [0]
    assert engine.reset()
    assert cached_tokens(engine.generate([mine])) == [320]


@on(V1_LAYERED)
def test_the_comparison_sees_an_error_of_one_percent_in_one_layer(
    engine: EngineProcess, reference: Reference
) -> None:
    """A negative control: without it, equality of outputs would prove little."""
    engine.generate([LONG])
    engine.scale_layer(3, 1.01)
    outputs = engine.generate([LONG], 8)
    assert cached_tokens(outputs) == [320]
    assert differences(outputs, reference([LONG]))
