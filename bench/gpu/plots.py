"""`python -m bench.gpu.plots [gpu_found.json …]`: the plots of docs/benchmarks.md, in `docs/plots`.

Files named on the command line are what `bench.gpu` wrote; what the plots need of them replaces
`bench/results/gpu_plots.json`, from which the plots are then drawn. All of it is of one commit, one
machine and one model: curves that were not measured together are not drawn together.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.percentile import percentile
from bench.provenance import ROOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DATA = ROOT / "bench" / "results" / "gpu_plots.json"
OUT = ROOT / "docs" / "plots"
LINK_BYTES_PER_S = 54.8e9
"""Of one large copy from pinned memory to the GPU over PCIe 5 x16, H100 and H200 alike."""
TOKEN_BYTES = 128 << 10
"""KV cache of a token: Llama-3.1-8B's shape in bf16."""
ENGINES = {
    "none": ("vLLM, no offload", "#8a8f98"),
    "native": ("vLLM's own offloading", "#e08a2c"),
    "kvtide": ("kvtide", "#0b6fb8"),
}
"""Engine → its name and its colour, in every plot; other engines are not drawn."""
WAYS = {
    "none": {"cold": ("computed", "-")},
    "native": {"reloaded": ("reloaded", "-")},
    "kvtide": {"layered": ("load: layered", "-"), "async": ("load: async", "--")},
}
"""Engine → which of its measurements over lengths are drawn, how they are called, and the line."""
SHARED = ("commit", "machine", "vllm", "shape", "tp")
"""What must be the same in all files that are drawn together."""
SHAPES = {"8b": "Llama-3.1-8B shape (dummy weights, bf16)"}
CLOSE_MS = 40
"""The gaps that are looked at closely end here; one that computes a prompt is far beyond."""
NAMED_TOKENS = 8192
"""The legend says the time at this length."""

Found = dict[str, dict[str, Any]]
"""Engine → key → value, and under `workload` what was run, as `bench.gpu` writes it."""


class PlotError(Exception):
    """Data that cannot be drawn; the message says what to do."""


def collect(found: list[Found]) -> dict[str, Any]:
    """What the plots need, out of several files of one sitting."""
    measured = [each.get("workload", {}) for each in found]
    for key in SHARED:
        values = {str(workload.get(key, "unknown")) for workload in measured}
        if len(values) != 1 or values == {"unknown"}:
            raise PlotError(
                f"{key}: {' and '.join(sorted(values))}; "
                f"measure everything that is drawn with one {key}"
            )
    if measured[0]["shape"] not in SHAPES:
        raise PlotError(f"shape: {measured[0]['shape']} is not drawn; measure {', '.join(SHAPES)}")
    engines: Found = {}
    for each in found:
        for engine in ENGINES:
            values = each.get(engine, {})
            kept = engines.setdefault(engine, {})
            if "mixed_itl" in values:
                kept["itl_ms"] = [round(gap * 1e3, 2) for gap in sorted(values["mixed_itl"])]
            if "lengths" in values:
                kept["ttft_ms"] = {
                    way: {length: [round(t, 2) for t in times] for length, times in points.items()}
                    for way, points in values["lengths"].items()
                }
    for key, workload in (("itl_ms", "mixed"), ("ttft_ms", "lengths")):
        missing = [engine for engine in ENGINES if key not in engines[engine]]
        if missing:
            raise PlotError(
                f"{', '.join(missing)}: not measured; run bench.gpu with --workloads {workload}"
            )
    return {key: measured[0][key] for key in SHARED} | {"engines": engines}


def title(data: dict[str, Any], load: str) -> str:
    """Of a plot: what was measured, and on what."""
    return (
        f"{load}\n{SHAPES[data['shape']]}, vLLM {data['vllm']}, "
        f"kvtide {data['commit']}\n{data['machine']}"
    )


def inter_token_latency(data: dict[str, Any]) -> Figure:
    """How many of the decoders' gaps are longer than a time, in the mixed load. The share has a
    logarithmic axis, because what differs is the one gap in a hundred."""
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, (close, whole) = pyplot.subplots(
        1, 2, figsize=(8.4, 4.2), sharey=True, width_ratios=(2.4, 1), layout="constrained"
    )
    for engine, (name, colour) in ENGINES.items():
        gaps = sorted(data["engines"][engine]["itl_ms"])
        label = f"{name}: p99 {percentile(gaps, 99):.1f} ms (n = {len(gaps):,})"
        longer = [1 - i / len(gaps) for i in range(len(gaps))]
        for axes in (close, whole):
            axes.step(gaps, longer, where="pre", color=colour, label=label)
    close.set_xlim(0, CLOSE_MS)
    close.set_title(f"the first {CLOSE_MS} ms", fontsize=8)
    whole.set_xlim(left=0)
    whole.set_title("all gaps", fontsize=8)
    close.set_ylabel("share of gaps that are at least as long")
    close.set_yscale("log")
    close.set_ylim(1e-3, 1.1)
    close.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share * 100:g} %"))
    for axes in (close, whole):
        axes.set_xlabel("time between two tokens, ms")
        axes.grid(alpha=0.3)
    close.legend(fontsize=8, loc="upper right")
    load = "Inter-token latency of 8 decoders while an 8k-token prompt is reloaded every 250 ms"
    figure.suptitle(title(data, f"{load} (load: auto)"), fontsize=9)
    return figure


def time_to_first_token(data: dict[str, Any]) -> Figure:
    """TTFT against the prompt's length, on an idle engine."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.4, 4.6), layout="constrained")
    lengths: set[int] = set()
    for engine, ways in WAYS.items():
        name, colour = ENGINES[engine]
        for way, (said, line) in ways.items():
            points = data["engines"][engine]["ttft_ms"][way]
            lengths |= curve(axes, points, f"{name}, {said}", color=colour, linestyle=line)
    ticks = sorted(lengths)
    link = [length * TOKEN_BYTES / LINK_BYTES_PER_S * 1e3 for length in ticks]
    axes.plot(ticks, link, "k:", label=f"PCIe alone, {LINK_BYTES_PER_S / 1e9:.1f} GB/s")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{length:,}" for length in ticks])
    axes.set_yticks(times := [2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000])
    axes.set_yticklabels(f"{each:,}" for each in times)
    axes.minorticks_off()
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("time to first token, ms")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    samples = len(next(iter(data["engines"]["kvtide"]["ttft_ms"]["layered"].values())))
    load = f"TTFT of one prompt on an idle engine: median of {samples}, bars from least to greatest"
    figure.suptitle(title(data, load), fontsize=9)
    return figure


def curve(axes: Axes, points: dict[str, list[float]], name: str, **style: Any) -> set[int]:
    """Draws medians with their spread; returns the lengths."""
    times = {int(length): sorted(samples) for length, samples in sorted(points.items(), key=length)}
    middle = {length: median(samples) for length, samples in times.items()}
    below = [middle[length] - samples[0] for length, samples in times.items()]
    above = [samples[-1] - middle[length] for length, samples in times.items()]
    if NAMED_TOKENS in middle:
        name = f"{name} ({NAMED_TOKENS:,} tokens: {middle[NAMED_TOKENS]:.0f} ms)"
    axes.errorbar(
        list(middle),
        list(middle.values()),
        yerr=(below, above),
        marker=".",
        capsize=2,
        label=name,
        **style,
    )
    return set(middle)


def length(point: tuple[str, Any]) -> int:
    """Of a point, whose key is a text in JSON."""
    return int(point[0])


def draw(data: dict[str, Any], out: Path) -> list[Path]:
    """Both plots, as files that are the same for the same data."""
    import matplotlib

    # No display is needed, nor looked for.
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kvtide"
    from matplotlib import pyplot

    out.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, plot in (("gpu-itl.svg", inter_token_latency), ("gpu-ttft.svg", time_to_first_token)):
        figure = plot(data)
        figure.savefig(out / name, metadata={"Date": None})
        pyplot.close(figure)
        drawn.append(out / name)
    return drawn


def main() -> None:
    """See the module's documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "found", nargs="*", type=Path, help=f"new measurements; without any, {DATA.name} is drawn"
    )
    arguments = parser.parse_args()
    try:
        if arguments.found:
            data = collect([json.loads(path.read_text()) for path in arguments.found])
            DATA.write_text(json.dumps(data) + "\n")
        elif not DATA.exists():
            raise PlotError(
                f"{DATA}: nothing was measured yet; give the gpu_found.json of bench.gpu"
            )
        for path in draw(json.loads(DATA.read_text()), OUT):
            print(path)
    except PlotError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
