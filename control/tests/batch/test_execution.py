"""How batches are worked on: faults of the upstream, retries, expiry, limits, order, shutdown."""

from __future__ import annotations

import base64
import datetime
import itertools
import resource
import sqlite3
import time
from collections import Counter
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI
from rig import (
    Mock,
    Server,
    all_ids,
    end_window,
    ended,
    free_port,
    jsonl,
    line,
    mock_upstream,
    results,
    server,
    submit,
    upload,
    wait_until,
)


def test_what_another_attempt_mends_is_mended(client: OpenAI, upstream: Mock) -> None:
    commands = [
        "[status 500 2]",
        "[status 503 3]",
        "[status 408 1]",
        "[retry 429 2 0.05]",
        "[retry 503 1 0.05]",
        "[reset 2]",
        "[html 502 2]",
        "[broken 1]",
        "[error 2]",
        "[slow 200]",
    ]
    # What is answered at once is asked again where it has to be seen whether anybody is there.
    lines = [line("plain"), *(line(c, f"{c} mended") for c in commands)]
    batch = ended(client, submit(client, lines))
    assert batch.status == "completed"
    assert batch.error_file_id is None
    assert all_ids(client, batch) == sorted([*commands, "plain"])
    attempts = Counter(content.removesuffix(" mended") for content in upstream.contents())
    assert attempts["[status 500 2]"] == 3
    assert attempts["[reset 2]"] == 3
    assert attempts["[slow 200]"] == 1


def test_what_no_attempt_mends_is_told_with_what_was_last_heard(
    client: OpenAI, upstream: Mock
) -> None:
    commands = ["[status 500 -1]", "[reset -1]", "[html 500 -1]", "[broken -1]", "[status 422 -1]"]
    batch = ended(client, submit(client, [line(c, f"{c} hopeless") for c in commands]))
    assert batch.status == "completed"
    assert batch.output_file_id is None
    lines = {item["custom_id"]: item for item in results(client, batch.error_file_id)}
    assert lines["[status 500 -1]"]["response"]["status_code"] == 500
    assert lines["[html 500 -1]"]["response"]["body"]["error"]["message"].startswith("<html>")
    assert lines["[reset -1]"]["error"]["code"] == "upstream_connection_error"
    assert lines["[broken -1]"]["error"]["code"] == "invalid_response"
    assert lines["[broken -1]"]["response"] is None
    attempts = Counter(content.removesuffix(" hopeless") for content in upstream.contents())
    assert attempts["[status 500 -1]"] == 5
    assert attempts["[status 422 -1]"] == 1


def test_retry_after_is_obeyed(data: Path) -> None:
    with mock_upstream() as mock, server(data, mock.url) as running:
        client = running.client()
        began = time.monotonic()
        batch = ended(client, submit(client, [line("a", "[retry 429 1 2]")]))
        assert time.monotonic() - began >= 2
        assert batch.status == "completed"


def test_long_answers_are_passed_through_and_too_long_ones_are_refused(client: OpenAI) -> None:
    lines = [
        line("large", "[huge 5000000]"),
        line("small", "hi"),
        line("too large", "[huge 34000000]"),
    ]
    batch = ended(client, submit(client, lines))
    lengths = {
        item["custom_id"]: len(item["response"]["body"].get("text", ""))
        for item in results(client, batch.output_file_id)
    }
    assert lengths == {"large": 5_000_000, "small": 0}
    (refused,) = results(client, batch.error_file_id)
    assert refused["error"]["code"] == "response_too_large"


def test_an_attempt_that_takes_too_long_is_given_up(data: Path) -> None:
    options = ["--request-timeout-s", "1", "--attempts", "2"]
    with mock_upstream() as mock, server(data, mock.url, *options) as running:
        client = running.client()
        batch = ended(client, submit(client, [line("slow", "[slow 60000]"), line("ok")]))
        (item,) = results(client, batch.error_file_id)
        assert item["error"]["code"] == "request_timeout"
        assert mock.contents().count("[slow 60000]") == 2


def test_a_batch_waits_for_an_upstream_that_is_not_there(data: Path) -> None:
    port = free_port()
    with server(data, f"http://127.0.0.1:{port}") as running:
        client = running.client()
        batch = submit(client, [line(str(n)) for n in range(50)])
        name = "kvtide_batch_retries_total"
        wait_until("many failed attempts", lambda: running.metric(name) >= 12)
        assert client.batches.retrieve(batch.id).status == "in_progress"
        assert httpx.get(f"{running.url}/v1/models").status_code == 502
        with mock_upstream(listen=f"127.0.0.1:{port}"):
            batch = ended(client, batch)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 50


def test_the_upstream_is_sent_the_client_s_bytes_a_key_and_the_owner(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("secret\n")
    options = ["--upstream-key-file", str(tmp_path / "key")]
    with (
        mock_upstream("--key", "secret") as mock,
        server(data, f"{mock.url}/v1/", *options) as running,
    ):
        client = running.client()
        batch = ended(client, submit(client, [line("a")]))
        assert batch.output_file_id is not None
        (request,) = mock.seen()["requests"]
        (result,) = results(client, batch.output_file_id)
        assert request["user"] == "default"
        assert request["id"] == result["id"]


def test_a_name_and_a_password_in_the_upstream_s_url_are_sent_and_not_logged(data: Path) -> None:
    with mock_upstream() as mock:
        url = mock.url.replace("http://", "http://some%40one:se%3Acret@")
        with server(data, url) as running:
            ended(running.client(), submit(running.client(), [line("a")]))
            log = running.log.read_text()
        expected = base64.b64encode(b"some@one:se:cret").decode()
        assert mock.seen()["requests"][-1]["authorization"] == f"Basic {expected}"
        assert mock.url in log
        assert "cret" not in log


def test_a_priority_is_put_into_every_request(data: Path) -> None:
    with mock_upstream() as mock, server(data, mock.url, "--priority", "7") as running:
        client = running.client()
        ended(client, submit(client, [line("a")]))
        assert [request["priority"] for request in mock.seen()["requests"]] == [7]


def test_requests_with_a_common_prefix_are_sent_together(data: Path) -> None:
    options = ["--requests-per-job", "1"]
    systems = ["one " * 300, "two " * 300, "six " * 300]
    with mock_upstream() as mock, server(data, mock.url, *options) as running:
        client = running.client()
        lines = []
        for n in range(30):
            request = line(str(n), str(n))
            system = {"role": "system", "content": systems[n % 3]}
            request["body"]["messages"].insert(0, system)
            lines.append(request)
        ended(client, submit(client, lines))
        order = [int(content) % 3 for content in mock.contents()]
        changes = sum(a != b for a, b in itertools.pairwise(order))
        assert changes == 2, order


def test_several_models_may_be_mixed_if_the_operator_says_so(data: Path) -> None:
    with mock_upstream() as mock, server(data, mock.url, "--mixed-models") as running:
        client = running.client()
        lines = [line(str(n), model=["m", "n"][n % 2]) for n in range(10)]
        batch = ended(client, submit(client, lines))
        assert batch.status == "completed"
        assert batch.model is None
        assert Counter(r["model"] for r in mock.seen()["requests"]) == {"m": 5, "n": 5}


def test_no_more_requests_are_in_flight_than_allowed(data: Path) -> None:
    options = ["--requests-per-model", "3", "--requests-at-first", "100"]
    with mock_upstream("--service-ms", "5") as mock, server(data, mock.url, *options) as running:
        client = running.client()
        batches = [submit(client, [line(str(n)) for n in range(60)]) for _ in range(3)]
        for batch in batches:
            assert ended(client, batch).status == "completed"
        assert mock.seen()["most_at_once"] == 3


def test_an_upstream_that_is_full_is_not_flooded(data: Path) -> None:
    """429 without Retry-After: fewer at once, until they fit."""
    with (
        mock_upstream("--capacity", "2", "--queue", "2", "--service-ms", "5") as mock,
        server(data, mock.url, "--requests-at-first", "64") as running,
    ):
        client = running.client()
        batch = ended(client, submit(client, [line(str(n)) for n in range(300)]))
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 300
        assert running.metric("kvtide_batch_concurrency_limit") < 16


def test_results_stand_in_the_order_of_the_input_if_the_operator_says_so(data: Path) -> None:
    options = ["--ordered-output", "--requests-at-first", "64"]
    with mock_upstream() as mock, server(data, mock.url, *options) as running:
        client = running.client()
        commands = ["[slow 300]", "", "[huge 1500000]", "[status 400 -1]", "[status 500 2]"]
        lines = [line(f"{n:03}", f"{commands[n % 5]} {n % 7}") for n in range(60)]
        batch = ended(client, submit(client, lines))
        for file, count in ((batch.output_file_id, 48), (batch.error_file_id, 12)):
            ids = [item["custom_id"] for item in results(client, file)]
            assert ids == sorted(ids)
            assert len(ids) == count


def test_what_is_left_when_the_window_ends_is_told(data: Path, tmp_path: Path) -> None:
    """The window is an hour at the least, so the clock is moved in the database's stead."""
    options = ["--lease-ms", "500"]
    with mock_upstream() as mock, server(data, mock.url, *options) as running:
        client = running.client()
        lines = [line("done")] + [line(f"slow-{n}", "[slow 60000]") for n in range(5)]
        batch = submit(client, lines)
        wait_until("a result", lambda: client.batches.retrieve(batch.id).request_counts.completed)
        running.kill()
        end_window(data, batch.id, int(time.time()) + 1)
        running.start()
        batch = ended(client, batch)
        assert batch.status == "expired"
        assert batch.expired_at is not None
        assert [item["custom_id"] for item in results(client, batch.output_file_id)] == ["done"]
        left = results(client, batch.error_file_id)
        assert {item["error"]["code"] for item in left} == {"batch_expired"}
        assert len(left) == 5


def test_expired_files_disappear(data: Path) -> None:
    with mock_upstream() as mock, server(data, mock.url) as running:
        client = running.client()
        file = upload(client, jsonl([line("a")]))
        running.kill()
        with sqlite3.connect(data / "batch.sqlite") as db:
            db.execute("UPDATE files SET expires_at = 1")
        db.close()
        running.start()
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file)
        assert list(client.files.list()) == []
        wait_until("its bytes to be gone", lambda: not list((data / "files").iterdir()))


def test_a_deleted_input_file_is_kept_until_its_batch_has_ended(data: Path) -> None:
    with mock_upstream() as mock, server(data, mock.url) as running:
        client = running.client()
        batch = submit(client, [line(str(n), "[slow 500]") for n in range(5)])
        client.files.delete(batch.input_file_id)
        running.kill()
        running.start()
        batch = ended(client, batch)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 5


def test_sigterm_lets_requests_end_and_the_rest_is_done_after_the_restart(data: Path) -> None:
    with mock_upstream("--service-ms", "20") as mock, server(data, mock.url) as running:
        client = running.client()
        batch = submit(client, [line(str(n)) for n in range(500)])
        wait_until("a result", lambda: client.batches.retrieve(batch.id).request_counts.completed)
        assert running.stop() == 0
        asked = len(mock.seen()["requests"])
        assert asked < 500
        running.start()
        batch = ended(client, batch)
        assert all_ids(client, batch) == sorted(str(n) for n in range(500))
        assert len(mock.seen()["requests"]) == 500, "nothing was asked for twice"


def test_a_second_server_in_the_same_directory_is_refused(shared: Server) -> None:
    second = Server(shared.data, ["--upstream", "http://127.0.0.1:1"])
    second.start(wait=False)
    assert second.process is not None
    assert second.process.wait(30) == 1
    assert "another server works in" in second.log.read_text()


def test_a_batch_that_waits_behind_another_is_cancelled_at_once(data: Path) -> None:
    with mock_upstream() as mock, server(data, mock.url, "--jobs", "1") as running:
        client = running.client()
        first = submit(client, [line(str(n), "[slow 60000]") for n in range(3)])
        wait_until("a start", lambda: client.batches.retrieve(first.id).status == "in_progress")
        ids = [str(n) for n in range(40)]
        waiting = submit(client, [line(name) for name in ids])
        wait_until(
            "its validation", lambda: client.batches.retrieve(waiting.id).request_counts.total
        )
        assert client.batches.cancel(waiting.id).status == "cancelling"
        batch = ended(client, waiting, patience_s=10)
        assert batch.status == "cancelled"
        assert batch.output_file_id is None
        assert all_ids(client, batch) == sorted(ids)
        codes = {item["error"]["code"] for item in results(client, batch.error_file_id)}
        assert codes == {"batch_cancelled"}
        assert batch.request_counts is not None
        assert (batch.request_counts.total, batch.request_counts.failed) == (40, 40)
        assert client.batches.retrieve(first.id).status == "in_progress"
        assert len(mock.seen()["requests"]) == 3


def test_a_batch_that_waits_behind_another_expires_in_time(data: Path) -> None:
    with mock_upstream() as mock, server(data, mock.url, "--jobs", "1") as running:
        client = running.client()
        batches = [submit(client, [line("a", "[slow 60000]")]) for _ in range(2)]
        for batch in batches:
            total = lambda: client.batches.retrieve(batch.id).request_counts.total  # noqa: B023, E731
            wait_until("its validation", total)
        running.kill()
        end_window(data, batches[1].id, int(time.time()) + 1)
        running.start()
        late = ended(client, batches[1], patience_s=20)
        assert late.status == "expired"
        assert all_ids(client, late) == ["a"]
        assert client.batches.retrieve(batches[0].id).status == "in_progress"


def test_a_model_that_is_down_holds_up_no_other(data: Path) -> None:
    """It has all job slots, and gives one up when somebody else can use it."""
    with mock_upstream() as mock, server(data, mock.url, "--jobs", "2") as running:
        client = running.client()
        dead = [line(str(n), "[status 503 -1]", model="dead") for n in range(20)]
        down = [submit(client, dead) for _ in range(4)]
        wait_until("the model to be asked", lambda: len(mock.contents()) > 8)
        live = ended(client, submit(client, [line(str(n)) for n in range(20)]))
        assert live.status == "completed"
        for batch in down:
            assert client.batches.retrieve(batch.id).status == "in_progress"


def test_requests_that_wait_out_a_pause_take_no_memory_of_others(data: Path) -> None:
    with mock_upstream() as mock, server(data, mock.url, "--memory-mib", "32") as running:
        client = running.client()
        long = "x" * 200_000
        paused = [line(str(n), f"[retry 429 -1 600]{long}", model="paused") for n in range(200)]
        waits = submit(client, paused)
        wait_until("a refusal", lambda: mock.seen()["requests"])
        live = ended(client, submit(client, [line(str(n), long) for n in range(50)]))
        assert live.status == "completed"
        assert client.batches.retrieve(waits.id).status == "in_progress"


def test_answers_that_cannot_be_kept_for_a_while_are_not_asked_for_again(data: Path) -> None:
    with mock_upstream() as mock, server(data, mock.url) as running:
        client = running.client()
        scratch = data / "scratch"
        ids = [str(n) for n in range(40)]
        file = upload(client, jsonl([line(name, "[huge 100000]") for name in ids]))
        # As good as a full disk for what is to be kept there.
        scratch.rename(data / "elsewhere")
        batch = client.batches.create(
            input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h"
        )
        said = "results cannot be recorded"
        wait_until("trouble", lambda: said in running.log.read_text())
        held = len(mock.seen()["requests"])
        assert held < 40, "no further requests meanwhile"
        (data / "elsewhere").rename(scratch)
        assert ended(client, batch).status == "completed"
        assert sorted(Counter(r["id"] for r in mock.seen()["requests"]).values()) == [1] * 40


def said_at(log: Path, text: str) -> list[datetime.datetime]:
    """When the server has said this."""
    lines = [entry for entry in log.read_text().splitlines() if text in entry]
    return [datetime.datetime.fromisoformat(entry.split()[0]) for entry in lines]


def test_a_batch_past_its_window_whose_end_cannot_be_written_waits_and_then_ends(
    data: Path,
) -> None:
    ids = [str(n) for n in range(10)]
    with mock_upstream() as mock, server(data, mock.url) as running:
        client = running.client()
        batch = submit(client, [line(name, "[slow 60000]") for name in ids])
        wait_until("a start", lambda: len(mock.contents()))
        running.kill()
        end_window(data, batch.id, int(time.time()) - 1)
        # Where the directory of its results should be there is something else.
        obstacle = data / "parts" / batch.id
        assert not obstacle.exists()
        obstacle.touch()
        running.start()
        said = "results cannot be recorded"
        wait_until("three attempts", lambda: len(said_at(running.log, said)) >= 3)
        with sqlite3.connect(data / "batch.sqlite") as db:
            (taken,) = db.execute("SELECT lease_epoch FROM batches").fetchone()
        db.close()
        # By the server that was killed, and once by this one: it is not given back and taken again.
        assert taken <= 3
        # Ever longer from one to the next, however slow the machine is besides.
        times = said_at(running.log, said)
        pauses = [(b - a).total_seconds() for a, b in itertools.pairwise(times)]
        assert pauses[0] > 0.2
        assert pauses[1] > 0.4
        assert client.batches.retrieve(batch.id).status == "in_progress"
        obstacle.unlink()
        batch = ended(client, batch)
        assert batch.status == "expired"
        assert all_ids(client, batch) == ids
        assert len(mock.contents()) <= 10, "nothing was asked for after the window"


def leave_descriptors(pid: int, count: int) -> None:
    """Allows a process so many more open files than it has."""
    (_, most) = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    few = len(list(Path(f"/proc/{pid}/fd").iterdir())) + count
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (few, most))


def test_a_lack_of_file_descriptors_is_held_against_nobody(data: Path) -> None:
    ids = [f"{n:03}" for n in range(120)]
    options = ["--requests-at-first", "120"]
    with mock_upstream("--service-ms", "200") as mock, server(data, mock.url, *options) as running:
        client = running.client()
        file = upload(client, jsonl([line(name) for name in ids]))
        assert running.process is not None
        pid = running.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        leave_descriptors(pid, 30)
        batch = client.batches.create(
            input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h"
        )
        said = "requests cannot be sent"
        wait_until("too few of them", lambda: said in running.log.read_text())
        assert "Too many open files" in running.log.read_text()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        batch = ended(client, batch)
        assert batch.status == "completed"
        assert batch.error_file_id is None
        assert all_ids(client, batch) == ids
        assert running.metric("kvtide_batch_retries_total") == 0
        assert len(mock.contents()) == 120, "each was asked for once"


def test_requests_that_wait_for_file_descriptors_lower_the_limit_and_can_be_cancelled(
    data: Path,
) -> None:
    options = ["--requests-at-first", "120", "--cancel-grace-s", "600"]
    # A new connection would need a descriptor.
    limits = httpx.Limits(keepalive_expiry=None)
    with (
        mock_upstream() as mock,
        server(data, mock.url, *options) as running,
        httpx.Client(limits=limits) as kept,
    ):
        client = running.client(http_client=kept)
        file = upload(client, jsonl([line(str(n), "[slow 3600000]") for n in range(120)]))
        assert running.process is not None
        assert running.metric("kvtide_batch_requests_in_flight", kept.get) == 0
        leave_descriptors(running.process.pid, 30)
        batch = client.batches.create(
            input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h"
        )

        def waiting() -> float:
            in_flight = running.metric("kvtide_batch_requests_in_flight", kept.get)
            return in_flight - len(mock.contents())

        said = "requests cannot be sent"
        wait_until("too few of them", lambda: said in running.log.read_text())
        assert waiting() > 0
        assert running.metric("kvtide_batch_concurrency_limit", kept.get) <= 60
        models = f"{running.url}/v1/models"
        lacking = "this server can make no further connection"
        wait_until("nothing to be left for another", lambda: lacking in kept.get(models).text)
        client.batches.cancel(batch.id)
        wait_until("only what was sent to be in flight", lambda: waiting() == 0)
        assert mock.contents()
        assert running.log.read_text().count(said) == 1
        assert client.batches.retrieve(batch.id).status == "cancelling"


def test_no_more_requests_of_a_batch_are_in_flight_than_allowed(data: Path) -> None:
    options = ["--requests-per-job", "2", "--requests-at-first", "100"]
    with mock_upstream("--service-ms", "5") as mock, server(data, mock.url, *options) as running:
        client = running.client()
        assert ended(client, submit(client, [line(str(n)) for n in range(60)])).status
        assert mock.seen()["most_at_once"] == 2


def test_requests_in_flight_share_the_memory_that_is_allowed(data: Path) -> None:
    """With 16 MiB there is room for fifteen requests of a megabyte and their answers."""
    options = ["--memory-mib", "32", "--requests-at-first", "256"]
    with mock_upstream() as mock, server(data, mock.url, *options) as running:
        client = running.client()
        lines = [line(str(n), "[slow 300]" + "x" * 1_000_000) for n in range(40)]
        assert ended(client, submit(client, lines)).status == "completed"
        assert 2 <= mock.seen()["most_at_once"] <= 15
