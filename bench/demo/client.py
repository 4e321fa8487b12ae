"""Sends the workload to an OpenAI-compatible server and times every streamed answer.

Times are in seconds, from `time.perf_counter`. TTFT runs from just before the request is sent to
the first delta with text in it; TPOT is the mean gap between tokens after that one.
"""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from bench.demo.workload import Conversation, Step, schedule

REQUEST_TIMEOUT_S = 180.0


class ClientError(Exception):
    """The server refused a request or broke off an answer."""


@dataclass(frozen=True)
class Answer:
    """One finished request: what came back, and when."""

    conversation: int
    turn: int
    text: str
    # Empty where the server does not offer `return_token_ids`.
    token_ids: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    # None for a single-token answer, which has no gap to measure.
    tpot_s: float | None

    @property
    def output(self) -> tuple[str, tuple[int, ...], int, int]:
        """All that must not depend on where the KV cache came from."""
        return self.text, self.token_ids, self.prompt_tokens, self.output_tokens


def parse_event(line: str) -> dict | None:
    """The JSON of one server-sent event line; None for blanks and the end marker."""
    if not line.startswith("data:"):
        return None
    payload = line.removeprefix("data:").strip()
    if payload == "[DONE]":
        return None
    event = json.loads(payload)
    if "error" in event:
        raise ClientError(f"the server broke off an answer: {event['error']}")
    return event


async def ask(
    http: httpx.AsyncClient, model: str, messages: list[dict[str, str]], step: Step, max_tokens: int
) -> Answer:
    """Streams one greedy chat completion."""
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    pieces: list[str] = []
    token_ids: list[int] = []
    usage: dict[str, int] = {}
    first = last = None
    sent = time.perf_counter()
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            reason = (await response.aread()).decode(errors="replace")[:500]
            raise ClientError(f"the server answered {response.status_code}: {reason}")
        async for line in response.aiter_lines():
            if (event := parse_event(line)) is None:
                continue
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                token_ids += choice.get("token_ids") or ()
                if text := choice["delta"].get("content"):
                    last = time.perf_counter()
                    first = first or last
                    pieces.append(text)
    if first is None or last is None or "completion_tokens" not in usage:
        raise ClientError(f"no text came back for turn {step.turn + 1} of #{step.conversation + 1}")
    tokens = usage["completion_tokens"]
    return Answer(
        conversation=step.conversation,
        turn=step.turn,
        text="".join(pieces),
        token_ids=tuple(token_ids),
        prompt_tokens=usage["prompt_tokens"],
        output_tokens=tokens,
        ttft_s=first - sent,
        tpot_s=(last - first) / (tokens - 1) if tokens > 1 else None,
    )


async def warm_up(base_url: str, model: str) -> None:
    """One short unrelated request, so that no run pays for the server's first-call work."""
    async with httpx.AsyncClient(base_url=base_url, timeout=REQUEST_TIMEOUT_S) as http:
        messages = [{"role": "user", "content": "Count from one to twenty, please."}]
        await ask(http, model, messages, Step(0, 0), max_tokens=16)


async def play(
    base_url: str,
    model: str,
    cast: Sequence[Conversation],
    *,
    concurrency: int,
    max_tokens: int,
    on_answer: Callable[[Answer], None],
) -> list[Answer]:
    """Plays every conversation to its end, `concurrency` requests at a time.

    Requests start in the order of `schedule`; one waits only for a free slot and for the answer to
    its own conversation's turn before. Answers are returned in that order too.
    """
    turns = len(cast[0].user_turns)
    histories = [[{"role": "system", "content": one.system}] for one in cast]
    steps = list(schedule(len(cast), turns))
    answered = {step: asyncio.Event() for step in steps}
    answers: dict[Step, Answer] = {}
    waiting = iter(steps)

    async def worker(http: httpx.AsyncClient) -> None:
        for step in waiting:
            if step.turn:
                await answered[Step(step.conversation, step.turn - 1)].wait()
            history = histories[step.conversation]
            question = cast[step.conversation].user_turns[step.turn]
            history.append({"role": "user", "content": question})
            answer = await ask(http, model, history, step, max_tokens)
            history.append({"role": "assistant", "content": answer.text})
            answers[step] = answer
            answered[step].set()
            on_answer(answer)

    async with httpx.AsyncClient(base_url=base_url, timeout=REQUEST_TIMEOUT_S) as http:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(worker(http))
        except ExceptionGroup as failures:
            # The first says what went wrong; the others failed because of it.
            raise failures.exceptions[0] from None
    return [answers[step] for step in steps]
