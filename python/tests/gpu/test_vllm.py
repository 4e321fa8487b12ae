"""Real vLLM on a GPU: what is reloaded is what was saved, and gives the same tokens.

On a GPU, prompts of different length are computed by different kernels, so what is reloaded is
compared with a hit in vLLM's own prefix cache of the same length, which must be equal in every
token, and with recomputing within a tolerance of the logprobs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from kvtide._native import CostModel

from python.tests.gpu import served
from python.tests.gpu.served import (
    BLOCK,
    PROMPT_TOKENS,
    Engine,
    distance,
    logprobs_of,
    prompt,
    tokens_of,
)

MODES = ["auto", "layered", "async", "sync"]
TOLERANCE = 0.25
"""Of `distance` between a reload and recomputing. Logits in bf16 come in steps of 1/32, and what is
computed in a step of another shape is rounded differently: 0.02 to 0.05 on a CPU, where all that
bf16 rounds on the way, against float32, makes 0.05 to 0.11. Another prompt is 0.7 to 1.6 away, and
one with a layer of its KV cache lost 0.5 to 0.9."""
ROUTES = ["dma", "staged", "kernel"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: Any) -> Iterator[Engine]:
    if torch.cuda.device_count() < served.RANKS:
        pytest.skip(f"GPU_TEST_RANKS is {served.RANKS}: there are fewer GPUs")
    built = Engine(Path(tmp_path_factory.mktemp("models")))
    yield built
    built.close()


@pytest.fixture(scope="module", params=ROUTES)
def routed(engine: Engine, request: Any) -> Iterator[Engine]:
    """The engine with all copies on one route."""
    engine.use_routes(
        **{f"gpu_{what}_route": request.param for what in ("save", "load", "layered")}
    )
    yield engine
    engine.use_routes()


def test_what_the_comparisons_rest_on(engine: Engine) -> None:
    engine.use(load="layered")
    each, other = prompt(1), prompt(2)
    cold = engine.generate([each])
    hit, again = engine.generate([each]), engine.generate([each])
    assert tokens_of(again) == tokens_of(hit), "equal steps give equal tokens"
    assert logprobs_of(again[0]) == logprobs_of(hit[0]), "equal steps give equal bits"
    assert distance(hit[0], cold[0]) < TOLERANCE
    # Prompts that differ in their first half only, and in all but the last block.
    half = len(each) // 2
    for prefix in (half, len(each) - BLOCK):
        (far,) = engine.generate([other[:prefix] + each[prefix:]], 1)
        assert distance(far, cold[0]) > TOLERANCE, f"the first {prefix} tokens do not matter"


def test_the_comparisons_see_false_blocks_in_the_cache(engine: Engine) -> None:
    engine.use(load="layered")
    each = prompt(3)
    engine.saved.clear()
    engine.generate([each], 1)
    hit = engine.generate([each], 1)[0]
    blocks = list(engine.saved.values())[: PROMPT_TOKENS // BLOCK]
    engine.drain()

    def reloaded() -> Any:
        engine.forget()
        (output,) = engine.generate([each], 1)
        assert len(engine.loaded) == len(blocks)
        return output

    engine.on_ranks(served.scale_layer, 3, 1.05)
    assert logprobs_of(engine.generate([each], 1)[0]) != logprobs_of(hit), "5 % in one layer"
    assert logprobs_of(reloaded()) == logprobs_of(hit)
    engine.on_ranks(served.scale_layer, 3, 0.0)
    assert distance(engine.generate([each], 1)[0], hit) > TOLERANCE, "a layer that is lost"
    assert logprobs_of(reloaded()) == logprobs_of(hit)
    for _, block in engine.loaded[40:50]:
        engine.on_ranks(served.poison, block)
    assert distance(engine.generate([each], 1)[0], hit) > TOLERANCE, "10 of 187 blocks not loaded"
    assert logprobs_of(reloaded()) == logprobs_of(hit)
    engine.on_ranks(served.poison, engine.loaded[50][1])
    assert logprobs_of(engine.generate([each], 1)[0]) != logprobs_of(hit), "one block not loaded"


def reload_byte_for_byte(engine: Engine, mode: str, prompts: list[list[int]]) -> None:
    """Prompts are computed, saved, forgotten by the GPU and reloaded."""
    engine.use(load=mode)
    engine.saved.clear()
    engine.generate(prompts, tokens=2)
    engine.drain()
    engine.remember_caches()
    engine.forget()
    counts = engine.layered_loads, engine.async_loads
    for each in prompts:
        engine.generate([each], tokens=1)
    assert len(engine.loaded) == sum((len(each) - 1) // BLOCK for each in prompts)
    if mode == "async":
        assert engine.async_loads == counts[1] + len(prompts)
    else:
        assert engine.layered_loads == counts[0] + len(prompts)
    assert engine.changed() == []


@pytest.mark.parametrize("mode", ["layered", "async", "sync"])
def test_the_paged_cache_after_a_reload_is_byte_for_byte_what_was_saved(
    engine: Engine, mode: str
) -> None:
    reload_byte_for_byte(engine, mode, [prompt(len(mode) * 10 + i) for i in range(2)])


@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize("mode", MODES)
def test_a_reload_gives_the_tokens_of_a_hit_in_the_gpu_cache(
    engine: Engine, mode: str, tokens: int
) -> None:
    engine.use(load=mode)
    each = prompt(5000 + MODES.index(mode) * 100 + tokens)
    cold = engine.generate([each], tokens)
    # As many blocks as are offered to a reload: all whole ones that leave a token to compute.
    hit = engine.generate([each], tokens)
    engine.drain()
    engine.forget()
    reloaded = engine.generate([each], tokens)
    assert engine.loaded, "nothing was loaded"
    assert tokens_of(reloaded) == tokens_of(hit)
    assert logprobs_of(reloaded[0]) == logprobs_of(hit[0])
    assert distance(reloaded[0], cold[0]) < TOLERANCE


def test_a_prompt_of_whole_blocks_is_loaded_whole_and_its_last_token_computed(
    engine: Engine,
) -> None:
    engine.use(load="async")
    each = prompt(8001, 188 * BLOCK)
    engine.saved.clear()
    cold = engine.generate([each], 1)
    engine.drain()
    engine.remember_caches()
    engine.forget()
    reloaded = engine.generate([each], 1)
    assert len(engine.loaded) == 188
    engine.loaded.pop()  # Its last token was computed again.
    assert engine.changed() == []
    assert distance(reloaded[0], cold[0]) < TOLERANCE


@pytest.mark.parametrize(("rest", "hooks"), [(1, False), (8, True)], ids=["one-token", "eight"])
def test_a_layered_load_is_waited_for_up_front_where_one_graph_has_all_layers(
    engine: Engine, rest: int, hooks: bool
) -> None:
    engine.use(load="layered")
    each = prompt(8100 + rest, 188 * BLOCK + rest)

    def generate() -> tuple[Any, list[int]]:
        engine.on_ranks(served.count_replays)
        try:
            (output,) = engine.generate([each], 1)
        finally:
            counts = engine.on_ranks(served.replays)
        return output, counts

    engine.saved.clear()
    engine.generate([each], 1)
    hit, replays_of_hit = generate()
    engine.drain()
    engine.remember_caches()
    engine.forget()
    engine.on_ranks(served.take_hooks_ran)
    reloaded, replays = generate()
    assert engine.on_ranks(served.take_hooks_ran) == [[hooks]] * served.RANKS
    assert replays == replays_of_hit
    for count in replays:
        assert (count == 1) == (not hooks), f"{count} graph replays"
    assert list(reloaded.token_ids) == list(hit.token_ids)
    assert logprobs_of(reloaded) == logprobs_of(hit)
    assert len(engine.loaded) == 188
    assert engine.changed() == []


def beside_decoders(engine: Engine, each: list[int], seed: int) -> Any:
    """The output of a prompt that comes when four others are being decoded."""
    running = engine.llm.llm_engine
    decoders = [f"decoder-{seed}-{i}" for i in range(4)]
    for i, name in enumerate(decoders):
        other = {"prompt_token_ids": prompt(seed + i, 300)}
        running.add_request(name, other, served.sampling(2000))
    for _ in range(8):
        running.step()
    late = f"late-{seed}"
    running.add_request(late, {"prompt_token_ids": each}, served.sampling(8))
    output = None
    while output is None:
        for told in running.step():
            assert told.request_id == late or not told.finished, "the others decode all the time"
            if told.request_id == late and told.finished:
                output = told.outputs[0]
    running.abort_request(decoders)
    while running.has_unfinished_requests():
        running.step()
    return output


def test_a_reload_beside_running_decoders_is_async_and_as_good_as_a_hit(engine: Engine) -> None:
    engine.use(load="auto")
    each = prompt(9001)
    engine.saved.clear()
    engine.generate([each], 1)
    hit = beside_decoders(engine, each, 9100)
    engine.drain()
    engine.remember_caches()
    engine.forget()
    counts = engine.layered_loads, engine.async_loads
    # Nothing is known yet of what steps and loads take, so nothing hides a load.
    engine.side._cost._model = CostModel()
    reloaded = beside_decoders(engine, each, 9200)
    assert (engine.layered_loads, engine.async_loads) == (counts[0], counts[1] + 1)
    assert len(engine.loaded) == (PROMPT_TOKENS - 1) // BLOCK
    assert engine.changed() == []
    assert len(reloaded.token_ids) == 8
    # The decoders are not as far as beside the hit, so the bits may differ.
    assert distance(reloaded, hit) < TOLERANCE


def test_more_prompts_than_the_gpu_pool_holds_are_reloaded(engine: Engine) -> None:
    engine.use(load="auto")
    prompts = [prompt(9500 + i, 2400) for i in range(8)]
    hits = []
    for each in prompts:
        engine.generate([each], 1)
        hits += engine.generate([each], 24)
    engine.drain()
    engine.forget()
    again = engine.generate(prompts, 24)
    assert len(engine.loaded) >= 8 * 140
    # Batches of another size are computed by other kernels.
    apart = [distance(a, b) for a, b in zip(again, hits, strict=True)]
    assert max(apart) < TOLERANCE, apart


def test_damaged_rows_are_seen_recomputed_and_dropped(engine: Engine) -> None:
    engine.use(load="async")
    each = prompt(9900)
    engine.saved.clear()
    hit = (engine.generate([each], 8), engine.generate([each], 8))[1]
    engine.drain()
    engine.forget()
    engine.damage(list(engine.saved)[:40])
    before = engine.damaged_blocks()
    again = engine.generate([each], 8)
    assert engine.loaded
    assert engine.damaged_blocks() == before + 40
    assert distance(again[0], hit[0]) < TOLERANCE


def test_damage_that_a_layered_load_brings_in_is_counted_and_contained(engine: Engine) -> None:
    engine.use(load="layered")
    each = prompt(9920)
    engine.saved.clear()
    hit = (engine.generate([each], 1), engine.generate([each], 1))[1][0]
    engine.drain()
    engine.forget()
    engine.damage(list(engine.saved)[:40])
    before = engine.damaged_blocks()
    failures = engine.on_ranks(served.counted, "layered_failures")
    (spoiled,) = engine.generate([each], 1)
    assert len(engine.loaded) == (PROMPT_TOKENS - 1) // BLOCK
    assert distance(spoiled, hit) > TOLERANCE, "it cannot be taken back"
    for _ in range(10):
        engine.drain()
        if engine.damaged_blocks() > before:
            break
    assert engine.damaged_blocks() == before + 40
    assert engine.on_ranks(served.counted, "layered_failures") == [n + 40 for n in failures]
    # Neither vLLM's prefix cache nor the pool has any of it.
    engine.loaded.clear()
    (computed,) = engine.generate([each], 1)
    assert engine.loaded == []
    assert distance(computed, hit) < TOLERANCE
    engine.drain()
    engine.forget()
    (reloaded,) = engine.generate([each], 1)
    assert engine.loaded
    assert distance(reloaded, hit) < TOLERANCE


def test_decoding_replays_full_graphs_while_loads_and_saves_go_on(engine: Engine) -> None:
    engine.use(load="auto")
    each = prompt(9950, 2000)
    engine.generate([each], 1)
    engine.drain()
    engine.forget()
    engine.on_ranks(served.count_replays)
    try:
        engine.generate([each], 100)
    finally:
        counts = engine.on_ranks(served.replays)
    assert engine.loaded
    # One full graph a decode step; piecewise graphs would be one for each layer and step.
    assert all(95 <= count <= 140 for count in counts), f"{counts} graph replays for 100 tokens"


@pytest.mark.parametrize("mode", ["layered", "async"])
def test_a_preempted_request_goes_on_as_one_that_hits_the_gpu_cache(
    engine: Engine, mode: str
) -> None:
    engine.use(load=mode)
    engine.drain()
    engine.forget()
    seed = 9960 + 20 * MODES.index(mode)
    each, length = prompt(seed, 124 * BLOCK + 5), 160
    # Six that grow until there is no room left for the last.
    others = [prompt(seed + 10 + i, 2300) for i in range(6)]
    # Known to the GPU's cache, so that all begin in one step, and the six end in one.
    engine.generate([*others, each], 1)
    counts = engine.layered_loads, engine.async_loads
    running = engine.llm.llm_engine
    for i, other in enumerate(others):
        running.add_request(f"other-{i}", {"prompt_token_ids": other}, served.sampling(200))
    running.add_request("preempted", {"prompt_token_ids": each}, served.sampling(length))
    (request,) = [r for r in engine.scheduler.requests.values() if "preempted" in r.request_id]
    held = engine.side._requests.get(request.request_id)
    before: list[int] = []
    output = None
    while running.has_unfinished_requests():
        if request.num_preemptions == 0:
            engine.remember_caches()
            before = list(held.blocks)
        for told in running.step():
            if told.request_id == "preempted":
                output = told.outputs[0]
    assert request.num_preemptions == 1
    loads = engine.layered_loads - counts[0], engine.async_loads - counts[1]
    assert loads == ((0, 1) if mode == "async" else (1, 0))
    assert engine.changed() == []
    assert output is not None
    tokens = list(output.token_ids)
    assert len(tokens) == length
    cached, computed, _ = began = engine.began[request.request_id]
    kept = cached + computed - len(each)
    assert 0 < kept < length
    # All that it went on with is what it had before, also where nothing was loaded.
    blocks = cached // BLOCK
    assert engine.unlike(list(zip(before[:blocks], held.blocks[:blocks], strict=True))) == []
    # Computed with the same shapes: a prompt that ends where the request went on, of which as much
    # is in the GPU's cache. That has a block more by now: under async scheduling a block is saved
    # in the step after the one that fills it, and there the request was preempted instead.
    engine.hide(held.blocks[blocks:])
    (hit,) = engine.generate([each + tokens[:kept]], length - kept)
    *_, hit_began = engine.began.values()
    assert hit_began == began == (cached, computed, 1), "the shapes differ"
    assert tokens[kept:] == list(hit.token_ids)
    assert logprobs_of(output)[kept:] == logprobs_of(hit)


@pytest.mark.parametrize("mode", ["layered", "async", "sync"])
def test_every_route_brings_back_what_it_saved(routed: Engine, mode: str) -> None:
    seed = 7000 + 10 * len(mode)
    reload_byte_for_byte(routed, mode, [prompt(seed, 1500), prompt(seed + 1, 1000)])
