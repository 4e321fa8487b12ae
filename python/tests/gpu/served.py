"""A real vLLM engine on one GPU or several, with what its connector was told."""

from __future__ import annotations

import collections
import json
import os
import random
from pathlib import Path
from typing import Any

import torch
import vllm

from bench.gpu import models
from bench.gpu.engine import go_by_layer
from bench.gpu.rig import raw
from python.tests.gpu import weights

BLOCK = 16
POOL_TOKENS = 16384
PROMPT_TOKENS = 3000
RANKS = int(os.environ.get("GPU_TEST_RANKS", "1"))
"""GPUs of the engine: one cannot be followed by another in one process."""
RUNNER = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "1")
"""Which of vLLM's model runners, for the same reason."""
TOP_TOKENS = 20
"""Likeliest tokens that are told at every place of an output."""
POISON = -3.0
"""What the KV cache is filled with where nothing may be read. Finite: attention multiplies what it
masks by zero."""


class Engine:
    """vLLM in this process, and its ranks in their own where there are several."""

    def __init__(self, folder: Path, **transfer: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = RUNNER
        # The scrub might find damaged rows before the load that is to find them.
        self.extra = {"host_capacity_gb": 4, "verify": "load", "scrub_mib_per_s": 0} | transfer
        self.llm = vllm.LLM(
            model=models.write("small", folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=8192,
            max_num_seqs=16,
            max_num_batched_tokens=2048,
            num_gpu_blocks_override=POOL_TOKENS // BLOCK,
            gpu_memory_utilization=0.3,
            tensor_parallel_size=RANKS,
            seed=0,
            compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16]},
            kv_transfer_config={
                "kv_connector": "OffloadingConnectorV1Type3",
                "kv_connector_module_path": "kvtide.vllm",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": self.extra,
            },
        )
        for module in self.on_ranks(runner_module):
            assert (".gpu." in module) == (RUNNER == "1"), module
        self.on_ranks(weights.spread)
        self.on_ranks(watch)
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.side = self.scheduler.connector._as_scheduler
        self.saved: dict[int, int] = {}
        """Slot → block from which it was saved."""
        self.loaded: list[tuple[int, int]] = []
        """(slot, block) of what was loaded."""
        self.began: dict[str, tuple[int, int, int]] = {}
        """Request → of the step in which it last began: tokens it had in the cache, tokens it
        computed, and requests of the step."""
        self.layered_loads = 0
        self.async_loads = 0
        plan_step = self.side.build_connector_meta

        def recording_plan(scheduler_output: Any) -> Any:
            plan = plan_step(scheduler_output)
            for _, moves in [*plan.save_now, *plan.save_step]:
                self.saved.update(decode(moves))
            if plan.layered is not None:
                self.loaded += decode(plan.layered[1])
                self.layered_loads += 1
            for load in plan.loads:
                self.loaded += decode(load.moves)
                self.async_loads += 1
            scheduled = scheduler_output.num_scheduled_tokens
            cached = scheduler_output.scheduled_cached_reqs
            # A request that was preempted is new to the V2 runner and resumed to V1.
            new = scheduler_output.scheduled_new_reqs
            begins = {each.req_id: each.num_computed_tokens for each in new}
            for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
                if name in cached.resumed_req_ids:
                    begins[name] = computed
            for name, computed in begins.items():
                self.began[name] = computed, scheduled[name], len(scheduled)
            return plan

        self.side.build_connector_meta = recording_plan

    def on_ranks(self, do: Any, *arguments: Any) -> list[Any]:
        """What a function of a vLLM worker returns on every rank."""
        return self.llm.llm_engine.model_executor.collective_rpc(do, args=arguments)

    def use(self, **extra: Any) -> None:
        """Changes settings that are read at every request."""
        from kvtide import _native

        settings = _native.Settings(json.dumps({"host_capacity_gb": 4} | extra), {})
        side = self.side
        for part in (side._requests, side._matching, side._loads, side._saves):
            part._settings = settings
        self.on_ranks(go_by_layer, settings.load != "sync")

    def use_routes(self, **routes: str) -> None:
        """Opens the GPU anew, with these routes for its copies instead of those that are measured
        to be the best. That writes to rows, so the pool is emptied."""
        self.drain()
        self.forget()
        self.side.reset_cache()
        names = ("gpu_save_route", "gpu_load_route", "gpu_layered_route")
        extra = json.dumps(self.extra | routes)
        for rates in self.on_ranks(open_again, extra):
            used = {purpose: route for purpose, route, _, is_used in rates if is_used}
            for name in names:
                wanted = routes.get(name, "")
                assert used[name.split("_")[1]].startswith(wanted), f"{used} instead of {routes}"

    def generate(self, prompts: list[list[int]], tokens: int = 32) -> list[Any]:
        """Greedy outputs with logprobs."""
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(inputs, sampling(tokens), use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    def remember_caches(self) -> None:
        """Keeps the KV cache as it is now, to be compared with."""
        self.on_ranks(remember)

    def changed(self, within_fp8: bool = False) -> list[str]:
        """Where a block that was loaded since is not what was saved; see `differences`."""
        pairs = [(self.saved[slot], block) for slot, block in self.loaded]
        assert pairs, "nothing was loaded"
        return self.unlike(pairs, within_fp8)

    def unlike(self, pairs: list[tuple[int, int]], within_fp8: bool = False) -> list[str]:
        """Of pairs of a remembered block and a block now, those that differ; see `differences`."""
        found = self.on_ranks(differences, pairs, within_fp8)
        return [f"rank {rank}: {where}" for rank, each in enumerate(found) for where in each]

    def drain(self) -> None:
        """Lets saves end: the last ones are told of in the next step."""
        self.generate([[7] * 20], 2)
        while self.side._pool.poll():
            pass

    def forget(self) -> None:
        """Empties vLLM's own prefix cache and leaves the pool alone. The blocks are overwritten, so
        that nobody finds in them by chance what should have been loaded."""
        assert self.llm.reset_prefix_cache()
        self.on_ranks(poison)
        self.loaded.clear()

    def hide(self, blocks: list[int]) -> None:
        """Requests to come find neither these blocks in vLLM's own prefix cache nor anything in the
        pool."""
        self.scheduler.kv_cache_manager.evict_blocks(set(blocks))
        self.use(tenant="that has saved nothing")

    def damage(self, slots: list[int]) -> None:
        """Flips a bit of every byte of rows, on all ranks."""
        # The file has lost its name by now, but not its descriptor.
        files = Path("/proc/self/fd").iterdir()
        path = next(p for p in files if p.exists() and "kvtide" in os.readlink(p))
        segment = self.side._memory.segment
        rows_at = segment.total_bytes - segment.rows * segment.row_bytes
        flipped = bytes(byte ^ 4 for byte in range(256))
        with path.open("r+b") as file:
            for slot in slots:
                file.seek(rows_at + slot * segment.row_bytes)
                row = file.read(segment.row_bytes)
                file.seek(rows_at + slot * segment.row_bytes)
                file.write(row.translate(flipped))

    def damaged_blocks(self) -> int:
        """Rows that were dropped for their checksum until now."""
        return int(self.side._pool.counters()["damaged_blocks"])

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def sampling(tokens: int) -> Any:
    """Greedy, of a fixed length."""
    return vllm.SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=TOP_TOKENS
    )


def decode(moves: bytes) -> list[tuple[int, int]]:
    """(slot, block) of every move."""
    words = [int.from_bytes(moves[i : i + 4], "little") for i in range(0, len(moves), 4)]
    return list(zip(words[::3], words[2::3], strict=True))


def prompt(seed: int, tokens: int = PROMPT_TOKENS) -> list[int]:
    """Random tokens."""
    return random.Random(seed).choices(range(10, 30000), k=tokens)


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [list(output.token_ids) for output in outputs]


def logprobs_of(output: Any) -> list[list[float]]:
    """Of the likeliest tokens at every place; of equally likely ones it is not said which."""
    return [sorted(each.logprob for each in at.values()) for at in output.logprobs]


def distance(one: Any, other: Any) -> float:
    """By how much the logprobs of the likeliest first tokens differ at most. Of a token that only
    one output names, the other says that it is no likelier than those that it names."""
    tops = [{token: at.logprob for token, at in out.logprobs[0].items()} for out in (one, other)]
    gaps = []
    for top, opposite in (tops, reversed(tops)):
        least = min(opposite.values())
        gaps += [abs(logprob - opposite.get(token, least)) for token, logprob in top.items()]
    return max(gaps)


# ---- what runs on the ranks

_remembered: list[torch.Tensor] = []
_replays = 0
_counted: collections.Counter[str] = collections.Counter()
_hooks_ran: list[bool] = []


def runner_module(worker: Any) -> str:
    return type(worker.model_runner).__module__


def watch(worker: Any) -> None:
    """From now on, notes what kvtide counts, and what it takes to be true of layered loads."""
    from kvtide.stats import Stats
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    count, side = Stats.count, get_kv_transfer_group()._as_worker
    hooks_will_run = side._hooks_will_run

    def noted_count(stats: Stats, name: str, amount: int) -> None:
        _counted[name] += amount
        count(stats, name, amount)

    def noted_hooks_will_run(context: Any) -> bool:
        will_run = hooks_will_run(context)
        _hooks_ran.append(will_run)
        return will_run

    Stats.count = noted_count  # type: ignore[method-assign]
    side._hooks_will_run = noted_hooks_will_run


def counted(worker: Any, name: str) -> int:
    """What kvtide has counted on this rank since the start."""
    return _counted[name]


def take_hooks_ran(worker: Any) -> list[bool]:
    """Of every layered load since the last call, whether hooks were expected to run for it."""
    taken = list(_hooks_ran)
    _hooks_ran.clear()
    return taken


def open_again(worker: Any, extra: str) -> list[Any]:
    """Gives up the copies to and from this GPU and begins anew with other settings; what each route
    has reached."""
    from kvtide import _native
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    side = get_kv_transfer_group()._as_worker
    attention = worker.model_runner.vllm_config.compilation_config.static_forward_context
    tensors = {name: attention[name].kv_cache for name in side._layers}
    torch.cuda.synchronize()
    side._worker.close()
    side._worker = None
    side._settings = _native.Settings(extra, {})
    side._reported_counters = {}
    side.register_kv_caches(tensors)
    return list(side._worker.copy_rates)


def caches(worker: Any) -> list[torch.Tensor]:
    torch.cuda.synchronize()
    return [raw(tensor) for tensor in worker.model_runner.kv_caches]


def remember(worker: Any) -> None:
    _remembered[:] = [tensor.clone() for tensor in caches(worker)]


@torch.inference_mode()
def poison(worker: Any, block: int | None = None) -> None:
    """Overwrites all of the KV cache, or one block."""
    pattern = raw(torch.tensor([POISON], dtype=torch.bfloat16)).item()
    for tensor in caches(worker):
        (tensor if block is None else block_of(tensor, block)).fill_(pattern)
    torch.cuda.synchronize()


@torch.inference_mode()
def scale_layer(worker: Any, layer: int, factor: float) -> None:
    """Falsifies one layer of the KV cache."""
    torch.cuda.synchronize()
    worker.model_runner.kv_caches[layer].mul_(factor)
    torch.cuda.synchronize()


def block_of(tensor: torch.Tensor, block: int) -> torch.Tensor:
    """One block of a layer, wherever blocks are counted."""
    return tensor[block] if tensor.shape[0] == POOL_TOKENS // BLOCK else tensor[:, block]


def differences(worker: Any, pairs: list[tuple[int, int]], within_fp8: bool) -> list[str]:
    """Of pairs of a remembered block and a block now, those that differ, in bytes or by more than
    a step of fp8."""
    found = []
    for layer, (was, now) in enumerate(zip(_remembered, caches(worker), strict=True)):
        for source, block in pairs:
            a, b = block_of(was, source), block_of(now, block)
            if within_fp8:
                a, b = (each.view(torch.bfloat16).float() for each in (a, b))
                bound = a.abs() / 16 + a.abs().max() * 2**-9
                same = bool(((a - b).abs() <= bound * 1.01).all())
            else:
                same = torch.equal(a, b)
            if not same:
                found.append(f"layer {layer}, block {source} -> {block}")
    return found


def count_replays(worker: Any) -> None:
    """Counts replays of CUDA graphs from now on."""
    global _replays
    _replays = 0
    replay = torch.cuda.CUDAGraph.replay

    def counting(graph: torch.cuda.CUDAGraph) -> None:
        global _replays
        _replays += 1
        replay(graph)

    counting.replay = replay  # type: ignore[attr-defined]
    torch.cuda.CUDAGraph.replay = counting  # type: ignore[method-assign]


def replays(worker: Any) -> int:
    """How many there were; they are not counted any more."""
    torch.cuda.CUDAGraph.replay = torch.cuda.CUDAGraph.replay.replay  # type: ignore[attr-defined]
    return _replays


def block_bytes(worker: Any) -> int:
    """Of all layers of this rank."""
    return sum(block_of(tensor, 0).numel() * tensor.element_size() for tensor in caches(worker))
