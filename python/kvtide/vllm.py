"""The connector that vLLM loads:

    --kv-transfer-config '{"kv_connector": "OffloadingConnectorV1Type3",
                           "kv_connector_module_path": "kvtide.vllm", "kv_role": "kv_both"}'

This module only maps vLLM's hooks (`KVConnectorBase_V1`, vLLM 0.26 to 0.32) to the two sides of
kvtide: `kvtide.scheduler` in the engine's process and `kvtide.worker` in every rank's.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

from kvtide.scheduler import SchedulerSide
from kvtide.stats import PromMetrics, Stats
from kvtide.worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:  # vLLM before 0.32 does not tell hits apart by their source.
    CacheHitSource = None


class OffloadingConnectorV1Type3(KVConnectorBase_V1):
    """Prefetch, load and compute overlapped; saves layer by layer in step with the forward pass."""

    if CacheHitSource is not None:
        _cache_hit_source = CacheHitSource.HOST

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._is_inner = is_made_by_multi_connector()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(vllm_config, kv_cache_config)
        else:
            self._worker = WorkerSide(vllm_config, kv_cache_config)
        _open_connectors.add(self)

    @property
    def _as_scheduler(self) -> SchedulerSide:
        assert self._scheduler is not None, "called on the worker's side"
        return self._scheduler

    @property
    def _as_worker(self) -> WorkerSide:
        assert self._worker is not None, "called on the scheduler's side"
        return self._worker

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a miss later, nothing more."""
        return False

    # ---- scheduler's side

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._as_scheduler.bind_gpu_block_pool(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        self._as_scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._as_scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self._as_scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._as_scheduler.build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._as_scheduler.update_connector_output(connector_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        answer = self._as_scheduler.request_finished(request)
        return False, None if self._is_inner else answer

    def take_events(self) -> Iterable[KVCacheEvent]:
        return self._as_scheduler.take_events()

    def reset_cache(self) -> bool | None:
        return self._as_scheduler.reset_cache()

    # ---- worker's side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._as_worker.register_kv_caches(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        self._as_worker.handle_preemptions(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._as_worker.bind(connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self._as_worker.start_load_kv(forward_context)

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._as_worker.wait_for_layer_load(layer_name)

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        self._as_worker.save_kv_layer(layer_name)

    def finish_forward(self) -> None:
        self._as_worker.end_step()

    def wait_for_save(self) -> None:
        self._as_worker.end_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        # Which requests have received their blocks, the scheduler's side adds: see the board.
        self._as_worker.collect_loads()
        return None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._as_worker.take_bad_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._as_worker.take_report()

    def clear_connector_metadata(self) -> None:
        self._as_worker.clear()
        super().clear_connector_metadata()

    # ---- both sides

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        side = self._scheduler or self._worker
        return side.take_stats() if side is not None else None

    def shutdown(self) -> None:
        for side in (self._scheduler, self._worker):
            if side is not None:
                side.shutdown()
        self._scheduler = self._worker = None

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Full graphs for decode stay: a step that runs no hooks waits for its loads first."""
        return False

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        return Stats(data if data is not None else {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def is_made_by_multi_connector() -> bool:
    """Whether MultiConnector makes the connector that asks, which it tells it nowhere. Of those
    inside, one alone may answer a router, and that is one that cannot do without."""
    frame = sys._getframe(1)
    for _ in range(3):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if isinstance(frame.f_locals.get("self"), MultiConnector):
            return True
    return False


_open_connectors: weakref.WeakSet[OffloadingConnectorV1Type3] = weakref.WeakSet()


@atexit.register
def _shutdown_open_connectors() -> None:
    """An engine inside another program may end with it, without being shut down."""
    for connector in list(_open_connectors):
        connector.shutdown()


class AIBrixOffloadingConnectorV1Type3(OffloadingConnectorV1Type3):
    """The same connector under the name that AIBrix users have in their manifests."""


def _register(connector: type[OffloadingConnectorV1Type3]) -> None:
    """Makes a connector known by its name, by which MultiConnector looks up whose counts it was
    given, although it has the module's path."""
    name = connector.__name__
    with contextlib.suppress(ValueError):  # Known already: this module was loaded anew.
        KVConnectorFactory.register_connector(name, __name__, name)


_register(OffloadingConnectorV1Type3)
_register(AIBrixOffloadingConnectorV1Type3)
