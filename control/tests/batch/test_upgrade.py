"""A PostgreSQL database of an earlier version goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from openai.types import Batch
from postgres import postgres, psql
from rig import Server, all_ids, end, ended, line, mock_upstream, submit, upload, wait_until

AS_IT_WAS = """
DROP VIEW kvtide_files_there;
DROP INDEX kvtide_files_gone, kvtide_files_stored, kvtide_files_deleted, kvtide_batches_with_parts;
ALTER TABLE kvtide_files DROP COLUMN gone_at;
CREATE INDEX kvtide_files_deleted ON kvtide_files (seq) WHERE deleted;
CREATE VIEW kvtide_files_there AS SELECT * FROM kvtide_files WHERE NOT deleted;
ALTER TABLE kvtide_batches DROP COLUMN model, DROP COLUMN due_at;
ALTER TABLE kvtide_batches DROP COLUMN lease_beat, DROP COLUMN lease_ms;
ALTER TABLE kvtide_batches ADD COLUMN lease_until bigint NOT NULL DEFAULT 0;
CREATE INDEX kvtide_batches_with_parts ON kvtide_batches (seq) WHERE has_parts;
UPDATE kvtide_batch_schema SET version = 1;
"""
"""Makes version 1 of version 3."""
SHAPE = """
SELECT table_name, column_name, data_type, is_nullable, column_default
FROM information_schema.columns
WHERE table_name IN ('kvtide_files', 'kvtide_batches', 'kvtide_parts', 'kvtide_users')
ORDER BY table_name, column_name;
SELECT indexdef FROM pg_indexes WHERE tablename LIKE 'kvtide%' ORDER BY indexname;
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url


def options(url: str, tmp_path: Path, upstream: str) -> list[str]:
    blobs = tmp_path / "blobs"
    blobs.mkdir(exist_ok=True)
    return ["--upstream", upstream, "--database", url, "--blobs", f"file://{blobs}"]


def started(client: OpenAI, batch: Batch) -> bool:
    return client.batches.retrieve(batch.id).status == "in_progress"


def test_a_database_of_the_first_version_is_upgraded_with_what_is_in_hand(
    tmp_path: Path, database: str
) -> None:
    with mock_upstream() as mock:
        running = Server(tmp_path / "data", options(database, tmp_path, mock.url))
        try:
            client = running.start().client()
            # Answered well only after a pause that the server forgets when it is killed.
            waits = "[retry 429 1 600]"
            goes_on = submit(client, [line("a", waits, model="m"), line("b", model="m")])
            cancelled = submit(client, [line("c", "[slow 60000]")])
            late = submit(client, [line("d", "[slow 60000]")])
            for batch in (goes_on, cancelled, late):
                wait_until("a start", lambda batch=batch: started(client, batch))
            wait_until("the first attempt", lambda: waits in mock.contents())
            client.files.delete(upload(client, b"x"))
            shape = psql(database, SHAPE)
            client.batches.cancel(cancelled.id)
            running.kill()
            past = int(time.time()) - 1
            psql(
                database,
                f"{AS_IT_WAS} UPDATE kvtide_batches SET doc ="
                f" jsonb_set(doc::jsonb, '{{expires_at}}', '{past}')::text"
                f" WHERE id = '{late.id}';",
            )
            assert psql(database, SHAPE) != shape
            running.start()
            assert psql(database, SHAPE) == shape
            assert psql(database, "SELECT version FROM kvtide_batch_schema;").strip() == "3"
            for batch, status, ids in (
                (goes_on, "completed", ["a", "b"]),
                (cancelled, "cancelled", ["c"]),
                (late, "expired", ["d"]),
            ):
                batch = ended(client, batch)
                assert batch.status == status
                assert all_ids(client, batch) == ids
        finally:
            if running.process:
                end(running.process)


def test_a_database_of_a_later_version_is_refused(tmp_path: Path, database: str) -> None:
    psql(database, "CREATE DATABASE later;")
    url = database.replace("/postgres", "/later")
    psql(
        url,
        "CREATE TABLE kvtide_batch_schema (version bigint NOT NULL);"
        "INSERT INTO kvtide_batch_schema VALUES (99);",
    )
    running = Server(tmp_path / "data", options(url, tmp_path, "http://127.0.0.1:1"))
    try:
        running.start(wait=False)
        assert running.process is not None
        assert running.process.wait(60) == 1
    finally:
        if running.process:
            end(running.process)
    assert "version 99" in running.log.read_text()
