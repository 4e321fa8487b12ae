"""`kvtide-control batch submit|status|watch|fetch|cancel`, and the announcement's quick start."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

from rig import CONTROL, Server, die_with_parent, jsonl, line

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
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "OPENAI_BASE_URL": f"{shared.url}/v1", "OPENAI_API_KEY": "none"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ids = [json.loads(text)["custom_id"] for text in done.stdout.split("\n") if text]
    assert sorted(ids) == ["req-1", "req-2"]


def test_every_option_has_a_line_of_help() -> None:
    done = subprocess.run([CONTROL, "batch", "--help"], capture_output=True, text=True, check=True)
    assert "Commands:" in done.stdout
    for name in ("--listen", "--upstream", "--keys", "--database", "--blobs", "--priority"):
        assert name in done.stdout
