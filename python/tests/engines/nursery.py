"""Forks a process for every engine that a test asks for.

Importing vLLM takes 10 to 20 s and starting the tiny model 3 s: so this process imports once, and
each connection to its socket becomes a forked process with one engine. It ends, without waiting for
engines, when its standard input is closed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

from engines.server import serve

IMPORTED_BY_EVERY_ENGINE = (
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu.model_runner",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.models.llama",
    "vllm.v1.executor.uniproc_executor",
    "transformers.models.llama.configuration_llama",
    "vllm.v1.metrics.loggers",
)


def main(address: str) -> None:
    """Serves connections until standard input ends."""
    # vLLM writes to stdout as well; only the word below goes where the tests wait for it.
    to_tests = os.dup(1)
    os.dup2(2, 1)
    for module in IMPORTED_BY_EVERY_ENGINE:
        with contextlib.suppress(ImportError):  # Not every version has all of them.
            importlib.import_module(module)
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads: a fork would lose all but one"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        os.write(to_tests, b"ready\n")
        os.close(to_tests)
        while True:
            readable, _, _ = select.select([sys.stdin, listener], [], [])
            if sys.stdin in readable:
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                become_engine(connection)
            connection.close()


def become_engine(connection: socket.socket) -> None:
    """Takes environment and log from the first line, then serves the rest; never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status = 1
    try:
        lines = connection.makefile("rw")
        birth = json.loads(lines.readline())
        log = os.open(birth["log"], os.O_WRONLY | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.environ.clear()
        os.environ.update(birth["environment"])
        lines.write(json.dumps({"value": os.getpid()}) + "\n")
        lines.flush()
        serve(lines, lines)
        status = 0
    finally:
        # As at the end of a program, but without what the parent had registered before the fork.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1])
