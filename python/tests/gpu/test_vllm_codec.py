"""Real vLLM on a GPU with rows in fp8: half the bytes, and nearly the same answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import models
from python.tests.gpu.test_vllm import Engine, prompt

LOGPROB_TOLERANCE = 0.5
"""Of the log-probability of the first token between a hit in the GPU's cache and a reload."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: Any) -> Iterator[Engine]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    model = models.write("small", Path(tmp_path_factory.mktemp("models")))
    built = Engine(model, codec="fp8")
    yield built
    built.llm.llm_engine.engine_core.shutdown()


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
    before = [tensor.view(torch.bfloat16).float() for tensor in engine.caches()]
    engine.forget()
    engine.loaded.clear()
    reloaded = engine.generate([each], 1)
    assert len(engine.loaded) >= 180
    after = [tensor.view(torch.bfloat16).float() for tensor in engine.caches()]
    for slot, block in engine.loaded:
        for layer, (was, now) in enumerate(zip(before, after, strict=True)):
            a, b = engine.block(was, engine.saved[slot]), engine.block(now, block)
            bound = a.abs() / 16 + a.abs().max() * 2**-9
            assert bool(((a - b).abs() <= bound * 1.01).all()), f"block {block}, {layer=}"
    ours, theirs = (
        next(iter(output[0].logprobs[0].values())).logprob for output in (reloaded, hit)
    )
    assert abs(ours - theirs) < LOGPROB_TOLERANCE


def test_a_row_has_half_the_bytes(engine: Engine) -> None:
    layers, blocks = 8, engine.block(engine.caches()[0], 0).numel() * 2
    raw_bytes = layers * blocks
    assert engine.worker._segment.row_bytes < raw_bytes * 0.51
