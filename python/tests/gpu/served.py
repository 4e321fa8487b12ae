"""A real vLLM engine on one GPU or several, with what its connector was told."""

from __future__ import annotations

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

BLOCK = 16
POOL_TOKENS = 16384
PROMPT_TOKENS = 3000
RANKS = int(os.environ.get("GPU_TEST_RANKS", "1"))
"""GPUs of the engine: one cannot be followed by another in one process."""
RUNNER = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "1")
"""Which of vLLM's model runners, for the same reason."""


class Engine:
    """vLLM in this process, and its ranks in their own where there are several."""

    def __init__(self, folder: Path, **transfer: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = RUNNER
        self.extra = {"host_capacity_gb": 4, "verify": "load"} | transfer
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
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.side = self.scheduler.connector._as_scheduler
        self.saved: dict[int, int] = {}
        """Slot → block from which it was saved."""
        self.loaded: list[tuple[int, int]] = []
        """(slot, block) of what was loaded."""
        self.lengths: dict[str, int] = {}
        """Request → tokens it had when it was loaded layer by layer."""
        self.layered_loads = 0
        self.async_loads = 0
        plan_step = self.side.build_connector_meta

        def recording_plan(scheduler_output: Any) -> Any:
            plan = plan_step(scheduler_output)
            for _, moves in [*plan.save_now, *plan.save_step]:
                self.saved.update(decode(moves))
            if plan.layered is not None:
                self.loaded += decode(plan.layered[1])
                for name in scheduler_output.num_scheduled_tokens:
                    self.lengths[name] = self.scheduler.requests[name].num_tokens
                self.layered_loads += 1
            for load in plan.loads:
                self.loaded += decode(load.moves)
                self.async_loads += 1
            return plan

        self.side.build_connector_meta = recording_plan

    def on_ranks(self, do: Any, *arguments: Any) -> list[Any]:
        """What a function of a vLLM worker returns on every rank."""
        return self.llm.llm_engine.model_executor.collective_rpc(do, args=arguments)

    def use(self, **extra: Any) -> None:
        """Changes settings that are read at every request."""
        from kvtide import _native

        settings = _native.Settings(json.dumps({"host_capacity_gb": 4} | extra), {})
        self.side._settings = settings
        self.on_ranks(go_by_layer, settings.load != "sync")

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
        found = self.on_ranks(differences, pairs, within_fp8)
        return [f"rank {rank}: {where}" for rank, each in enumerate(found) for where in each]

    def drain(self) -> None:
        """Lets saves end: the last ones are told of in the next step."""
        self.generate([[7] * 20], 2)
        while self.side._pool.poll():
            pass

    def forget(self) -> None:
        """Empties vLLM's own prefix cache and leaves the pool alone."""
        assert self.llm.reset_prefix_cache()
        self.loaded.clear()

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def sampling(tokens: int) -> Any:
    """Greedy, of a fixed length."""
    return vllm.SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=1
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


def logprobs_of(output: Any) -> list[float]:
    """Of the tokens that were chosen."""
    return [next(iter(each.values())).logprob for each in output.logprobs]


# ---- what runs on the ranks

_remembered: list[torch.Tensor] = []
_replays = 0


def runner_module(worker: Any) -> str:
    return type(worker.model_runner).__module__


def caches(worker: Any) -> list[torch.Tensor]:
    torch.cuda.synchronize()
    return [raw(tensor) for tensor in worker.model_runner.kv_caches]


def remember(worker: Any) -> None:
    _remembered[:] = [tensor.clone() for tensor in caches(worker)]


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
