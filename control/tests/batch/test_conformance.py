"""Point by point, what OpenAI's reference promises, mostly through OpenAI's own client."""

from __future__ import annotations

import io
import json
import re
import shutil
import socket
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from rig import Mock, Server, ended, jsonl, line, results, server, submit, upload, wait_until

ROOT = Path(__file__).resolve().parents[3]
BATCH_FIELDS = {
    "id", "object", "endpoint", "model", "errors", "input_file_id", "completion_window", "status",
    "output_file_id", "error_file_id", "created_at", "in_progress_at", "expires_at",
    "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at",
    "request_counts", "usage", "metadata",
}  # fmt: skip
FILE_FIELDS = {
    "id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status",
    "status_details",
}  # fmt: skip


@pytest.fixture(scope="module")
def done(shared: Server) -> openai.types.Batch:
    """A batch of which two requests have succeeded and one was refused."""
    client = shared.client()
    lines = [line("a", "x"), line("b", "[status 400 -1]"), line("c", 'é\n"')]
    return ended(client, submit(client, lines, metadata={"project": "p"}))


def fails(
    kind: type[openai.APIStatusError], call: Any, param: str | None, code: str | None = None
) -> openai.APIStatusError:
    with pytest.raises(kind) as raised:
        call()
    error = raised.value
    assert error.param == param
    if code:
        assert error.code == code
    assert error.message
    assert error.request_id.startswith("req_")
    return error


# --- files


def test_an_uploaded_file_is_described_field_for_field(client: OpenAI) -> None:
    content = jsonl([line("a")])
    before = int(time.time())
    file = client.files.create(file=("some name.jsonl", content), purpose="batch")
    assert file.id.startswith("file-")
    assert (file.object, file.bytes, file.filename) == ("file", len(content), "some name.jsonl")
    assert (file.purpose, file.status) == ("batch", "processed")
    assert before <= file.created_at <= time.time()
    assert set(file.to_dict()) == FILE_FIELDS


def test_a_file_for_a_batch_expires_after_thirty_days_unless_told_otherwise(client: OpenAI) -> None:
    file = client.files.create(file=b"x", purpose="batch")
    assert file.expires_at == file.created_at + 30 * 86_400
    anchored = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=b"x", purpose="batch", expires_after=anchored)
    assert file.expires_at == file.created_at + 3600
    file = client.files.create(file=b"x", purpose="user_data")
    assert file.expires_at is None


@pytest.mark.parametrize("seconds", [3599, 2_592_001])
def test_an_expiry_out_of_range_is_refused(client: OpenAI, seconds: int) -> None:
    anchored: Any = {"anchor": "created_at", "seconds": seconds}
    call = lambda: client.files.create(file=b"x", purpose="batch", expires_after=anchored)  # noqa: E731
    fails(openai.BadRequestError, call, "expires_after[seconds]", "invalid_value")


def test_an_expiry_with_another_anchor_is_refused(client: OpenAI) -> None:
    anchored: Any = {"anchor": "last_active_at", "seconds": 3600}
    call = lambda: client.files.create(file=b"x", purpose="batch", expires_after=anchored)  # noqa: E731
    fails(openai.BadRequestError, call, "expires_after[anchor]", "invalid_value")


def test_an_unknown_purpose_is_refused(client: OpenAI) -> None:
    call = lambda: client.files.create(file=b"x", purpose="fun")  # noqa: E731
    fails(openai.BadRequestError, call, "purpose", "invalid_value")


def test_a_file_can_be_sent_before_the_purpose(shared: Server) -> None:
    form = [("file", ("in.jsonl", b"x")), ("purpose", (None, b"batch"))]
    assert httpx.post(f"{shared.url}/v1/files", files=form).json()["purpose"] == "batch"


def test_a_large_file_can_be_sent_before_what_it_is_for(shared: Server) -> None:
    """A batch's limit is not that of other files, whatever the order in the form."""
    content = b"x" * 210_000_000
    form = lambda purpose: [("file", ("a", content)), ("purpose", (None, purpose))]  # noqa: E731
    answer = httpx.post(f"{shared.url}/v1/files", files=form(b"user_data"), timeout=120)
    assert answer.json()["bytes"] == len(content)
    httpx.delete(f"{shared.url}/v1/files/{answer.json()['id']}")
    refused = httpx.post(f"{shared.url}/v1/files", files=form(b"batch"), timeout=120)
    assert (refused.status_code, refused.json()["error"]["param"]) == (413, "file")


def test_a_file_s_limit_holds_whatever_the_order_in_the_form(data: Path, upstream: Mock) -> None:
    with server(data, upstream.url, "--file-mib", "1") as running:
        url = f"{running.url}/v1/files"
        parts = [("file", ("a", b"x" * (2 << 20))), ("purpose", (None, b"user_data"))]
        for form in (parts, parts[::-1]):
            assert httpx.post(url, files=form).status_code == 413


def test_a_form_without_a_file_is_refused(shared: Server) -> None:
    answer = httpx.post(f"{shared.url}/v1/files", files=[("purpose", (None, b"batch"))])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "file"


def test_a_form_without_a_purpose_is_refused(shared: Server) -> None:
    answer = httpx.post(f"{shared.url}/v1/files", files=[("file", ("a", b"x"))])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "purpose"


def test_what_is_no_form_is_refused(shared: Server) -> None:
    answer = httpx.post(f"{shared.url}/v1/files", json={"purpose": "batch"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_file_can_be_retrieved(client: OpenAI) -> None:
    file = client.files.create(file=b"x", purpose="batch")
    assert client.files.retrieve(file.id) == file


def test_a_file_s_content_comes_back_byte_for_byte(client: OpenAI) -> None:
    content = bytes(range(256)) * 5000
    file = client.files.create(file=io.BytesIO(content), purpose="user_data")
    assert client.files.content(file.id).content == content


def test_a_file_s_content_says_what_it_is(client: OpenAI, shared: Server) -> None:
    file = client.files.create(file=("my in.jsonl", b"{}", "application/jsonl"), purpose="batch")
    answer = httpx.get(f"{shared.url}/v1/files/{file.id}/content")
    assert answer.headers["content-type"] == "application/jsonl"
    assert 'filename="my in.jsonl"' in answer.headers["content-disposition"]
    assert answer.headers["etag"] == f'"{file.id}"'
    assert parsedate_to_datetime(answer.headers["last-modified"]).timestamp() == file.created_at
    strange = client.files.create(file=("é ü.txt", b"{}", "text/html"), purpose="user_data")
    answer = httpx.get(f"{shared.url}/v1/files/{strange.id}/content")
    assert answer.headers["content-type"] == "text/html"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "filename*=UTF-8''%C3%A9%20%C3%BC.txt" in answer.headers["content-disposition"]


def test_a_part_of_a_file_s_content_can_be_had(client: OpenAI, shared: Server) -> None:
    content = bytes(range(256)) * 1000
    url = f"{shared.url}/v1/files/{upload(client, content)}/content"
    whole = httpx.get(url)
    assert (whole.status_code, whole.headers["accept-ranges"]) == (200, "bytes")

    def get(asked: str, **headers: str) -> httpx.Response:
        return httpx.get(url, headers={"range": asked, **headers})

    part = get("bytes=1000-200000")
    assert (part.status_code, part.content) == (206, content[1000:200_001])
    assert part.headers["content-range"] == "bytes 1000-200000/256000"
    assert get("bytes=-7").content == content[-7:]
    assert get("bytes=1-", **{"if-range": whole.headers["etag"]}).content == content[1:]
    assert get("bytes=1-", **{"if-range": '"another"'}).content == content
    beyond = get("bytes=256000-")
    assert (beyond.status_code, beyond.json()["error"]["param"]) == (416, "range")


def test_an_empty_file_can_be_kept(client: OpenAI) -> None:
    file = client.files.create(file=("e", b""), purpose="user_data")
    assert client.files.content(file.id).content == b""


def test_a_deleted_file_is_gone(client: OpenAI) -> None:
    file = client.files.create(file=b"x", purpose="batch")
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        fails(openai.NotFoundError, lambda call=call: call(file.id), "id")
    assert file.id not in [listed.id for listed in client.files.list(limit=100)]


def test_files_are_listed_newest_first_and_oldest_first_by_pages(client: OpenAI) -> None:
    ids = [client.files.create(file=b"x", purpose="vision").id for _ in range(5)]
    listed = [file.id for file in client.files.list(purpose="vision", limit=2)]
    assert listed[:5] == ids[::-1]
    listed = [file.id for file in client.files.list(purpose="vision", limit=2, order="asc")]
    assert listed[-5:] == ids


def test_a_page_of_files_says_whether_there_are_more(client: OpenAI) -> None:
    ids = [client.files.create(file=b"x", purpose="assistants").id for _ in range(3)]
    page = client.files.list(purpose="assistants", limit=2)
    assert (page.has_more, [file.id for file in page.data]) == (True, ids[:0:-1])
    page = client.files.list(purpose="assistants", limit=2, after=page.data[-1].id)
    assert page.has_more is False


def test_files_are_listed_by_purpose(client: OpenAI, done: openai.types.Batch) -> None:
    outputs = client.files.list(purpose="batch_output")
    assert {file.purpose for file in outputs} == {"batch_output"}
    assert done.output_file_id in [file.id for file in outputs]


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "limit=x", "order=up", "after=file-0"])
def test_a_list_of_files_with_a_wrong_query_is_refused(shared: Server, query: str) -> None:
    answer = httpx.get(f"{shared.url}/v1/files?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.split("=")[0]


def test_ten_thousand_files_may_be_asked_for(shared: Server) -> None:
    assert httpx.get(f"{shared.url}/v1/files?limit=10000").status_code == 200


# --- creating batches


def test_a_new_batch_is_described_field_for_field(client: OpenAI) -> None:
    before = int(time.time())
    batch = submit(client, [line("a")], metadata={"k": "v"})
    assert batch.id.startswith("batch_")
    assert (batch.object, batch.status) == ("batch", "validating")
    assert (batch.endpoint, batch.completion_window) == ("/v1/chat/completions", "24h")
    assert batch.metadata == {"k": "v"}
    assert before <= batch.created_at <= time.time()
    assert batch.expires_at == batch.created_at + 86_400
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 0, "completed": 0, "failed": 0}
    fields = batch.to_dict()
    assert set(fields) == BATCH_FIELDS
    null = {"errors", "output_file_id", "error_file_id", "in_progress_at", "completed_at"}
    assert {name for name in null if fields[name] is not None} == set()


@pytest.mark.parametrize("window", ["1h", "2h", "6h", "12h", "24h"])
def test_windows_of_whole_hours_are_kept_as_they_were_given(client: OpenAI, window: Any) -> None:
    batch = submit(client, [line("a")], window=window)
    assert batch.completion_window == window
    assert batch.expires_at == batch.created_at + int(window[:-1]) * 3600


@pytest.mark.parametrize("window", ["25h", "1d", "", "0h"])
def test_other_windows_are_refused(client: OpenAI, window: Any) -> None:
    call = lambda: submit(client, [line("a")], window=window)  # noqa: E731
    fails(openai.BadRequestError, call, "completion_window", "invalid_value")


@pytest.mark.parametrize(
    "url", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
)
def test_every_endpoint_is_served(client: OpenAI, url: Any) -> None:
    batch = ended(client, submit(client, [line("a", url=url)], endpoint=url))
    assert batch.status == "completed"
    (result,) = results(client, batch.output_file_id)
    assert result["response"]["body"]["model"] == "mock"
    assert batch.usage is not None
    assert batch.usage.input_tokens == 5


@pytest.mark.parametrize(
    "url",
    ["/v1/moderations", "/v1/images/generations", "/v1/images/edits", "/v1/videos", "/v1/rerank"],
)
def test_openai_s_other_endpoints_may_be_named(client: OpenAI, url: Any) -> None:
    assert submit(client, [line("a", url=url)], endpoint=url).endpoint == url


def test_a_batch_has_a_day_unless_told_otherwise(shared: Server, client: OpenAI) -> None:
    order = {"input_file_id": upload(client, jsonl([line("a")])), "endpoint": "/v1/embeddings"}
    answer = httpx.post(f"{shared.url}/v1/batches", json=order).json()
    assert answer["completion_window"] == "24h"
    assert answer["expires_at"] == answer["created_at"] + 86_400


def test_another_endpoint_is_refused(client: OpenAI) -> None:
    call = lambda: submit(client, [line("a")], endpoint="/v1/files")  # noqa: E731
    fails(openai.BadRequestError, call, "endpoint", "invalid_value")


@pytest.mark.parametrize("field", ["input_file_id", "endpoint"])
def test_a_missing_parameter_is_named(shared: Server, client: OpenAI, field: str) -> None:
    order = {"input_file_id": upload(client, b"x"), "endpoint": "/v1/embeddings"}
    order["completion_window"] = "24h"
    del order[field]
    answer = httpx.post(f"{shared.url}/v1/batches", json=order)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (field, "missing_required_parameter")


def test_a_parameter_that_does_not_exist_is_refused(client: OpenAI) -> None:
    call = lambda: submit(client, [line("a")], extra_body={"output_expire_after": 1})  # noqa: E731
    fails(openai.BadRequestError, call, "output_expire_after", "unknown_parameter")


def test_an_input_file_that_does_not_exist_is_not_found(client: OpenAI) -> None:
    def call() -> None:
        client.batches.create(
            input_file_id="file-0", endpoint="/v1/embeddings", completion_window="24h"
        )

    fails(openai.NotFoundError, call, "input_file_id")


def test_an_input_file_for_something_else_is_refused(client: OpenAI) -> None:
    file = client.files.create(file=b"x", purpose="user_data")

    def call() -> None:
        client.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
        )

    fails(openai.BadRequestError, call, "input_file_id")


@pytest.mark.parametrize(
    "metadata",
    [{str(n): "v" for n in range(17)}, {"k" * 65: "v"}, {"k": "v" * 513}],
    ids=["17 keys", "65 characters", "513 characters"],
)
def test_too_much_metadata_is_refused(client: OpenAI, metadata: Any) -> None:
    call = lambda: submit(client, [line("a")], metadata=metadata)  # noqa: E731
    fails(openai.BadRequestError, call, "metadata", "invalid_value")


def test_the_most_metadata_is_kept(client: OpenAI) -> None:
    metadata = {f"{n:064}": "é" * 512 for n in range(16)}
    assert submit(client, [line("a")], metadata=metadata).metadata == metadata


def test_metadata_that_is_no_text_is_refused(client: OpenAI) -> None:
    metadata: Any = {"k": 1}
    call = lambda: submit(client, [line("a")], metadata=metadata)  # noqa: E731
    fails(openai.BadRequestError, call, "metadata.k", "invalid_type")


def test_a_body_that_is_no_json_is_refused(shared: Server) -> None:
    answer = httpx.post(f"{shared.url}/v1/batches", content=b"{")
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_aibrix_s_extension_is_kept(client: OpenAI) -> None:
    extension = {"job_id": "j", "model_template": {"name": "t", "version": "1"}}
    batch = submit(client, [line("a")], extra_body={"aibrix": extension})
    assert client.batches.retrieve(batch.id).to_dict()["aibrix"] == extension


# --- results


def test_a_batch_completes_with_every_time_and_count(
    client: OpenAI, done: openai.types.Batch
) -> None:
    assert (done.status, done.model) == ("completed", "mock")
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 3, "completed": 2, "failed": 1}
    times = [done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at]
    assert None not in times
    assert times == sorted(times)  # type: ignore[type-var]
    assert (done.failed_at, done.expired_at, done.cancelling_at, done.cancelled_at) == (None,) * 4
    assert done.errors is None


def test_usage_is_summed_up(done: openai.types.Batch) -> None:
    assert done.usage is not None
    assert done.usage.to_dict() == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 8},
        "output_tokens": 14,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 24,
    }


def test_output_lines_have_openai_s_format(client: OpenAI, done: openai.types.Batch) -> None:
    lines = {item["custom_id"]: item for item in results(client, done.output_file_id)}
    assert set(lines) == {"a", "c"}
    for item in lines.values():
        assert set(item) == {"id", "custom_id", "response", "error"}
        assert item["id"].startswith("batch_req_")
        assert item["error"] is None
        assert set(item["response"]) == {"status_code", "request_id", "body"}
        assert item["response"]["status_code"] == 200
    content = lines["c"]["response"]["body"]["choices"][0]["message"]["content"]
    assert content == 'é\n"'


def test_refused_requests_go_to_the_error_file_with_the_response(
    client: OpenAI, done: openai.types.Batch
) -> None:
    (item,) = results(client, done.error_file_id)
    assert (item["custom_id"], item["error"]) == ("b", None)
    assert item["response"]["status_code"] == 400
    assert item["response"]["body"]["error"]["message"] == "as you wish"


def test_output_files_are_files_of_their_own(client: OpenAI, done: openai.types.Batch) -> None:
    assert done.output_file_id is not None
    file = client.files.retrieve(done.output_file_id)
    assert file.purpose == "batch_output"
    assert file.bytes == len(client.files.content(file.id).content)
    assert set(file.to_dict()) == FILE_FIELDS


def test_output_expires_when_it_was_asked_to(client: OpenAI) -> None:
    after: Any = {"anchor": "created_at", "seconds": 7200}
    batch = ended(client, submit(client, [line("a")], output_expires_after=after))
    assert batch.output_file_id is not None
    file = client.files.retrieve(batch.output_file_id)
    assert file.expires_at == file.created_at + 7200


@pytest.mark.parametrize("seconds", [1, 2_592_001, "x"])
def test_an_expiry_of_output_out_of_range_is_refused(client: OpenAI, seconds: Any) -> None:
    after: Any = {"anchor": "created_at", "seconds": seconds}
    call = lambda: submit(client, [line("a")], output_expires_after=after)  # noqa: E731
    fails(openai.BadRequestError, call, "output_expires_after.seconds", "invalid_value")


def test_files_without_lines_do_not_exist(client: OpenAI) -> None:
    batch = ended(client, submit(client, [line("a")]))
    assert batch.output_file_id is not None
    assert batch.error_file_id is None
    batch = ended(client, submit(client, [line("a", "[status 404 -1]")]))
    assert batch.output_file_id is None
    assert batch.error_file_id is not None
    assert batch.status == "completed"


# --- validation


GOOD = json.dumps(line("good"))


@pytest.mark.parametrize(
    ("content", "code", "number"),
    [
        ("", "empty_file", None),
        ("\n\n", "empty_file", None),
        ("nonsense", "invalid_json_line", 1),
        (GOOD + "\n{", "invalid_json_line", 2),
        (GOOD + "\n\n" + GOOD[:-1] + "\n", "invalid_json_line", 3),
        (GOOD + "\n[]", "invalid_json_line", 2),
        (GOOD + "\n" + GOOD, "duplicate_custom_id", 2),
        (GOOD + "\n" + json.dumps(line("b", model="other")), "mismatched_model", 2),
        (json.dumps(line("a", url="/v1/embeddings")), "invalid_url", 1),
        (GOOD.replace("POST", "GET"), "invalid_method", 1),
        (GOOD.replace("custom_id", "id"), "missing_required_parameter", 1),
        (GOOD.replace('"model"', '"m"'), "missing_required_parameter", 1),
        (GOOD.replace('"model"', '"stream": true, "model"'), "unsupported_parameter", 1),
        (GOOD.replace('"body"', '"b"'), "missing_required_parameter", 1),
    ],
)
def test_a_wrong_input_file_fails_the_batch_and_the_line_is_named(
    client: OpenAI, content: str, code: str, number: int | None
) -> None:
    batch = ended(client, submit(client, content.encode()))
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert batch.errors.object == "list"
    assert batch.errors.data is not None
    (error,) = batch.errors.data
    assert (error.code, error.line) == (code, number)
    assert error.message
    assert (batch.output_file_id, batch.error_file_id) == (None, None)


def test_a_line_with_bytes_that_are_no_text_is_named(client: OpenAI) -> None:
    content = GOOD.encode() + b"\n" + GOOD.encode().replace(b"good", b"\xff\xfe")
    batch = ended(client, submit(client, content))
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(error.code, error.line) for error in batch.errors.data] == [("invalid_json_line", 2)]


# --- retrieving, listing, cancelling


def test_a_batch_can_be_retrieved(client: OpenAI, done: openai.types.Batch) -> None:
    assert client.batches.retrieve(done.id) == done


def test_an_unknown_batch_is_not_found(client: OpenAI) -> None:
    fails(openai.NotFoundError, lambda: client.batches.retrieve("batch_0"), "id")
    fails(openai.NotFoundError, lambda: client.batches.cancel("batch_0"), "id")


def test_batches_are_listed_newest_first_by_pages(client: OpenAI) -> None:
    ids = [submit(client, [line("a")]).id for _ in range(5)]
    assert [batch.id for batch in client.batches.list(limit=2)][:5] == ids[::-1]
    page = client.batches.list(limit=2)
    assert page.has_more is True
    page = client.batches.list(limit=2, after=ids[1])
    assert page.data[0].id == ids[0]


@pytest.mark.parametrize("limit", [0, 101])
def test_a_list_of_batches_out_of_bounds_is_refused(client: OpenAI, limit: int) -> None:
    fails(openai.BadRequestError, lambda: client.batches.list(limit=limit), "limit")


def test_pages_have_first_and_last_ids(shared: Server, client: OpenAI) -> None:
    newest = submit(client, [line("a")]).id
    page = httpx.get(f"{shared.url}/v1/batches?limit=1").json()
    assert set(page) == {"object", "data", "first_id", "last_id", "has_more"}
    assert (page["object"], page["first_id"], page["last_id"]) == ("list", newest, newest)


def test_a_cancelled_batch_keeps_what_was_done(data: Path, upstream: Mock) -> None:
    # A server of its own: whatever was asked before, it asks for all at once.
    with server(data, upstream.url, "--requests-at-first", "256", "--cancel-grace-s", "1") as own:
        client = own.client()
        lines = [line("done")] + [line(f"slow-{n}", "[slow 30000]") for n in range(200)]
        batch = submit(client, lines)
        wait_until("a result", lambda: client.batches.retrieve(batch.id).request_counts.completed)
        cancelling = client.batches.cancel(batch.id)
        assert cancelling.status == "cancelling"
        assert cancelling.cancelling_at is not None
        again = client.batches.cancel(batch.id)
        assert again.cancelling_at == cancelling.cancelling_at
        batch = ended(client, batch)
        assert batch.status == "cancelled"
        assert batch.cancelled_at is not None
        assert batch.completed_at is None
        assert "done" in [item["custom_id"] for item in results(client, batch.output_file_id)]
        left = results(client, batch.error_file_id)
        assert {(item["error"]["code"], item["response"]) for item in left} == {
            ("batch_cancelled", None)
        }
        assert batch.request_counts is not None
        counts = batch.request_counts
        assert (counts.total, counts.completed + counts.failed) == (201, 201)


def test_an_ended_batch_cannot_be_cancelled_and_the_client_does_not_try_again(
    shared: Server, done: openai.types.Batch
) -> None:
    client = shared.client(max_retries=2)
    before = shared.metric("kvtide_batch_http_requests_total")
    fails(openai.ConflictError, lambda: client.batches.cancel(done.id), None)
    assert shared.metric("kvtide_batch_http_requests_total") - before <= 2


# --- around it


def test_models_are_the_upstream_s(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["mock", "org/mock-2"]
    assert client.models.retrieve("mock").id == "mock"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")


def test_models_are_listed_with_a_slash_at_the_end_too(shared: Server) -> None:
    assert httpx.get(f"{shared.url}/v1/models/").json()["object"] == "list"
    assert httpx.get(f"{shared.url}/v1/models/org/mock-2").json()["id"] == "org/mock-2"


def routes() -> list[str]:
    """Every path that the server knows, from its source."""
    source = (ROOT / "control" / "batch" / "src" / "http" / "mod.rs").read_text()
    return re.findall(r'\.route\(\s*"(/[^"]*)"', source)


BODIES: dict[str, tuple[dict[str, str | bytes], bytes]] = {
    "nothing": ({}, b""),
    "no JSON": ({"content-type": "application/json"}, b"{"),
    "a byte too much": ({"content-type": "application/json"}, b" " * ((1 << 20) + 1)),
    "far too much": ({"content-type": "application/json"}, b" " * (5 << 20)),
    "a form that ends": ({"content-type": "multipart/form-data; boundary=b"}, b"--b\r\ncon"),
    "a form without boundary": ({"content-type": "multipart/form-data"}, b"--b\r\n"),
    "no form": ({"content-type": "multipart/form-data; boundary=b"}, b"\xff" * 100_000),
    "bad headers": ({"content-type": b"\xff/\xfe;;=", "range": "bytes=x-"}, b"\xff"),
}


@pytest.mark.parametrize("body", BODIES)
def test_whatever_is_wrong_every_route_says_so_as_openai_does(shared: Server, body: str) -> None:
    known = routes()
    assert len(known) >= 16
    headers, content = BODIES[body]
    caller = httpx.Client(headers=headers, timeout=60)
    for route in [*known, "/", "/v1", "/v1/nothing", "/v1/files/a/b/c"]:
        # Paths that are good, that name nothing, and that are no text.
        for name in ("file-0", "%ff", "%00", "a%2Fb", "x" * 2000):
            path = re.sub(r"{\*?\w+}", name, route)
            for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"):
                if (method, path) == ("DELETE", "/v1/files"):
                    continue
                url = httpx.URL(shared.url).copy_with(raw_path=path.encode())
                answer = caller.request(method, url, content=content)
                where = (method, path, answer.status_code, answer.text)
                if answer.status_code < 400:
                    continue
                assert answer.headers["content-type"] == "application/json", where
                if method != "HEAD":
                    error = answer.json()["error"]
                    assert set(error) == {"message", "type", "param", "code"}, where
                    assert isinstance(error["message"], str), where
                assert answer.status_code < 500 or path == "/readyz", where
            if name == "file-0" and "{" not in route:
                break


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v1/batches", 413), ("/CreateUser", 413), ("/v1/files", 400)],
)
def test_a_json_body_that_is_too_long_is_refused(shared: Server, path: str, status: int) -> None:
    answer = httpx.post(shared.url + path, json={"x": "y" * (3 << 20)})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_a_body_that_breaks_off_or_is_no_body_is_refused(shared: Server) -> None:
    head = "POST /v1/batches HTTP/1.1\r\nhost: localhost\r\n"
    with socket.create_connection(("127.0.0.1", shared.port), timeout=30) as broken:
        broken.sendall(f"{head}transfer-encoding: chunked\r\n\r\nnonsense\r\n".encode())
        answer = broken.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'{"error":' in answer


def test_unknown_paths_and_methods_have_openai_s_errors(shared: Server) -> None:
    for method, path, status in [
        ("GET", "/v1/nothing", 404),
        ("PUT", "/v1/batches", 405),
        ("GET", "/", 404),
    ]:
        answer = httpx.request(method, shared.url + path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"].startswith("req_")


def test_health_is_told(shared: Server) -> None:
    assert httpx.get(f"{shared.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{shared.url}/readyz").json() == {"status": "ready"}
    assert httpx.get(f"{shared.url}/status").json()["batches"]["live"] >= 0


def test_the_service_measures_itself(shared: Server, done: openai.types.Batch) -> None:
    assert shared.metric("kvtide_batch_results_total") >= 3
    assert shared.metric("kvtide_batch_validation_seconds_count") >= 1
    assert shared.metric("kvtide_batch_requests_in_flight") >= 0


def test_every_metric_of_the_documentation_is_there(
    shared: Server, done: openai.types.Batch, client: OpenAI
) -> None:
    # One of each kind that only comes with its event.
    ended(client, submit(client, [line("a", "[status 500 1]")]))
    page = (ROOT / "docs" / "batch.md").read_text().split("\n## Metrics\n")[1].split("\n## ")[0]
    names = set(re.findall(r"`(kvtide_batch_\w+)", page))
    assert len(names) >= 12
    shown = httpx.get(f"{shared.url}/metrics").text
    kinds = dict(re.findall(r"^# TYPE (kvtide_batch_\w+) (\w+)$", shown, re.MULTILINE))
    assert names == set(kinds)


def test_a_file_that_is_too_large_for_a_batch_is_refused_while_it_arrives(
    data: Path, upstream: Mock
) -> None:
    """200 MB are good, a byte more is not; nothing is kept of what was refused."""

    def form(size: int) -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\n'
        yield b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        piece = b"x" * 1_000_000
        for _ in range(size // len(piece)):
            yield piece
        yield b"x" * (size % len(piece))
        yield b"\r\n--b--\r\n"

    # One of its own, in whose directories nobody else writes.
    with server(data, upstream.url) as running:

        def send(size: int) -> httpx.Response:
            headers = {"content-type": "multipart/form-data; boundary=b"}
            url = f"{running.url}/v1/files"
            return httpx.post(url, content=form(size), headers=headers, timeout=120)

        refused = send(200_000_001)
        assert refused.status_code == 413
        error = refused.json()["error"]
        assert (error["param"], error["code"]) == ("file", "file_too_large")
        assert not list((data / "files").iterdir())
        assert not list((data / "scratch").iterdir())
        assert send(200_000_000).json()["bytes"] == 200_000_000
    shutil.rmtree(data / "files")


def test_users_are_created_read_updated_and_deleted(shared: Server) -> None:
    def call(action: str, **user: Any) -> httpx.Response:
        return httpx.post(f"{shared.url}/{action}User", json=user)

    user = {"name": "ann", "rpm": 10, "tpm": 1000}
    assert call("Create", **user).json()["user"] == user
    again = call("Create", name="ann", rpm=99, tpm=99)
    assert (again.status_code, again.json()["user"]) == (200, user), "as it was"
    assert call("Read", name="ann").json()["user"] == user
    assert call("Update", name="ann", rpm=20, tpm=1).json()["user"]["rpm"] == 20
    assert call("Delete", name="ann").status_code == 200
    assert call("Read", name="ann").status_code == 404
    assert call("Rename", name="ann").status_code == 404
    assert call("Create", rpm=1).status_code == 400


def test_a_form_whose_boundary_never_comes_is_refused_early(shared: Server) -> None:
    for start in (b"", b'--b\r\nContent-Disposition: form-data; name="file"; x="'):
        answer = httpx.post(
            f"{shared.url}/v1/files",
            content=start + b"x" * 5_000_000,
            headers={"content-type": "multipart/form-data; boundary=b"},
        )
        assert answer.status_code == 400
        assert "before its first part or in the head of one" in answer.json()["error"]["message"]
