"""Nothing is lost and nothing is written twice, whatever happens to the server."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from pathlib import Path

import httpx
import openai
import pytest
from rig import Server, all_ids, ended, jsonl, line, mock_upstream, server, submit, wait_until

KILLS = int(os.environ.get("KVTIDE_BATCH_KILLS", "20"))
REQUESTS = 400


def check(client: openai.OpenAI, batch: openai.types.Batch, ids: list[str]) -> None:
    batch = ended(client, batch, patience_s=180)
    assert batch.status == "completed"
    found = all_ids(client, batch)
    assert len(found) == len(set(found)), "a result was written twice"
    assert found == sorted(ids), "a result was lost"
    assert batch.request_counts is not None
    counts = batch.request_counts
    assert (counts.total, counts.completed + counts.failed) == (len(ids), len(ids))


def test_no_result_is_lost_or_written_twice_when_the_server_is_killed(data: Path) -> None:
    """Kills at random moments, over all phases of as many batches as it takes."""
    chance = random.Random(17)
    ids = [f"request-{n}" for n in range(REQUESTS)]
    lines = [
        line(name, "[status 400 -1]" if n % 10 == 0 else "[status 500 1]" if n % 17 == 0 else "hi")
        for n, name in enumerate(ids)
    ]
    kills = 0
    in_progress = 0
    options = ["--requests-per-model", "16"]
    with (
        mock_upstream("--service-ms", "30") as mock,
        server(data, mock.url, *options) as running,
    ):
        client = running.client()
        while kills < KILLS:
            batch = submit(client, lines)
            for _ in range(min(10, KILLS - kills)):
                time.sleep(chance.uniform(0, 0.25))
                running.kill()
                kills += 1
                running.start()
                in_progress += client.batches.retrieve(batch.id).status == "in_progress"
            check(client, batch, ids)
    assert in_progress >= KILLS // 4, "most kills hit nothing"


def test_an_upload_that_the_server_did_not_survive_leaves_nothing(data: Path) -> None:
    def half() -> object:
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\n'
        yield b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield b"x" * 100_000
        scratch = data / "scratch"
        wait_until("bytes on disk", lambda: any(f.stat().st_size for f in scratch.iterdir()))
        running.kill()
        yield b"x" * 10_000_000

    with server(data, "http://127.0.0.1:1") as running:
        with pytest.raises(httpx.TransportError):
            httpx.post(
                f"{running.url}/v1/files",
                content=half(),  # type: ignore[arg-type]
                headers={"content-type": "multipart/form-data; boundary=b"},
            )
        running.start()
        assert list(running.client().files.list()) == []
        assert list((data / "scratch").iterdir()) == []
        assert list((data / "files").iterdir()) == []


def test_a_server_that_was_stopped_for_long_goes_on_where_it_was(data: Path) -> None:
    ids = [str(n) for n in range(REQUESTS)]
    with (
        mock_upstream("--service-ms", "10") as mock,
        server(data, mock.url, "--lease-ms", "500") as running,
    ):
        client = running.client()
        batch = submit(client, [line(name) for name in ids])
        wait_until("a result", lambda: client.batches.retrieve(batch.id).request_counts.completed)
        assert running.process is not None
        running.process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        running.process.send_signal(signal.SIGCONT)
        check(client, batch, ids)


LIMIT = 3_000_000


def limit_file_size() -> None:
    """Every write beyond the limit fails, as on a full disk; without the signal."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))


def test_a_full_disk_stops_a_batch_and_loses_nothing(data: Path) -> None:
    """Results that do not fit are not counted; with room, the batch goes on and completes."""
    ids = [f"{n:04}" for n in range(60)]
    with mock_upstream() as mock:
        running = Server(data, ["--upstream", mock.url], preexec=limit_file_size)
        try:
            client = running.start().client()
            batch = submit(client, [line(name, "[huge 100000]") for name in ids])
            said = "results cannot be recorded"
            wait_until("a full disk", lambda: said in running.log.read_text())
            assert client.batches.retrieve(batch.id).status == "in_progress"
            before = client.batches.retrieve(batch.id).request_counts
            assert before is not None
            assert before.completed < 60
            # More room, without a restart.
            assert running.process is not None
            everything = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, everything)
            check(client, batch, ids)
            assert len(mock.seen()["requests"]) == 60, "what was answered is not asked for again"
        finally:
            if running.process:
                running.kill()


def test_an_upload_that_does_not_fit_is_refused_and_leaves_nothing(data: Path) -> None:
    running = Server(data, [], preexec=limit_file_size)
    try:
        client = running.start().client(max_retries=0)
        with pytest.raises(openai.InternalServerError):
            client.files.create(file=b"x" * (LIMIT + 1), purpose="batch")
        assert list(client.files.list()) == []
        assert list((data / "scratch").iterdir()) == []
        small = client.files.create(file=jsonl([line("a")]), purpose="batch")
        assert client.files.retrieve(small.id).bytes == small.bytes
    finally:
        if running.process:
            running.kill()


def test_the_server_takes_all_the_file_descriptors_that_it_may_have(data: Path) -> None:
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 1024))

    running = Server(data, [], preexec=few)
    try:
        running.start()
        assert running.process is not None
        assert resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE) == (1024, 1024)
    finally:
        if running.process:
            running.kill()
