"""Two ranks: every row has a shard of each, and a load ends when both have ended it."""

from __future__ import annotations

from engines.client import EngineProcess
from engines.compare import assert_same, cached_tokens
from engines.matrix import TP2, TP2_V2, on
from engines.segment_file import SegmentFile
from engines.workloads import CROWD, LONG, MIXED, OTHER, Reference


@on(TP2, TP2_V2)
def test_two_ranks_save_and_load_the_same_outputs(
    engine: EngineProcess, reference: Reference
) -> None:
    wanted = reference(MIXED)
    assert_same(engine.generate(MIXED, 8), wanted, "cold")
    engine.settle()
    assert engine.reset()
    before = engine.counts()
    together = engine.generate(MIXED, 8)
    assert_same(together, wanted, "reloaded together")
    assert cached_tokens(together) == [0, 32, 64, 128]
    assert engine.reset()
    assert_same(engine.generate(MIXED[3:]), wanted[3:], "reloaded alone")
    engine.settle()
    after = engine.counts()
    assert after["hit_tokens"] - before.get("hit_tokens", 0) == 224 + 128
    assert after["loaded_tokens_layered"] >= 128, "the one that was alone loads layer by layer"
    assert after["gauge_loads"] == 0


@on(TP2)
def test_a_shard_damaged_on_one_rank_fails_the_block_on_both(
    engine: EngineProcess, reference: Reference
) -> None:
    engine.generate([LONG])
    engine.settle()
    assert engine.reset()
    # Half a row is one rank's: change only bytes of the second.
    SegmentFile(engine.segment, engine.config.row_bytes, ranks=2).damage(only_rank=1)
    # While another request runs, "auto" loads async: a failure can be told.
    running = engine.submit(OTHER, 24)
    engine.step(3)
    late = engine.submit(LONG, 8)
    engine.step(until_done=True)
    assert_same(engine.results([running, late]), reference([OTHER, LONG]), "one bad shard")
    engine.settle()
    assert engine.counts()["load_failures"] >= 1
    assert engine.counts()["gauge_loads"] == 0


@on(TP2)
def test_two_ranks_survive_preemption(engine: EngineProcess, reference: Reference) -> None:
    before = engine.counts().get("preemptions", 0)
    assert_same(engine.generate(CROWD, 40), reference(CROWD), "cold")
    engine.settle()
    assert engine.reset()
    assert_same(engine.generate(CROWD, 40), reference(CROWD), "reloaded")
    assert engine.counts()["preemptions"] > before
