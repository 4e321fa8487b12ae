"""Prompts, and what the model answers to them without any connector or cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import random
from pathlib import Path

from engines.client import EngineProcess, Nursery
from engines.compare import Output
from engines.config import EngineConfig

Prompt = dict[str, object]
ANSWER_TOKENS = 48
"""Tokens of every reference answer; a test may ask for fewer."""

REFERENCE_ENGINE = EngineConfig(
    connector=False,
    prefix_caching=False,
    async_scheduling=False,
    blocks=64,
    max_requests=1,
    max_tokens_a_step=384,
)
"""One request at a time, nothing cached, nothing chunked, nothing preempted."""


def tokens(name: str, length: int) -> list[int]:
    """Random tokens, the same in every run."""
    rng = random.Random(name)
    return [rng.randrange(5, 4000) for _ in range(length)]


def prompt(name: str, length: int) -> Prompt:
    """A prompt of random tokens."""
    return {"prompt_token_ids": tokens(name, length)}


def salted(text: Prompt, salt: str) -> Prompt:
    """The same prompt under a cache salt."""
    return {**text, "cache_salt": salt}


def token_ids(text: Prompt) -> list[int]:
    """The tokens of a prompt."""
    ids = text["prompt_token_ids"]
    assert isinstance(ids, list)
    return ids


MIXED = [prompt(f"mixed-{length}", length) for length in (20, 64, 65, 150)]
"""Under a block, whole blocks, a token more, and more than a step's budget."""
LONG = prompt("long", 330)
"""Ten blocks and a bit; prefilled in three chunks."""
OTHER = prompt("other", 70)
CROWD = [prompt(f"crowd-{number}", 92) for number in range(6)]
"""Together they need more blocks than there are once each has generated 5 tokens."""
PRESSED = [*CROWD[:4], LONG]
"""The first four and the last prompt just fit in, but they grow amid its prefill: then it is
preempted, even if it is to generate one token."""
PREFIX = prompt("family", 70)
FAMILY = {"prompt_token_ids": token_ids(PREFIX)[:64] + tokens("family-tail", 110)}
"""Shares two blocks with PREFIX."""
FIRST_TURN = prompt("turn", 60)
STREAM = [prompt(f"stream-{number}", 100) for number in range(10)]
"""More blocks than a small pool has rows."""

ALL = [*MIXED, LONG, OTHER, *CROWD, PREFIX, FAMILY, FIRST_TURN, *STREAM]


def second_turn(first_answer: Output) -> Prompt:
    """The conversation goes on: question, answer, next question."""
    said = token_ids(FIRST_TURN) + first_answer["tokens"] + tokens("turn-2", 30)
    return {"prompt_token_ids": said}


def pressed_lengths(max_tokens: int) -> list[int]:
    """Tokens to generate for each of PRESSED: at least 8, so that they grow, and for the last one
    `max_tokens`."""
    return [max(max_tokens, 8)] * 4 + [max_tokens]


class Reference:
    """Answers by prompt, computed once for each vLLM version and model and then kept on disk."""

    def __init__(self, model: Path, nursery: Nursery) -> None:
        self._nursery = nursery
        recipe = json.dumps([str(model.name), ALL, ANSWER_TOKENS, vllm_version()])
        digest = hashlib.sha256(recipe.encode()).hexdigest()[:16]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvtide"
        folder = Path(os.environ.get("KVTIDE_CACHE", folder)) / "test-references"
        self._file = folder / f"{digest}.json"
        self._model = model
        self._answers: dict[str, Output] = {}

    def load(self) -> None:
        """Reads the answers, or computes them."""
        if self._file.exists():
            self._answers = json.loads(self._file.read_text())
            return
        engine = EngineProcess(REFERENCE_ENGINE, self._model, self._nursery)
        try:
            answers = engine.generate(ALL, ANSWER_TOKENS)
            first = answers[ALL.index(FIRST_TURN)]
            answers += engine.generate([second_turn(first)], ANSWER_TOKENS)
        finally:
            engine.close()
        prompts = [*ALL, second_turn(first)]
        self._answers = {key(p): a for p, a in zip(prompts, answers, strict=True)}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(self._answers))
        scratch.rename(self._file)

    def __call__(self, prompts: list[Prompt]) -> list[Output]:
        """The right answers."""
        return [self._answers[key(text)] for text in prompts]


def key(text: Prompt) -> str:
    """Identifies a prompt by its tokens; a salt does not change the answer."""
    return hashlib.sha256(json.dumps(text["prompt_token_ids"]).encode()).hexdigest()


def vllm_version() -> str:
    """The version under test."""
    return importlib.metadata.version("vllm")
