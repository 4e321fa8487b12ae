"""`kvtide-control batch submit|status|watch|fetch|cancel`, and the announcement's quick start."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import socket
import subprocess
import sys
import termios
from pathlib import Path

from rig import CONTROL, Mock, Server, die_with_parent, free_port, jsonl, line, server

ROOT = Path(__file__).resolve().parents[3]


def run(shared: Server, *arguments: str, expect: int = 0, **more: object) -> str:
    done = subprocess.run(
        [CONTROL, "batch", *arguments, "--url", f"{shared.url}/v1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **more,  # type: ignore[call-overload]
    )
    assert done.returncode == expect, done.stderr
    return done.stdout or done.stderr


def test_a_batch_is_submitted_watched_and_fetched(shared: Server, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl([line("a"), line("b", "[status 400 -1]")]))
    batch = run(shared, "submit", str(tmp_path / "in.jsonl"), "--metadata", "k=v").strip()
    watched = json.loads(run(shared, "watch", batch))
    assert (watched["status"], watched["metadata"]) == ("completed", {"k": "v"})
    assert json.loads(run(shared, "status", batch)) == watched
    paths = run(shared, "fetch", batch, "--directory", str(tmp_path)).split()
    ids = [json.loads(Path(path).read_text())["custom_id"] for path in paths]
    assert ids == ["a", "b"]
    assert not list(tmp_path.glob("*.part"))


def test_a_batch_that_is_watched_on_a_terminal_has_a_progress_bar(
    shared: Server, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl([line(str(n), "[slow 3000]") for n in range(4)]))
    command = [CONTROL, "batch", "submit", "--watch", tmp_path / "in.jsonl"]
    terminal, other_end = pty.openpty()
    # A new terminal has no width, and a bar no room.
    termios.tcsetwinsize(other_end, (24, 100))
    watching = subprocess.Popen(
        [*command, "--url", f"{shared.url}/v1"],
        stdout=subprocess.PIPE,
        stderr=other_end,
        text=True,
        preexec_fn=die_with_parent,
    )
    os.close(other_end)
    drawn = b""
    # Linux says EIO when nobody has the terminal open any more.
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 4096):
            drawn += piece
    os.close(terminal)
    said, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0
    assert '"completed"' in said
    assert re.search(rb"in_progress +\[[=> ]{40}\] \d/4", drawn), drawn
    assert b"[" + b"=" * 40 + b"] 4/4" in drawn


def test_a_batch_that_fails_gives_an_exit_status(shared: Server, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(line("a")) + "\nnonsense\n")
    said = run(shared, "submit", "--watch", str(tmp_path / "in.jsonl"), expect=2)
    assert '"invalid_json_line"' in said
    assert '"line": 2' in said


def test_a_batch_is_cancelled(shared: Server, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl([line("a", "[slow 60000]")]))
    batch = run(shared, "submit", str(tmp_path / "in.jsonl")).strip()
    assert run(shared, "cancel", batch).strip() == "cancelling"
    run(shared, "watch", batch, expect=2)


def test_what_is_wrong_is_said(shared: Server, tmp_path: Path) -> None:
    assert "No such Batch" in run(shared, "status", "batch_0", expect=1)
    assert "nothing.jsonl" in run(shared, "submit", "nothing.jsonl", expect=1)
    (tmp_path / "in.jsonl").write_text("{}\n")
    assert "--endpoint" in run(shared, "submit", str(tmp_path / "in.jsonl"), expect=1)
    file = tmp_path / "good.jsonl"
    file.write_bytes(jsonl([line("a")]))
    said = run(shared, "submit", str(file), "--window", "1d", expect=1)
    assert "parameter completion_window" in said


def test_the_quick_start_works_as_written(shared: Server, tmp_path: Path) -> None:
    """The Python and the JSON of docs/batch.md, word for word; only the address is another."""
    page = (ROOT / "docs" / "batch.md").read_text()
    start = page.split("## Quick start")[1].split("\n## ")[0]
    requests = re.findall(r"```json\n(.*?)```", start, re.DOTALL)[0]
    program = re.findall(r"```python\n(.*?)```", start, re.DOTALL)[0]
    (tmp_path / "requests.jsonl").write_text(requests)
    ids = [
        json.loads(text)["custom_id"]
        for text in quick_start(program, shared, tmp_path).split("\n")
        if text
    ]
    assert sorted(ids) == ["req-1", "req-2"]


def quick_start(program: str, shared: Server, directory: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=directory,
        env={**os.environ, "OPENAI_BASE_URL": f"{shared.url}/v1", "OPENAI_API_KEY": "none"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_quick_start_shows_what_was_refused(shared: Server, tmp_path: Path) -> None:
    """Requests that the engine refuses leave no output file, wrong lines no file at all."""
    page = (ROOT / "docs" / "batch.md").read_text().split("## Quick start")[1]
    program = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    (tmp_path / "requests.jsonl").write_bytes(jsonl([line("refused-1", "[status 400 -1]")]))
    assert "refused-1" in quick_start(program, shared, tmp_path)
    (tmp_path / "requests.jsonl").write_text("no request\n")
    assert "invalid_json_line" in quick_start(program, shared, tmp_path)


def test_a_text_with_a_byte_order_mark_is_submitted(shared: Server, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl([line("a"), line("b")]))
    said = run(shared, "submit", "--watch", str(tmp_path / "in.jsonl"))
    assert '"completed"' in said


def test_what_a_pipe_gives_is_submitted(shared: Server, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl([line(str(n)) for n in range(1000)]))
    command = f"{CONTROL} batch submit --url {shared.url}/v1 --watch <(cat {tmp_path}/in.jsonl)"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.split("\n", 1)[1])["request_counts"]
    assert (counts["total"], counts["completed"]) == (1000, 1000)


def test_results_go_to_a_directory_that_is_made(shared: Server, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl([line("a")]))
    said = run(shared, "submit", "--watch", str(tmp_path / "in.jsonl"))
    batch = said.split("\n", 1)[0]
    paths = run(shared, "fetch", batch, "--directory", str(tmp_path / "a" / "b")).split()
    assert [Path(path).parent for path in paths] == [tmp_path / "a" / "b"]


def says(*arguments: str, environment: dict[str, str] | None = None) -> str:
    """What a command that fails says, and that it fails in time."""
    done = subprocess.run(
        [CONTROL, "batch", *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode not in (0, None), done.stdout
    return done.stderr


def test_a_server_that_cannot_be_called_is_told_with_what_to_do(tmp_path: Path) -> None:
    said = says("status", "batch_1", "--url", "localhost:8090/v1")
    assert "--url" in said
    assert "http://" in said
    said = says("status", "batch_1", "--url", f"http://127.0.0.1:{free_port()}")
    assert "Connection refused" in said
    assert "is the server running" in said
    said = says("status", "batch_1", "--url", "http://u:secret@127.0.0.1:1")
    assert "--api-key" in said
    assert "secret" not in said
    (tmp_path / "empty.jsonl").touch()
    said = says("submit", str(tmp_path / "empty.jsonl"), "--url", "http://127.0.0.1:1")
    assert "is empty" in said
    assert "directory" in says("submit", str(tmp_path), "--url", "http://127.0.0.1:1")


def test_a_server_that_is_stopped_is_not_waited_for_for_ever() -> None:
    """As one that a debugger or SIGSTOP holds: connections are made, and nothing is said."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "does not answer" in says("status", "batch_1", "--url", url)


def test_a_server_listens_where_a_name_says(tmp_path: Path, upstream: Mock) -> None:
    with server(tmp_path / "data", upstream.url, listen="localhost") as running:
        assert list(running.client().batches.list()) == []
    said = says("--listen", "8090", "--data", str(tmp_path / "data"))
    assert "--listen" in said
    assert "localhost:8090" in said


def options_of_help() -> dict[str, str]:
    """Every option of the server, and the variable that its help names."""
    done = subprocess.run([CONTROL, "batch", "--help"], capture_output=True, text=True, check=True)
    found = re.findall(
        r"^\s+(?:-\w, )?--([\w-]+)(.*?)(?=^\s+(?:-\w, )?--|\Z)", done.stdout, re.M | re.S
    )
    variables = {name: re.search(r"\[env: (\w+)", text) for name, text in found}
    return {name: variable[1] if variable else "" for name, variable in variables.items()}


def test_every_option_can_be_set_by_the_variable_that_is_documented() -> None:
    options = options_of_help()
    assert len(options) > 25
    del options["help"]
    page = (ROOT / "docs" / "batch.md").read_text()
    for name, variable in options.items():
        others = {"log": "KVTIDE_LOG", "log-format": "KVTIDE_LOG_FORMAT"}
        expected = others.get(name, "KVTIDE_BATCH_" + name.upper().replace("-", "_"))
        assert variable == expected
        if name in others:
            assert f"`{expected}`" in page
    assert "`KVTIDE_API_KEYS`" in page
    # That a variable is read shows in what the help says of it, or in what is refused.
    secret = {"database", "upstream", "blobs"}
    shown = subprocess.run(
        [CONTROL, "batch", "--help"],
        env={**os.environ, **{variable: f"probe-{name}" for name, variable in options.items()}},
        capture_output=True,
        text=True,
        check=False,
    )
    for name, variable in options.items():
        assert (f"[env: {variable}=probe-{name}]" in shown.stdout) == (name not in secret), name


def test_help_shows_nothing_secret_of_the_environment() -> None:
    environment = {
        "KVTIDE_BATCH_DATABASE": "postgres://u:secret@h/d",
        "KVTIDE_BATCH_UPSTREAM": "http://u:secret@h",
        "KVTIDE_BATCH_BLOBS": "s3://u:secret@h",
        "OPENAI_API_KEY": "secret",
        "OPENAI_BASE_URL": "http://u:secret@h",
    }
    for command in ([], ["submit"], ["status"], ["watch"], ["fetch"], ["cancel"]):
        done = subprocess.run(
            [CONTROL, "batch", *command, "--help"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "secret" not in done.stdout


def test_every_option_has_a_line_of_help() -> None:
    done = subprocess.run([CONTROL, "batch", "--help"], capture_output=True, text=True, check=True)
    assert "Commands:" in done.stdout
    for name in ("--listen", "--upstream", "--keys", "--database", "--blobs", "--priority"):
        assert name in done.stdout
