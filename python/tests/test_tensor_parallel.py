"""Two ranks: every row has a shard of each, and a load ends when both have ended it."""

from __future__ import annotations

from engines.client import EngineProcess
from engines.compare import assert_same, cached_tokens
from engines.matrix import TP2, TP2_V2, each_length, on
from engines.segment_file import SegmentFile
from engines.workloads import LONG, MIXED, OTHER, PRESSED, Reference, pressed_lengths


@each_length
@on(TP2, TP2_V2)
def test_two_ranks_save_and_load_the_same_outputs(
    engine: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    wanted = reference(MIXED)
    assert_same(engine.generate(MIXED, max_tokens), wanted, "cold")
    engine.settle()
    assert engine.reset()
    before = engine.counts()
    together = engine.generate(MIXED, max_tokens)
    assert_same(together, wanted, "reloaded together")
    # The first, which has nothing to load, would wait for the others; so they load async, and the
    # one of two whole blocks has both.
    assert cached_tokens(together) == [0, 64, 64, 128]
    assert engine.reset()
    assert_same(engine.generate(MIXED[3:], max_tokens), wanted[3:], "reloaded alone")
    engine.settle()
    after = engine.counts()
    assert after["hit_tokens"] - before.get("hit_tokens", 0) == 256 + 128
    assert after["loaded_tokens_layered"] >= 128, "the one that was alone loads layer by layer"
    assert after["gauge_loads"] == 0


@each_length
@on(TP2, TP2_V2)
def test_a_shard_damaged_on_one_rank_fails_the_block_on_both(
    engine: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    engine.generate([LONG])
    engine.settle()
    assert engine.reset()
    before = engine.counts().get("load_failures", 0)
    # Half a row is one rank's: change only bytes of the second.
    SegmentFile(engine.segment, engine.config.row_bytes, ranks=2).damage(only_rank=1)
    # While another request runs, "auto" loads async: a failure can be told.
    running = engine.submit(OTHER, 32)
    engine.step(3)
    late = engine.submit(LONG, max_tokens)
    engine.step(until_done=True)
    assert_same(engine.results([running, late]), reference([OTHER, LONG]), "one bad shard")
    engine.settle()
    assert engine.counts()["load_failures"] > before
    assert engine.counts()["gauge_loads"] == 0


@each_length
@on(TP2, TP2_V2)
def test_two_ranks_survive_preemption(
    engine: EngineProcess, reference: Reference, max_tokens: int
) -> None:
    prompts, lengths = PRESSED, pressed_lengths(max_tokens)
    assert_same(engine.generate(prompts, lengths), reference(prompts), "cold")
    assert engine.recorded("preempted"), "the test does not test anything"
    engine.settle()
    assert engine.reset()
    assert_same(engine.generate(prompts, lengths), reference(prompts), "reloaded")
