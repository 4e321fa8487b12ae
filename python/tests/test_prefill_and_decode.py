"""Engines with a role on one pool, and what routers of prefill and decode say and are told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines.client import EngineProcess, Nursery
from engines.compare import assert_same, cached_tokens
from engines.config import EngineConfig
from engines.daemon import Daemon
from engines.matrix import V1_ASYNC, V1_LAYERED, V2_LAYERED, need_triton
from engines.workloads import LONG, MIXED, OTHER, Prompt, Reference
from kvtide.transfer_params import NOTHING_SAID, TransferParams

WHOLE = 320
"""Tokens of `LONG` that can be loaded."""
BLOCKS = 10
"""Blocks that they are."""
REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What vLLM's toy proxy and AIBrix's router say to the engine that prefills."""

Start = Callable[..., EngineProcess]
on_real_engines = pytest.mark.engine
without_others = pytest.mark.usefixtures("no_engine")


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon that serves."""
    made = Daemon()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def start(daemon: Daemon, tiny_model: Path, nursery: Nursery) -> Iterator[Start]:
    """Starts engines with the daemon's pool; they end with the test."""
    started: list[EngineProcess] = []

    def start_engine(config: EngineConfig, role: str = "kv_both") -> EngineProcess:
        need_triton(config.runner)
        extra = json.dumps({"pool": daemon.pool, "pool_required": True})
        config = replace(config, settings=extra, role=role)
        started.append(EngineProcess(config, tiny_model, nursery))
        return started[-1]

    yield start_engine
    for engine in started:
        if engine.is_alive():
            engine.close()


def ask(engine: EngineProcess, prompt: Prompt, max_tokens: int, transfer: Any) -> dict[str, Any]:
    """One request with `kv_transfer_params`."""
    request = engine.submit(prompt, max_tokens, transfer=transfer)
    engine.step(until_done=True)
    engine.step()  # As vLLM's core does for requests that have finished: what they leave is saved.
    (output,) = engine.results([request])
    return dict(output)


def through_a_router(
    prefill: EngineProcess, decode: EngineProcess, prompt: Prompt, max_tokens: int
) -> dict[str, Any]:
    """As vLLM's toy proxy does it: prefill one token, hand the answer over as it is."""
    told = ask(prefill, prompt, 1, REMOTE_DECODE)["transfer"]
    assert told, "a router takes no answer for a failure"
    # AIBrix's router puts the address in.
    return ask(decode, prompt, max_tokens, {**told, "remote_host": "10.0.0.7"})


def held(status: dict[str, Any]) -> int:
    """Blocks that the pool holds, completely."""
    return sum(each["held_blocks"] - each["saving_blocks"] for each in status["namespaces"])


@on_real_engines
@without_others
@pytest.mark.parametrize("config", [V1_LAYERED, V2_LAYERED], ids=lambda config: config.name)
def test_what_a_router_sends_on_is_decoded_as_by_one_engine(
    start: Start, reference: Reference, config: EngineConfig
) -> None:
    prefill, decode = start(config, "kv_producer"), start(config, "kv_consumer")
    for prompt in [LONG, OTHER, *MIXED]:
        output = through_a_router(prefill, decode, prompt, 32)
        assert_same([output], reference([prompt]), "decoded elsewhere")
    # vLLM 0.32 reports the prefill engine's hits, of which there are none, in place of these.
    assert decode.counts()["hit_tokens"] >= WHOLE
    assert prefill.reset()
    again = through_a_router(prefill, decode, LONG, 8)
    assert_same([again], reference([LONG]), "prefilled from the pool")
    assert prefill.counts()["hit_tokens"] >= WHOLE, "a producer loads what there is"


@on_real_engines
@without_others
def test_a_consumer_saves_nothing(daemon: Daemon, start: Start, reference: Reference) -> None:
    consumer = start(V1_ASYNC, "kv_consumer")
    assert_same(consumer.generate([LONG, *MIXED], 32), reference([LONG, *MIXED]), "alone")
    status = daemon.status()
    assert status is not None
    assert sum(each["held_blocks"] for each in status["namespaces"]) == 0
    told = ask(consumer, LONG, 1, REMOTE_DECODE)["transfer"]
    assert told is None, "nothing is there for another engine"


@on_real_engines
@without_others
def test_limits_of_a_request_are_kept(daemon: Daemon, start: Start, reference: Reference) -> None:
    first, second = start(V1_ASYNC), start(V1_ASYNC)
    wanted = reference([LONG])
    output = ask(first, LONG, 8, {"max_offload_tokens": 100})
    assert_same([output], wanted, "computed")
    daemon.wait(lambda status: held(status) == 3)
    first.reset()
    assert_same([ask(first, LONG, 8, None)], wanted, "computed once more")
    daemon.wait(lambda status: held(status) == BLOCKS)
    for said, loaded in [
        ({"max_load_tokens": 0}, 0),
        ({"kv_load_tiers": []}, 0),
        ({"kv_load_tiers": [{"medium": "STORAGE"}]}, 0),
        ({"max_load_tokens": 70}, 64),
        ({"kv_load_tiers": [{"medium": "CPU"}]}, WHOLE),
    ]:
        second.reset()
        output = ask(second, LONG, 8, said)
        assert_same([output], wanted, str(said))
        assert cached_tokens([output]) == [loaded], said


def params(said: Any) -> TransferParams:
    """What a request says."""
    request: Any = SimpleNamespace(kv_transfer_params=said, request_id="r", num_computed_tokens=9)
    return TransferParams.of(request)


@pytest.mark.parametrize("said", [None, {}, {"remote_host": "h", "do_remote_prefill": True}])
def test_what_means_nothing_here_changes_nothing(said: Any) -> None:
    assert params(said) == NOTHING_SAID


@pytest.mark.parametrize("wrong", [-1, 1.5, "7", True])
def test_limits_that_are_no_numbers_are_passed_over(wrong: Any) -> None:
    assert params({"max_load_tokens": wrong, "max_offload_tokens": wrong}) == NOTHING_SAID


@pytest.mark.parametrize(
    ("tiers", "limit"),
    [
        ([], 0),
        ([{}], None),
        ([{"medium": "cpu", "locality": "local"}], None),
        ([{"medium": "CPU", "locality": "REMOTE"}], 0),
        ([{"medium": "STORAGE"}, {"locality": "LOCAL"}], None),
        ([{"medium": "TAPE"}, 7], None),
        ([{"medium": "TAPE"}, {"medium": "STORAGE"}], 0),
        ("CPU", None),
    ],
)
def test_tiers_are_read_as_vllm_reads_them(tiers: Any, limit: int | None) -> None:
    assert params({"kv_load_tiers": tiers}).load_tokens == limit


def test_a_router_is_answered_only_where_another_engine_decodes() -> None:
    request: Any = SimpleNamespace(request_id="r", num_computed_tokens=9)
    assert params({"do_remote_decode": False}).answer(request, "e", 2) is None
    told = params(REMOTE_DECODE).answer(request, "e", 2)
    assert told is not None
    assert (told["do_remote_prefill"], told["do_remote_decode"]) == (True, False)
    assert not {"remote_host", "remote_port"} & set(told), "nothing can be fetched from here"
