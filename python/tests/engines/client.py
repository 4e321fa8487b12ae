"""The test's end of an engine's process."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from engines.config import TESTS, EngineConfig, Environment, new_engine_id
from engines.segment_file import held_segment, named_segment
from engines.shared_memory import remove, shared_memory_of_vllm

START_LIMIT_S = 300.0
CALL_LIMIT_S = 240.0
EXIT_LIMIT_S = 60.0


class EngineError(AssertionError):
    """The engine's process failed; carries its traceback or the end of its log."""


class Nursery:
    """The process that engines are forked from; see `engines.nursery`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvtide-tests-")
        self._address = str(Path(self._folder.name) / "nursery")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "engines.nursery", self._address],
            cwd=TESTS,
            env=Environment().variables(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise EngineError("vLLM cannot be imported; see above")

    def connect(self) -> socket.socket:
        """A connection to a new process."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address)
        return connection

    def close(self) -> None:
        """Ends it; engines are ended on their own."""
        self._process.communicate(timeout=EXIT_LIMIT_S)
        self._folder.cleanup()


class EngineProcess:
    """A vLLM engine in a process of its own; methods of `engines.server.Engine` can be called."""

    def __init__(
        self,
        config: EngineConfig,
        model: Path,
        nursery: Nursery,
        engine_id: str | None = None,
        more_environment: dict[str, str] | None = None,
    ) -> None:
        self.config = config
        self.engine_id = engine_id or new_engine_id()
        self.named_segment = named_segment(self.engine_id)
        self.log = Path(tempfile.mkstemp(prefix="kvtide-engine-", suffix=".log")[1])
        self._connection = nursery.connect()
        self._lines = self._connection.makefile("rw")
        more = more_environment or {}
        environment = Environment(config.runner, config.async_scheduling, more).variables()
        birth = {"log": str(self.log), "environment": environment}
        self.pid = int(self._ask(birth, EXIT_LIMIT_S))
        self._process = psutil.Process(self.pid)
        try:
            self.description: dict[str, Any] = self._ask(
                {
                    "method": "start",
                    "config": config.as_json(),
                    "model": str(model),
                    "engine_id": self.engine_id,
                },
                START_LIMIT_S,
            )
        except BaseException:
            self.kill()
            self._forget()
            raise

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE

    def begin(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Asks without waiting for the answer, which `end` returns."""
        self._lines.write(json.dumps({"method": method, "args": args, "kwargs": kwargs}) + "\n")
        self._lines.flush()

    def is_blocked(self, limit_s: float = 60.0) -> bool:
        """After `begin`: whether the engine comes to a standstill before it answers."""
        limit = time.monotonic() + limit_s
        still = 0
        while time.monotonic() < limit:
            used = sum(self._process.cpu_times()[:2])
            if select.select([self._connection], [], [], 0.75)[0]:
                return False
            # Once may be for want of a core.
            still = still + 1 if sum(self._process.cpu_times()[:2]) - used < 0.05 else 0
            if still == 2:
                return True
        raise EngineError(f"neither an answer nor a standstill in {limit_s} s")

    def end(self) -> Any:
        """The answer to `begin`."""
        return self._answer("begin", CALL_LIMIT_S)

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._ask({"method": method, "args": args, "kwargs": kwargs}, CALL_LIMIT_S)

        return call

    def _ask(self, line: dict[str, Any], limit_s: float) -> Any:
        with contextlib.suppress(OSError):
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
        return self._answer(line.get("method", "fork"), limit_s)

    def _answer(self, what: str, limit_s: float) -> Any:
        text = ""
        with contextlib.suppress(OSError):
            readable, _, _ = select.select([self._connection], [], [], limit_s)
            if not readable:
                self.kill()
                raise EngineError(f"{what}: no answer in {limit_s} s\n{self.log_tail()}")
            text = self._lines.readline()
        if not text:
            raise EngineError(f"{what}: the engine died\n{self.log_tail()}")
        reply = json.loads(text)
        if "error" in reply:
            raise EngineError(f"{what}:\n{reply['error']}")
        return reply["value"]

    def log_tail(self, lines: int = 25) -> str:
        """The end of what the process has written."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    @property
    def segment(self) -> Path:
        """The shared segment, which has no name any more."""
        return held_segment(
            self.engine_id, [self._process, *self._process.children(recursive=True)]
        )

    def close(self) -> list[psutil.Process]:
        """Ends the engine in an orderly way; returns processes that it left behind."""
        family = self._family()
        leftovers = shared_memory_of_vllm(family)
        if self.is_alive():
            self._ask({"method": "close", "args": [], "kwargs": {}}, EXIT_LIMIT_S)
        _, left = psutil.wait_procs(family, timeout=EXIT_LIMIT_S)
        remove(leftovers)
        self._forget()
        return left

    def kill(self) -> None:
        """Ends the engine as a crash does, with everything that it started."""
        family = self._family()
        leftovers = shared_memory_of_vllm(family)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=EXIT_LIMIT_S)
        remove(leftovers)
        self._connection.close()

    def _forget(self) -> None:
        self._connection.close()
        self.log.unlink(missing_ok=True)

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self._process, *self._process.children(recursive=True)]
        return []


class EngineSlot:
    """Holds at most one engine: tests with equal configurations use the same one."""

    def __init__(self, model: Path, nursery: Nursery) -> None:
        self._model = model
        self._nursery = nursery
        self._engine: EngineProcess | None = None
        self.boots: list[tuple[str, float]] = []

    def get(self, config: EngineConfig) -> EngineProcess:
        """An engine with this configuration and nothing cached."""
        if self._engine is None or self._engine.config != config or not self._engine.is_alive():
            self.clear()
            started = time.monotonic()
            self._engine = EngineProcess(config, self._model, self._nursery)
            self.boots.append((config.name, time.monotonic() - started))
        return self._engine

    def discard(self) -> None:
        """Gives up an engine that may be in an unknown state."""
        if self._engine is not None:
            self._engine.kill()
            self._engine.named_segment.unlink(missing_ok=True)
            self._engine.log.unlink(missing_ok=True)
            self._engine = None

    def clear(self) -> None:
        """Ends the engine, if there is one, and makes sure that nothing is left of it."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        try:
            left = engine.close()
        except BaseException:
            engine.kill()
            raise
        assert not left, f"processes left behind: {left}"
        assert not engine.named_segment.exists(), f"left behind: {engine.named_segment}"
