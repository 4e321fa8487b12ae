"""What AIBrix v0.5.0's clients and tests expect where it differs from OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import pytest
from rig import Mock, Server, jsonl, line, server

FORM = {"purpose": (None, "batch"), "file": ("test.jsonl", jsonl([line("a")]), "application/jsonl")}


@pytest.fixture(scope="module")
def aibrix(upstream: Mock, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("aibrix") / "data"
    with server(data, upstream.url, "--aibrix") as running:
        yield running


def upload(running: Server, path: str = "/v1/files") -> dict[str, Any]:
    answer = httpx.post(running.url + path, files=FORM)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_collections_may_be_called_with_a_slash_at_the_end(shared: Server) -> None:
    file = upload(shared, "/v1/files/")
    listed = httpx.get(f"{shared.url}/v1/files/", params={"limit": 5}).json()
    assert file["id"] in [one["id"] for one in listed["data"]]
    order = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions"}
    batch = httpx.post(f"{shared.url}/v1/batches/", json=order).json()
    assert batch["completion_window"] == "24h"
    listed = httpx.get(f"{shared.url}/v1/batches/").json()
    assert batch["id"] in [one["id"] for one in listed["data"]]


def test_a_file_is_uploaded_where_the_operator_says_that_clients_are_aibrix_s(
    aibrix: Server, shared: Server
) -> None:
    assert upload(shared)["status"] == "processed"
    file = upload(aibrix)
    assert file["status"] == "uploaded"
    listed = httpx.get(f"{aibrix.url}/v1/files").json()["data"]
    assert {one["status"] for one in listed} == {"uploaded"}
    found = httpx.get(f"{aibrix.url}/v1/files/{file['id']}").json()
    assert found["status"] == "uploaded"
    assert found["content_type"] == "application/jsonl"
    assert found["etag"]
    assert found["last_modified"] == file["created_at"]


def test_the_head_of_a_file_tells_what_it_is(aibrix: Server, shared: Server) -> None:
    for running, status in ((aibrix, "uploaded"), (shared, "processed")):
        file = upload(running)
        answer = httpx.head(f"{running.url}/v1/files/{file['id']}")
        assert answer.status_code == 200
        headers = answer.headers
        assert headers["x-file-id"] == file["id"]
        assert headers["x-file-name"] == "test.jsonl"
        assert headers["x-file-status"] == status
        assert headers["x-file-purpose"] == "batch"
        assert headers["x-file-created-at"] == str(file["created_at"])
        assert headers["content-type"] == "application/jsonl"
        assert headers["content-length"] == str(file["bytes"])
        assert headers["etag"]
        written = parsedate_to_datetime(headers["last-modified"]).timestamp()
        assert written == file["created_at"]
        assert httpx.head(f"{running.url}/v1/files/file-0").status_code == 404
