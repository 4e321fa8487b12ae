"""Which configurations a test runs in.

Every rule that is known to bite is tested on both model runners with async scheduling on; sync
scheduling, load modes and verification are spread over the rest.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from engines.config import EngineConfig

V1_LAYERED = EngineConfig(load="layered", verify="always")
V1_ASYNC = EngineConfig(load="async")
V2_LAYERED = EngineConfig("v2", load="layered", verify="always")
V2_ASYNC = EngineConfig("v2", load="async")
V1_SMALL_POOL = EngineConfig(
    async_scheduling=False, load="auto", eviction="lru", rows=20, kv_events=True
)
"""A pool that always evicts; the only one with sync scheduling."""
V1_STRICT_SMALL_POOL = replace(V1_SMALL_POOL, async_scheduling=True, load="async", policy="fail")
"""The same with async scheduling and vLLM's default policy: a load that fails fails its request."""
V2_STRICT_SMALL_POOL = replace(V1_STRICT_SMALL_POOL, runner="v2")
V1_STRICT = replace(V1_ASYNC, policy="fail")
V2_STRICT = replace(V2_ASYNC, policy="fail")
V1_UNVERIFIED = EngineConfig(load="layered")
"""Layered loads are compared with their checksums too late."""
V2_UNVERIFIED = replace(V1_UNVERIFIED, runner="v2")
V1_SYNC = EngineConfig(load="sync")
V1_JOINING = EngineConfig(
    load="async", prefix_caching=False, blocks=64, settings='{"join_timeout_ms": 30}'
)
"""Without prefix caching, a repeated prompt meets its own save; there are blocks for both."""
V1_IMPATIENT = replace(V1_ASYNC, settings='{"load_timeout_ms": 1000}')
"""Loads that have not ended in a second are given up."""
V2_IMPATIENT = replace(V1_IMPATIENT, runner="v2")
V1_IMPATIENT_STRICT = replace(V1_IMPATIENT, policy="fail")
TP2_IMPATIENT = replace(V1_IMPATIENT, tensor_parallel=2)
V2_SCRUBBED = EngineConfig("v2", load="auto", prefix_caching=False, scrub_mib_per_s=512)
"""Rows are checked all the time in the background."""
TP2 = EngineConfig(load="auto", tensor_parallel=2)
TP2_V2 = EngineConfig("v2", load="auto", tensor_parallel=2)

BOTH_RUNNERS = [V1_LAYERED, V1_ASYNC, V2_LAYERED, V2_ASYNC]
ALL_MODES = [*BOTH_RUNNERS, V1_SMALL_POOL]
EVERYTHING = [*ALL_MODES, V1_UNVERIFIED, V2_SCRUBBED]


LENGTHS = [int(tokens) for tokens in os.environ.get("KVTIDE_TEST_LENGTHS", "1 32").split()]

each_length = pytest.mark.parametrize("max_tokens", LENGTHS)
"""With one token a request ends with its prefill; with 32, generated tokens complete blocks."""


def on(*configs: EngineConfig) -> Callable[[Any], Any]:
    """Runs a test in these configurations, each on a real engine given as `engine`."""

    def mark(test: Any) -> Any:
        each = pytest.mark.parametrize(
            "engine", configs, indirect=True, ids=[config.name for config in configs]
        )
        return pytest.mark.engine(each(test))

    return mark


def need_triton(runner: str) -> None:
    """Skips where the V2 model runner cannot run."""
    if runner == "v2" and importlib.util.find_spec("triton") is None:
        pytest.skip("the V2 model runner needs the package triton, which is not installed here")
