"""Real vLLM on a GPU with rows in fp8: half the bytes, and nearly the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from python.tests.gpu import served
from python.tests.gpu.served import Engine, distance, prompt

TOLERANCE = 0.4
"""Of `distance` between a hit in the GPU's cache and a reload: rounding a KV cache to fp8 costs
0.09 to 0.16 on a CPU, and another prompt is 0.7 to 1.6 away."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: Any) -> Iterator[Engine]:
    if torch.cuda.device_count() < served.RANKS:
        pytest.skip(f"GPU_TEST_RANKS is {served.RANKS}: there are fewer GPUs")
    built = Engine(Path(tmp_path_factory.mktemp("models")), codec="fp8")
    yield built
    built.close()


@pytest.mark.parametrize("mode", ["layered", "async"])
def test_what_is_reloaded_is_within_an_fp8_step_of_what_was_saved(
    engine: Engine, mode: str
) -> None:
    engine.use(load=mode, codec="fp8")
    each = prompt(100 + len(mode))
    engine.saved.clear()
    engine.generate([each], 2)
    hit = engine.generate([each], 1)
    engine.drain()
    engine.remember_caches()
    engine.forget()
    reloaded = engine.generate([each], 1)
    assert len(engine.loaded) >= 180
    assert engine.changed(within_fp8=True) == []
    assert engine.changed() != [], "rows hold more than eight bits a number"
    assert distance(reloaded[0], hit[0]) < TOLERANCE


def test_a_row_has_half_the_bytes(engine: Engine) -> None:
    raw_bytes = sum(engine.on_ranks(served.block_bytes))
    assert engine.side._memory.segment.row_bytes < raw_bytes * 0.51
