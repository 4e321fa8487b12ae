"""`kvtide serve` as a process of its own, for engines that share its pool."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
LIMIT_S = 60.0


def kvtide_binary() -> Path:
    """The daemon as `make test-serve` builds it."""
    path = Path(os.environ.get("KVTIDE_BINARY", REPOSITORY / "target" / "debug" / "kvtide"))
    if not path.exists():
        pytest.skip(
            f"{path} is not built: `make test-serve` builds it, or name one in KVTIDE_BINARY"
        )
    return path


class Daemon:
    """A daemon with memory, socket and log of its own; what it leaves is removed by `close`."""

    def __init__(
        self, capacity: str = "64MiB", extent: str = "8MiB", *, started: bool = True
    ) -> None:
        self._binary = kvtide_binary()
        self.folder = Path(tempfile.mkdtemp(prefix="kvtide-daemon-"))
        self.socket = self.folder / "kvtide.sock"
        self.memory = Path(tempfile.mkdtemp(prefix="kvtide-tests-daemon-", dir="/dev/shm"))
        self._config = self.folder / "kvtide.toml"
        self.configure(capacity, extent)
        self._log = (self.folder / "log").open("ab")
        self._process: subprocess.Popen[bytes] | None = None
        if started:
            self.start()

    def configure(self, capacity: str, extent: str = "8MiB") -> None:
        """Of which size its memory is from the next start on; with another one it begins anew."""
        self._config.write_text(
            f'[memory]\ncapacity = "{capacity}"\nextent = "{extent}"\ndirectory = "{self.memory}"\n'
            f'[socket]\npath = "{self.socket}"\n[http]\nlisten = "none"\n'
        )

    def forget(self) -> None:
        """Removes what it has left in memory, as a reboot does."""
        for each in self.memory.iterdir():
            shutil.rmtree(each)

    @property
    def pool(self) -> str:
        """What engines have as their setting `pool`."""
        return f"unix:{self.socket}"

    def start(self) -> None:
        """Starts it, and waits until it serves."""
        command = [self._binary, "serve", "--config", self._config]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        self.wait(lambda status: status["readiness"]["ready"])

    def kill(self) -> None:
        """Ends it as a crash does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def terminate(self) -> int:
        """Ends it in an orderly way; its exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(LIMIT_S)

    def pause(self, stopped: bool) -> None:
        """Stops it where it stands, or lets it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP if stopped else signal.SIGCONT)

    def status(self) -> dict[str, Any] | None:
        """What `kvtide status --json` says; None while it does not answer."""
        command = [self._binary, "status", "--json", "--socket", self.socket]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        return json.loads(asked.stdout) if asked.returncode == 0 else None

    def wait(self, until: Any, limit_s: float = LIMIT_S) -> dict[str, Any]:
        """The first status for which `until` holds."""
        limit = time.monotonic() + limit_s
        while True:
            status = self.status()
            if status is not None and until(status):
                return status
            if time.monotonic() > limit:
                raise AssertionError(f"waited in vain: {status}\n{self.log_tail()}")
            time.sleep(0.02)

    def log_tail(self) -> str:
        """The end of its log."""
        lines = (self.folder / "log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-30:])

    def close(self) -> None:
        """Ends it, and removes everything of it."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        self._log.close()
        shutil.rmtree(self.memory, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
