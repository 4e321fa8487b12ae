"""Throughput without hits: one engine, its connector taken out and put back between rounds.

A turn is three short rounds in an order drawn anew: with kvtide, without, and once more without.
Rounds of one turn share the process, so the memory that it happened to get, and are seconds apart,
so a machine whose speed wanders slows all three alike; only ratios inside a turn are used. The
third round is the control: its ratio to the second shows what the method makes of no difference.
(Engines side by side in processes of their own differed by a seventh without any difference.)
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
ROUNDS = {"vllm": "off", "control": "off", "kvtide": "on"}
RESAMPLES = 2_000


@dataclass(frozen=True)
class Ratio:
    """Throughput relative to rounds without kvtide."""

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

    def __init__(self, what: str, model: str, **variables: str) -> None:
        command = [sys.executable, "-m", "bench.engine_cost.engine", what, model]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ
            | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
            | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.first = self._answer()

    def round(self, seed: int, state: str) -> float:
        """Seconds for one round, with kvtide `on` or `off`."""
        assert self._process.stdin is not None
        print(seed, state, file=self._process.stdin, flush=True)
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
    """Seconds of every round."""


def measure(model: str, boots: int, turns: int) -> Throughput:
    """Boots an engine `boots` times, for `turns` turns each."""
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
    """Seconds of every round of one boot."""
    engine = Engine("rounds", model)
    seconds: dict[str, list[float]] = {name: [] for name in ROUNDS}
    seed = 0
    try:
        for turn in range(WARM_UP_TURNS + turns):
            for name in rng.sample(sorted(ROUNDS), k=len(ROUNDS)):
                seed += 1
                spent = engine.round(seed, ROUNDS[name])
                if turn >= WARM_UP_TURNS:
                    seconds[name].append(spent)
    finally:
        engine.close()
    return seconds
