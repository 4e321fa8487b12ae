"""Engines that kvtide refuses, decided from configuration objects alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="no vLLM here: use the Python of provision.py vllm VERSION")

from kvtide import ConfigError
from kvtide._native import Namespace, Settings
from kvtide.encoding import float_of, scaled_dimensions, scales_of
from kvtide.geometry import Geometry, one_group, refuse_flags, refuse_shared_layers
from kvtide.requests import Requests

PARALLEL = {
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 1,
    "decode_context_parallel_size": 1,
    "prefill_context_parallel_size": 1,
    "nnodes": 1,
    "enable_dbo": False,
    "ubatch_size": 0,
}


def config(**changes: Any) -> Any:
    """An engine's configuration; `changes` go where they belong."""
    parallel = {name: changes.pop(name, value) for name, value in PARALLEL.items()}
    transfer = {"kv_role": changes.pop("kv_role", "kv_both"), "engine_id": "e"}
    return SimpleNamespace(
        model_config=SimpleNamespace(
            runner_type=changes.pop("runner_type", "generate"),
            enable_sleep_mode=changes.pop("enable_sleep_mode", False),
        ),
        parallel_config=SimpleNamespace(**parallel),
        speculative_config=changes.pop("speculative_config", None),
        kv_transfer_config=SimpleNamespace(**transfer),
        **changes,
    )


def spec(kind: str = "FullAttentionSpec", page: int = 4096, tokens: int = 32) -> Any:
    """One layer's kind of KV cache."""
    fields = {"page_size_bytes": page, "block_size": tokens}
    return type(kind, (SimpleNamespace,), {})(**fields)


def kv_cache(*specs: Any, layers: int = 4) -> Any:
    """A KV cache with one group for each of `specs`."""
    names = [f"layer.{number}" for number in range(layers)]
    groups = [SimpleNamespace(kv_cache_spec=each, layer_names=names) for each in specs]
    return SimpleNamespace(kv_cache_groups=groups, num_blocks=24)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size 2"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size 2"),
        ({"nnodes": 2}, "--nnodes 2"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"enable_dbo": True}, "--enable-dbo"),
        ({"ubatch_size": 2}, "--ubatch-size"),
        ({"enable_sleep_mode": True}, "--enable-sleep-mode"),
        ({"kv_role": "kv_consumer"}, 'kv_role: a "kv_consumer"'),
        ({"runner_type": "pooling"}, "--runner pooling"),
    ],
)
def test_flags_that_are_not_supported_are_refused_by_name(
    changes: dict[str, Any], flag: str
) -> None:
    settings = Settings("{}", {})
    refuse_flags(config(), settings)
    with pytest.raises(ConfigError) as refused:
        refuse_flags(config(**changes), settings)
    assert str(refused.value).startswith(flag)
    fixes = ("set it to", "remove it", "start it without kvtide")
    assert any(fix in str(refused.value) for fix in fixes)


@pytest.mark.parametrize("kind", ["SlidingWindowSpec", "MambaSpec", "ChunkedLocalAttentionSpec"])
def test_kinds_of_kv_cache_that_forget_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"model: .*{kind}"):
        one_group(kv_cache(spec(kind)))


def test_several_groups_are_refused_with_their_kinds_and_the_flag() -> None:
    with pytest.raises(ConfigError) as refused:
        one_group(kv_cache(spec(), spec("SlidingWindowSpec")))
    for part in ("2 groups", "SlidingWindowSpec", "--disable-hybrid-kv-cache-manager"):
        assert part in str(refused.value)


def test_layers_of_different_sizes_are_refused() -> None:
    nested = spec("UniformTypeKVCacheSpecs")
    nested.kv_cache_specs = {"a": spec(page=4096), "b": spec(page=8192)}
    with pytest.raises(ConfigError, match="differ in bytes"):
        one_group(kv_cache(nested))


def test_layers_that_share_their_kv_cache_are_refused_by_name() -> None:
    refuse_shared_layers({"layer.0": 4096, "layer.1": 8192})
    with pytest.raises(ConfigError, match=r"layers layer\.0 and layer\.2 share one KV cache"):
        refuse_shared_layers({"layer.0": 4096, "layer.1": 8192, "layer.2": 4096})


def test_a_supported_engine_has_the_geometry_of_its_configuration() -> None:
    geometry = Geometry.of(config(), kv_cache(spec()), Settings("{}", {}))
    assert (geometry.ranks, geometry.blocks, geometry.block_tokens) == (2, 24, 32)
    assert (geometry.layers, geometry.layer_bytes, geometry.instance) == (4, 4096, "e")


def test_a_codec_needs_a_gpu() -> None:
    settings = Settings('{"codec": "fp8"}', {})
    with pytest.raises(ConfigError, match=r"codec: .*NVIDIA GPU"):
        Geometry.of(config(), kv_cache(spec()), settings)


@pytest.mark.parametrize(
    ("fields", "scales"),
    [
        ({"num_kv_heads": 8, "head_size": 128}, 16),
        ({"num_kv_heads": 8, "head_size": 128, "head_size_v": 128}, 16),
    ],
)
def test_keys_and_values_of_every_head_have_a_scale(fields: Any, scales: int) -> None:
    each = spec()
    vars(each).update(fields)
    assert scales_of(each) == scales
    assert scales_of(spec("MLAAttentionSpec")) == 1


def test_numbers_that_cannot_be_encoded_are_refused() -> None:
    each = spec()
    vars(each).update({"dtype": "torch.float8_e4m3fn", "num_kv_heads": 1, "head_size": 64})
    with pytest.raises(ConfigError, match=r"codec: .*holds float8_e4m3fn"):
        float_of(each)
    vars(each).update({"head_size_v": 32})
    with pytest.raises(ConfigError, match=r"codec: .*one size"):
        scales_of(each)


def test_heads_are_found_in_every_order_of_memory() -> None:
    tokens_first = scaled_dimensions("l", (9, 4, 16, 256), (32768, 512, 2048, 2), 2, 8)
    assert tokens_first == [(4, 512), (2, 256)]
    heads_first = scaled_dimensions("l", (9, 4, 16, 256), (32768, 8192, 512, 2), 2, 8)
    assert heads_first == [(4, 8192), (2, 256)]
    keys_then_values = scaled_dimensions("l", (9, 8, 16, 128), (32768, 256, 2048, 2), 2, 8)
    assert keys_then_values == [(8, 256)]
    assert scaled_dimensions("l", (9, 16, 576), (18432, 1152, 2), 2, 1) == []
    with pytest.raises(ConfigError, match=r"codec: .*heads of layer l"):
        scaled_dimensions("l", (2, 9, 16, 4, 128), (1, 1, 1, 1, 1), 2, 8)


def test_the_name_and_the_path_of_a_lora_adapter_are_kept_apart() -> None:
    """As the scheduler's side passes them; either may have line ends in it."""

    def first_key(name: str, path: str) -> bytes:
        namespace = Namespace(
            model="m",
            weights_revision="",
            compute_dtype="",
            kv_dtype="",
            layout="",
            block_tokens=32,
            ranks=1,
            shard_bytes=4096,
        )
        request: Any = SimpleNamespace(
            request_id="r",
            prompt_token_ids=list(range(32)),
            resumable=False,
            lora_request=SimpleNamespace(lora_name=name, lora_path=path),
            cache_salt=None,
            mm_features=[],
        )
        requests = Requests(Settings("{}", {}), namespace)
        requests.add(request)
        [key] = requests.states["r"].sequence.keys(0, 1)
        return key

    assert first_key("a\nb", "c") != first_key("a", "b\nc")
    assert first_key("a", "b") == first_key("a", "b")
