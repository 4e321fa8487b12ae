#!/usr/bin/env python3
"""Runs lanes of make targets side by side: `side_by_side.py test-a test-b + test-c + test-d`.

The targets of a lane run one after the other, in the order given, also behind one that has failed.
What a target prints is shown whole when it has ended, with how long it took; until then a line a
minute says what runs. The exit status is 0 if all targets succeeded.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
HEARTBEAT_S = 60.0


class Lanes:
    """The lanes of one run, and what became of their targets."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._ended: list[tuple[str, int, float]] = []
        self._stopped = threading.Event()

    def run(self, lanes: list[list[str]]) -> int:
        """Runs all lanes; the number of targets that failed."""
        threads = [threading.Thread(target=self._lane, args=(lane,)) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(HEARTBEAT_S)
                if thread.is_alive():
                    self._say_what_runs()
        for target, status, seconds in self._ended:
            outcome = "passed" if status == 0 else f"FAILED with status {status}"
            print(f"{target}: {outcome} in {seconds:.0f} s", flush=True)
        return sum(status != 0 for _, status, _ in self._ended)

    def stop(self, signum: int, _frame: FrameType | None) -> None:
        """Ends everything that runs, with what it has started."""
        self._stopped.set()
        for process in list(self._running.values()):
            os.killpg(process.pid, signal.SIGTERM)
        raise SystemExit(128 + signum)

    def _lane(self, targets: list[str]) -> None:
        for target in targets:
            if not self._stopped.is_set():
                self._target(target)

    def _target(self, target: str) -> None:
        log = self._folder / f"{target}.log"
        began = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [os.environ.get("MAKE", "make"), target],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running[target] = process
            status = process.wait()
        del self._running[target]
        seconds = time.monotonic() - began
        with self._lock:
            self._ended.append((target, status, seconds))
            outcome = "passed" if status == 0 else "FAILED"
            print(f"\n==== {target}: {outcome} after {seconds:.0f} s; it printed:", flush=True)
            sys.stdout.buffer.write(log.read_bytes())
            print(f"==== end of {target}", flush=True)

    def _say_what_runs(self) -> None:
        minutes = (time.monotonic() - self._began) / 60
        with self._lock:
            print(f"[{minutes:.0f} min] running: {', '.join(sorted(self._running))}", flush=True)


def main() -> int:
    """See the module's documentation."""
    arguments = itertools.groupby(sys.argv[1:], lambda argument: argument == "+")
    lanes = [list(targets) for is_plus, targets in arguments if not is_plus]
    if not lanes:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="kvtide-lanes-") as folder:
        running = Lanes(Path(folder))
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, running.stop)
        return min(running.run(lanes), 1)


if __name__ == "__main__":
    sys.exit(main())
