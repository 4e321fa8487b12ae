"""Tests that need a GPU, and nothing of vLLM: run by `make test-gpu`.

Where there is no GPU they are skipped, unless KVTIDE_REQUIRE_GPU=1 says that there must be one.
"""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("KVTIDE_REQUIRE_GPU") == "1":
        return
    skip = pytest.mark.skip(reason="no GPU that CUDA can use")
    for item in items:
        item.add_marker(skip)
