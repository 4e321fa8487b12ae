"""vLLM's own shared memory, which it leaves in /dev/shm when its processes are killed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import psutil

FOLDER = Path("/dev/shm")


def shared_memory_of_vllm(processes: Iterable[psutil.Process]) -> set[Path]:
    """Files in /dev/shm that these processes have mapped; kvtide's are not among them."""
    mapped = set()
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                if str(FOLDER) in line:
                    # By inode: a semaphore is mapped under a name that it had before.
                    mapped.add(int(line.split(maxsplit=5)[4]))
    found = {path for path in FOLDER.iterdir() if path.lstat().st_ino in mapped}
    return {path for path in found if not path.name.startswith("kvtide-")}


def remove(paths: Iterable[Path]) -> None:
    """Removes what is still there."""
    for path in paths:
        path.unlink(missing_ok=True)
