"""`vllm serve` with kvtide inside vLLM's MultiConnector, which passes on what it is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from engines.config import new_engine_id
from engines.http import Server
from engines.segment_file import SegmentFile, held_segment
from engines.workloads import LONG, token_ids
from test_serve import SERVED, wait_for


@pytest.mark.parametrize("name", ["OffloadingConnectorV1Type3", "AIBrixOffloadingConnectorV1Type3"])
def test_vllm_knows_the_connector_by_each_of_its_names(name: str) -> None:
    import kvtide.vllm
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    found = KVConnectorFactory.get_connector_class_by_name(name)
    assert found is getattr(kvtide.vllm, name)


@pytest.mark.engine
@pytest.mark.usefixtures("no_engine")
def test_inside_a_multi_connector_prompts_are_reloaded_and_damaged_ones_computed(
    tiny_model: Path, tmp_path: Path
) -> None:
    # A load that is async can be taken back.
    config = replace(SERVED, load="async", multi=True)
    server = Server(config, tiny_model, new_engine_id(), tmp_path)
    try:
        cold = server.complete(token_ids(LONG), 16)
        wait_for(server, "kvtide_saved_blocks_total", 10)
        server.reset()
        again = server.complete(token_ids(LONG), 16)
        assert again["choices"][0]["text"] == cold["choices"][0]["text"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 320
        wait_for(server, 'kvtide_hit_tokens_total{tier="host"}', 320)
        server.reset()
        segment = held_segment(server.engine_id, server.family())
        assert SegmentFile(segment, config.row_bytes).damage() >= 10
        computed = server.complete(token_ids(LONG), 16)
        assert computed["choices"][0]["text"] == cold["choices"][0]["text"]
        wait_for(server, 'kvtide_load_failed_blocks_total{mode="async"}', 10)
        assert server.stop() == []
    finally:
        server.kill()
        server.named_segment.unlink(missing_ok=True)
