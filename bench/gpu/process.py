"""An engine of the GPU benchmarks in a process of its own, and how it is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

from bench.provenance import ROOT

if TYPE_CHECKING:
    from pathlib import Path

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Engine:
    """One engine's process."""

    def __init__(self, name: str, log: Path, gpu: int | None = None, **options: Any) -> None:
        self.name = name
        self._log = log.open("w")
        visible = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.engine", json.dumps(options)],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | visible,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.boot_s = 0.0
        self._reader = threading.Thread(target=self._await_boot)
        self._reader.start()

    def _await_boot(self) -> None:
        self.boot_s = self._answer()["boot_s"]

    def booted(self) -> None:
        """Waits for the boot."""
        self._reader.join()
        if self.boot_s == 0.0:
            sys.exit(f"{self.name} did not boot; see {self._log.name}")
        print(f"{self.name}: booted in {self.boot_s:.0f} s", flush=True)

    def __call__(self, do: str, **arguments: Any) -> Any:
        """Runs a workload."""
        assert self._process.stdin is not None
        print(json.dumps({"do": do} | arguments), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
            print(line, end="", file=self._log)
        return {"boot_s": 0.0}
