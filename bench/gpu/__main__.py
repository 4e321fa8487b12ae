"""`python -m bench.gpu`: kvtide, vLLM's own offloading and no offloading, side by side on one GPU.

All engines are alive at once, each in a process of its own, and run every workload in turn. Writes
`bench/results/gpu.json`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench import provenance
from bench.gpu.engine import POOL_TOKENS, PROMPT_TOKENS
from bench.gpu.process import Engine
from bench.percentile import percentile

if TYPE_CHECKING:
    from collections.abc import Iterator

CLOSED_LOOP = {"users": 4, "new_tokens": 1024, "output": 64}
CLOSED_LOOP_PERCENTILES = (("ttft", 50), ("tpot", 50), ("itl", 99), ("shared", 50))
"""What is kept of the closed loop: times, and which percentile of them."""
CLOSED_LOOP_MODES = {"none": ("hit",), "kvtide": ("auto", "sync", "hit")}
"""Engine → in which ways it runs the closed loop, if not just as it is; see `closed_loop`."""
OUTPUTS = (64, 16)
"""Output tokens of a request of the closed loop."""
LENGTHS = [1024 << doublings for doublings in range(7)]
MODEL_TOKENS = {POOL_TOKENS: 16384}
"""Of the pool → longest sequence, where it is not the whole pool."""
DESCRIBED = ("shape", "tp", "new_tokens", "pool_tokens", "utilization")
"""Arguments that runs whose results are kept beside each other have in common."""
NAMED = {"kvtide-fp8": {"codec": "fp8"}}
"""Engine → kvtide's settings, where the name does not say them."""
RELOAD_ROUNDS, RELOADS_A_ROUND = 4, 4
LENGTH_ROUNDS, PROMPTS_A_LENGTH = 2, 3
"""Of the longest length, so many prompts fit into the default pool in host memory."""
MIXED_RUNS = 3
SETTLE_S = 0.3
"""After saves, before what must not overlap with them."""


def ms(seconds: float) -> float:
    """In milliseconds."""
    return seconds * 1e3


class Suite:
    """All workloads over the engines that are alive."""

    def __init__(self, engines: list[Engine], out: Path, pool_tokens: int) -> None:
        self.engines = engines
        self.pool_prompts = -(-pool_tokens // PROMPT_TOKENS)
        """So many drive everything else out of the GPU."""
        self.out = out
        self.found: dict[str, dict[str, Any]] = {engine.name: {} for engine in engines}
        self.seed = 1000

    def fresh(self, count: int) -> list[int]:
        """Seeds that no engine has seen."""
        self.seed += count
        return list(range(self.seed - count, self.seed))

    def evicted(self, engine: Engine, count: int) -> list[int]:
        """Seeds of prompts that the engine has computed and that have left the GPU since."""
        seeds = self.fresh(count)
        engine("batch", seeds=seeds, output=1)
        engine("idle", seconds=SETTLE_S)
        self.evict(engine)
        return seeds

    def evict(self, engine: Engine) -> None:
        """Drives everything out of the GPU."""
        engine("batch", seeds=self.fresh(self.pool_prompts), output=1)
        engine("idle", seconds=SETTLE_S)

    def by_turns(self, rounds: int) -> Iterator[Engine]:
        """The engines again and again, so that what a host does beside us meets all of them; one
        without offloading once, because it only says what computing anew takes."""
        for turn in range(rounds):
            yield from (each for each in self.engines if turn == 0 or each.name != "none")

    def note(self, engine: Engine, what: str, value: Any) -> None:
        """Keeps and prints a result."""
        self.found[engine.name][what] = value
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{engine.name:12} {what:40} {shown}", flush=True)

    def warm_up(self) -> None:
        """Kernels are chosen and graphs captured before anything is timed."""
        for engine in self.engines:
            seeds = self.fresh(8)
            engine("batch", seeds=seeds, output=8)
            engine("idle", seconds=SETTLE_S)
            engine("batch", seeds=seeds, output=8)
            engine("each", seeds=seeds[:3], output=1)

    def reload(self) -> None:
        """8k-token prompts reloaded on an idle engine; cold and GPU hits beside it."""
        times: dict[str, dict[str, list[float]]] = {engine.name: {} for engine in self.engines}
        for engine in self.by_turns(RELOAD_ROUNDS):
            of = times[engine.name]
            seeds = self.fresh(RELOADS_A_ROUND + self.pool_prompts)
            of.setdefault("cold", []).extend(engine("each", seeds=seeds, output=1))
            engine("idle", seconds=SETTLE_S)
            again = seeds[:RELOADS_A_ROUND]
            of.setdefault("reload", []).extend(engine("each", seeds=again, output=1))
            of.setdefault("gpu_hit", []).extend(engine("each", seeds=again[-1:] * 2, output=1))
        for engine in self.engines:
            for what, seconds in times[engine.name].items():
                self.note(engine, f"{what}_ms", ms(median(seconds)))
            reloads = [round(ms(each), 1) for each in times[engine.name]["reload"]]
            self.note(engine, "reload_all_ms", reloads)

    def batch(self) -> None:
        """16 prompts of 8k with 32 tokens each, reloaded."""
        times: dict[str, list[float]] = {engine.name: [] for engine in self.engines}
        for engine in self.by_turns(3):
            seeds = self.fresh(16)
            engine("batch", seeds=seeds, output=32)
            engine("idle", seconds=SETTLE_S)
            times[engine.name].append(engine("batch", seeds=seeds, output=32))
        for engine in self.engines:
            self.note(engine, "batch_reload_s", median(times[engine.name]))

    def new_prompts(self, turns: int) -> None:
        """16 new prompts, by turns: what saving costs."""
        seconds: dict[str, list[float]] = {engine.name: [] for engine in self.engines}
        for turn in range(turns):
            order = self.engines if turn % 2 == 0 else self.engines[::-1]
            seeds = self.fresh(16)
            for engine in order:
                seconds[engine.name].append(engine("batch", seeds=seeds, output=32))
                engine("idle", seconds=SETTLE_S)
        for engine in self.engines:
            pairs = zip(seconds[engine.name], seconds["none"], strict=True)
            self.note(engine, "new_s", median(seconds[engine.name]))
            self.note(engine, "new_cost", median(a / b for a, b in pairs) - 1)

    def saving(self, turns: int) -> None:
        """8 new prompts with and without being saved, by turns in one engine: what copying costs,
        without what a connector costs."""
        for engine in self.engines:
            if not engine.name.startswith("kvtide"):
                continue
            ratios = []
            for turn in range(turns):
                seconds = {}
                for on in (True, False) if turn % 2 else (False, True):
                    engine("saving", on=on)
                    seconds[on] = engine("batch", seeds=self.fresh(8), output=32)
                    engine("idle", seconds=SETTLE_S)
                ratios.append(seconds[True] / seconds[False])
            engine("saving", on=True)
            self.note(engine, "saving_cost", median(ratios) - 1)
            self.note(engine, "saving_ratios", [round(ratio, 4) for ratio in ratios])

    def mixed(self) -> None:
        """8 decoders and a reload each 250 ms; all samples of three runs, because a reload takes a
        step more or less by when it comes in one."""
        for engine in self.engines:
            seeds = self.evicted(engine, 12)
            ttft: list[float] = []
            itl: list[float] = []
            for run in range(MIXED_RUNS):
                if run > 0:
                    self.evict(engine)
                result = engine("mixed", seeds=seeds, decoders=8, every_s=0.25)
                ttft, itl = sorted(ttft + result["ttft"]), sorted(itl + result["itl"])
            self.note(engine, "mixed_ttft_p50_ms", ms(median(ttft)))
            self.note(engine, "mixed_ttft_all_ms", [round(ms(t), 1) for t in ttft])
            for name, percent in (("p50", 50), ("p99", 99), ("max", 100)):
                self.note(engine, f"mixed_itl_{name}_ms", ms(percentile(itl, percent)))
            self.found[engine.name]["mixed_itl"] = itl

    def lengths(self) -> None:
        """TTFT against the prompt's length on an idle engine; kvtide in both its ways to load."""
        found: dict[str, dict[str, dict[int, list[float]]]] = {}
        for _ in range(LENGTH_ROUNDS):
            for engine in self.engines:
                of = found.setdefault(engine.name, {})
                for length in LENGTHS:
                    for what, seconds in self.length(engine, length).items():
                        of.setdefault(what, {}).setdefault(length, []).extend(map(ms, seconds))
        for engine in self.engines:
            if engine.name.startswith("kvtide"):
                engine("load_mode", mode="auto")
            self.note(engine, "lengths", found[engine.name])

    def length(self, engine: Engine, tokens: int) -> dict[str, list[float]]:
        """Seconds for prompts of one length: cold, and loaded in each of the engine's ways."""
        seeds = self.fresh(PROMPTS_A_LENGTH)
        times = {"cold": engine("each", seeds=seeds, output=1, tokens=tokens)}
        engine("idle", seconds=SETTLE_S)
        modes = ("layered", "async") if engine.name.startswith("kvtide") else ("reloaded",)
        for mode in modes if engine.name != "none" else ():
            if mode != "reloaded":
                engine("load_mode", mode=mode)
            engine("forget")
            times[mode] = engine("each", seeds=seeds, output=1, tokens=tokens)
        return times

    def timeline(self, timelines: list[str]) -> None:
        """Where the time of the steps goes; printed, for whoever tunes, with the GPU's side in
        files that chrome://tracing shows."""
        workloads: dict[str, tuple[int, dict[str, Any]]] = {
            "batch": (16, {"do": "batch", "output": 32}),
            "reload": (3, {"do": "each", "output": 1}),
            "new": (0, {"do": "batch", "output": 8}),
            "mixed": (3, {"do": "mixed", "decoders": 8, "every_s": 0.25}),
            "closed_loop": (8, CLOSED_LOOP | {"do": "closed_loop", "requests": 8}),
        }
        for engine in self.engines:
            if engine.name == "none":
                continue  # It loads nothing.
            for name in timelines:
                count, workload = workloads[name]
                seeds = "prefixes" if name == "closed_loop" else "seeds"
                of = workload | {seeds: self.evicted(engine, count) or self.fresh(3)}
                print(f"{engine.name}, {name}\n{engine('timeline', of=of)}", flush=True)
                of[seeds] = self.evicted(engine, count) or self.fresh(3)
                trace = self.out / f"{engine.name}-{name}.trace.json.gz"
                engine("timeline", of=of, trace=str(trace))

    def closed_loop(self, turns: int, new_tokens: int) -> None:
        """The headline: every prefill step carries a load. kvtide also in its mode `sync`, and
        with so few prefixes that none leaves the GPU: no way to load them can be faster. So does
        an engine without offloading, which tells what a connector and its saves take of that."""
        seeds = {engine.name: self.evicted(engine, 16) for engine in self.engines}
        for output in OUTPUTS:
            found: dict[tuple[Engine, str], list[dict[str, Any]]] = {}
            workload = CLOSED_LOOP | {"output": output, "new_tokens": new_tokens}
            for _ in range(turns):
                for engine in self.engines:
                    for mode in CLOSED_LOOP_MODES.get(engine.name, ("auto",)):
                        # So many prefixes that each has left the GPU when it comes again.
                        prefixes = seeds[engine.name]
                        if mode == "sync":
                            engine("load_mode", mode=mode)
                        elif mode == "hit":
                            prefixes = prefixes[: CLOSED_LOOP["users"]]
                            engine(
                                "closed_loop", prefixes=prefixes, requests=len(prefixes), **workload
                            )
                        result = engine("closed_loop", prefixes=prefixes, requests=32, **workload)
                        if mode == "sync":
                            engine("load_mode", mode="auto")
                        elif mode == "hit":
                            self.evict(engine)
                        found.setdefault((engine, mode), []).append(result)
            for (engine, mode), results in found.items():
                name = f"loop{output}{'' if mode == 'auto' else '_' + mode}"
                rates = sorted(result["requests_s"] for result in results)
                self.note(engine, f"{name}_requests_s", median(rates))
                self.note(engine, f"{name}_requests_s_all", [round(rate, 2) for rate in rates])
                for what, percent in CLOSED_LOOP_PERCENTILES:
                    values = [ms(percentile(r[what], percent)) for r in results if r[what]]
                    if not values:
                        continue
                    self.note(engine, f"{name}_{what}_p{percent}_ms", median(values))


def settings_of(name: str) -> dict[str, str]:
    """kvtide's settings of an engine by its name, as in `kvtide-fp8` or `kvtide,KEY=VALUE,…`."""
    if name in NAMED:
        return NAMED[name]
    return dict(pair.split("=", 1) for pair in name.split(",")[1:])


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is measured, on which machine: results are kept together only if all of it is equal."""
    try:
        commit = arguments.commit or provenance.commit()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"--commit: say which commit is measured, git does not know ({error})")
    return {key: getattr(arguments, key) for key in DESCRIBED} | {
        "commit": commit,
        "machine": provenance.gpu_machine(),
        "vllm": version("vllm"),
    }


def keep(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """Writes what was found, beside what these and other engines found there in an earlier run with
    the same model and pool: two large ones do not fit on the GPUs at once."""
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier.get("workload") == found["workload"]:
            found = earlier | {name: earlier.get(name, {}) | found[name] for name in found}
    path.write_text(json.dumps(found, indent=1))


def main() -> None:
    """See the module's documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument(
        "--engines",
        nargs="*",
        default=["none", "native", "kvtide"],
        help="none, native, pegaflow, kvtide, kvtide-fp8, or with settings: kvtide,KEY=VALUE,…",
    )
    parser.add_argument(
        "--workloads", nargs="*", default=["reload", "batch", "mixed", "closed_loop", "new_prompts"]
    )
    parser.add_argument("--host-gb", type=float, default=32, help="of each engine")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--pool-tokens",
        type=int,
        default=POOL_TOKENS,
        help="of the KV cache of each engine; the workload `lengths` needs 70000",
    )
    parser.add_argument("--shape", default="8b", help="of the model: 8b or 70b, dummy weights")
    parser.add_argument("--tp", type=int, default=1, help="GPUs of each engine")
    parser.add_argument(
        "--utilization", type=float, default=0.32, help="share of a GPU that each engine may take"
    )
    parser.add_argument(
        "--new-tokens",
        type=int,
        default=CLOSED_LOOP["new_tokens"],
        help="behind the reloaded ones, in the closed loop",
    )
    parser.add_argument("--timelines", nargs="*", default=["reload", "batch", "mixed", "new"])
    parser.add_argument(
        "--commit",
        help="the commit that is measured; the default is the one that git has checked out",
    )
    arguments = parser.parse_args()
    described = describe(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="kvtide-bench-")
    engines = []
    for name in arguments.engines:
        engines.append(
            Engine(
                name,
                arguments.out / f"{re.sub('[^a-z0-9]+', '-', name)}.log",
                connector=re.split("[-,]", name)[0],
                host_gb=arguments.host_gb,
                extra=settings_of(name),
                pool_tokens=arguments.pool_tokens,
                max_model_len=MODEL_TOKENS.get(arguments.pool_tokens, arguments.pool_tokens),
                folder=folder,
                shape=arguments.shape,
                tp=arguments.tp,
                utilization=arguments.utilization,
            )
        )
        if name == arguments.engines[0]:
            engines[0].booted()  # Compiles for all of them.
    for engine in engines[1:]:
        engine.booted()
    suite = Suite(engines, arguments.out, arguments.pool_tokens)
    began = time.perf_counter()
    suite.warm_up()
    for workload in arguments.workloads:
        try:
            run = getattr(suite, workload)
            wanted = inspect.signature(run).parameters
            run(**{name: getattr(arguments, name) for name in wanted})
        finally:
            keep(arguments.out / "gpu_found.json", suite.found | {"workload": described})
        print(f"-- {workload} done at {time.perf_counter() - began:.0f} s", flush=True)
    for engine in engines:
        engine.close()


if __name__ == "__main__":
    main()
