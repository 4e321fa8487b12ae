"""Counts are added up over ranks and become the documented Prometheus metrics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="no vLLM here: use the Python of provision.py vllm VERSION")

from kvtide.stats import (
    COPY_RATE,
    COUNTERS,
    DESCRIPTIONS,
    GAUGES,
    LOADS_KEPT,
    PromMetrics,
    Stats,
    collector,
)
from prometheus_client import REGISTRY, Counter, Gauge, Histogram


def test_counts_of_ranks_add_up_and_the_newest_gauges_win() -> None:
    one, other = Stats(), Stats()
    one.count("saved_bytes", 3)
    one.count("load_failures", 0)
    one.gauge({"held": 1, "slots": 4})
    other.count("saved_bytes", 4)
    other.gauge({"held": 2, "slots": 4})
    other.observe_load(0.5)
    total = one.aggregate(other)
    assert total.data == {
        "saved_bytes": 7,
        "gauges": {"held": 2, "slots": 4},
        "load_seconds": [0.5],
    }
    assert total.reduce()["pool use %"] == 50.0


def test_durations_are_bounded() -> None:
    stats, more = Stats(), Stats()
    for _ in range(LOADS_KEPT + 10):
        stats.observe_load(0.1)
        more.observe_load(0.1)
    assert len(stats.aggregate(more).data["load_seconds"]) == LOADS_KEPT


def test_nothing_counted_is_empty_and_can_be_reduced() -> None:
    stats = Stats()
    assert stats.is_empty()
    assert stats.reduce()["loaded tokens"] == 0
    stats.count("saved_bytes", 1)
    assert not stats.is_empty()
    stats.reset()
    assert stats.is_empty()


def prom_metrics(engines: dict[int, list[object]]) -> PromMetrics:
    """What vLLM makes for so many engines, given their labels."""
    config: Any = SimpleNamespace(kv_transfer_config=None)
    metric_types: dict[Any, Any] = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    return PromMetrics(config, metric_types, ["engine"], engines)


def test_every_count_reaches_its_metric() -> None:
    metrics = prom_metrics({0: ["0"], 1: ["1"]})
    gauges = dict.fromkeys(GAUGES, 5)
    durations = {"load_seconds": [0.01, 3.0]}
    worker = Stats()
    worker.set_copy_rates([("load", "kernel:4", 5e10, True)])
    told = Stats().aggregate(worker).data
    counts = dict.fromkeys(COUNTERS, 2)
    metrics.observe(counts | {"gauges": gauges} | durations | told, engine_idx=1)
    for name, labels in COUNTERS.values():
        sample = REGISTRY.get_sample_value(f"{name}_total", {"engine": "1", **labels})
        assert sample == 2, name
        assert DESCRIPTIONS[name].endswith(".")
    for name, _ in GAUGES.values():
        assert REGISTRY.get_sample_value(name, {"engine": "1"}) == 5
    assert REGISTRY.get_sample_value("kvtide_load_seconds_count", {"engine": "1"}) == 2
    rate = {"engine": "1", "purpose": "load", "route": "kernel:4", "used": "true"}
    assert REGISTRY.get_sample_value(COPY_RATE, rate) == 5e10
    assert (
        REGISTRY.get_sample_value("kvtide_hit_tokens_total", {"engine": "0", "tier": "host"}) == 0
    )


def test_engines_of_one_process_share_metrics_and_are_told_apart_by_their_labels() -> None:
    def saved(engine: str) -> float | None:
        return REGISTRY.get_sample_value("kvtide_saved_blocks_total", {"engine": engine})

    def held(engine: str) -> float | None:
        return REGISTRY.get_sample_value("kvtide_pool_held_blocks", {"engine": engine})

    first, second, other = (prom_metrics({0: [name]}) for name in ("same", "same", "other"))
    first.observe({"saved_blocks": 3, "gauges": {"held": 7}})
    second.observe({"saved_blocks": 4, "gauges": {"held": 2}})
    other.observe({"saved_blocks": 1})
    first.observe({"saved_blocks": 1})
    assert (saved("same"), saved("other")) == (8, 1)
    assert (held("same"), held("other")) == (2, 0)


def test_a_registry_that_was_emptied_gets_its_metrics_from_the_next_engine() -> None:
    prom_metrics({0: ["lost"]}).observe({"saved_blocks": 3})
    for registered in {*REGISTRY._collector_to_names}:
        if getattr(registered, "_name", "").startswith("kvtide_"):
            REGISTRY.unregister(registered)
    for _ in range(2):
        prom_metrics({0: ["found"]}).observe({"saved_blocks": 3})
    assert REGISTRY.get_sample_value("kvtide_saved_blocks_total", {"engine": "found"}) == 6
    assert REGISTRY.get_sample_value("kvtide_saved_blocks_total", {"engine": "lost"}) is None


def test_a_metric_of_somebody_else_with_our_name_is_still_an_error() -> None:
    Gauge("kvtide_foreign", "Not ours.")
    with pytest.raises(ValueError, match="kvtide_foreign"):
        collector(Counter, "kvtide_foreign", documentation="Ours.", labelnames=[])
