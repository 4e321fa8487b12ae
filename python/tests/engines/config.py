"""Configurations of an engine, and the environment its process runs in.

The KV cache on the "GPU" is small on purpose: with 24 blocks, a handful of requests makes vLLM
preempt and evict, and with 128 tokens a step every longer prompt is prefilled in chunks.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engines.segment_file import segment_bytes

TESTS = Path(__file__).resolve().parents[1]
BLOCK_TOKENS = 32
LAYERS = 8
LAYER_BYTES = 4 * BLOCK_TOKENS * 64 * 4
"""Heads, tokens, numbers for K and V, bytes of a float32."""
ROW_BYTES = LAYERS * LAYER_BYTES
MAX_TOKENS_A_STEP = 128


@dataclass(frozen=True)
class EngineConfig:
    """What tests vary. Hashable: tests with equal configurations share one engine."""

    runner: str = "v1"
    async_scheduling: bool = True
    load: str = "auto"
    verify: str = "load"
    connector: bool = True
    prefix_caching: bool = True
    tensor_parallel: int = 1
    blocks: int = 24
    max_requests: int = 8
    max_tokens_a_step: int = MAX_TOKENS_A_STEP
    rows: int = 240
    """Rows of the pool."""
    eviction: str = "s3fifo"
    scrub_mib_per_s: int = 0
    kv_events: bool = False
    multi: bool = False
    """Whether kvtide is inside vLLM's MultiConnector."""
    policy: str = "recompute"
    """vLLM's kv_load_failure_policy."""
    role: str = "kv_both"
    """vLLM's kv_role."""
    settings: str = "{}"
    """More of kvtide's settings, as JSON."""
    arguments: str = "{}"
    """More of vLLM's arguments, as JSON."""

    @property
    def name(self) -> str:
        """What differs from the defaults, for test ids."""
        words = [self.runner, "async" if self.async_scheduling else "sync", f"load-{self.load}"]
        if not self.connector:
            words.append("no-connector")
        if self.verify != "load":
            words.append(f"verify-{self.verify}")
        if not self.prefix_caching:
            words.append("no-prefix-caching")
        if self.tensor_parallel > 1:
            words.append(f"tp{self.tensor_parallel}")
        if self.rows != EngineConfig.rows:
            words.append(f"{self.rows}-rows")
        if self.scrub_mib_per_s:
            words.append("scrub")
        if self.kv_events:
            words.append("events")
        if self.multi:
            words.append("multi")
        if self.policy != "recompute":
            words.append(f"policy-{self.policy}")
        if self.role != "kv_both":
            words.append(self.role)
        if self.settings != "{}":
            words.append("set")
        return "-".join(words)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row with the shards of all ranks (heads are divided among them)."""
        return ROW_BYTES

    def capacity_gb(self) -> float:
        """The setting that makes a pool of exactly `rows` rows."""
        return segment_bytes(self.rows, self.row_bytes, self.tensor_parallel) / 2**30

    def llm_arguments(self, model: Path, engine_id: str) -> dict[str, Any]:
        """Arguments of `vllm.LLM`."""
        arguments: dict[str, Any] = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "seed": 0,
            "enforce_eager": True,
            "block_size": BLOCK_TOKENS,
            "max_model_len": 384,
            "max_num_seqs": self.max_requests,
            "max_num_batched_tokens": self.max_tokens_a_step,
            "kv_cache_memory_bytes": self.blocks * ROW_BYTES // self.tensor_parallel,
            "enable_prefix_caching": self.prefix_caching,
            "tensor_parallel_size": self.tensor_parallel,
            "disable_log_stats": False,
        }
        if self.connector:
            arguments["kv_transfer_config"] = self.transfer(engine_id)
        if self.kv_events:
            arguments["kv_events_config"] = {"enable_kv_cache_events": True, "publisher": "null"}
        return arguments | json.loads(self.arguments)

    def transfer(self, engine_id: str) -> dict[str, Any]:
        """`--kv-transfer-config`."""
        transfer = transfer_config(engine_id, self.extra_config(), self.policy, self.role)
        return inside_multi(transfer) if self.multi else transfer

    def extra_config(self) -> dict[str, Any]:
        """kvtide's own settings."""
        return {
            "host_capacity_gb": self.capacity_gb(),
            "load": self.load,
            "verify": self.verify,
            "eviction": self.eviction,
            "scrub_mib_per_s": self.scrub_mib_per_s,
        } | json.loads(self.settings)

    def as_json(self) -> dict[str, Any]:
        """For the engine's process."""
        return asdict(self)


def transfer_config(
    engine_id: str, extra: dict[str, Any], policy: str = "recompute", role: str = "kv_both"
) -> dict[str, Any]:
    """`--kv-transfer-config` with kvtide in it."""
    return {
        "kv_connector": "OffloadingConnectorV1Type3",
        "kv_connector_module_path": "kvtide.vllm",
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "engine_id": engine_id,
        "kv_connector_extra_config": extra,
    }


def inside_multi(transfer: dict[str, Any]) -> dict[str, Any]:
    """The same inside vLLM's MultiConnector."""
    inner = {key: value for key, value in transfer.items() if key != "engine_id"}
    outer = {
        "kv_connector": "MultiConnector",
        "kv_connector_extra_config": {"connectors": [inner]},
    }
    return {k: v for k, v in transfer.items() if k != "kv_connector_module_path"} | outer


def new_engine_id() -> str:
    """Unlike any other engine's, so that a segment can be attributed."""
    return f"tests-{os.getpid()}-{uuid.uuid4().hex[:8]}"


@dataclass(frozen=True)
class Environment:
    """Environment variables of an engine's process."""

    runner: str = "v1"
    async_scheduling: bool = True
    more: dict[str, str] = field(default_factory=dict)

    def variables(self) -> dict[str, str]:
        """The whole environment; one thread, nothing from the network."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("KVTIDE_")}
        paths = [str(TESTS / "vllm_plugins"), str(TESTS.parent), str(TESTS)]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        variables = {
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_V2_MODEL_RUNNER": "1" if self.runner == "v2" else "0",
            "KVTIDE_REQUIRE_ASYNC_SCHEDULING": "1" if self.async_scheduling else "0",
            "TRITON_INTERPRET": "1",
            # vLLM 0.26 compiles its sampler in every start, for 15 s.
            "TORCH_COMPILE_DISABLE": "1",
        }
        return inherited | variables | self.more
