"""Metrics and entries of the log line: those of the pages are those of the code."""

import ast
import re

import pytest

from bench.tests import pages
from bench.tests.pages import PAGES, ROOT

RUST = re.compile(r'metrics::(?:counter|gauge|histogram)!\(\s*"(\w+)"')
STATS = (ROOT / "python" / "kvtide" / "stats.py").read_text()
NO_METRICS = {"kvtide_control", "kvtide_control_batch", "kvtide_server"}
"""Names of crates and log targets."""


def table(name: str) -> dict[str, tuple[str, dict[str, str] | str]]:
    """`COUNTERS` or `GAUGES` of kvtide/stats.py."""
    tree = ast.parse(STATS)
    [value] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == name
    ]
    return ast.literal_eval(value)


def of_the_engine() -> set[str]:
    """As they are exposed: counters end in `_total`."""
    counters = {f"{name}_total" for name, _ in table("COUNTERS").values()}
    gauges = {name for name, _ in table("GAUGES").values()}
    others = re.findall(r'"(kvtide_\w+_(?:seconds|per_second))"', STATS)
    return counters | gauges | set(others)


def of_the_control_plane(prefix: str) -> set[str]:
    """Of one part of it."""
    return {name for name in RUST.findall(pages.text_of(*pages.CONTROL)) if prefix in name}


def of_the_daemon() -> set[str]:
    """Of `kvtide serve`."""
    return set(RUST.findall(pages.text_of("engine/server/src/**/*.rs")))


def named(page: str) -> set[str]:
    """Metrics in a page's code."""
    found = re.findall(r"(?<![\w:/.-])kvtide_[a-z_]+(?![\w/(])", " ".join(pages.page(page).code))
    return set(found) - NO_METRICS


@pytest.mark.parametrize(
    ("page", "exposed"),
    [
        ("docs/metrics.md", of_the_engine() | of_the_daemon()),
        ("docs/operations.md", of_the_control_plane("kvtide_control_")),
        ("docs/batch.md", of_the_control_plane("kvtide_batch_")),
    ],
)
def test_a_page_of_metrics_has_all_of_them_and_no_others(page: str, exposed: set[str]) -> None:
    assert exposed
    assert named(page) == exposed


def test_the_row_of_a_counter_has_its_labels() -> None:
    lines = [line.split("|") for line in pages.page("docs/metrics.md").text.splitlines()]
    rows = {cells[1].strip(" `"): cells[3] for cells in lines if len(cells) > 4}
    missing = [
        (name, label, value)
        for name, labels in table("COUNTERS").values()
        for label, value in dict(labels).items()
        if label not in rows[f"{name}_total"] or f'"{value}"' not in rows[f"{name}_total"]
    ]
    assert not missing


def test_no_page_names_a_metric_that_does_not_exist() -> None:
    exposed = of_the_engine() | of_the_daemon() | of_the_control_plane("kvtide_")
    assert not {
        (str(page), name) for page in PAGES for name in named(str(page)) if name not in exposed
    }


def test_the_log_line_has_the_entries_that_are_documented() -> None:
    tree = ast.parse(STATS)
    reduce = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "reduce"
    )
    written: set[str] = set()
    for node in ast.walk(reduce):
        if isinstance(node, ast.Dict):
            written |= {ast.literal_eval(key) for key in node.keys if key is not None}
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            written |= {name.replace("_", " ") for name in ast.literal_eval(node.iter)}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            key = node.targets[0].slice
            if isinstance(key, ast.Constant):
                written.add(key.value)
    rows = pages.page("docs/metrics.md").table("Entry")
    assert {entry for row in rows for entry in re.findall(r"`([^`]+)`", row[0])} == written
