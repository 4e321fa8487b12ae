"""The plots of the GPU's measurements, of a small measurement in the format of bench.gpu."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import plots

LENGTHS = (1024, 8192, 65536)


def measured(**workload: Any) -> dict[str, Any]:
    """What bench.gpu writes, with few values: times of gaps in seconds, of lengths in ms."""
    ordinary = {
        "commit": "abcdef0",
        "machine": "one NVIDIA H200, driver 580.1, 16 cores",
        "vllm": "0.26.0",
        "shape": "8b",
        "tp": 1,
        "pool_tokens": 70000,
    }
    gaps = {"none": 0.205, "native": 0.0257, "kvtide": 0.0067}
    rates = {"cold": 0.027, "reloaded": 0.0065, "layered": 0.0038, "async": 0.004}
    ways = {"none": ("cold",), "native": ("cold", "reloaded"), "kvtide": tuple(rates)}
    found: dict[str, Any] = {
        engine: {
            "mixed_itl": [0.0065] * 95 + [longest] * 5,
            "lengths": {
                way: {str(n): [n * rates[way] + spread for spread in (1, 0, 3)] for n in LENGTHS}
                for way in ways[engine]
            },
        }
        for engine, longest in gaps.items()
    }
    return found | {"workload": ordinary | workload}


@pytest.fixture
def drawn(tmp_path: Path) -> dict[str, str]:
    """Name of a plot → its text."""
    files = plots.draw(plots.collect([measured()]), tmp_path)
    return {path.name: path.read_text() for path in files}


def words(svg: str) -> str:
    """What is written in a plot: matplotlib leaves each text in a comment beside its outlines."""
    return "\n".join(re.findall(r"<!-- (.*?) -->", svg, re.DOTALL))


def test_an_engine_has_one_colour_in_both_plots(drawn: dict[str, str]) -> None:
    for _, colour in plots.ENGINES.values():
        assert all(f"stroke: {colour}" in svg for svg in drawn.values())
    default_colours = ("#1f77b4", "#ff7f0e", "#2ca02c")
    assert not any(colour in svg for colour in default_colours for svg in drawn.values())


def test_both_plots_say_model_load_commit_and_machine(drawn: dict[str, str]) -> None:
    for svg in drawn.values():
        for said in ("Llama-3.1-8B", "abcdef0", "NVIDIA H200", "vLLM 0.26.0", "load: "):
            assert said in words(svg)


def test_the_legend_of_gaps_says_how_many_there_are(drawn: dict[str, str]) -> None:
    said = words(drawn["gpu-itl.svg"])
    assert "kvtide: p99 6.7 ms (n = 100)" in said
    assert "vLLM, no offload: p99 205.0 ms (n = 100)" in said


def test_lengths_are_written_out_and_show_their_spread(drawn: dict[str, str]) -> None:
    said = words(drawn["gpu-ttft.svg"])
    assert "8,192" in said
    assert "2^" not in said
    assert "median of 3, bars from least to greatest" in said
    assert "vLLM, no offload, computed" in said


def test_equal_data_make_equal_files(drawn: dict[str, str], tmp_path: Path) -> None:
    again = plots.draw(plots.collect([measured()]), tmp_path / "again")
    assert {path.name: path.read_text() for path in again} == drawn


def test_workloads_of_one_sitting_may_lie_in_two_files() -> None:
    mixed, lengths = measured(pool_tokens=49536), measured()
    for engine in plots.ENGINES:
        del mixed[engine]["lengths"]
        del lengths[engine]["mixed_itl"]
    assert plots.collect([mixed, lengths]) == plots.collect([measured()])


@pytest.mark.parametrize("key", ["commit", "machine", "vllm", "shape"])
def test_what_was_not_measured_together_is_not_drawn_together(key: str) -> None:
    with pytest.raises(plots.PlotError, match=f"^{key}: .*another"):
        plots.collect([measured(), measured(**{key: "another"})])


def test_a_measurement_that_does_not_say_its_commit_is_refused() -> None:
    old = measured()
    del old["workload"]["commit"]
    with pytest.raises(plots.PlotError, match=r"^commit: unknown"):
        plots.collect([old])


def test_a_model_whose_tokens_have_another_size_is_refused() -> None:
    with pytest.raises(plots.PlotError, match=r"^shape: 70b is not drawn"):
        plots.collect([measured(shape="70b")])


def test_a_plot_without_one_of_the_engines_is_refused() -> None:
    without = measured()
    del without["none"]["mixed_itl"]
    with pytest.raises(plots.PlotError, match=r"none: not measured; .*--workloads mixed"):
        plots.collect([without])


def test_the_committed_data_can_be_drawn(tmp_path: Path) -> None:
    if not plots.DATA.exists():
        pytest.skip(f"{plots.DATA.name} is not there: nothing was measured in this format yet")
    assert len(plots.draw(json.loads(plots.DATA.read_text()), tmp_path)) == 2
