"""The worker's side: carries out the scheduler's plan for one rank.

Called on the thread that runs the model. Nothing here waits for a copy, except where the next
computation needs its result: `handle_preemptions` for saves whose blocks are about to be
overwritten, and, on a CPU, `wait_for_layer_load` for the layer that is about to be read. On a GPU
both waits are put on the stream that computes. The mode `sync`, which is there to be compared with,
waits for everything.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from kvtide._native import KvtideError, Segment, Worker
from kvtide.attacher import Attacher
from kvtide.cancelled import CancelledLoads
from kvtide.encoding import scaled_dimensions
from kvtide.geometry import Geometry, attach, read_settings, refuse_shared_layers
from kvtide.log import logger
from kvtide.messages import StepPlan, WorkerReport, block_of
from kvtide.stats import Stats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvtide._native import KvCache

ERROR_PERIOD_S = 60.0
"""Between two log lines on failed copies."""


class WorkerSide:
    """See the module's documentation."""

    def __init__(self, config: VllmConfig, kv_cache: KVCacheConfig) -> None:
        self._rank: int = get_tensor_model_parallel_rank()
        self._settings = read_settings(config)
        if self._rank == 0:
            for notice in self._settings.notices:
                logger.warning("%s", notice)
        self._geometry = Geometry.of(config, kv_cache, self._settings)
        daemon = self._geometry.daemon(config, self._settings)
        self._segment = (
            attach(daemon, self._settings, self._rank)
            if daemon is not None
            else self._geometry.segment(self._settings, self._rank)
        )
        self._daemon = daemon
        self._attacher: Attacher | None = None
        self._cache: KvCache | None = None
        """What is attached to a daemon's memory."""
        self._by_layer = self._settings.load != "sync"
        self._worker: Worker | None = None
        """Between the KV cache and the pool; None before a daemon has come."""
        self._gpu: int | None = None
        """Where the KV cache lies; None is host memory."""
        self._layers: dict[str, int] = {}
        self._hooked: set[int] = set()
        """Layers whose hooks were seen to run."""
        self._exception_outside: BaseException | None = None
        """What the program around the engine was handling when the step began."""
        self._plan: StepPlan | None = None
        self._prepared: StepPlan | None = None
        self._async: dict[int, tuple[str, bytes, int | None]] = {}
        """Async load job → request, moves, the first block known lost before it began."""
        self._layered: dict[int, bytes] = {}
        self._cancelled = CancelledLoads()
        self._bad_blocks: set[int] = set()
        self._report = WorkerReport()
        if daemon is None:
            self._report.segments.add(self._segment.nonce)
        self._stats = Stats()
        self._reported_counters: dict[str, int] = {}
        self._next_error = 0.0

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Takes the engine's KV cache into use."""
        if self._worker is not None or self._cache is not None:
            # Another one's bytes would be saved under this engine's keys.
            raise KvtideError(
                "another engine of this process has this connector: vLLM has one in a process. Set "
                "VLLM_ENABLE_V1_MULTIPROCESSING=1, or end the first engine before"
            )
        refuse_shared_layers({name: tensor.data_ptr() for name, tensor in kv_caches.items()})
        rank = self._rank
        self._gpu = gpu_of(kv_caches)
        views = [view_of(name, tensor) for name, tensor in kv_caches.items()]
        encoding = None
        if self._geometry.encoding is not None:
            float_name, scales = self._geometry.encoding
            encoding = (
                float_name,
                [
                    scaled_dimensions(name, shape, strides, item_bytes, scales)
                    for name, _, _, shape, strides, item_bytes in views
                ],
            )
        name = f"cpu{rank}" if self._gpu is None else f"cuda{self._gpu}"
        daemon = self._daemon
        # A device is opened and measured over memory of its own where the pool's may hold blocks of
        # others, or may not be there yet.
        own = self._segment if daemon is None else self._scratch()
        worker = Worker(
            self._settings,
            own,
            rank if daemon is None else 0,
            name,
            self._gpu,
            self._geometry.blocks,
            self._geometry.layer_bytes,
            views,
            encoding,
            list(kv_caches.values()),
        )
        self._report.load_rate = worker.load_rate
        self._stats.set_copy_rates(worker.copy_rates)
        if daemon is None:
            self._worker = worker
        else:
            has = 0 if self._segment is None else self._segment.nonce
            self._attacher = Attacher(daemon, rank, name, has)
            self._cache = worker.cache
            worker.close()
            if self._segment is not None:
                self._worker = self._cache.over(self._segment, rank, name)
                self._cache = self._worker.cache
        if self._worker is not None:
            logger.info("rank %d: %s", rank, self._worker.about)
        self._layers = {name: index for index, name in enumerate(kv_caches)}

    def _scratch(self) -> Segment:
        return Segment.scratch(self._geometry.layers, self._geometry.row_layer_bytes)

    def _follow_memory(self, plan: StepPlan) -> None:
        """Goes over to the memory that the scheduler's side has. Nothing is under way on this rank
        then: no plan has anything for it until all ranks have the memory."""
        attacher = self._attacher
        if attacher is None:
            return
        if plan.memory is not None and self._cache is not None:
            attacher.begin(self._cache, plan.memory)
        attached = attacher.take()
        if attached is None:
            return
        self.collect_loads()  # The last ones of the memory of before.
        self._count()
        self._reported_counters = {}
        last = self._worker
        self._segment, self._worker = attached
        self._cache = self._worker.cache
        logger.info("rank %d: %s", self._rank, self._worker.about)
        if last is not None:
            # Its memory may take its time to be unpinned and unmapped.
            threading.Thread(target=last.close, name="kvtide-detach", daemon=True).start()

    # ---- one step, in the order in which vLLM calls

    def handle_preemptions(self, plan: StepPlan) -> None:
        """Saves what earlier steps computed, and waits for saves that this step would spoil."""
        self._follow_memory(plan)
        self._prepared = plan
        if self._is_without_pool():
            return
        worker = self._open()
        # A step that has not ended by now has failed on the way.
        worker.abort_step()
        if self._gpu is not None:
            worker.use_stream(torch.cuda.current_stream(self._gpu).cuda_stream)
        if plan.save_now:
            worker.save_now(plan.save_now)
        if plan.wait_saves:
            worker.wait_saves(plan.wait_saves)
        if not self._by_layer:
            worker.finish_saves([job for job, _ in plan.save_now])
        if any(load.behind_steps for load in plan.loads):
            # vLLM may start loads only when the step is already on the stream.
            worker.step_held_back()

    def bind(self, plan: StepPlan) -> None:
        """The step begins."""
        self._exception_outside = sys.exc_info()[1]
        assert self._prepared is plan, "vLLM calls handle_preemptions in every step"
        self._plan = plan
        if plan.save_step:
            self._open().begin_step(plan.save_step)

    def start_load_kv(self, context: ForwardContext) -> None:
        """Starts all loads of the step; everything that will be waited for is queued on return."""
        plan = self._plan
        if plan is None or self._is_without_pool():
            return
        worker = self._open()
        if plan.layered is not None:
            job, moves, behind_steps = plan.layered
            self._layered[job] = moves
            worker.load_layered(job, moves, behind_steps)
            if not self._by_layer:
                worker.finish_layers()
            elif not self._hooks_will_run(context):
                worker.wait_all_layers()
        for load in plan.loads:
            self._async[load.job] = (load.request_id, load.moves, load.lost_block)
            worker.load_async(load.job, load.cell, load.moves, load.behind_steps)
        for cancelled in plan.cancelled:
            self._cancelled.add(cancelled)
            if not worker.cancel_load(cancelled.job):
                self._end_cancelled(cancelled.job)

    def _hooks_will_run(self, context: ForwardContext) -> bool:
        """Whether `wait_for_layer_load` will be called for every layer of this step.

        A step that replays one CUDA graph for all of the model runs no Python. The first model
        runner says so by the graph's mode, the second by a context without attention metadata.
        """
        mode = getattr(context, "cudagraph_runtime_mode", None)
        if context.attn_metadata is None or getattr(mode, "name", "") == "FULL":
            return False
        return len(self._hooked) == len(self._layers)

    def wait_for_layer_load(self, name: str) -> None:
        """The layer is about to be read."""
        layer = self._layers[name]
        plan = self._plan
        if plan is not None and plan.layered is not None:
            self._open().wait_layer(layer)

    def save_kv_layer(self, name: str) -> None:
        """The layer has been written."""
        layer = self._layers[name]
        self._hooked.add(layer)
        plan = self._plan
        if plan is not None and plan.save_step and self._by_layer:
            self._open().layer_computed(layer)

    def end_step(self) -> None:
        """All layers have been written; called once or twice a step. vLLM's first model runner
        calls it also on the way out of a step that failed, whose layers were not."""
        if sys.exc_info()[1] is not self._exception_outside:
            if not self._is_without_pool():
                self._open().abort_step()
            return
        plan = self._plan
        if plan is not None and (plan.save_step or plan.layered is not None):
            self._open().end_step()
            if not self._by_layer:
                self._open().finish_saves([job for job, _ in plan.save_step])

    def collect_loads(self) -> None:
        """Takes note of loads that have ended. The scheduler's side knows from the board that an
        async one has; what failed is reported here."""
        if self._is_without_pool():
            return
        for job, failed, damaged, size, seconds in self._open().take_loads():
            self._report.damaged.update(damaged)
            self._stats.count("load_bytes", size)
            layered = self._layered.pop(job, None) is not None
            if self._gpu is None or not layered:
                # On a GPU, that a layered load has ended is seen a step or two later.
                self._stats.observe_load(seconds)
            if layered:
                self._report.ended[job] = 1
                if failed:
                    # Too late for this step; the scheduler's side keeps it from spreading.
                    self._stats.count("layered_failures", len(failed))
                    self._report.spoiled = True
                continue
            request_id, moves, lost = self._async.pop(job)
            self._report.loading = True  # Until just now.
            if job in self._cancelled:
                self._end_cancelled(job)
                continue
            bad = [block_of(moves, index) for index in failed]
            if lost is not None:
                bad.append(lost)
            if bad:
                self._bad_blocks.update(bad)
                self._report.failed[job] = 1
                self._stats.count("load_failures", len(bad))
                logger.warning("%d blocks of request %s failed to load", len(bad), request_id)

    def _end_cancelled(self, job: int) -> None:
        """Nothing writes into the blocks of a cancelled load any more, on this rank: it has ended,
        well or not, or it never came here. They can be computed when all ranks have said so."""
        blocks = self._cancelled.pop(job).blocks
        self._async.pop(job, None)
        self._bad_blocks.update(blocks)
        self._report.cancelled[job] = 1
        self._stats.count("load_failures", len(blocks))

    def take_bad_blocks(self) -> set[int]:
        """Blocks that must be recomputed, of the loads that the report names as failed."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_report(self) -> WorkerReport | None:
        """What the scheduler's side has to know."""
        self._cancelled.check()
        self._report.loading |= bool(self._async)
        if self._report.is_empty():
            return None
        report, self._report = self._report, WorkerReport()
        return report

    def take_stats(self) -> Stats | None:
        """What was counted since the last call, or None."""
        self._count()
        return self._stats.take()

    def _count(self) -> None:
        if self._is_without_pool():
            return
        counters = self._open().counters()
        if counters != self._reported_counters:
            for name, value in counters.items():
                self._stats.count(name, value - self._reported_counters.get(name, 0))
            if counters["copy_errors"] != self._reported_counters.get("copy_errors", 0):
                self._log_error(counters["copy_errors"])
            self._reported_counters = counters

    def _log_error(self, count: int) -> None:
        """A device that fails, fails often: one line a minute says so."""
        now = time.monotonic()
        if now >= self._next_error:
            self._next_error = now + ERROR_PERIOD_S
            error = self._open().take_error()
            logger.error(
                "%d copies failed so far (%s); affected saves are skipped, affected loads "
                "recomputed",
                count,
                error,
            )

    def clear(self) -> None:
        """The step has ended."""
        self._plan = None

    def shutdown(self) -> None:
        """Lets copies in flight end, then lets go of tensors and segment."""
        attacher, self._attacher = self._attacher, None
        if attacher is not None:
            attacher.stop()
        if self._worker is not None:
            self._worker.close()
        self._worker = self._cache = None
        self.__dict__.pop("_segment", None)

    def _is_without_pool(self) -> bool:
        """Whether no daemon has come yet: then there is nothing to do in a step."""
        return self._worker is None and self._cache is not None

    def _open(self) -> Worker:
        if self._worker is None:
            raise KvtideError("the KV cache is not registered, or the connector was shut down")
        return self._worker


def view_of(name: str, tensor: torch.Tensor) -> tuple[str, int, int, list[int], list[int], int]:
    """A registered tensor as the engine wants it; see `_native.Worker`."""
    size: Any = tensor.element_size()
    offset = tensor.storage_offset() * size
    return (
        name,
        tensor.data_ptr(),
        tensor.untyped_storage().nbytes() - offset,
        list(tensor.shape),
        [stride * size for stride in tensor.stride()],
        size,
    )


def gpu_of(kv_caches: dict[str, torch.Tensor]) -> int | None:
    """The CUDA device on which the KV cache lies, or None for host memory."""
    devices = {tensor.device for tensor in kv_caches.values()}
    kinds = {device.type for device in devices}
    if len(devices) != 1 or not kinds <= {"cpu", "cuda"} or torch.version.hip is not None:
        places = ", ".join(sorted(map(str, devices)))
        raise KvtideError(
            f"the KV cache lies on {places}: kvtide copies to and from one NVIDIA GPU for each "
            "worker, or host memory"
        )
    (device,) = devices
    return None if device.type == "cpu" else (device.index or 0)
