"""`kvtide serve` with memory of its own, for benchmarks of engines that share its pool."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

START_S = 60.0
END_S = 60.0
NAME = "bench"
MEMORY = Path("/dev/shm") / f"kvtide-pool-{NAME}"


class Daemon:
    """A daemon that runs until it is closed; its memory goes with it."""

    def __init__(self, binary: Path, folder: Path, gib: int) -> None:
        self.socket = folder / "kvtide.sock"
        config = folder / "kvtide.toml"
        config.write_text(
            f"""
[memory]
capacity = "{gib}GiB"
name = "{NAME}"
[socket]
path = "{self.socket}"
[http]
listen = "none"
"""
        )
        self._process = subprocess.Popen([binary, "serve", "--config", config])
        deadline = time.monotonic() + START_S
        while not self.socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                sys.exit("kvtide serve did not start")
            time.sleep(0.1)

    @property
    def pool(self) -> str:
        """What an engine's setting `pool` has to be."""
        return f"unix:{self.socket}"

    def close(self) -> None:
        """Ends it and removes the memory."""
        self._process.terminate()
        self._process.wait(timeout=END_S)
        shutil.rmtree(MEMORY, ignore_errors=True)
