"""Throughput without hits: an engine with kvtide, one without, and a second one without.

All three are alive at once and compute the same short round in turn, in an order drawn anew each
time. Rounds of one turn are seconds apart, so a machine whose speed wanders by more than what is
measured slows all three alike, and only ratios inside a turn are used. A process keeps the memory
it happened to get, so the three are booted anew several times. The second engine without kvtide is
the control: its ratio to the first shows what the method itself makes of no difference.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.engine_cost.engine import OUTPUT_TOKENS, PROMPT_TOKENS, PROMPTS
from bench.provenance import ROOT

WARM_UP_TURNS = 4
ENGINES = {"vllm": "vllm", "control": "vllm", "kvtide": "kvtide"}
RESAMPLES = 2_000


@dataclass(frozen=True)
class Ratio:
    """Throughput of an engine relative to vLLM without kvtide."""

    median: float
    low: float
    """Lower end of the median's 95 % interval, by bootstrap over boots and, in each, over turns."""
    high: float

    @classmethod
    def of(cls, boots: list[list[float]]) -> Ratio:
        """The median over all turns of all boots, and its interval."""
        rng = random.Random(0)

        def resampled() -> float:
            drawn = rng.choices(boots, k=len(boots))
            return median(ratio for boot in drawn for ratio in rng.choices(boot, k=len(boot)))

        medians = sorted(resampled() for _ in range(RESAMPLES))
        low, high = medians[int(RESAMPLES * 0.025)], medians[int(RESAMPLES * 0.975)]
        return cls(median(ratio for boot in boots for ratio in boot), low, high)


class Engine:
    """One engine in a process of its own."""

    def __init__(self, what: str, which: str, model: str) -> None:
        command = [sys.executable, "-m", "bench.engine_cost.engine", what, which, model]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ
            | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.first = self._answer()

    def round(self, seed: int) -> float:
        """Seconds for one round."""
        assert self._process.stdin is not None
        print(seed, file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        """Ends the engine."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        sys.exit(f"an engine ended early, with status {self._process.wait()}; its log is above")


@dataclass(frozen=True)
class Throughput:
    """The result."""

    kvtide: Ratio
    control: Ratio
    tokens_per_s: float
    """Of vLLM without kvtide."""
    boots: list[dict[str, list[float]]]
    """Seconds of every round, by engine."""


def measure(model: str, boots: int, turns: int) -> Throughput:
    """Boots the engines `boots` times, for `turns` turns each."""
    rng = random.Random(0)
    seconds = []
    for boot in range(boots):
        print(f"throughput: boot {boot + 1} of {boots}", file=sys.stderr)
        seconds.append(one_boot(model, turns, rng))
    tokens = PROMPTS * (PROMPT_TOKENS + OUTPUT_TOKENS)

    def ratio(name: str) -> Ratio:
        return Ratio.of(
            [[a / b for a, b in zip(boot["vllm"], boot[name], strict=True)] for boot in seconds]
        )

    return Throughput(
        ratio("kvtide"),
        ratio("control"),
        tokens / median(spent for boot in seconds for spent in boot["vllm"]),
        seconds,
    )


def one_boot(model: str, turns: int, rng: random.Random) -> dict[str, list[float]]:
    """Seconds of every round of one boot, by engine."""
    engines = {name: Engine("rounds", which, model) for name, which in ENGINES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    try:
        for turn in range(WARM_UP_TURNS + turns):
            for name in rng.sample(sorted(engines), k=len(engines)):
                spent = engines[name].round(turn + 1)
                if turn >= WARM_UP_TURNS:
                    seconds[name].append(spent)
    finally:
        for engine in engines.values():
            engine.close()
    return seconds
