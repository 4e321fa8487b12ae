"""Whose is what: keys, tenants, quotas, retried creates."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI
from rig import CONTROL, Mock, Server, ended, jsonl, line, server, submit, upload, wait_until

QUOTA = 100_000


def key(tenant: str, secret: str, **more: object) -> dict[str, object]:
    return {"tenant": tenant, "sha256": hashlib.sha256(secret.encode()).hexdigest(), **more}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    entries = [
        key("ann", "ann-1"),
        key("ann", "ann-2"),
        key("bob", "bob-1", storage_bytes=QUOTA),
        key("root", "root-1", admin=True),
    ]
    path.write_text(json.dumps({"keys": entries}))
    return path


@pytest.fixture(scope="module")
def guarded(
    upstream: Mock, keys: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("guarded") / "data"
    with server(data, upstream.url, "--keys", str(keys)) as running:
        yield running


def client_of(guarded: Server, secret: str) -> OpenAI:
    return guarded.client(secret, max_retries=0)


def test_nobody_is_served_without_a_key_or_with_a_wrong_one(guarded: Server) -> None:
    with pytest.raises(openai.AuthenticationError) as raised:
        client_of(guarded, "wrong").batches.list()
    assert raised.value.code == "invalid_api_key"
    for path in ("/v1/files", "/v1/batches", "/v1/models", "/v1/files/file-1/content"):
        assert httpx.get(guarded.url + path).status_code == 401
    for path in ("/healthz", "/readyz"):
        assert httpx.get(guarded.url + path).status_code == 200


def test_what_belongs_to_another_tenant_does_not_exist(guarded: Server, upstream: Mock) -> None:
    ann, bob = client_of(guarded, "ann-1"), client_of(guarded, "bob-1")
    batch = ended(ann, submit(ann, [line("a")]))
    assert batch.output_file_id is not None
    for call in (
        lambda: bob.files.retrieve(batch.input_file_id),
        lambda: bob.files.content(batch.output_file_id),  # type: ignore[arg-type]
        lambda: bob.files.delete(batch.input_file_id),
        lambda: bob.batches.retrieve(batch.id),
        lambda: bob.batches.cancel(batch.id),
        lambda: bob.batches.create(
            input_file_id=batch.input_file_id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
        ),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert batch.id not in [other.id for other in bob.batches.list()]
    assert batch.input_file_id not in [other.id for other in bob.files.list()]
    answer = httpx.get(
        f"{guarded.url}/v1/batches?after={batch.id}", headers={"authorization": "Bearer bob-1"}
    )
    assert answer.status_code == 400
    assert upstream.seen()["requests"][-1]["user"] == "ann"


def test_several_keys_of_a_tenant_see_the_same(guarded: Server) -> None:
    file = upload(client_of(guarded, "ann-1"), b"x")
    assert client_of(guarded, "ann-2").files.retrieve(file).id == file


def test_a_quota_is_kept_while_a_file_arrives_and_frees_with_deletion(guarded: Server) -> None:
    bob = client_of(guarded, "bob-1")
    file = upload(bob, b"x" * (QUOTA - 1000))
    with pytest.raises(openai.PermissionDeniedError) as raised:
        upload(bob, b"x" * 1001)
    assert raised.value.code == "storage_quota_exceeded"
    upload(bob, b"x" * 1000)
    bob.files.delete(file)
    upload(bob, b"x" * 1000)


def test_uploads_at_the_same_time_do_not_pass_the_quota_together(guarded: Server) -> None:
    bob = client_of(guarded, "bob-1")
    for file in bob.files.list():
        bob.files.delete(file.id)

    def attempt(_: int) -> bool:
        try:
            upload(bob, b"x" * (QUOTA // 4))
        except openai.PermissionDeniedError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 4


def test_users_are_managed_by_admins_only(guarded: Server) -> None:
    def create(secret: str) -> int:
        headers = {"authorization": f"Bearer {secret}"}
        url = f"{guarded.url}/CreateUser"
        return httpx.post(url, json={"name": "u"}, headers=headers).status_code

    assert create("ann-1") == 403
    assert create("root-1") == 200


def test_a_file_of_keys_that_changes_is_read_again(guarded: Server, keys: Path) -> None:
    made = subprocess.run(
        [CONTROL, "batch", "key", "carl"], capture_output=True, text=True, check=True
    )
    secret, entry = made.stdout.strip(), json.loads(made.stderr.splitlines()[-1])
    document = json.loads(keys.read_text())
    document["keys"].append(entry)
    time.sleep(0.01)
    keys.write_text(json.dumps(document))

    def works() -> bool:
        try:
            client_of(guarded, secret).batches.list()
        except openai.AuthenticationError:
            return False
        return True

    wait_until("the new key", works)
    assert secret not in keys.read_text()
    assert secret not in guarded.log.read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--listen", "0.0.0.0:0"], "whoever reaches"),
        (["--keys", "/nonexistent"], "cannot be read"),
        (["--upstream", "router:8000"], "--upstream must be a URL"),
        (["--latency-tolerance", "1"], "--latency-tolerance"),
        (["--database", "mysql://x", "--blobs", "file:///tmp"], "--database must begin"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(
    tmp_path: Path, options: list[str], said: str
) -> None:
    done = subprocess.run(
        [CONTROL, "batch", "--data", tmp_path / "data", *options],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert said in done.stderr


# --- retried creates


RETRIED = {"x-stainless-retry-count": "1"}


def test_a_create_that_is_sent_again_gives_the_same_batch(client: OpenAI) -> None:
    file = upload(client, jsonl([line("a")]))

    def create(retry: bool, **more: object) -> str:
        return client.batches.create(
            input_file_id=file,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            extra_headers=RETRIED if retry else {},
            **more,  # type: ignore[arg-type]
        ).id

    first = create(False)
    assert create(True) == first
    assert create(True, metadata={"another": "order"}) != first
    deliberate = create(False)
    assert deliberate != first


def test_a_create_whose_answer_is_lost_is_one_batch_for_openai_s_client(shared: Server) -> None:
    """The answer to the first attempt never arrives; the client tries again by itself."""
    calls = 0

    class Lossy(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            nonlocal calls
            answer = super().handle_request(request)
            if request.url.path == "/v1/batches" and request.method == "POST":
                calls += 1
                if calls == 1:
                    answer.read()
                    raise httpx.ReadError("lost on the way")
            return answer

    client = shared.client(http_client=httpx.Client(transport=Lossy()))
    file = upload(client, jsonl([line("a")]))
    batch = client.batches.create(
        input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h"
    )
    assert calls == 2
    made = [b.id for b in client.batches.list(limit=100) if b.input_file_id == file]
    assert made == [batch.id]


def test_an_upload_that_is_sent_again_is_one_file(client: OpenAI) -> None:
    def create(name: str, retry: bool) -> str:
        headers = RETRIED if retry else {}
        return client.files.create(
            file=(name, b"retried"), purpose="batch", extra_headers=headers
        ).id

    first = create("a", False)
    assert create("a", True) == first
    assert create("b", True) != first
    assert create("a", False) != first
    assert client.files.content(first).content == b"retried"


def test_a_retry_from_another_tenant_is_its_own(guarded: Server) -> None:
    def create(secret: str) -> str:
        client = client_of(guarded, secret)
        return client.files.create(file=b"same", purpose="batch", extra_headers=RETRIED).id

    assert create("ann-1") != create("root-1")
    assert create("ann-1") == create("ann-2")
