"""What kvtide has to know of an engine, and which engines it refuses.

Everything here is read from vLLM's configuration, which scheduler and workers have alike, so both
sides come to the same geometry without a message.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtide._native import ConfigError, Daemon, Namespace, Segment, Settings
from kvtide.encoding import float_of, scales_of
from kvtide.log import describe_segment, log_waiting, logger, progress_logger

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

ATTACH_TIMEOUT_S = 30.0
"""How long an engine that starts waits for the daemon that has its pool, if it is required."""
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
ATTENTION_SPECS = ("FullAttentionSpec", "MLAAttentionSpec")
"""Kinds of KV cache in which a block, once full, never changes and is never dropped early."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of an engine's KV cache."""

    instance: str
    ranks: int
    blocks: int
    block_tokens: int
    layers: int
    layer_bytes: int
    """Bytes of a block in one layer on one rank."""
    row_layer_bytes: int
    """The same in a row of the pool."""
    layout: str
    encoding: tuple[str, int] | None
    """Type of the KV cache's numbers, and scales of a block in one layer, if rows are encoded."""

    @classmethod
    def of(cls, config: VllmConfig, kv_cache: KVCacheConfig, settings: Settings) -> Geometry:
        """The geometry of an engine, or a ConfigError that names what stands against it."""
        refuse_flags(config, settings)
        layers, spec = one_group(kv_cache)
        transfer = config.kv_transfer_config
        layer_bytes = getattr(spec, "unpadded_page_size_bytes", spec.page_size_bytes)
        encoding = None
        if settings.codec != "none":
            refuse_codec_without_gpu()
            encoding = float_of(spec), scales_of(spec)
        return cls(
            instance=str(transfer.engine_id),
            ranks=config.parallel_config.tensor_parallel_size,
            blocks=kv_cache.num_blocks,
            block_tokens=spec.block_size,
            layers=layers,
            layer_bytes=layer_bytes,
            row_layer_bytes=settings.row_layer_bytes(layer_bytes, encoding[1] if encoding else 0),
            encoding=encoding,
            layout=f"{cache_layout(kv_cache)} {spec}",
        )

    def segment(self, settings: Settings, rank: int | None = None) -> Segment:
        """The engine's own shared segment, mapped, for the worker of `rank` or the scheduler's
        side. Whoever creates it logs that."""
        segment = Segment(
            settings,
            self.instance,
            self.ranks,
            self.layers,
            self.row_layer_bytes,
            rank,
            log_waiting,
        )
        segment.populate(progress_logger(segment))
        describe_segment(segment)
        return segment

    def daemon(self, config: VllmConfig, settings: Settings) -> Daemon | None:
        """The daemon that has the engine's pool; None where that is the engine's own."""
        socket = settings.pool_socket
        if socket is None:
            return None
        refuse_scales_of_its_own(config)
        return Daemon(
            socket,
            self.instance,
            self.namespace(config, settings),
            settings.tenant or "",
            self.ranks,
            self.layers,
            self.row_layer_bytes,
            publishes_events(config),
        )

    def namespace(self, config: VllmConfig, settings: Settings) -> Namespace:
        """What seeds the identity of every block of this engine."""
        model = config.model_config
        revision = settings.weights_revision or weights_of(model)
        # What was encoded is not what the model computed.
        codec = "" if self.encoding is None else f" {settings.codec}"
        return Namespace(
            model=str(model.model),
            weights_revision=revision,
            compute_dtype=str(model.dtype),
            kv_dtype=f"{config.cache_config.cache_dtype} {model.quantization}{codec}",
            layout=self.layout + overrides_of(model),
            block_tokens=self.block_tokens,
            ranks=self.ranks,
            shard_bytes=self.layers * self.row_layer_bytes,
        )


def attach(daemon: Daemon, settings: Settings, rank: int | None = None) -> Segment | None:
    """The daemon's memory, mapped, for the worker of `rank` or the scheduler's side, at an engine's
    start. None where there is no daemon and it is not required."""
    required = settings.pool_required
    segment = daemon.attach(rank, ATTACH_TIMEOUT_S if required else 0.0, required)
    socket = settings.pool_socket
    if segment is not None:
        segment.take_place(rank)
        segment.populate(progress_logger(segment))
    if rank is None:
        if segment is not None:
            logger.info("attached to the pool of the daemon at %s", socket)
        else:
            logger.warning(
                "no daemon answers at %s: this engine starts without a cache, and attaches when "
                "there is one. Set pool_required to true for it not to start without",
                socket,
            )
    return segment


def publishes_events(config: VllmConfig) -> bool:
    """Whether the engine tells others which blocks there are."""
    events = config.kv_events_config
    enabled = events is not None and events.enable_kv_cache_events
    return bool(enabled and config.cache_config.enable_prefix_caching)


def weights_of(model: ModelConfig) -> str:
    """Which weights a model has: the commit that was loaded from a hub, or of files in a folder
    their names, sizes and times. They may be replaced under one name, and a pool may outlive that.
    """
    where = Path(str(model.model))
    if where.exists():
        inside = where.iterdir() if where.is_dir() else [where]
        files = sorted(path for path in inside if path.suffix in WEIGHT_FILES)
        about = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return hashlib.sha256(repr(about).encode()).hexdigest()[:32]
    commit = getattr(model.hf_config, "_commit_hash", None)
    return str(commit or model.revision or "")


def overrides_of(model: ModelConfig) -> str:
    """What was changed of the model's own configuration, such as its rotary embedding."""
    overrides = getattr(model, "hf_overrides", None)
    if not overrides:
        return ""
    if callable(overrides):
        return f" overrides {overrides.__module__}.{overrides.__qualname__}"
    return f" overrides {json.dumps(overrides, sort_keys=True, default=str)}"


def cache_layout(kv_cache: KVCacheConfig) -> str:
    """In which order a block's numbers lie where vLLM has a choice."""
    layout = getattr(kv_cache, "kv_cache_layout", None)
    if layout is None:  # vLLM before 0.32 says it nowhere: what a user has chosen, it is.
        from vllm import envs

        layout = envs.VLLM_KV_CACHE_LAYOUT
    return str(layout)


def read_settings(config: VllmConfig) -> Settings:
    """The settings in `kv_connector_extra_config` and the environment."""
    extra = dict(config.kv_transfer_config.kv_connector_extra_config)
    ranks = config.parallel_config.tensor_parallel_size
    return Settings(json.dumps(extra, default=str), dict(os.environ), ranks)


def refuse_flags(config: VllmConfig, settings: Settings) -> None:
    """Raises ConfigError for flags under which blocks would be lost, mixed up or never saved."""
    parallel = config.parallel_config
    for flag, value in (
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size),
        (
            "--decode-context-parallel-size",
            getattr(parallel, "decode_context_parallel_size", 1),
        ),
        (
            "--prefill-context-parallel-size",
            getattr(parallel, "prefill_context_parallel_size", 1),
        ),
        ("--nnodes", getattr(parallel, "nnodes", 1)),
    ):
        if value > 1:
            raise ConfigError(f"{flag} {value}: kvtide does not support it yet; set it to 1")
    # Whoever allows it: vLLM's second model runner takes a step for ended before the drafter has
    # written its blocks, so loads would have to wait for the steps in flight.
    if config.speculative_config is not None:
        raise ConfigError(
            "--speculative-config: kvtide does not support speculative decoding yet; remove it"
        )
    if config.model_config.runner_type != "generate":
        raise ConfigError(
            f"--runner {config.model_config.runner_type}: a pooling model needs all of its prompt "
            "computed, so there is nothing to reuse; start it without kvtide"
        )
    if getattr(config.model_config, "enable_sleep_mode", False):
        raise ConfigError(
            "--enable-sleep-mode: it takes the KV cache's memory away while copies may still use "
            "it; kvtide does not support it yet, remove it"
        )
    for flag, splits in (
        ("--enable-dbo", getattr(parallel, "enable_dbo", False)),
        ("--ubatch-size", getattr(parallel, "ubatch_size", 0) > 1),
    ):
        if splits:
            raise ConfigError(f"{flag}: kvtide cannot follow split batches yet; remove it")
    role = config.kv_transfer_config.kv_role
    if role == "kv_consumer" and settings.pool_socket is None:
        raise ConfigError(
            'kv_role: a "kv_consumer" saves nothing, so in a pool of its own it never finds '
            'anything; set it to "kv_both", or pool to the socket of kvtide serve'
        )


def refuse_scales_of_its_own(config: VllmConfig) -> None:
    """Raises ConfigError where an engine's KV cache means nothing to another one."""
    if getattr(config.cache_config, "calculate_kv_scales", False):
        raise ConfigError(
            "--calculate-kv-scales: each engine has scales of its own, so no other can use what it "
            'saves; remove it, or set `pool` to "embedded"'
        )


def refuse_codec_without_gpu() -> None:
    """Raises ConfigError where there are no kernels that could encode."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        raise ConfigError(
            'codec: "fp8" is computed on an NVIDIA GPU, and this engine has none; set it to "none"'
        )


def one_group(kv_cache: KVCacheConfig) -> tuple[int, KVCacheSpec]:
    """Number of layers, and the one kind of KV cache that all of them have."""
    groups = kv_cache.kv_cache_groups
    if len(groups) != 1:
        kinds = sorted({kind(group.kv_cache_spec) for group in groups})
        raise ConfigError(
            f"model: it has {len(groups)} groups of KV cache ({', '.join(kinds)}), and kvtide "
            "carries models with one; if they differ only in their attention window, start vLLM "
            "with --disable-hybrid-kv-cache-manager"
        )
    spec: Any = groups[0].kv_cache_spec
    nested = getattr(spec, "kv_cache_specs", None)
    specs = list(nested.values()) if nested is not None else [spec]
    for each in specs:
        if kind(each) not in ATTENTION_SPECS:
            raise ConfigError(
                f"model: KV cache type {kind(each)} is not supported: its blocks are overwritten. "
                f"Supported: {', '.join(ATTENTION_SPECS)}"
            )
    if len({each.page_size_bytes for each in specs}) != 1:
        raise ConfigError(
            "model: its layers differ in bytes for a block; kvtide cannot carry it yet"
        )
    return len(groups[0].layer_names), specs[0]


def refuse_shared_layers(addresses: dict[str, int]) -> None:
    """Raises ConfigError if layers share their KV cache; `addresses` are those of its tensors."""
    first: dict[int, str] = {}
    for name, address in addresses.items():
        if address in first:
            raise ConfigError(
                f"model: layers {first[address]} and {name} share one KV cache; kvtide cannot "
                "carry such a model yet"
            )
        first[address] = name


def kind(spec: KVCacheSpec) -> str:
    """The name of a kind of KV cache."""
    return type(spec).__name__
