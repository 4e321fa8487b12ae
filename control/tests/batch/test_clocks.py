"""Leases when somebody sets the database's clock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from openai.types import Batch
from postgres import postgres, psql
from rig import Server, end, ended, line, mock_upstream, submit, wait_until

CLOCK = """
CREATE TABLE clock_is_set (seconds int NOT NULL);
INSERT INTO clock_is_set VALUES (0);
CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS
    'SELECT pg_catalog.clock_timestamp()
     + (SELECT seconds FROM public.clock_is_set) * interval ''1 second''';
ALTER DATABASE clock SET search_path = public, pg_catalog;
"""
"""Puts a clock that can be set before PostgreSQL's own."""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with postgres(tmp_path_factory.mktemp("postgres")) as url:
        psql(url, "CREATE DATABASE clock;")
        url = url.replace("/postgres", "/clock")
        psql(url, CLOCK)
        yield url


def set_clock(url: str, seconds: int) -> None:
    before = psql(url, "SELECT clock_timestamp();")
    psql(url, f"UPDATE clock_is_set SET seconds = {seconds};")
    assert (psql(url, "SELECT clock_timestamp();") < before) == (seconds < 0)


def has_total(client: OpenAI, batch: Batch) -> bool:
    counts = client.batches.retrieve(batch.id).request_counts
    return counts is not None and counts.total > 0


def test_a_batch_that_waits_is_started_though_the_clock_is_set_back(
    tmp_path: Path, database: str
) -> None:
    (tmp_path / "blobs").mkdir()
    with mock_upstream() as mock:
        options = ["--upstream", mock.url, "--database", database, "--lease-ms", "1500"]
        options += ["--blobs", f"file://{tmp_path}/blobs", "--jobs", "1"]
        one, other = (Server(tmp_path / name, options) for name in ("one", "other"))
        try:
            client = one.start().client()
            running = submit(client, [line("a", "[slow 3000]")])
            wait_until("a start", lambda: mock.contents())
            waiting = submit(client, [line("b", "[slow 60000]"), line("c")])
            wait_until("its validation", lambda: has_total(client, waiting))
            set_clock(database, -3600)
            assert ended(client, running).status == "completed"
            wait_until("the next to start", lambda: "[slow 60000]" in mock.contents())
            # It is taken over as well, from a server that is dead.
            one.kill()
            asked = len(mock.contents())
            client = other.start().client()
            wait_until("another to take over", lambda: len(mock.contents()) > asked)
            client.batches.cancel(waiting.id)
            assert ended(client, waiting).status == "cancelled"
        finally:
            set_clock(database, 0)
            for server in (one, other):
                if server.process:
                    end(server.process)
