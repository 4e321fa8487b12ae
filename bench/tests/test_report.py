"""Percentiles, comparison of outputs, and the shape of report.json."""

import dataclasses
import json
from pathlib import Path

import pytest

from bench.demo import __main__ as cli
from bench.demo import plot, report
from bench.demo.client import Answer
from bench.demo.metrics import Counters
from bench.percentile import percentile


def answer(
    conversation: int, turn: int, ttft_s: float = 0.1, tpot_s: float | None = 0.02
) -> Answer:
    return Answer(conversation, turn, "yes", (5, 6), 100, 2, ttft_s, tpot_s)


def counters(host: float = 0.0, *, has_kvtide: bool = False) -> Counters:
    return Counters(1000, 300, host, {"host": host} if has_kvtide else {}, host, 4096, has_kvtide)


def run(name: str, *answers: Answer, measured: Counters | None = None) -> report.Run:
    return report.Run(name, answers, measured or counters(), wall_s=2.0, boot_s=30.0)


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1.0), (25, 1.75), (50, 2.5), (99, 3.97), (100, 4.0)]
)
def test_percentile_interpolates_like_numpy(percent: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == pytest.approx(expected)


def test_percentile_of_one_value_is_that_value() -> None:
    assert percentile([7.0], 99) == 7.0


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_report_has_the_promised_shape() -> None:
    built = report.build(
        [
            run("vllm", answer(0, 0), answer(1, 0, ttft_s=0.3)),
            run("kvtide", answer(0, 0), answer(1, 0), measured=counters(500, has_kvtide=True)),
        ],
        machine=report.describe_machine(),
        commit=None,
    )
    built = json.loads(json.dumps(built))
    assert built["outputs_identical"] is True
    assert set(built["machine"]) == {"cpu", "cores", "memory_gib", "system"}
    stock, kvtide = built["runs"]
    assert stock["ttft_ms"] == {"p50": 200.0, "p99": 298.0}
    assert stock["tpot_ms"] == {"p50": 20.0, "p99": 20.0}
    assert stock["throughput_tok_s"] == 2.0
    assert stock["hit_rate"] == {"gpu": 0.3, "host": 0.0}
    assert kvtide["hit_rate"] == {"gpu": 0.3, "host": 0.5}
    assert kvtide["tokens_loaded"] == 500
    assert kvtide["bytes_saved"] == 4096
    assert len(kvtide["samples"]) == kvtide["requests"] == 2


@pytest.mark.parametrize("change", [{"text": "no"}, {"token_ids": (5, 7)}, {"prompt_tokens": 99}])
def test_any_difference_in_output_is_found(change: dict[str, object]) -> None:
    stock = run("vllm", answer(0, 0), answer(1, 0))
    other = run("kvtide", answer(0, 0), dataclasses.replace(answer(1, 0), **change))
    (found,) = report.differences(stock, other)
    assert found.startswith("conversation 2, turn 1: vllm")
    assert report.build([stock, other])["outputs_identical"] is False


def test_speed_is_no_difference_in_output() -> None:
    slow, quick = run("vllm", answer(0, 0, ttft_s=9.0)), run("kvtide", answer(0, 0, tpot_s=None))
    assert report.differences(slow, quick) == []


def test_single_token_answers_leave_no_gap_to_average() -> None:
    assert run("vllm", answer(0, 0, tpot_s=None)).to_json()["tpot_ms"] == {"p50": 0.0, "p99": 0.0}


def test_baseline_alone_has_no_verdict() -> None:
    alone = run("vllm", answer(0, 0))
    assert report.build([alone])["outputs_identical"] is None
    assert cli.verdict([alone]) == []


@pytest.mark.parametrize(
    ("measured", "complaint"),
    [
        (counters(has_kvtide=False), "missing from /metrics"),
        (counters(0, has_kvtide=True), "loaded nothing"),
    ],
)
def test_a_run_in_which_kvtide_did_nothing_fails(measured: Counters, complaint: str) -> None:
    (wrong,) = cli.verdict(
        [run("vllm", answer(0, 0)), run("kvtide", answer(0, 0), measured=measured)]
    )
    assert complaint in wrong


def test_a_useful_run_passes() -> None:
    useful = run("kvtide", answer(0, 0), measured=counters(500, has_kvtide=True))
    assert cli.verdict([run("vllm", answer(0, 0)), useful]) == []


def test_table_and_plot_are_made_from_the_report(tmp_path: Path) -> None:
    built = report.build(
        [
            run("vllm", answer(0, 0), answer(0, 1)),
            run("kvtide", answer(0, 0), answer(0, 1), measured=counters(500, has_kvtide=True)),
        ]
    )
    text = report.table(built)
    assert "TTFT p99 (ms)" in text
    assert "prompt tokens from kvtide host" in text
    assert max(map(len, text.splitlines())) <= 80
    plot.draw(built, tmp_path / "ttft.png")
    assert (tmp_path / "ttft.png").read_bytes().startswith(b"\x89PNG")
