"""KV events of the pool, as vLLM publishes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines.client import EngineProcess
from engines.config import BLOCK_TOKENS, LAYERS
from engines.matrix import (
    V1_SMALL_POOL,
    V1_STRICT_SMALL_POOL,
    V2_STRICT_SMALL_POOL,
    each_length,
    on,
)
from engines.server import as_json
from engines.workloads import FAMILY, LONG, PREFIX, STREAM, salted, token_ids, vllm_version
from kvtide.events import EventLog
from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

Event = dict[str, Any]
V1_LORA = replace(
    V1_STRICT_SMALL_POOL, rows=60, arguments='{"enable_lora": true, "max_lora_rank": 8}'
)
SMALL_POOLS = [V1_SMALL_POOL, V1_STRICT_SMALL_POOL, V2_STRICT_SMALL_POOL]
"""With async scheduling a block is computed before the scheduler knows its last token."""


def of_pool(events: list[Event], kind: str) -> list[Event]:
    """Events of the pool; vLLM's own carry another medium."""
    return [event for event in events if event["kind"] == kind and event["medium"] == "CPU"]


def of_vllm(events: list[Event], kind: str) -> list[Event]:
    """vLLM's own events."""
    return [event for event in events if event["kind"] == kind and event["medium"] != "CPU"]


def by_block(events: list[Event]) -> dict[str, Event]:
    """What events say of each block, one by one; the last of several."""
    said: dict[str, Event] = {}
    for event in events:
        blocks = event["block_hashes"]
        for i, block in enumerate(blocks):
            alone = {k: v for k, v in event.items() if k != "medium"} | {"block_hashes": [block]}
            if event["kind"] == "BlockStored":
                tokens, size = event["token_ids"], event["block_size"]
                alone["token_ids"] = tokens[i * size : (i + 1) * size]
                alone["extra_keys"] = [event["extra_keys"][i]]
                alone["parent_block_hash"] = blocks[i - 1] if i else event["parent_block_hash"]
            said[str(block)] = alone
    return said


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
    on_gpu = of_vllm(events, "BlockStored")
    assert sorted(map(str, hashes(stored))) == sorted(map(str, hashes(on_gpu)))
    assert [event["parent_block_hash"] for event in stored] == [None, *hashes(stored)[:-1]]
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
        if event.get("medium") != "CPU":
            continue
        for block in map(str, event["block_hashes"]):
            if event["kind"] == "BlockStored":
                assert block not in held, "announced twice"
                held.add(block)
            else:
                held.remove(block)
    assert of_pool(events, "BlockRemoved"), "30 blocks went through a pool of 20"
    assert len(held) == engine.counts()["gauge_held"] <= engine.config.rows
    ours, own = by_block(of_pool(events, "BlockRemoved")), by_block(of_vllm(events, "BlockRemoved"))
    both = ours.keys() & own.keys()
    assert both, "vLLM has evicted some of them too"
    assert [ours[block] for block in both] == [own[block] for block in both]


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


def test_blocks_with_media_are_announced_as_vllm_announces_them() -> None:
    """vLLM's own prefix cache and events, of a request with a LoRA adapter, a salt and images."""
    size, blocks = 16, 5
    caching = BlockPool(blocks + 1, True, size, enable_kv_cache_events=True)
    spec = FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=8, dtype=torch.float32)
    cache = KVCacheConfig(blocks + 1, [], [KVCacheGroupSpec(["layer"], spec)])
    init_none_hash(sha256)
    images = [("first", 4, 20), ("second", 24, 10), ("first", 60, 8)]
    request = Request(
        "r",
        list(range(blocks * size)),
        SamplingParams(max_tokens=1),
        None,
        mm_features=[
            MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset=at, length=length))
            for name, at, length in images
        ],
        lora_request=LoRARequest("adapter", 7, "/adapter"),
        cache_salt="mine",
        block_hasher=get_request_block_hasher(size, sha256),
    )
    caching.cache_full_blocks(request, caching.get_new_blocks(blocks), 0, blocks, size, 0)
    own = by_block([as_json(event) for event in caching.take_events()])

    log = EventLog(cache, size)
    keys = [bytes([number]) for number in range(blocks)]
    sequence: Any = SimpleNamespace(keys=lambda first, end: keys[first:end])
    pool: Any = SimpleNamespace(take_events=lambda: [("stored", key) for key in keys])
    log.note_save(request, sequence, 0, 2)
    log.note_save(request, sequence, 2, blocks)
    ours = by_block([as_json(event) for event in log.take(pool)])

    named = ("kv_cache_spec_kind", "kv_cache_spec_sliding_window")  # vLLM's manager adds them.
    assert [{k: v for k, v in ours[block].items() if k not in named} for block in own] == [
        {k: v for k, v in event.items() if k not in named} for event in own.values()
    ]
    assert [event["extra_keys"][0][1:] for event in ours.values()] == [
        [["first", 4], "mine"],
        [["first", -12], ["second", 8]],
        [["second", -8]],
        [["first", 12]],
        [["first", -4]],
    ]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter for the tiny model."""
    folder = tmp_path_factory.mktemp("adapter")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    weights = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.randn(
            shape
        )
        for layer in range(LAYERS)
        for side, shape in (("A", (8, 256)), ("B", (256, 8)))
    }
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


@on(V1_LORA)
def test_events_say_of_a_block_what_vllms_own_say_of_it(
    engine: EngineProcess, adapter: Path
) -> None:
    forget_the_past(engine)
    session = {} if vllm_version().startswith("0.26") else {"session_id": "talk"}
    engine.submit(LONG)
    engine.submit(salted(LONG, "mine"))
    engine.submit(LONG, lora=str(adapter))
    engine.submit(salted(LONG, "mine"), lora=str(adapter))
    engine.submit(FAMILY, **session)
    engine.step(until_done=True)
    engine.settle()
    events = engine.recorded("events")
    ours, own = by_block(of_pool(events, "BlockStored")), by_block(of_vllm(events, "BlockStored"))
    assert len(ours) == 4 * 10 + 5
    assert ours == {block: own[block] for block in ours}
    keys = {str(event["extra_keys"]) for event in ours.values()}
    assert keys == {"[None]", "[['mine']]", "[['adapter']]", "[['adapter', 'mine']]"}
    assert {event["kv_cache_spec_kind"] for event in ours.values()} == {"full_attention"}
    if session:
        assert sum(event["session_id"] == "talk" for event in ours.values()) == 5
