"""What kvtide cannot do is refused when vLLM starts, with the key or flag and the fix."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from engines.client import EngineError, EngineProcess, Nursery
from engines.compare import assert_same, cached_tokens
from engines.config import EngineConfig
from engines.matrix import V1_ASYNC, need_triton
from engines.workloads import LONG, vllm_version

pytestmark = pytest.mark.engine


def refusal(config: EngineConfig, model: Path, nursery: Nursery) -> str:
    """The error with which this engine does not start."""
    try:
        engine = EngineProcess(config, model, nursery)
    except EngineError as error:
        return str(error)
    engine.close()
    raise AssertionError("the engine started")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"host_capacity": 1}, ["host_capacity: ", "did you mean host_capacity_gb"]),
        ({"host_capacity_gb": 0.0001}, ["host_capacity_gb", "row"]),
        ({"host_capacity_gb": 1e5}, ["host_capacity_gb: ", "are available"]),
        ({"eviction": "clock"}, ["eviction: ", '"s3fifo" or "lru"']),
        ({"load": "sometimes"}, ["load: ", '"auto", "layered", "async" or "sync"']),
        ({"segment_directory": "/proc"}, ["segment_directory: ", "type proc", "/dev/shm"]),
    ],
    ids=["unknown-key", "less-than-a-row", "more-than-the-host-has", "eviction", "load", "disk"],
)
@pytest.mark.usefixtures("no_engine")
def test_wrong_settings_are_refused_at_start(
    settings: dict[str, object], expected: list[str], tiny_model: Path, nursery: Nursery
) -> None:
    config = dataclasses.replace(V1_ASYNC, settings=json.dumps(settings))
    error = refusal(config, tiny_model, nursery)
    last = error.strip().splitlines()[-1]
    assert "kvtide" in last or "Error" in last
    for part in expected:
        assert part in last, error


NOT_UTF_8 = "\udce9t\udce9"
"""How Python has bytes in the environment that are not UTF-8."""


@pytest.mark.usefixtures("no_engine")
def test_an_environment_that_others_use_too_does_not_keep_an_engine_from_starting(
    tiny_model: Path, nursery: Nursery
) -> None:
    variables = {
        "GREETING": NOT_UTF_8,
        "KVTIDE_LOG": "info",
        "KVTIDE_BATCH_UPSTREAM": "http://engine:8000",
        "KVTIDE_EVICTION": "",
        "AIBRIX_KV_CACHE_OL_L1_CACHE_EVICTION_POLICY": "FIFO",
        "AIBRIX_KV_CACHE_OL_L2_CACHE_BACKEND": "INFINISTORE",
    }
    engine = EngineProcess(V1_ASYNC, tiny_model, nursery, more_environment=variables)
    try:
        notices = [line for line in engine.log.read_text().splitlines() if "AIBRIX" in line]
        assert len([line for line in notices if "WARNING" in line]) == 1, notices
        assert "AIBRIX_KV_CACHE_OL_L2_CACHE_BACKEND" in notices[0]
    finally:
        assert engine.close() == []


@pytest.mark.usefixtures("no_engine")
def test_a_setting_that_is_not_utf_8_is_refused_by_its_name(
    tiny_model: Path, nursery: Nursery
) -> None:
    with pytest.raises(EngineError, match=r"KVTIDE_TENANT: .* is not UTF-8"):
        EngineProcess(V1_ASYNC, tiny_model, nursery, more_environment={"KVTIDE_TENANT": NOT_UTF_8})


def with_windows(model: Path, folder: Path, kinds: list[str]) -> Path:
    """The tiny model with sliding windows of 64 tokens in layers of kind `sliding_attention`."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    config |= {"sliding_window": 64, "layer_types": kinds}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


MIXED_WINDOWS = ["sliding_attention", "full_attention"] * 4


TWO_GROUPS = json.dumps({"disable_hybrid_kv_cache_manager": False})
"""Layers that forget and layers that do not are managed apart."""


@pytest.mark.usefixtures("no_engine")
def test_a_model_with_two_groups_of_kv_cache_is_refused_by_vllm_itself(
    tiny_model: Path, nursery: Nursery, tmp_path: Path
) -> None:
    """vLLM 0.26 to 0.32 do not even ask a connector that carries one group, as kvtide is one; what
    kvtide would answer is in the next test."""
    model = with_windows(tiny_model, tmp_path / "model", MIXED_WINDOWS)
    error = refusal(dataclasses.replace(V1_ASYNC, arguments=TWO_GROUPS), model, nursery)
    last = error.strip().splitlines()[-1]
    assert "Connector OffloadingConnectorV1Type3 does not support HMA" in last, error
    assert "--disable-hybrid-kv-cache-manager" in last, error


@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.usefixtures("no_engine")
def test_the_two_groups_that_vllm_makes_of_a_model_are_refused_by_kvtide(
    runner: str, tiny_model: Path, nursery: Nursery, tmp_path: Path
) -> None:
    """The KV cache is that of a real engine, without the connector because vLLM would stop first;
    kvtide is shown it afterwards."""
    need_triton(runner)
    model = with_windows(tiny_model, tmp_path / "model", MIXED_WINDOWS)
    config = EngineConfig(runner, connector=False, arguments=TWO_GROUPS)
    engine = EngineProcess(config, model, nursery)
    try:
        refused = engine.refusal_of_groups()
    finally:
        assert engine.close() == []
    assert refused.startswith("model: it has 2 groups of KV cache "), refused
    assert "(FullAttentionSpec, SlidingWindowSpec)" in refused
    assert "start vLLM with --disable-hybrid-kv-cache-manager" in refused


@pytest.mark.usefixtures("no_engine")
def test_a_model_whose_layers_all_forget_is_refused(
    tiny_model: Path, nursery: Nursery, tmp_path: Path
) -> None:
    model = with_windows(tiny_model, tmp_path / "model", ["sliding_attention"] * 8)
    error = refusal(V1_ASYNC, model, nursery)
    assert "model: KV cache type SlidingWindowSpec is not supported" in error, error


@pytest.mark.usefixtures("no_engine")
def test_a_model_with_mixed_windows_works_with_one_group(
    tiny_model: Path, nursery: Nursery, tmp_path: Path
) -> None:
    """What the refusal recommends does work: vLLM's default for connectors such as this one."""
    model = with_windows(tiny_model, tmp_path / "model", MIXED_WINDOWS)
    if vllm_version().startswith("0.26."):
        pytest.skip("vLLM 0.26 cannot keep this model in one group, with or without kvtide")
    engine = EngineProcess(V1_ASYNC, model, nursery)
    try:
        cold = engine.generate([LONG], 8)
        engine.settle()
        assert engine.reset()
        again = engine.generate([LONG], 8)
        assert cached_tokens(again) == [320]
        assert_same(again, cold, "reloaded")
    finally:
        assert engine.close() == []
