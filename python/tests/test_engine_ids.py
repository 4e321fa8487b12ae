"""Two engines with one `engine_id`, and kvtide twice in one engine, are refused; none hangs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from engines.client import EngineError, EngineProcess, Nursery
from engines.compare import assert_same, cached_tokens
from engines.config import LAYER_BYTES, LAYERS, new_engine_id, transfer_config
from engines.matrix import V1_ASYNC
from engines.workloads import LONG, Reference

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("no_engine")]


def test_an_engine_with_the_id_of_another_that_is_starting_is_refused(
    tiny_model: Path, nursery: Nursery
) -> None:
    """The other's worker has its pool, and its scheduler's side has not come yet."""
    from kvtide._native import Segment, Settings

    engine_id = new_engine_id()
    settings = Settings(json.dumps(V1_ASYNC.extra_config()), {})
    worker = Segment(settings, engine_id, 1, LAYERS, LAYER_BYTES, 0, lambda *_: None)
    with pytest.raises(EngineError, match="engine_id: another worker of rank 0 uses /dev/shm/kv"):
        EngineProcess(V1_ASYNC, tiny_model, nursery, engine_id)
    # The other starts all the same.
    scheduler = Segment(settings, engine_id, 1, LAYERS, LAYER_BYTES, None, lambda *_: None)
    assert scheduler.nonce == worker.nonce


def test_the_id_of_an_engine_that_is_up_can_be_used_again(
    tiny_model: Path, nursery: Nursery, reference: Reference
) -> None:
    engine_id = new_engine_id()
    engines = [EngineProcess(V1_ASYNC, tiny_model, nursery, engine_id) for _ in range(2)]
    try:
        for engine in engines:
            engine.generate([LONG])
            engine.settle()
            assert engine.reset()
            again = engine.generate([LONG], 8)
            assert_same(again, reference([LONG]), "reloaded")
            assert cached_tokens(again) == [320]
    finally:
        for engine in engines:
            engine.close()


def test_kvtide_twice_in_a_multi_connector_is_refused(tiny_model: Path, nursery: Nursery) -> None:
    inner = transfer_config("unused", V1_ASYNC.extra_config())
    del inner["engine_id"]
    outer = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [inner, inner]},
    }
    config = replace(V1_ASYNC, arguments=json.dumps({"kv_transfer_config": outer}))
    with pytest.raises(EngineError, match="list kvtide once in a MultiConnector"):
        EngineProcess(config, tiny_model, nursery)


def test_workers_with_another_pool_are_noticed_and_nothing_is_loaded(
    tiny_model: Path, nursery: Nursery, reference: Reference
) -> None:
    engine = EngineProcess(V1_ASYNC, tiny_model, nursery)
    try:
        engine.report_another_segment()
        engine.generate([LONG])
        assert engine.reset()
        again = engine.generate([LONG], 8)
        assert_same(again, reference([LONG]), "computed")
        assert cached_tokens(again) == [0]
        assert "engine_id: the workers do not have this scheduler's pool" in engine.log.read_text()
    finally:
        engine.close()
