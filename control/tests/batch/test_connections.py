"""Callers who are slow, silent or many: what they get, and what is left for the others."""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from rig import Mock, Server, jsonl, line, server, upload, wait_until

MANY = 1030
"""More connections than a server takes at once."""
MIB = 1 << 20


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """As many as there may be: this process has the other end of every connection."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    of = lambda name: {"tenant": name, "sha256": hashlib.sha256(name.encode()).hexdigest()}  # noqa: E731
    path.write_text(json.dumps({"keys": [of("ann"), of("bob")]}))
    return path


class Crowd:
    """Connections of which each has sent something and is left alone."""

    def __init__(self, running: Server) -> None:
        self.address = ("127.0.0.1", running.port)
        self.sockets = contextlib.ExitStack()

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        self.sockets.close()

    def add(self, count: int, request: bytes) -> None:
        for _ in range(count):
            one = self.sockets.enter_context(socket.socket())
            # Whoever does not read lets little pile up on his side.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.settimeout(30)
            one.connect(self.address)
            # A server that has refused already may have closed.
            with contextlib.suppress(ConnectionError):
                one.sendall(request)


def memory_bytes(running: Server) -> int:
    """What the server has in memory."""
    assert running.process is not None
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    (row,) = (row for row in status.splitlines() if row.startswith("VmRSS"))
    return int(row.split()[1]) * 1024


def everything_else_works(running: Server) -> None:
    # The crowd's address may have taken its share of the places for probes.
    elsewhere = httpx.HTTPTransport(local_address="127.0.0.2")
    with httpx.Client(transport=elsewhere, timeout=30) as probing:
        for path in ("/healthz", "/readyz", "/status", "/metrics"):
            assert probing.get(running.url + path).status_code == 200, path
    bob = running.client("bob", max_retries=0, timeout=30)
    assert bob.batches.list().data == []
    upload(bob, b"x" * MIB)


def is_refused_for_now(answer: httpx.Response, status: int) -> None:
    assert answer.status_code == status, answer.text
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("who", ["ann", "nobody"])
def test_bodies_that_do_not_arrive_shut_nobody_out(
    keys: Path, data: Path, upstream: Mock, who: str
) -> None:
    with (
        server(data, upstream.url, "--keys", str(keys)) as running,
        Crowd(running) as crowd,
    ):
        head = f"POST /v1/batches HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {who}\r\n"
        crowd.add(MANY, f"{head}content-length: 100\r\n\r\n{{".encode())
        everything_else_works(running)
        if who == "ann":
            key = {"authorization": "Bearer ann"}
            answer = httpx.get(f"{running.url}/v1/batches", headers=key, timeout=60)
            is_refused_for_now(answer, 429)


def test_connections_that_say_nothing_shut_nobody_out(
    keys: Path, data: Path, upstream: Mock
) -> None:
    with server(data, upstream.url, "--keys", str(keys)) as running, Crowd(running) as crowd:
        crowd.add(MANY, b"GET /healthz HTTP/1.1\r\nx: ")
        everything_else_works(running)
        crowd.add(MANY, b"")
        everything_else_works(running)


def test_metrics_that_nobody_reads_shut_nobody_out(keys: Path, data: Path, upstream: Mock) -> None:
    with server(data, upstream.url, "--keys", str(keys)) as running, Crowd(running) as crowd:
        crowd.add(MANY, b"GET /metrics HTTP/1.1\r\nhost: h\r\n\r\n" * 50)
        # Those who ask for metrics are not waited for.
        assert httpx.get(f"{running.url}/healthz", timeout=3).status_code == 200
        everything_else_works(running)


def test_downloads_that_nobody_reads_shut_nobody_out_and_take_the_memory_allowed(
    keys: Path, data: Path, upstream: Mock
) -> None:
    options = ["--keys", str(keys), "--memory-mib", "64"]
    with server(data, upstream.url, *options) as running, Crowd(running) as crowd:
        ann = running.client("ann", max_retries=0)
        file = upload(ann, b"x" * (20 * MIB))
        everything_else_works(running)
        before = memory_bytes(running)
        head = f"GET /v1/files/{file}/content HTTP/1.1\r\nhost: h\r\nauthorization: Bearer ann\r\n"
        crowd.add(MANY, f"{head}\r\n".encode())
        everything_else_works(running)
        answer = httpx.get(
            f"{running.url}/v1/files/{file}", headers={"authorization": "Bearer ann"}, timeout=60
        )
        assert answer.status_code in (200, 429)
        assert memory_bytes(running) - before < 64 * MIB


def test_lists_that_nobody_reads_take_the_memory_allowed(
    keys: Path, data: Path, upstream: Mock
) -> None:
    options = ["--keys", str(keys), "--memory-mib", "64"]
    with server(data, upstream.url, *options) as running, Crowd(running) as crowd:
        ann = running.client("ann", max_retries=0)
        for _ in range(200):
            ann.files.create(file=("n" * 500, b"x"), purpose="user_data")
        before = memory_bytes(running)
        head = "GET /v1/files HTTP/1.1\r\nhost: h\r\nauthorization: Bearer ann\r\n\r\n"
        crowd.add(MANY, head.encode() * 20)
        everything_else_works(running)
        assert memory_bytes(running) - before < 64 * MIB


@pytest.mark.parametrize("store", ["data", "blobs"])
def test_uploads_that_stop_half_way_take_the_memory_allowed(
    keys: Path, data: Path, upstream: Mock, tmp_path: Path, store: str
) -> None:
    options = ["--keys", str(keys), "--memory-mib", "64"]
    if store == "blobs":
        (tmp_path / "shared").mkdir()
        options += ["--blobs", (tmp_path / "shared").as_uri()]
    with server(data, upstream.url, *options) as running, Crowd(running) as crowd:
        everything_else_works(running)
        before = memory_bytes(running)
        form = (
            b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n--b\r\n'
            b'content-disposition: form-data; name="file"; filename="f"\r\n\r\n'
        ) + b"x" * (7 * MIB)
        head = (
            "POST /v1/files HTTP/1.1\r\nhost: h\r\nauthorization: Bearer ann\r\n"
            "content-type: multipart/form-data; boundary=b\r\ncontent-length: 100000000\r\n\r\n"
        )
        crowd.add(40, head.encode() + form)
        everything_else_works(running)
        assert memory_bytes(running) - before < 64 * MIB


def test_where_memory_is_taken_the_next_is_asked_to_come_again(data: Path, upstream: Mock) -> None:
    with (
        server(data, upstream.url, "--memory-mib", "32") as running,
        Crowd(running) as crowd,
    ):
        file = upload(running.client(), b"x" * (20 * MIB))
        head = f"GET /v1/files/{file}/content HTTP/1.1\r\nhost: localhost\r\n\r\n"
        crowd.add(200, head.encode())
        answer = httpx.get(f"{running.url}/v1/files/{file}/content", timeout=60)
        is_refused_for_now(answer, 429)
        # Those that waited for memory in vain are gone, and have left their places.
        small = lambda: httpx.get(f"{running.url}/v1/files/{file}", timeout=60).status_code  # noqa: E731
        wait_until("a place for what takes no memory", lambda: small() == 200)
    # Whose clients go gets it all back.
    with server(data, upstream.url, "--memory-mib", "32") as running:
        with Crowd(running) as crowd:
            crowd.add(64, head.encode())
        content = running.client().files.content(file)
        assert len(content.read()) == 20 * MIB


def test_a_server_that_is_told_to_stop_says_so_before_it_takes_no_more_connections(
    data: Path, upstream: Mock
) -> None:
    with server(data, upstream.url, "--unready-s", "600") as running:
        assert running.process is not None
        before = httpx.get(f"{running.url}/v1/batches", timeout=30)
        assert before.headers.get("connection") != "close"
        running.process.send_signal(signal.SIGTERM)
        ready = lambda: httpx.get(f"{running.url}/readyz", timeout=30).status_code  # noqa: E731
        wait_until("it to say so", lambda: ready() == 503)
        assert httpx.get(f"{running.url}/healthz", timeout=30).status_code == 200
        answer = httpx.get(f"{running.url}/v1/batches", timeout=30)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        upload(running.client(), b"x")
        # Who does not want to wait says so again.
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(60) == 0


def test_a_second_create_that_was_never_read_is_no_repetition_of_the_first(
    keys: Path, data: Path, upstream: Mock
) -> None:
    """The client sends it again by itself once there is room: a batch of its own."""
    with server(data, upstream.url, "--keys", str(keys)) as running:
        client = running.client("ann")
        order = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        file = upload(client, jsonl([line("a", "[slow 60000]")]))
        first = client.batches.create(input_file_id=file, **order)  # type: ignore[call-overload]
        head = "POST /v1/batches HTTP/1.1\r\nhost: h\r\nauthorization: Bearer ann\r\n"
        with Crowd(running) as crowd:
            crowd.add(MANY, f"{head}content-length: 100\r\n\r\n{{".encode())
            with pytest.raises(openai.RateLimitError):
                client.batches.create(input_file_id=file, **order)  # type: ignore[call-overload]
        again = client.with_options(max_retries=20)
        repeated = {"x-stainless-retry-count": "1"}
        second = again.batches.create(  # type: ignore[call-overload]
            input_file_id=file, extra_headers=repeated, **order
        )
        assert second.id != first.id
