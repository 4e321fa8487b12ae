"""Several engines in one process, as in notebooks, trainers and test suites."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engines.config import TESTS, Environment
from engines.several import BLOCK_TOKENS, BLOCKS, CONFIG

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
    said = [line for line in ended.stdout.splitlines() if line.startswith("counted: ")]
    assert ended.returncode == 0, ended.stdout[-6000:]
    counted = json.loads(said[0].removeprefix("counted: "))
    assert len(counted) == 4, "two engines at once, the first again, and one after them"
    assert [each["kvtide_hit_tokens_total"] for each in counted] == [
        BLOCKS * BLOCK_TOKENS * times for times in (1, 2, 3, 4)
    ]
    assert [each["kvtide_saved_blocks_total"] for each in counted] == [
        BLOCKS * times for times in (1, 2, 2, 3)
    ]
    assert {each["kvtide_pool_slots"] for each in counted} == {CONFIG.rows}
