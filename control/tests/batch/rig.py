"""Processes under test: the batch server and its mock upstream, started and surely ended."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
from openai import OpenAI
from openai.types import Batch

T = TypeVar("T")

BINARIES = Path(os.environ["KVTIDE_CONTROL_BINARIES"])
CONTROL = BINARIES / "kvtide-control"
MOCK = BINARIES / "examples" / "mock_upstream"
PATIENCE_S = 60.0
"""For what happens within milliseconds, on a machine that may be busy."""
PR_SET_PDEATHSIG = 1
# Nobody balances load here, and tests should not wait for somebody to.
ENVIRONMENT = {"KVTIDE_LOG": "info", "KVTIDE_BATCH_UNREADY_S": "0"}
ENDED = ("completed", "failed", "expired", "cancelled")


def die_with_parent() -> None:
    """Runs in the child: a test run that is killed leaves no server behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(what: str, condition: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """Waits for `condition` to give something true, and gives it back."""
    deadline = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {patience_s} s in vain for: {what}"
        time.sleep(0.02)
    return found


def end(process: subprocess.Popen) -> None:
    """Ends a process whatever it is doing, also when it is stopped."""
    if process.poll() is None:
        process.kill()
    process.wait()


@dataclass
class Mock:
    """A running mock upstream."""

    url: str
    process: subprocess.Popen

    def seen(self) -> dict[str, Any]:
        """What was received so far."""
        return httpx.get(f"{self.url}/seen", timeout=30).json()

    def contents(self) -> list[str]:
        """The prompts received, in order."""
        return [request["content"] for request in self.seen()["requests"]]


@contextlib.contextmanager
def mock_upstream(*options: str, listen: str = "127.0.0.1:0") -> Iterator[Mock]:
    """A mock upstream, ended at the end."""
    process = subprocess.Popen(
        [MOCK, "--listen", listen, *options],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        yield Mock(f"http://{address}", process)
    finally:
        end(process)


@dataclass
class Server:
    """A batch server: where it is, how it is started, and its process while it runs."""

    data: Path
    options: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    listen: str = "127.0.0.1"
    process: subprocess.Popen | None = None
    preexec: Callable[[], None] | None = None

    @property
    def url(self) -> str:
        """Without /v1."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """What the server says."""
        return self.data.with_suffix(".log")

    def start(self, wait: bool = True) -> Server:
        """Starts the server and waits until it can work."""

        def prepare() -> None:
            die_with_parent()
            if self.preexec:
                self.preexec()

        command: list[str | Path] = [CONTROL, "batch", "--listen", f"{self.listen}:{self.port}"]
        command += ["--data", self.data, *self.options]
        if "--backoff-ms" not in self.options:
            command += ["--backoff-ms", "20"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stderr=log,
                stdout=log,
                env={**os.environ, **ENVIRONMENT, **self.environment},
                preexec_fn=prepare,
            )
        if wait:
            wait_until("the server to be ready", self.is_ready)
        return self

    def is_ready(self) -> bool:
        """Whether it answers; raises with its log if it has ended."""
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """`kill -9`."""
        assert self.process is not None
        end(self.process)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(PATIENCE_S)

    def client(self, key: str = "none", **options: Any) -> OpenAI:
        """OpenAI's client, as its users make it."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, **options)

    def metric(self, name: str, get: Callable[..., httpx.Response] = httpx.get) -> float:
        """The value of a metric, summed over its labels."""
        page = get(f"{self.url}/metrics", timeout=30).text
        rows = [line for line in page.splitlines() if line.split("{")[0].split(" ")[0] == name]
        return sum(float(row.rsplit(" ", 1)[1]) for row in rows)


def end_window(data: Path, batch: str, at: int) -> None:
    """Moves the end of a batch's window, an hour at the least, in the database of a dead server."""
    with contextlib.closing(sqlite3.connect(data / "batch.sqlite")) as db, db:
        (text,) = db.execute("SELECT doc FROM batches WHERE id = ?", (batch,)).fetchone()
        document = {**json.loads(text), "expires_at": at}
        db.execute(
            "UPDATE batches SET doc = ?, due_at = ? WHERE id = ?", (json.dumps(document), at, batch)
        )


@contextlib.contextmanager
def server(data: Path, upstream: str, *options: str, **more: Any) -> Iterator[Server]:
    """A running batch server, ended at the end."""
    running = Server(data, ["--upstream", upstream, *options], **more)
    try:
        yield running.start()
    finally:
        if running.process:
            end(running.process)


def line(
    custom_id: str, content: str = "hi", url: str = "/v1/chat/completions", model: str = "mock"
) -> dict[str, Any]:
    """One request."""
    if url == "/v1/chat/completions":
        body: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
    elif url == "/v1/completions":
        body = {"prompt": content}
    else:
        body = {"input": content}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": model, **body}}


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    """An input file."""
    return b"".join(json.dumps(item).encode() + b"\n" for item in lines)


def upload(client: OpenAI, content: bytes) -> str:
    """The id of the new input file."""
    return client.files.create(file=("in.jsonl", content), purpose="batch").id


def submit(client: OpenAI, lines: list[dict[str, Any]] | bytes, **options: Any) -> Batch:
    """A new batch of these lines."""
    content = lines if isinstance(lines, bytes) else jsonl(lines)
    endpoint = options.pop("endpoint", "/v1/chat/completions")
    return client.batches.create(
        input_file_id=upload(client, content),
        endpoint=endpoint,
        completion_window=options.pop("window", "24h"),
        **options,
    )


def ended(client: OpenAI, batch: Batch, patience_s: float = PATIENCE_S) -> Batch:
    """The batch, once it has ended."""

    def look() -> Batch | None:
        now = client.batches.retrieve(batch.id)
        return now if now.status in ENDED else None

    return wait_until(f"the end of {batch.id}", look, patience_s)


def results(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of an output or error file."""
    if file_id is None:
        return []
    return [json.loads(text) for text in client.files.content(file_id).text.splitlines()]


def all_ids(client: OpenAI, batch: Batch) -> list[str]:
    """Every custom_id of output and error file, sorted."""
    both = results(client, batch.output_file_id) + results(client, batch.error_file_id)
    return sorted(item["custom_id"] for item in both)
