"""Counts on their way to vLLM's log lines and its `/metrics` page.

`docs/metrics.md` lists them for the reader.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LOADS_KEPT = 4096
"""Durations kept between two readings; more are counted and their durations dropped."""

COUNTERS = {
    "hit_tokens": ("kvtide_hit_tokens", {"tier": "host"}),
    "loaded_tokens_layered": ("kvtide_loaded_tokens", {"mode": "layered"}),
    "loaded_tokens_async": ("kvtide_loaded_tokens", {"mode": "async"}),
    "load_bytes": ("kvtide_loaded_bytes", {}),
    "load_failures": ("kvtide_load_failed_blocks", {"mode": "async"}),
    "layered_failures": ("kvtide_load_failed_blocks", {"mode": "layered"}),
    "saved_bytes": ("kvtide_saved_bytes", {}),
    "saved_blocks": ("kvtide_saved_blocks", {}),
    "failed_blocks": ("kvtide_save_failed_blocks", {}),
    "refused_saves": ("kvtide_save_refused_blocks", {}),
    "copy_errors": ("kvtide_copy_errors", {}),
    "throttled_blocks": ("kvtide_save_throttled_blocks", {}),
    "deferred_lookups": ("kvtide_deferred_lookups", {}),
    "evicted_blocks": ("kvtide_evicted_blocks", {}),
    "damaged_blocks": ("kvtide_damaged_blocks", {}),
    "verified_blocks": ("kvtide_verified_blocks", {}),
    "scrubbed_blocks": ("kvtide_scrubbed_blocks", {}),
}
"""Count → metric and its labels."""

GAUGES = {
    "slots": ("kvtide_pool_slots", "Rows of the pool."),
    "free": ("kvtide_pool_free_slots", "Rows that hold nothing."),
    "held": ("kvtide_pool_held_blocks", "Blocks that can be matched."),
    "saving": ("kvtide_pool_saving_blocks", "Blocks being saved."),
    "index_bytes": ("kvtide_pool_index_bytes", "Memory of the pool's index."),
    "loads": ("kvtide_loads", "Async loads in flight."),
    "usable": ("kvtide_pool_usable", "1 while blocks can be found and saved, else 0."),
}
"""Gauge → metric and its description."""

DESCRIPTIONS = {
    "kvtide_hit_tokens": "Prompt tokens that the pool supplied.",
    "kvtide_loaded_tokens": "Prompt tokens loaded, by the way they were loaded.",
    "kvtide_loaded_bytes": "Bytes copied from the pool, of all ranks.",
    "kvtide_load_failed_blocks": "Blocks whose load failed; async ones are recomputed.",
    "kvtide_saved_bytes": "Bytes copied to the pool, of all ranks.",
    "kvtide_saved_blocks": "Blocks saved.",
    "kvtide_save_failed_blocks": "Blocks whose save failed.",
    "kvtide_save_refused_blocks": "Blocks not saved because a worker's queue was full.",
    "kvtide_copy_errors": "Copies that a GPU or its driver failed, of all ranks.",
    "kvtide_save_throttled_blocks": "Blocks not saved because too much was in flight or pinned.",
    "kvtide_deferred_lookups": "Lookups put off because too many loads were in flight.",
    "kvtide_evicted_blocks": "Blocks given up to make room.",
    "kvtide_damaged_blocks": "Blocks dropped because their bytes did not have their checksum.",
    "kvtide_verified_blocks": "Blocks compared with their checksums before they were offered.",
    "kvtide_scrubbed_blocks": "Blocks that the background scrub has checked.",
}

COPY_RATE = "kvtide_copy_rate_bytes_per_second"
"""Set once, when a worker has measured its routes."""

LOAD_SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)

_collectors: dict[tuple[type, str], Any] = {}
"""By class and name; as many as there are metrics, whatever the number of engines."""
_collectors_lock = threading.Lock()


def collector(kind: type, name: str, **about: Any) -> Any:
    """The collector `name` of this process, which the first engine in it has made.

    A process may start several engines. vLLM then takes its own collectors, `vllm:…`, from the
    registry and makes new ones; ours stay, so that the engines before are still counted.
    """
    with _collectors_lock:
        try:
            made = _collectors[kind, name] = kind(name=name, **about)
        except ValueError:  # It is registered already.
            made = _collectors.get((kind, name))
            if made is None:
                raise
        return made


@dataclass
class Stats(KVConnectorStats):
    """Counts since the last reading; `data` holds plain numbers and lists only."""

    data: dict[str, Any] = field(default_factory=dict)

    def count(self, name: str, amount: int) -> None:
        """Adds to a counter."""
        if amount:
            self.data[name] = self.data.get(name, 0) + amount

    def gauge(self, values: dict[str, int]) -> None:
        """Sets gauges."""
        self.data["gauges"] = values

    def set_copy_rates(self, rates: list[tuple[str, str, float, bool]]) -> None:
        """Sets what the routes to and from a GPU reached: purpose, route, bytes per second, and
        whether the route is in use."""
        if rates:
            self.data["copy_rates"] = [list(rate) for rate in rates]

    def observe_load(self, seconds: float) -> None:
        """Notes how long a load took."""
        durations = self.data.setdefault("load_seconds", [])
        if len(durations) < LOADS_KEPT:
            durations.append(seconds)

    def take(self) -> Stats | None:
        """What was counted since the last call, or None."""
        taken, self.data = Stats(self.data), {}
        return taken if taken.data else None

    def reset(self) -> None:
        """Forgets everything."""
        self.data = {}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Adds the counts of another rank, or of the scheduler's side."""
        for name, value in other.data.items():
            if name in ("gauges", "copy_rates"):
                self.data[name] = value  # Ranks copy alike; the last one speaks for all.
            elif name == "load_seconds":
                durations = self.data.setdefault(name, [])
                durations.extend(value[: max(0, LOADS_KEPT - len(durations))])
            else:
                self.count(name, value)
        return self

    def reduce(self) -> dict[str, int | float]:
        """The numbers for vLLM's periodic log line."""
        data = self.data
        loaded = data.get("loaded_tokens_layered", 0) + data.get("loaded_tokens_async", 0)
        numbers: dict[str, int | float] = {
            "loaded tokens": loaded,
            "loaded MiB": round(data.get("load_bytes", 0) / 2**20, 1),
            "saved MiB": round(data.get("saved_bytes", 0) / 2**20, 1),
        }
        durations = sorted(data.get("load_seconds", ()))
        if durations:
            numbers["load p50 ms"] = round(durations[len(durations) // 2] * 1e3, 2)
        for name in (
            "load_failures",
            "layered_failures",
            "damaged_blocks",
            "copy_errors",
            "throttled_blocks",
        ):
            if data.get(name):
                numbers[name.replace("_", " ")] = data[name]
        gauges = data.get("gauges")
        if gauges:
            numbers["pool use %"] = round(100 * gauges["held"] / max(1, gauges["slots"]), 1)
        return numbers


class PromMetrics(KVConnectorPromMetrics):
    """The counts as Prometheus metrics: vLLM's labels tell engines apart, and what has the same
    labels adds up."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        metrics: dict[str, Any] = {}
        for name, labels in COUNTERS.values():
            if name not in metrics:
                metrics[name] = collector(
                    self._counter_cls,
                    name,
                    documentation=DESCRIPTIONS[name],
                    labelnames=labelnames + list(labels),
                )
        for name, description in GAUGES.values():
            # The newest value is the true one, also when several API servers report.
            metrics[name] = collector(
                self._gauge_cls,
                name,
                documentation=description,
                labelnames=labelnames,
                multiprocess_mode="mostrecent",
            )
        load_seconds = collector(
            self._histogram_cls,
            "kvtide_load_seconds",
            documentation="From the acceptance of a load by a worker to its end.",
            buckets=LOAD_SECONDS_BUCKETS,
            labelnames=labelnames,
        )
        self._copy_rate = collector(
            self._gauge_cls,
            COPY_RATE,
            documentation="What a route to or from the GPU reached when it was measured.",
            labelnames=[*labelnames, "purpose", "route", "used"],
            multiprocess_mode="mostrecent",
        )
        self._engine_labels = per_engine_labelvalues
        self._bound = {
            engine: {
                "load_seconds": load_seconds.labels(*values),
                **{k: metrics[m].labels(*values) for k, (m, _) in GAUGES.items()},
                **{
                    k: metrics[m].labels(*values, *labels.values())
                    for k, (m, labels) in COUNTERS.items()
                },
            }
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds one reading."""
        bound = self._bound[engine_idx]
        for name, value in transfer_stats_data.items():
            if name == "gauges":
                for gauge, current in value.items():
                    bound[gauge].set(current)
            elif name == "copy_rates":
                for purpose, route, bytes_per_s, used in value:
                    labels = [*self._engine_labels[engine_idx], purpose, route, str(used).lower()]
                    self._copy_rate.labels(*labels).set(bytes_per_s)
            elif name == "load_seconds":
                for seconds in value:
                    bound[name].observe(seconds)
            else:
                bound[name].inc(value)
