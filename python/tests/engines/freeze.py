"""Stops single threads of an engine, so that a copy takes exactly as long as a test wants.

SIGSTOP stops whole processes; tracing stops one thread. Engines are descendants of the test's
process, which Linux allows to trace them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PTRACE_DETACH = 17
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
WAIT_ALL = 0x40000000
"""`__WALL`: also for threads."""

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


def threads_named(process: int, ending: str) -> list[int]:
    """Threads of a process whose names end so."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return [int(t.name) for t in tasks if (t / "comm").read_text().strip().endswith(ending)]


def trace(request: int, thread: int) -> None:
    """One call of ptrace(2)."""
    if libc.ptrace(request, thread, None, None) == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


@contextmanager
def frozen(process: int, ending: str) -> Iterator[None]:
    """Within the block, threads whose names end so do not run."""
    stopped: list[int] = []
    threads = threads_named(process, ending)
    assert threads, f"no thread {ending}"
    try:
        for thread in threads:
            try:
                trace(PTRACE_SEIZE, thread)
            except PermissionError:
                pytest.skip("this machine does not let a process trace its children")
            stopped.append(thread)
            trace(PTRACE_INTERRUPT, thread)
            os.waitpid(thread, WAIT_ALL)
        yield
    finally:
        for thread in stopped:
            trace(PTRACE_DETACH, thread)
