"""Which configurations a test runs in.

Every rule that is known to bite is tested on both model runners with async scheduling on; sync
scheduling, load modes and verification are spread over the rest.
"""

from __future__ import annotations

from collections.abc import Callable
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
V1_UNVERIFIED = EngineConfig(load="layered")
"""Layered loads are compared with their checksums too late."""
V1_POLICY_FAIL = EngineConfig(load="async", policy="fail")
"""vLLM's default: a load that fails fails its request."""
V1_JOINING = EngineConfig(
    load="async", prefix_caching=False, blocks=64, settings='{"join_timeout_ms": 30}'
)
"""Without prefix caching, a repeated prompt meets its own save; there are blocks for both."""
V2_SCRUBBED = EngineConfig("v2", load="auto", prefix_caching=False, scrub_mib_per_s=512)
"""Rows are checked all the time in the background."""
TP2 = EngineConfig(load="auto", tensor_parallel=2)
TP2_V2 = EngineConfig("v2", load="auto", tensor_parallel=2)

BOTH_RUNNERS = [V1_LAYERED, V1_ASYNC, V2_LAYERED, V2_ASYNC]
ALL_MODES = [*BOTH_RUNNERS, V1_SMALL_POOL]
EVERYTHING = [*ALL_MODES, V1_UNVERIFIED, V2_SCRUBBED]


def on(*configs: EngineConfig) -> Callable[[Any], Any]:
    """Runs a test in these configurations, each on a real engine given as `engine`."""

    def mark(test: Any) -> Any:
        each = pytest.mark.parametrize(
            "engine", configs, indirect=True, ids=[config.name for config in configs]
        )
        return pytest.mark.engine(each(test))

    return mark
