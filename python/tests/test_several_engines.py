"""Several engines in one process, as in notebooks, trainers and test suites."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engines.config import TESTS, Environment
from engines.several import LOADED_TOKENS

LIMIT_S = 500


@pytest.mark.engine
@pytest.mark.usefixtures("no_engine", "nothing_left")
@pytest.mark.parametrize("kind", ["llm", "async"])
def test_engines_of_one_process_start_and_are_all_counted(kind: str, tiny_model: Path) -> None:
    environment = Environment(more={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}).variables()
    ended = subprocess.run(
        [sys.executable, "-m", "engines.several", kind, str(tiny_model)],
        cwd=TESTS,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-6000:]
    [said] = [line for line in ended.stdout.splitlines() if line.startswith("added: ")]
    added = json.loads(said.removeprefix("added: "))
    assert [name for name, _ in added] == ["one", "other", "one", "other"]
    assert all(tokens and tokens % LOADED_TOKENS == 0 for _, tokens in added), added
