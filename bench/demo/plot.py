"""Draws the report: time to first token per turn, and where the prompt tokens came from."""

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#8a8f98", "#0b6fb8")
SOURCE_COLOURS = {"gpu": "#b9c0c9", "host": "#0b6fb8", "computed": "#e08a2c"}
OTHER_COLOURS = ("#3a9d6e", "#7b5ea7")
# Half the width that one turn's points of one run are spread over, in turns.
SPREAD = 0.13


def draw(report: dict, target: Path) -> None:
    """Writes a PNG of the report's runs to `target`."""
    import matplotlib

    # No display is needed, nor looked for.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 4.8), width_ratios=(2.2, 1), layout="constrained"
    )
    draw_ttft(left, report["runs"])
    draw_sources(right, report["runs"])
    machine = report.get("machine", {})
    versions = report.get("versions", {})
    figure.suptitle(
        f"Multi-turn chat, {report.get('model', '?')}, vLLM {versions.get('vllm', '?')}, "
        f"{machine.get('cores', '?')} CPU cores ({machine.get('cpu', '?')})",
        fontsize=10,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=140)
    pyplot.close(figure)


def draw_ttft(axes: "Axes", runs: list[dict]) -> None:
    """Every request as a point beside its turn, every run's median as a bar through them."""
    for index, run in enumerate(runs):
        centre = (index - (len(runs) - 1) / 2) * 0.36
        by_turn: dict[int, list[float]] = {}
        for sample in run["samples"]:
            by_turn.setdefault(sample["turn"] + 1, []).append(sample["ttft_ms"])
        for turn, times in by_turn.items():
            middle = turn + centre
            step = 2 * SPREAD / max(len(times) - 1, 1)
            places = [middle - SPREAD + step * place for place in range(len(times))]
            label = run["name"] if turn == min(by_turn) else None
            axes.scatter(places, times, s=26, color=COLOURS[index % 2], alpha=0.75, label=label)
            axes.hlines(
                median(times),
                middle - SPREAD - 0.03,
                middle + SPREAD + 0.03,
                color=COLOURS[index % 2],
                linewidth=2.5,
            )
    axes.set_xlabel("turn of the conversation (bar: median)")
    axes.set_ylabel("time to first token (ms)")
    axes.set_xticks(sorted({sample["turn"] + 1 for run in runs for sample in run["samples"]}))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title("Time to first token, one point per request", fontsize=10)


def draw_sources(axes: "Axes", runs: list[dict]) -> None:
    """One stacked bar per run: share of prompt tokens per tier, and computed."""
    names = [run["name"] for run in runs]
    shares = [
        {**run["hit_rate"], "computed": max(0.0, 1 - sum(run["hit_rate"].values()))} for run in runs
    ]
    sources = list(dict.fromkeys(source for share in shares for source in share))
    spare = iter(OTHER_COLOURS * len(sources))
    below = [0.0] * len(runs)
    for source in sources:
        heights = [100 * share.get(source, 0.0) for share in shares]
        if not any(heights):
            continue
        colour = SOURCE_COLOURS.get(source) or next(spare)
        label = source if source == "computed" else f"from {source}"
        bars = axes.bar(names, heights, bottom=below, color=colour, width=0.6, label=label)
        texts = [f"{height:.0f} %" if height >= 4 else "" for height in heights]
        axes.bar_label(bars, texts, label_type="center", fontsize=9)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set_ylabel("share of prompt tokens (%)")
    axes.set_ylim(0, 100)
    axes.set_title("Where prompt tokens came from", fontsize=10)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, fontsize=9)
