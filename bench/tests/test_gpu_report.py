"""The table of the GPU's measurements."""

import json
import sys
from pathlib import Path

import pytest

from bench.gpu import report


def test_a_slowdown_is_given_in_per_cent() -> None:
    found = {"kvtide": {"new_cost": 0.0066}, "native": {"new_cost": 0.0149}}
    [row] = report.end_to_end(found)
    assert (row["value"], row["baseline"], row["unit"]) == pytest.approx((0.66, 1.49, "%"))


def test_a_commit_other_than_that_of_the_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu_found.json"
    path.write_text(json.dumps({"kvtide": {}, "workload": {"commit": "abcdef0"}}))
    arguments = ["report", "--found", str(path), "1234567", "--machine", "one H200"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert "the file says that abcdef0 was measured" in capsys.readouterr().err
