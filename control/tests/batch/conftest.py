"""Fixtures: one mock upstream and one batch server for all tests that do nothing to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from rig import Mock, Server, mock_upstream, server


@pytest.fixture(scope="session")
def upstream() -> Iterator[Mock]:
    with mock_upstream() as mock:
        yield mock


@pytest.fixture(scope="session")
def shared(upstream: Mock, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("shared") / "data"
    options = ["--requests-at-first", "256", "--cancel-grace-s", "1"]
    with server(data, upstream.url, *options) as running:
        yield running


@pytest.fixture
def client(shared: Server) -> OpenAI:
    return shared.client(max_retries=0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"
