"""What bench.gpu writes is what its plots read. The engines are played: there is no GPU here."""

import json
from pathlib import Path
from typing import Any

from bench.gpu import plots
from bench.gpu.__main__ import LENGTH_ROUNDS, PROMPTS_A_LENGTH, Suite, keep

WORKLOAD = {
    "commit": "abcdef0",
    "machine": "one NVIDIA H200, driver 580.1, 16 cores",
    "vllm": "0.26.0",
    "shape": "8b",
    "tp": 1,
}


class Played:
    """Answers as an engine's process does, and remembers in which mode it would load."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.mode = "auto"

    def __call__(self, do: str, **arguments: Any) -> Any:
        if do == "load_mode":
            self.mode = arguments["mode"]
        elif do == "each":
            return [0.02 + 1e-6 * arguments.get("tokens", 0)] * len(arguments["seeds"])
        elif do == "mixed":
            return {"ttft": [0.04] * len(arguments["seeds"]), "itl": [0.0065, 0.007, 0.02]}
        return None


def measure(names: list[str], out: Path, *workloads: str, **workload: Any) -> list[Played]:
    """Runs workloads and keeps the results, as `python -m bench.gpu` does."""
    engines = [Played(name) for name in names]
    suite = Suite(engines, out, pool_tokens=70000)  # type: ignore[arg-type]
    for name in workloads:
        getattr(suite, name)()
    keep(out / "gpu_found.json", suite.found | {"workload": WORKLOAD | workload})
    return engines


def collected(out: Path) -> dict[str, Any]:
    return plots.collect([json.loads((out / "gpu_found.json").read_text())])


def test_the_plots_read_what_was_measured(tmp_path: Path) -> None:
    engines = measure(list(plots.ENGINES), tmp_path, "mixed", "lengths")
    data = collected(tmp_path)
    times = data["engines"]["kvtide"]["ttft_ms"]
    assert set(times) == {"cold", "layered", "async"}
    assert set(map(len, times["layered"].values())) == {LENGTH_ROUNDS * PROMPTS_A_LENGTH}
    assert {len(of["itl_ms"]) for of in data["engines"].values()} == {9}
    assert {engine.mode for engine in engines} == {"auto"}
    assert len(plots.draw(data, tmp_path)) == 2


def test_engines_that_do_not_fit_together_are_measured_one_after_the_other(tmp_path: Path) -> None:
    for name in plots.ENGINES:
        measure([name], tmp_path, "mixed", "lengths")
    assert set(collected(tmp_path)["engines"]) == set(plots.ENGINES)


def test_results_of_another_commit_are_not_kept_beside_new_ones(tmp_path: Path) -> None:
    measure(["none", "native"], tmp_path, "mixed", "lengths", commit="1234567")
    measure(["kvtide"], tmp_path, "mixed", "lengths")
    assert set(json.loads((tmp_path / "gpu_found.json").read_text())) == {"kvtide", "workload"}
