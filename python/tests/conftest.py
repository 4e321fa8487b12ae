"""Fixtures: the tiny model, right answers, and one running engine at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from engines.client import EngineProcess, EngineSlot, Nursery  # noqa: E402
from engines.config import EngineConfig  # noqa: E402
from engines.matrix import need_triton  # noqa: E402
from engines.workloads import Reference  # noqa: E402

SHARED_MEMORY = Path("/dev/shm")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "engine: starts vLLM on CPU (about 20 s for each start)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests without an engine first, then those that share one beside each other."""
    order: dict[EngineConfig, int] = {}

    def place(item: pytest.Item) -> tuple[int, int]:
        config = getattr(item, "callspec", None) and item.callspec.params.get("engine")
        if config is not None:
            return 2, order.setdefault(config, len(order))
        return (1 if item.get_closest_marker("engine") else 0), 0

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Lets fixtures know whether their test failed."""
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report


FAILED = pytest.StashKey[bool]()


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """Folder of a seeded random Llama."""
    pytest.importorskip("vllm", reason="no vLLM here: use the Python of provision.py vllm VERSION")
    script = TESTS.parent / "env" / "models.py"
    made = subprocess.run(
        [sys.executable, script, "tiny"], check=True, stdout=subprocess.PIPE, text=True
    )
    return Path(made.stdout.strip())


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Where engines' processes come from."""
    born = Nursery()
    yield born
    born.close()


@pytest.fixture(scope="session")
def reference(tiny_model: Path, nursery: Nursery) -> Reference:
    """Right answers, from vLLM without kvtide."""
    answers = Reference(tiny_model, nursery)
    answers.load()
    return answers


@pytest.fixture(scope="session")
def nothing_left() -> Iterator[None]:
    """After all tests, no segment is left that was not there before."""
    before = set(SHARED_MEMORY.glob("kvtide-*"))
    yield
    left = set(SHARED_MEMORY.glob(f"kvtide-tests-{os.getpid()}-*")) - before
    assert not left, f"left behind: {left}"


@pytest.fixture(scope="session")
def slot(tiny_model: Path, nursery: Nursery, nothing_left: None) -> Iterator[EngineSlot]:
    """Where the running engine is kept."""
    engines = EngineSlot(tiny_model, nursery)
    yield engines
    engines.clear()
    for name, seconds in engines.boots:
        print(f"booted {name} in {seconds:.0f} s")


@pytest.fixture
def engine(
    request: pytest.FixtureRequest, reference: Reference, slot: EngineSlot
) -> Iterator[EngineProcess]:
    """A running engine with the configuration that the test asks for, and nothing cached."""
    config: EngineConfig = request.param
    need_triton(config.runner)
    running = slot.get(config)
    assert running.reset(connector=True), "blocks are still in use"
    for what in ("received", "bad_blocks", "events", "preempted", "starts"):
        running.recorded(what)
    yield running
    if request.node.stash.get(FAILED, True):
        print(running.log_tail())
        slot.discard()


@pytest.fixture
def no_engine(slot: EngineSlot) -> None:
    """For tests that start vLLM themselves: the shared engine makes room."""
    slot.clear()
