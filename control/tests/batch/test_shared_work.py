"""Two servers on one PostgreSQL, with moto's server in the place of S3."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from objects import BUCKET, bucket, object_store
from openai import OpenAI
from postgres import postgres, psql
from rig import (
    Mock,
    Server,
    all_ids,
    end,
    ended,
    line,
    mock_upstream,
    results,
    submit,
    upload,
    wait_until,
)

KILLS = int(os.environ.get("KVTIDE_BATCH_KILLS", "20")) // 4


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with object_store(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@dataclass
class Pair:
    """Two servers that share everything."""

    first: Server
    second: Server
    mock: Mock
    prefix: str
    """Of its objects in the bucket, which other tests use too."""


@pytest.fixture
def pair(tmp_path: Path, database: str, s3: dict[str, str]) -> Iterator[Pair]:
    with mock_upstream("--service-ms", "20") as mock:
        options = ["--upstream", mock.url, "--database", database]
        prefix = tmp_path.name
        options += ["--blobs", f"s3://{BUCKET}/{prefix}", "--lease-ms", "1500"]
        options += ["--requests-per-model", "8", "--cancel-grace-s", "1"]
        servers = [Server(tmp_path / name, options, s3) for name in ("first", "second")]
        try:
            yield Pair(servers[0].start(), servers[1].start(), mock, prefix)
        finally:
            for server in servers:
                if server.process:
                    end(server.process)


def check(client: OpenAI, batch_id: str, ids: list[str]) -> None:
    batch = ended(client, client.batches.retrieve(batch_id), patience_s=180)
    assert batch.status == "completed"
    found = all_ids(client, batch)
    assert len(found) == len(set(found)), "a result was written twice"
    assert found == sorted(ids), "a result was lost"


def test_what_one_server_is_told_the_other_knows(pair: Pair) -> None:
    one, other = pair.first.client(), pair.second.client()
    batch = submit(one, [line("a"), line("b", "[status 400 -1]")])
    batch = ended(other, batch)
    assert batch.status == "completed"
    (result,) = results(other, batch.output_file_id)
    assert result["custom_id"] == "a"
    assert [b.id for b in other.batches.list(limit=1)][:1] == [batch.id]
    files = [file.id for file in one.files.list(limit=2)]
    assert batch.output_file_id in files
    assert one.files.delete(batch.input_file_id).deleted
    with pytest.raises(Exception, match="No such File"):
        other.files.retrieve(batch.input_file_id)


def test_a_list_is_one_statement_whenever_it_is_asked_for(pair: Pair, database: str) -> None:
    """Each statement stays prepared on its connection: one a second would be too many."""
    asked = (
        "SELECT DISTINCT query FROM pg_stat_activity"
        " WHERE query LIKE 'SELECT doc FROM kvtide_files WHERE tenant = %';"
    )

    def ask() -> str:
        assert httpx.get(f"{pair.first.url}/v1/files", timeout=30).status_code == 200
        return psql(database, asked)

    texts = set()
    for _ in range(3):
        second = int(time.time())
        texts.add(wait_until("the statement among what the connections did last", ask))
        wait_until("the next second", lambda second=second: int(time.time()) > second)
    assert len(texts) == 1, texts


def test_a_retried_create_is_one_batch_whichever_servers_it_reaches(pair: Pair) -> None:
    one, other = pair.first.client(), pair.second.client()
    batch = submit(one, [line("a")])
    order = {
        "input_file_id": batch.input_file_id,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    again = other.batches.create(**order, extra_headers={"x-stainless-retry-count": "1"})
    assert again.id == batch.id


def test_work_is_shared_out(pair: Pair) -> None:
    client = pair.first.client()
    ids = [str(n) for n in range(60)]
    batches = [submit(client, [line(name) for name in ids]) for _ in range(10)]
    for batch in batches:
        check(client, batch.id, ids)
    for server in (pair.first, pair.second):
        assert server.metric("kvtide_batch_results_total") > 0


def test_a_cancellation_reaches_the_server_that_has_the_batch(pair: Pair) -> None:
    ids = [str(n) for n in range(20)]
    lines = [line(name, "[slow 60000]") for name in ids]
    for server, other in ((pair.first, pair.second), (pair.second, pair.first)):
        client = server.client()
        # Whom it is submitted to hears of it first, and takes it; the other is told to cancel it.
        batch = submit(client, lines)
        wait_until("a start", lambda: client.batches.retrieve(batch.id).status == "in_progress")  # noqa: B023
        assert other.client().batches.cancel(batch.id).status == "cancelling"
        batch = ended(client, batch)
        assert batch.status == "cancelled"
        assert all_ids(client, batch) == sorted(ids)


def test_no_result_is_lost_or_written_twice_when_either_server_is_killed(pair: Pair) -> None:
    chance = random.Random(23)
    client = pair.first.client()
    ids = [f"request-{n}" for n in range(400)]
    batch = submit(client, [line(name) for name in ids])
    for _ in range(max(KILLS, 3)):
        victim = chance.choice([pair.first, pair.second])
        time.sleep(chance.uniform(0.1, 1.2))
        victim.kill()
        victim.start()
    check(client, batch.id, ids)


def test_a_server_that_sleeps_past_its_lease_writes_nothing_when_it_wakes(
    pair: Pair, s3: dict[str, str]
) -> None:
    """The other server takes over; what the sleeper had in hand is not written."""
    client = pair.second.client()
    ids = [f"request-{n}" for n in range(1500)]
    name = "kvtide_batch_results_total"
    # Whom it is submitted to hears of it first, and takes it.
    batch = submit(pair.first.client(), [line(custom_id) for custom_id in ids])
    wait_until("some results", lambda: pair.first.metric(name))
    assert pair.first.process is not None
    pair.first.process.send_signal(signal.SIGSTOP)
    check(client, batch.id, ids)
    objects = {item.key for item in bucket(s3).objects.all() if "/parts/" not in item.key}  # type: ignore[attr-defined]
    pair.first.process.send_signal(signal.SIGCONT)
    awake = wait_until("the sleeper to wake", lambda: pair.first.metric(name))
    wait_until("it to notice", lambda: "taken the batch over" in pair.first.log.read_text())
    time.sleep(1)
    assert pair.first.metric(name) == awake, "it has recorded results of a batch that it lost"
    after = {item.key for item in bucket(s3).objects.all() if "/parts/" not in item.key}  # type: ignore[attr-defined]
    assert after == objects
    check(client, batch.id, ids)


def test_who_has_all_slots_makes_way_for_the_batch_of_a_server_that_has_died(
    tmp_path: Path, database: str, s3: dict[str, str]
) -> None:
    """Two of ann's batches have both slots of the server that is left; bob's was on the other."""
    secrets = {"ann-1": "ann", "bob-1": "bob"}
    entries = [
        {"tenant": tenant, "sha256": hashlib.sha256(secret.encode()).hexdigest()}
        for secret, tenant in secrets.items()
    ]
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": entries}))
    with mock_upstream("--service-ms", "20") as mock:
        options = ["--upstream", mock.url, "--database", database, "--keys", str(keys)]
        options += ["--blobs", f"s3://{BUCKET}/dead", "--lease-ms", "1500", "--jobs", "2"]
        options += ["--requests-at-first", "4", "--requests-per-model", "4"]
        left, dead = (Server(tmp_path / name, options, s3) for name in ("left", "dead"))
        try:
            lines = [line(str(n), "[slow 200]") for n in range(2000)]
            ann = left.start().client("ann-1")
            large = [submit(ann, lines) for _ in range(2)]
            for batch in large:
                wait_until(
                    "a start",
                    lambda batch=batch: ann.batches.retrieve(batch.id).request_counts.completed,
                )
            bob = dead.start().client("bob-1")
            small = submit(bob, lines)
            wait_until("bob's", lambda: bob.batches.retrieve(small.id).request_counts.completed)
            dead.kill()
            bob = left.client("bob-1")
            done = bob.batches.retrieve(small.id).request_counts.completed
            wait_until(
                "bob's to go on",
                lambda: bob.batches.retrieve(small.id).request_counts.completed > done,
                patience_s=40,
            )
            assert "a batch makes way for another" in left.log.read_text()
            # What others find in the database is nobody's any more.
            for client, batch in [*((ann, batch) for batch in large), (bob, small)]:
                client.batches.cancel(batch.id)
            for client, batch in [*((ann, batch) for batch in large), (bob, small)]:
                assert ended(client, batch).status == "cancelled"
        finally:
            for server in (left, dead):
                if server.process:
                    end(server.process)


def test_parts_and_deleted_files_are_removed_from_the_object_store(
    pair: Pair, s3: dict[str, str]
) -> None:
    client = pair.first.client()
    batch = ended(client, submit(client, [line("a")]))
    assert batch.output_file_id is not None

    def left() -> list[object]:
        return list(bucket(s3).objects.filter(Prefix=f"{pair.prefix}/"))  # type: ignore[attr-defined]

    assert left()
    for file in client.files.list():
        client.files.delete(file.id)
    # A sweep comes with the start.
    pair.first.kill()
    pair.first.start()
    wait_until("nothing of it in the bucket", lambda: not left())


def test_a_list_can_be_read_on_from_behind_what_was_deleted(pair: Pair) -> None:
    client = pair.first.client()
    files = {upload(client, b"x") for _ in range(7)}
    seen = set()
    for file in client.files.list(limit=2, order="asc"):
        seen.add(file.id)
        client.files.delete(file.id)
    assert files <= seen
    assert not files & {file.id for file in client.files.list()}


def test_a_server_whose_database_falls_silent_notices_and_goes_on_when_it_is_back(
    tmp_path: Path, database: str, s3: dict[str, str]
) -> None:
    """Neither closed nor refused: the connection's other end just says nothing any more."""
    with silenceable(database) as (through, silent), mock_upstream("--service-ms", "20") as mock:
        options = ["--upstream", mock.url, "--database", through, "--lease-ms", "1500"]
        running = Server(
            tmp_path / "one", [*options, "--blobs", f"s3://{BUCKET}/silent"], s3
        ).start()
        try:
            client = running.client()
            ids = [str(n) for n in range(300)]
            batch = submit(client, [line(name) for name in ids])
            wait_until(
                "results", lambda: client.batches.retrieve(batch.id).request_counts.completed
            )
            silent.set()
            ready = f"{running.url}/readyz"
            wait_until("it to notice", lambda: httpx.get(ready, timeout=60).status_code == 503)
            silent.clear()
            check(client, batch.id, ids)
        finally:
            if running.process:
                end(running.process)


@contextlib.contextmanager
def silenceable(database: str) -> Iterator[tuple[str, threading.Event]]:
    """A way to the database, and what makes all that goes by it get stuck."""
    silent = threading.Event()
    port = int(database.split(":")[-1].split("/")[0])
    listener = socket.create_server(("127.0.0.1", 0))

    def carry(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if silent.is_set():
                    # Lost for good, as when a machine between has gone.
                    return
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def take() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", port))
                ways.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=carry, args=pair, daemon=True).start()

    ways: list[socket.socket] = []
    threading.Thread(target=take, daemon=True).start()
    try:
        yield database.replace(f":{port}/", f":{listener.getsockname()[1]}/"), silent
    finally:
        listener.close()
        for way in ways:
            way.close()
