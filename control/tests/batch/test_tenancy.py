"""Whose is what: keys, tenants, quotas, retried creates."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI
from rig import (
    CONTROL,
    Mock,
    Server,
    all_ids,
    ended,
    jsonl,
    line,
    mock_upstream,
    server,
    submit,
    upload,
    wait_until,
)

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


def test_uploads_that_are_under_way_count(guarded: Server) -> None:
    """An upload that has begun leaves less for the next, before either is there."""
    bob = client_of(guarded, "bob-1")
    for file in bob.files.list():
        bob.files.delete(file.id)
    refused: list[int] = []

    def slowly() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\n'
        yield b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield b"x" * (QUOTA * 8 // 10)
        scratch = guarded.data / "scratch"
        wait_until("bytes on disk", lambda: any(f.stat().st_size for f in scratch.iterdir()))
        with pytest.raises(openai.PermissionDeniedError) as raised:
            upload(bob, b"x" * (QUOTA // 2))
        refused.append(raised.value.status_code)
        upload(bob, b"x" * (QUOTA // 10))
        yield b"\r\n--b--\r\n"

    answer = httpx.post(
        f"{guarded.url}/v1/files",
        content=slowly(),
        headers={
            "content-type": "multipart/form-data; boundary=b",
            "authorization": "Bearer bob-1",
        },
        timeout=60,
    )
    assert (answer.status_code, refused) == (200, [403])


def test_a_deleted_file_counts_for_as_long_as_a_batch_reads_it(guarded: Server) -> None:
    bob = client_of(guarded, "bob-1")
    for file in bob.files.list():
        bob.files.delete(file.id)
    lines = [line("slow", "[slow 60000]"), line("large", "x" * (QUOTA // 2))]
    batch = submit(bob, lines)
    wait_until("a start", lambda: bob.batches.retrieve(batch.id).status == "in_progress")
    bob.files.delete(batch.input_file_id)
    with pytest.raises(openai.PermissionDeniedError):
        upload(bob, b"x" * (QUOTA * 6 // 10))
    bob.batches.cancel(batch.id)


def test_a_429_of_one_tenant_does_not_stop_another(keys: Path, tmp_path: Path) -> None:
    with (
        mock_upstream() as mock,
        server(tmp_path / "data", mock.url, "--keys", str(keys)) as running,
    ):
        ann, bob = running.client("ann-1"), running.client("bob-1")
        waits = submit(ann, [line("a", "[retry 429 1 600]")])
        wait_until("a refusal", lambda: mock.seen()["requests"])
        assert ended(bob, submit(bob, [line("b")])).status == "completed"
        assert ann.batches.retrieve(waits.id).status == "in_progress"


def test_a_tenant_has_so_many_batches_at_once_and_others_still_have_places(
    keys: Path, tmp_path: Path
) -> None:
    options = ["--keys", str(keys), "--batches-per-tenant", "1"]
    with mock_upstream() as mock, server(tmp_path / "data", mock.url, *options) as running:
        ann, bob = (running.client(key, max_retries=0) for key in ("ann-1", "bob-1"))
        order = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        file = upload(ann, jsonl([line("a", "[slow 60000]")]))
        first = ann.batches.create(input_file_id=file, **order)  # type: ignore[call-overload]
        with pytest.raises(openai.RateLimitError, match="1 of your batches"):
            ann.batches.create(input_file_id=file, **order)  # type: ignore[call-overload]
        # That was refused: sending it again does not make it the first one.
        with pytest.raises(openai.RateLimitError):
            ann.batches.create(input_file_id=file, extra_headers=RETRIED, **order)  # type: ignore[call-overload]
        assert [batch.id for batch in ann.batches.list()] == [first.id]
        assert ended(bob, submit(bob, [line("b")])).status == "completed"


def test_a_second_create_that_is_refused_is_refused_however_often_the_client_tries(
    data: Path,
) -> None:
    """The client tries again by itself; what it then says must not make two orders one."""
    with mock_upstream() as mock, server(data, mock.url, "--batches-per-tenant", "1") as running:
        client = running.client()
        order = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        file = upload(client, jsonl([line("a", "[slow 60000]")]))
        first = client.batches.create(input_file_id=file, **order)  # type: ignore[call-overload]
        with pytest.raises(openai.RateLimitError):
            client.batches.create(input_file_id=file, **order)  # type: ignore[call-overload]
        client.batches.cancel(first.id)
        again = client.with_options(max_retries=20)
        second = again.batches.create(input_file_id=file, **order)  # type: ignore[call-overload]
        assert second.id != first.id


def test_a_tenant_with_all_job_slots_makes_way_for_another(keys: Path, tmp_path: Path) -> None:
    """Of two slots one is given up, after ten seconds, and nothing is lost or asked for twice."""
    options = ["--keys", str(keys), "--jobs", "2"]
    # Requests take the same time whatever the machine does: they are not slowed down for its sake.
    options += ["--latency-tolerance", "1000", "--requests-per-model", "8"]
    options += ["--requests-at-first", "8"]
    ids = [f"{n:03}" for n in range(500)]
    with mock_upstream() as mock, server(tmp_path / "data", mock.url, *options) as running:
        ann, bob = running.client("ann-1"), running.client("bob-1")
        large = [submit(ann, [line(name, "[slow 200]") for name in ids]) for _ in range(2)]
        for batch in large:
            wait_until(
                "a start",
                lambda batch=batch: ann.batches.retrieve(batch.id).request_counts.completed,
            )
        small = ended(bob, submit(bob, [line("b")]))
        assert small.status == "completed"
        assert "a batch makes way for another" in running.log.read_text()
        for batch in large:
            batch = ended(ann, batch, patience_s=120)
            assert batch.status == "completed"
            assert all_ids(ann, batch) == ids
        assert len(mock.seen()["requests"]) == 1001, "what was in flight has ended"


def test_who_may_be_anybody_is_no_admin(tmp_path: Path) -> None:
    with server(tmp_path / "data", "http://127.0.0.1:1") as running:
        url = running.url
        assert httpx.post(f"{url}/CreateUser", json={"name": "u"}).status_code == 200
    running = Server(tmp_path / "open", ["--anonymous"])
    running.listen = "0.0.0.0"
    try:
        running.start()
        answer = httpx.post(f"{running.url}/CreateUser", json={"name": "u"})
        assert answer.status_code == 403
        assert list(running.client().files.list()) == []
    finally:
        if running.process:
            running.kill()


@pytest.mark.parametrize("variable", ["KVTIDE_BATCH_KEYS", "KVTIDE_API_KEYS"])
def test_keys_can_be_named_by_either_variable(keys: Path, tmp_path: Path, variable: str) -> None:
    environment = {variable: str(keys)}
    with server(tmp_path / "data", "http://127.0.0.1:1", environment=environment) as running:
        assert httpx.get(f"{running.url}/v1/files").status_code == 401
        assert list(client_of(running, "ann-1").batches.list()) == []
        assert "NO API KEYS" not in running.log.read_text()


def test_an_open_server_says_so_and_names_variables_that_mean_nothing(tmp_path: Path) -> None:
    environment = {
        "KVTIDE_BATCH_KEY": "/keys.json",
        # What Kubernetes sets in every container beside a Service named kvtide-batch.
        "KVTIDE_BATCH_SERVICE_HOST": "10.0.0.1",
        "KVTIDE_BATCH_PORT_8090_TCP_ADDR": "10.0.0.1",
    }
    with server(tmp_path / "data", "http://127.0.0.1:1", environment=environment) as running:
        log = running.log.read_text()
    assert "NO API KEYS" in log
    assert "KVTIDE_BATCH_KEY is set and no setting" in log
    assert "KVTIDE_BATCH_SERVICE_HOST" not in log
    assert "KVTIDE_BATCH_PORT" not in log


def test_another_site_s_page_is_not_obeyed_where_no_key_is_asked_for(tmp_path: Path) -> None:
    with server(tmp_path / "data", "http://127.0.0.1:1") as running:
        ours = f"localhost:{running.port}"
        form = {"purpose": (None, b"batch"), "file": ("in.jsonl", b"x")}

        def upload_from(**headers: str) -> int:
            answer = httpx.post(f"{running.url}/v1/files", files=form, headers=headers)
            if answer.status_code == 403:
                assert answer.json()["error"]["type"] == "permission_error"
            return answer.status_code

        assert upload_from(host=ours) == 200
        assert upload_from(host=ours, origin=f"http://{ours}") == 200
        assert upload_from(host=ours, origin="http://attacker.example") == 403
        assert upload_from(host=ours, origin="null") == 403
        assert upload_from(host=f"attacker.example:{running.port}") == 403
        for path in ("/v1/batches", "/status", "/metrics"):
            answer = httpx.get(running.url + path, headers={"host": "attacker.example"})
            assert answer.status_code == 403
        user = {"name": "u", "rpm": 1, "tpm": 1}
        answer = httpx.post(
            f"{running.url}/CreateUser", json=user, headers={"origin": "http://attacker.example"}
        )
        assert answer.status_code == 403
        assert len(list(running.client().files.list())) == 2


def test_pages_may_call_a_server_that_asks_for_keys(guarded: Server) -> None:
    headers = {"authorization": "Bearer ann-1", "origin": "http://page.example"}
    assert httpx.get(f"{guarded.url}/v1/batches", headers=headers).status_code == 200


def test_what_a_server_keeps_is_its_user_s_alone(upstream: Mock, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with server(data, upstream.url) as running:
        client = running.client()
        ended(client, submit(client, [line("a"), line("b", "[status 400 -1]")]))
        slow = submit(client, [line(str(n), "[slow 60000]" if n else "x") for n in range(2)])
        parts = data / "parts" / slow.id
        wait_until("a result", lambda: parts.exists() and list(parts.iterdir()))
        found = [data, *data.rglob("*")]
        names = {path.name for path in found}
        assert {"batch.sqlite", "batch.sqlite-wal", "files", "parts", slow.id} <= names
        open_to_others = [path for path in found if path.stat().st_mode & 0o077]
        assert open_to_others == []


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
        (["--upstream", "http://u:secret@h:p"], "--upstream must be a URL"),
        (["--upstream", "http://u:secret@h", "--upstream-key-file", "/dev/null"], "only one"),
        (["--latency-tolerance", "1"], "--latency-tolerance"),
        (["--database", "mysql://x", "--blobs", "file:///tmp"], "--database must begin"),
        (["--blobs", "memory:///"], "--blobs must be one of"),
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
    assert "secret" not in done.stderr


def test_the_status_names_models_to_an_admin_only(guarded: Server) -> None:
    def status(key: str | None) -> dict[str, object]:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        answer = httpx.get(f"{guarded.url}/status", headers=headers, timeout=30)
        assert answer.status_code == 200
        found: dict[str, object] = answer.json()
        return found

    assert isinstance(status("root-1")["models"], list)
    for other in (None, "ann-1", "wrong"):
        assert "models" not in status(other)
        assert "requests" in status(other)


# --- retried creates


RETRIED = {"x-stainless-retry-count": "1"}


def test_a_create_that_is_sent_again_gives_the_same_batch_while_that_goes_on(
    client: OpenAI,
) -> None:
    file = upload(client, jsonl([line("a", "[slow 20000]")]))

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
    assert create(True) == deliberate
    client.batches.cancel(deliberate)
    client.batches.cancel(first)
    another = create(True)
    assert another not in (first, deliberate), "they are cancelled, or about to be"
    for batch in client.batches.list(limit=100):
        if batch.input_file_id == file and batch.status in ("validating", "in_progress"):
            client.batches.cancel(batch.id)


def test_a_retry_that_fails_makes_the_next_no_batch_of_its_own(data: Path, upstream: Mock) -> None:
    """The answer to the first is lost, the database fails the second: the third is the first's."""
    with server(data, upstream.url) as running:
        client = running.client(max_retries=0)
        file = upload(client, jsonl([line("a", "[slow 60000]")]))
        order = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        first = client.batches.create(input_file_id=file, **order)  # type: ignore[call-overload]
        with contextlib.closing(sqlite3.connect(data / "batch.sqlite", timeout=60)) as db:
            db.execute("BEGIN IMMEDIATE")
            with pytest.raises(openai.InternalServerError):
                client.batches.create(  # type: ignore[call-overload]
                    input_file_id=file, extra_headers=RETRIED, **order
                )
            db.rollback()
        again = client.batches.create(  # type: ignore[call-overload]
            input_file_id=file, extra_headers=RETRIED, **order
        )
        assert again.id == first.id


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
    file = upload(client, jsonl([line("a", "[slow 5000]")]))
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
