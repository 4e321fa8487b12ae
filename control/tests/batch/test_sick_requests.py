"""Requests that are never answered, beside others that are: whom they hold up, and how they end."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import Batch
from rig import (
    Server,
    all_ids,
    ended,
    free_port,
    line,
    mock_upstream,
    results,
    server,
    submit,
    wait_until,
)

ATTEMPTS = 5


def counts(batch: Batch) -> tuple[int, int]:
    assert batch.request_counts is not None
    return batch.request_counts.completed, batch.request_counts.failed


def status(running: Server) -> dict[str, Any]:
    return httpx.get(f"{running.url}/status", timeout=30).json()


@pytest.mark.parametrize(("sick", "code"), [(1, 504), (3, 503), (20, 502)])
def test_requests_that_nobody_ever_answers_end_after_their_attempts(
    data: Path, sick: int, code: int
) -> None:
    with mock_upstream() as mock, server(data, mock.url) as running:
        client = running.client()
        names = [f"sick-{n}" for n in range(sick)]
        lines = [line(name, f"[status {code} -1] {name}") for name in names]
        lines += [line(str(n), str(n)) for n in range(500)]
        batch = ended(client, submit(client, lines))
        assert batch.status == "completed"
        assert counts(batch) == (500, sick)
        failed = results(client, batch.error_file_id)
        assert sorted(item["custom_id"] for item in failed) == sorted(names)
        assert {item["response"]["status_code"] for item in failed} == {code}
        asked = Counter(mock.contents())
        for name in names:
            # A first attempt while nothing else was answered does not count.
            assert asked[f"[status {code} -1] {name}"] - ATTEMPTS in (0, 1)
        assert sum(asked.values()) < 500 + 2 * ATTEMPTS * sick + 2 * ATTEMPTS


def test_sick_requests_that_come_first_hold_up_nothing(data: Path) -> None:
    """What has one prompt is sent together: in one of these batches, the sick come first."""
    with mock_upstream() as mock, server(data, mock.url) as running:
        client = running.client()
        sick = [line(f"sick-{n}", "[status 503 -1]") for n in range(30)]
        batches = [
            submit(client, [*sick, *(line(str(n), f"prompt {salt}") for n in range(200))])
            for salt in range(4)
        ]
        for batch in batches:
            batch = ended(client, batch)
            assert (batch.status, counts(batch)) == ("completed", (200, 30))


def test_sick_requests_hold_up_no_other_tenant(data: Path, tmp_path: Path) -> None:
    entries = [
        {"tenant": name, "sha256": hashlib.sha256(name.encode()).hexdigest()}
        for name in ("ann", "bob")
    ]
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": entries}))
    options = ["--keys", str(keys), "--jobs", "8", "--backoff-ms", "4000"]
    with mock_upstream() as mock, server(data, mock.url, *options) as running:
        ann, bob = running.client("ann"), running.client("bob")
        sick = [submit(ann, [line("sick", "[status 503 -1]"), line("ok")]) for _ in range(6)]
        wait_until("six failures", lambda: mock.contents().count("[status 503 -1]") >= 6)
        batch = ended(bob, submit(bob, [line(str(n)) for n in range(200)]))
        assert (batch.status, counts(batch)) == ("completed", (200, 0))
        # Their pauses alone take fourteen seconds at the least.
        for batch in sick:
            assert ann.batches.retrieve(batch.id).status == "in_progress"
        for batch in sick:
            assert counts(ended(ann, batch, patience_s=120)) == (1, 1)


def test_one_503_that_asks_for_a_long_pause_stops_no_other_request(data: Path) -> None:
    with mock_upstream() as mock, server(data, mock.url) as running:
        client = running.client()
        lines = [line("sick", "[retry 503 -1 600]")]
        batch = submit(client, [*lines, *(line(str(n)) for n in range(300))])

        def answered() -> bool:
            return counts(client.batches.retrieve(batch.id)) == (300, 0)

        wait_until("all others", answered)
        assert mock.contents().count("[retry 503 -1 600]") == 1, "it is left alone itself"
        assert status(running)["requests"] == {"in_flight": 0, "to_repeat": 1}


def test_status_tells_what_waits_for_an_upstream_that_is_down(data: Path) -> None:
    with mock_upstream() as mock, server(data, mock.url) as running:
        client = running.client()
        batch = submit(client, [line(str(n), "[status 503 -1]") for n in range(20)])

        def condition() -> str | None:
            models = status(running)["models"]
            return models[0]["condition"] if models else None

        wait_until("the model to be down", lambda: condition() == "unavailable")
        (model,) = status(running)["models"]
        assert (model["model"], model["tenants"]) == ("mock", 1)
        assert model["to_repeat"] >= 8
        assert counts(client.batches.retrieve(batch.id)) == (0, 0)


def test_a_429_that_does_not_say_how_long_is_not_repeated_hundreds_of_times(data: Path) -> None:
    with mock_upstream() as mock, server(data, mock.url) as running:
        client = running.client()
        batch = submit(client, [line(str(n), "[status 429 -1]") for n in range(1000)])
        wait_until("a refusal", mock.contents)
        before = len(mock.contents())
        time.sleep(5)
        assert len(mock.contents()) - before < 100
        assert status(running)["models"][0]["condition"] == "rate_limited"
        assert counts(client.batches.retrieve(batch.id)) == (0, 0)


# --- a key that the upstream refuses


def refused_batch(running: Server) -> Batch:
    """A batch whose upstream refuses the key, once that is known."""
    client = running.client()
    batch = submit(client, [line(str(n)) for n in range(300)])

    def is_refused() -> bool:
        return any(model["condition"] == "refused" for model in status(running)["models"])

    wait_until("the key to be refused", is_refused)
    assert counts(client.batches.retrieve(batch.id)) == (0, 0), "none is burnt"
    assert "it answers with status 401" in running.log.read_text()
    return batch


def test_a_batch_waits_for_a_key_to_be_mended(data: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with server(data, f"http://{address}") as running:
        with mock_upstream("--key", "secret", listen=address):
            batch = refused_batch(running)
        with mock_upstream(listen=address):
            batch = ended(running.client(), batch)
        assert (batch.status, counts(batch)) == ("completed", (300, 0))


def test_a_key_that_stays_refused_ends_the_batch_with_the_upstream_s_answers(data: Path) -> None:
    with (
        mock_upstream("--key", "secret") as mock,
        server(data, mock.url, "--refused-for-s", "3") as running,
    ):
        client = running.client()
        batch = ended(client, refused_batch(running))
        assert (batch.status, counts(batch)) == ("completed", (0, 300))
        failed = results(client, batch.error_file_id)
        assert {item["response"]["status_code"] for item in failed} == {401}


def test_one_request_that_is_forbidden_among_others_fails_alone(data: Path) -> None:
    with mock_upstream() as mock, server(data, mock.url) as running:
        client = running.client()
        lines = [line("forbidden", "[status 403 -1]"), *(line(str(n)) for n in range(50))]
        batch = ended(client, submit(client, lines))
        assert (batch.status, counts(batch)) == ("completed", (50, 1))


# --- answers that are none


def test_an_error_under_status_200_is_tried_again_and_then_stands_in_the_error_file(
    data: Path,
) -> None:
    with mock_upstream() as mock, server(data, mock.url) as running:
        client = running.client()
        lines = [line("never", "[error -1]"), line("mended", "[error 2]"), line("well")]
        batch = ended(client, submit(client, lines))
        assert counts(batch) == (2, 1)
        assert mock.contents().count("[error -1]") == ATTEMPTS
        (item,) = results(client, batch.error_file_id)
        assert item["custom_id"] == "never"
        assert item["response"]["status_code"] == 200
        assert item["response"]["body"]["error"]["message"] == "as you wish"


def test_no_character_ends_a_line_but_the_line_feed(data: Path) -> None:
    """Python's splitlines() and httpx's iter_lines() end lines at these three, too."""
    odd = "a\u2028b\u2029c\u0085d"
    large = "e" * 40_000 + odd
    with mock_upstream() as mock, server(data, mock.url) as running:
        client = running.client()
        lines = [line(f"ok {odd}", odd), line("large", large), line("no", f"[status 400 -1] {odd}")]
        lines.append(line(f"broken {odd}", "[broken -1]"))
        batch = ended(client, submit(client, lines))
        assert all_ids(client, batch) == sorted([f"ok {odd}", "large", "no", f"broken {odd}"])
        for file, count in ((batch.output_file_id, 2), (batch.error_file_id, 2)):
            assert file is not None
            text = client.files.content(file).text
            assert len(text.splitlines()) == count == text.count("\n")
        answers = {
            item["custom_id"]: item["response"]["body"]["choices"][0]["message"]["content"]
            for item in results(client, batch.output_file_id)
        }
        assert answers == {f"ok {odd}": odd, "large": large}
