"""TLS to whatever the server connects to, with an authority that no system knows."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from objects import BUCKET, bucket, object_store
from postgres import postgres
from rig import (
    CONTROL,
    Mock,
    Server,
    all_ids,
    end,
    ended,
    jsonl,
    line,
    server,
    submit,
    wait_until,
)
from tls import Certificates, certificates, tls_before


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def upstream_tls(upstream: Mock, made: Certificates) -> Iterator[str]:
    with tls_before(upstream.url, made) as url:
        yield url


@pytest.fixture(scope="module")
def database(made: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with postgres(tmp_path_factory.mktemp("postgres"), made) as url:
        yield url


def refused(data: Path, *options: str) -> str:
    """What a server says that does not start."""
    running = Server(data, list(options))
    try:
        running.start(wait=False)
        assert running.process is not None
        assert running.process.wait(60) == 1
    finally:
        if running.process:
            end(running.process)
    return running.log.read_text()


def test_an_upstream_with_tls_is_asked_if_its_authority_is_trusted(
    data: Path, upstream_tls: str, made: Certificates
) -> None:
    with server(data, upstream_tls, "--ca-file", str(made.authority)) as running:
        client = running.client()
        assert client.models.retrieve("mock").id == "mock"
        ids = [str(n) for n in range(9)]
        batch = ended(client, submit(client, [line(name) for name in ids]))
        assert batch.status == "completed"
        assert all_ids(client, batch) == ids


def test_an_upstream_that_proves_itself_by_nobody_is_not_sent_anything(
    data: Path, upstream: Mock, upstream_tls: str
) -> None:
    before = len(upstream.contents())
    with server(data, upstream_tls) as running:
        client = running.client()
        batch = submit(client, [line("secret")])
        said = "the upstream is not available; pausing"
        wait_until("a pause", lambda: said in running.log.read_text())
        assert client.batches.retrieve(batch.id).status == "in_progress"
        (first, *_) = [entry for entry in running.log.read_text().splitlines() if said in entry]
        assert "invalid peer certificate" in first
        assert httpx.get(f"{running.url}/v1/models").status_code == 502
    assert len(upstream.contents()) == before


def test_the_command_line_speaks_to_a_server_behind_tls(
    shared: Server, made: Certificates, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl([line("a")]))
    with tls_before(shared.url, made) as url:
        command = [CONTROL, "batch", "submit", tmp_path / "in.jsonl", "--url", url]
        trusting = [*command, "--ca-file", made.authority]
        done = subprocess.run(trusting, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("batch_")
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert "cannot be reached" in done.stderr


def test_database_and_object_store_are_used_over_tls(
    tmp_path: Path, upstream: Mock, database: str, made: Certificates
) -> None:
    with object_store(tmp_path) as plain, tls_before(plain["AWS_ENDPOINT"], made) as endpoint:
        environment = {**plain, "AWS_ENDPOINT": endpoint}
        # What is not encrypted is not allowed.
        del environment["AWS_ALLOW_HTTP"]
        options = ["--database", f"{database}?sslmode=verify-full", "--blobs", f"s3://{BUCKET}/x"]
        options += ["--ca-file", str(made.authority)]
        data = tmp_path / "data"
        with server(data, upstream.url, *options, environment=environment) as running:
            client = running.client()
            ids = [str(n) for n in range(9)]
            batch = ended(client, submit(client, [line(name) for name in ids]))
            assert batch.status == "completed"
            assert all_ids(client, batch) == ids
        assert list(bucket(plain).objects.all())  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["", "?sslmode=require"])
def test_a_database_that_proves_itself_by_nobody_is_not_used(
    tmp_path: Path, database: str, mode: str
) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    options = ["--database", database + mode, "--blobs", f"file://{blobs}"]
    said = refused(tmp_path / "data", *options)
    assert "invalid peer certificate" in said


def test_a_database_that_asks_for_tls_is_not_used_without(tmp_path: Path, database: str) -> None:
    """The test of the tests above: what they connect to takes nothing else."""
    options = ["--database", f"{database}?sslmode=disable", "--blobs", f"file://{tmp_path}"]
    assert "no encryption" in refused(tmp_path / "data", *options)


def test_a_file_of_authorities_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").touch()
    for name in ("missing.pem", "empty.pem"):
        assert f"--ca-file {tmp_path / name}" in refused(
            tmp_path / "data", "--ca-file", str(tmp_path / name)
        )
