"""The streaming client, against a small server that answers as vLLM does."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bench.demo import client
from bench.demo.workload import conversations

PIECES = ["", "Good", " day", "."]
PAUSE_S = 0.03


class Handler(BaseHTTPRequestHandler):
    """Streams PIECES, the first of them empty, with a pause before each."""

    seen: list[dict]
    broken = False

    def log_message(self, *_args: object) -> None:
        """Keeps the test's output clean."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        self.send_response(503 if self.broken else 200)
        self.end_headers()
        if self.broken:
            self.wfile.write(b"out of order")
            return
        for number, piece in enumerate(PIECES):
            time.sleep(PAUSE_S)
            choice = {"delta": {"content": piece}, "token_ids": [number] if number else None}
            self.event({"choices": [choice]})
        self.event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content: dict) -> None:
        """One server-sent event."""
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())
        self.wfile.flush()


class Server(ThreadingHTTPServer):
    """Says nothing when a client hangs up, as one does once another request was refused."""

    def handle_error(self, *_args: object) -> None:
        """Keeps the test's output clean."""


@pytest.fixture
def handler() -> Iterator[tuple[str, type[Handler]]]:
    """A running server's address and the handler class it uses."""
    own = type("OwnHandler", (Handler,), {"seen": []})
    server = Server(("127.0.0.1", 0), own)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", own
    server.shutdown()
    thread.join()
    server.server_close()


def play(address: str, count: int, turns: int, concurrency: int) -> list[client.Answer]:
    cast = conversations(count, turns, 1, 1)
    return asyncio.run(
        client.play(
            address, "m", cast, concurrency=concurrency, max_tokens=8, on_answer=lambda _: None
        )
    )


def test_times_start_at_the_first_text_not_at_the_empty_delta(
    handler: tuple[str, type[Handler]],
) -> None:
    (answer,) = play(handler[0], 1, 1, 1)
    assert answer.output == ("Good day.", (1, 2, 3), 9, 3)
    assert answer.ttft_s >= 2 * PAUSE_S
    assert answer.tpot_s is not None
    assert answer.tpot_s >= 0.8 * PAUSE_S


@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_every_turn_carries_the_history_before_it(
    handler: tuple[str, type[Handler]], concurrency: int
) -> None:
    answers = play(handler[0], 3, 3, concurrency)
    assert [(one.turn, one.conversation) for one in answers] == [
        (turn, conversation) for turn in range(3) for conversation in range(3)
    ]
    roles = sorted([message["role"] for message in body["messages"]] for body in handler[1].seen)
    one_turn = ["system", "user"]
    expected = [one_turn + ["assistant", "user"] * turn for turn in range(3) for _ in range(3)]
    assert roles == sorted(expected)


def test_requests_are_greedy_and_ask_for_token_ids(handler: tuple[str, type[Handler]]) -> None:
    play(handler[0], 1, 1, 1)
    (body,) = handler[1].seen
    assert body["temperature"] == 0
    assert body["return_token_ids"] is True
    assert body["max_tokens"] == 8


def test_a_refusal_is_told_in_the_servers_words(handler: tuple[str, type[Handler]]) -> None:
    handler[1].broken = True
    with pytest.raises(client.ClientError, match="503: out of order"):
        play(handler[0], 2, 1, 2)


def test_an_error_inside_a_stream_is_raised() -> None:
    with pytest.raises(client.ClientError, match="engine died"):
        client.parse_event('data: {"error": {"message": "engine died"}}')


@pytest.mark.parametrize("line", ["", ": comment", "data: [DONE]"])
def test_lines_without_an_event_are_passed_over(line: str) -> None:
    assert client.parse_event(line) is None
