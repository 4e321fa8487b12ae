"""`python -m bench.gpu.plots`: plots of what `bench.gpu` measured, into `docs/plots`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.provenance import ROOT

OUT = ROOT / "docs" / "plots"
LINK_BYTES_PER_S = 54.8e9
"""Of one large copy from pinned memory to an H100 over PCIe 5 x16."""
TOKEN_BYTES = 128 << 10
"""KV cache of a token: Llama-3.1-8B's shape in bf16."""
NAMES = {"none": "no offload", "native": "vLLM's own offloading", "kvtide": "kvtide"}
Found = dict[str, dict[str, Any]]


def inter_token_latency(found: Found, note: str) -> Path:
    """How the decoders' gaps of the mixed load are distributed."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for engine, values in found.items():
        gaps = sorted(gap * 1e3 for gap in values.get("mixed_itl", ()))
        if gaps:
            shares = [(i + 1) / len(gaps) for i in range(len(gaps))]
            axes.step(gaps, shares, where="post", label=NAMES.get(engine, engine))
    axes.set_xlabel("time between two tokens of a decoder, ms")
    axes.set_ylabel("share of gaps that are no longer")
    axes.set_ylim(0.9, 1.0)
    axes.set_xlim(left=0)
    axes.set_title(f"8 decoders beside an 8k reload each 250 ms\n{note}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, "gpu-itl.svg")


def time_to_first_token(found: Found, note: str) -> Path:
    """TTFT against the prompt's length, on an idle engine."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for engine, values in found.items():
        for way, points in values.get("lengths", {}).items():
            lengths = sorted(int(length) for length in points)
            name = NAMES.get(engine, engine)
            axes.plot(
                lengths,
                [points[str(length)] for length in lengths],
                marker=".",
                label=f"computed, with {name}" if way == "cold" else f"{name}, {way}",
            )
            limit = [length * TOKEN_BYTES / LINK_BYTES_PER_S * 1e3 for length in lengths]
    axes.plot(lengths, limit, "k:", label=f"the link alone, {LINK_BYTES_PER_S / 1e9:.1f} GB/s")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("time to first token, ms")
    axes.set_title(f"Idle engine, one prompt\n{note}", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return save(figure, "gpu-ttft.svg")


def save(figure: Any, name: str) -> Path:
    """The plot as a file that is the same for the same data."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "kvtide"
    OUT.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(OUT / name, metadata={"Date": None})
    return OUT / name


def main() -> None:
    """See the module's documentation."""
    import matplotlib

    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--found", type=Path, required=True, help="gpu_found.json of bench.gpu")
    parser.add_argument("--note", required=True, help="machine and commit, for the title")
    arguments = parser.parse_args()
    found: Found = json.loads(arguments.found.read_text())
    if any("mixed_itl" in values for values in found.values()):
        print(inter_token_latency(found, arguments.note))
    if any("lengths" in values for values in found.values()):
        print(time_to_first_token(found, arguments.note))


if __name__ == "__main__":
    main()
