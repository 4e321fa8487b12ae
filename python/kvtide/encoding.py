"""Which numbers of the KV cache share a scale, where rows hold them in eight bits.

Scheduler and workers know from the kind of KV cache how many scales a block has in one layer; a
worker sees from its tensors where their numbers lie. `docs/architecture.md` has the row's format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtide._native import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from vllm.v1.kv_cache_interface import KVCacheSpec

FLOATS = ("bfloat16", "float16")
"""Numbers that can be encoded."""


def float_of(spec: KVCacheSpec) -> str:
    """The type of the KV cache's numbers, or a ConfigError if they cannot be encoded."""
    name = str(getattr(spec, "dtype", None)).removeprefix("torch.")
    if name not in FLOATS:
        raise ConfigError(
            f'codec: "fp8" is for a KV cache of {" or ".join(FLOATS)}, and this one holds {name}; '
            'set it to "none"'
        )
    return name


def scales_of(spec: KVCacheSpec) -> int:
    """Scales of a block in one layer: one for each head, for keys and values apart."""
    if type(spec).__name__ == "MLAAttentionSpec":
        return 1
    fields: Any = spec
    if getattr(fields, "head_size_v", fields.head_size) != fields.head_size:
        raise ConfigError(
            'codec: "fp8" needs keys and values of one size, and this model\'s differ; set it to '
            '"none"'
        )
    return 2 * fields.num_kv_heads


def scaled_dimensions(
    name: str, shape: Seq[int], strides: Seq[int], item_bytes: int, scales: int
) -> list[tuple[int, int]]:
    """The dimensions of a layer's tensor whose places have scales of their own, as (length, stride
    in bytes): heads, and within them keys and values if they lie side by side.

    vLLM's shape is (blocks, heads, tokens, size) whatever the order in memory, where a head is one
    of keys, one of values, or both; a model with one latent head may leave it out.
    """
    if scales == 1 and len(shape) == 3:
        return []
    if len(shape) == 4 and scales % shape[1] == 0 and shape[3] % (scales // shape[1]) == 0:
        parts = scales // shape[1]
        width = shape[3] // parts * item_bytes
        dimensions = [(shape[1], strides[1]), (parts, width)]
        return [dimension for dimension in dimensions if dimension[0] > 1]
    raise ConfigError(
        f'codec: "fp8" cannot tell the {scales} heads of layer {name} apart, whose shape is '
        f'{tuple(shape)}; set it to "none"'
    )
