"""A real `vllm serve`, with all of its processes."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from engines.config import BLOCK_TOKENS, ROW_BYTES, EngineConfig, Environment
from engines.segment_file import named_segment
from engines.shared_memory import remove, shared_memory_of_vllm

START_LIMIT_S = 300.0
EXIT_LIMIT_S = 60.0


class Server:
    """`vllm serve` with kvtide; scheduler and worker have processes of their own."""

    def __init__(
        self,
        config: EngineConfig,
        model: Path,
        engine_id: str,
        folder: Path,
        *,
        data_parallel: int = 1,
    ) -> None:
        self.engine_id = engine_id
        self.named_segment = named_segment(engine_id)
        self.events = f"ipc://{folder}/events"
        self._model = str(model)
        self._log = folder / "server.log"
        port = free_port()
        more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1"}
        arguments: list[str] = []
        if data_parallel > 1:
            arguments = ["--data-parallel-size", str(data_parallel), "--api-server-count", "1"]
        environment = Environment(config.runner, config.async_scheduling, more)
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": self.events,
            "topic": "kv",
        }
        if data_parallel == 1:  # vLLM counts up ports for its ranks, and knows none in a path.
            arguments += ["--kv-events-config", json.dumps(events)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self._model),
                    *("--host", "127.0.0.1", "--port", str(port)),
                    *("--dtype", "float32", "--max-model-len", "384", "--enforce-eager"),
                    *("--kv-cache-memory-bytes", str(config.blocks * ROW_BYTES)),
                    *("--block-size", str(BLOCK_TOKENS), "--max-num-seqs", "4"),
                    "--enable-prompt-tokens-details",
                    *arguments,
                    "--kv-transfer-config",
                    json.dumps(config.transfer(engine_id)),
                ],
                env=environment.variables(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self._wait_until_ready()
        self._itself = psutil.Process(self._process.pid)

    def _wait_until_ready(self) -> None:
        limit = time.monotonic() + START_LIMIT_S
        while time.monotonic() < limit and self._process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if self._client.get("/health").status_code == 200:
                    return
            time.sleep(0.5)
        self._process.kill()
        raise AssertionError(f"vllm serve does not start:\n{self.log()[-4000:]}")

    def log(self) -> str:
        """Everything it has written."""
        return self._log.read_text(errors="replace")

    def complete(
        self, prompt: list[int], max_tokens: int, *, rank: int | None = None, **more: Any
    ) -> dict[str, Any]:
        """One greedy completion, of a data parallel rank if there are several: text and usage."""
        body = {"model": self._model, "prompt": prompt, "max_tokens": max_tokens}
        reply = self._client.post(
            "/v1/completions",
            json=body | {"temperature": 0, "ignore_eos": True} | more,
            headers={} if rank is None else {"X-data-parallel-rank": str(rank)},
        )
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    def reset(self) -> None:
        """Empties vLLM's own prefix cache, not the pool."""
        assert self._client.post("/reset_prefix_cache").json()["success"]

    def metrics(self) -> dict[str, float]:
        """Samples of `/metrics`, with vLLM's own labels removed, added up."""
        found: dict[str, float] = {}
        for line in self._client.get("/metrics").text.splitlines():
            if line.startswith("#") or " " not in line:
                continue
            name, value = line.rsplit(" ", 1)
            name, _, labels = name.partition("{")
            own = [
                label
                for label in labels.rstrip("}").split(",")
                if label and not label.startswith(("engine=", "model_name="))
            ]
            key = name + (f"{{{','.join(own)}}}" if own else "")
            found[key] = found.get(key, 0) + float(value)
        return found

    def family(self) -> list[psutil.Process]:
        """All processes."""
        return [self._itself, *self._itself.children(recursive=True)]

    def stop(self) -> list[psutil.Process]:
        """Ends it as a service manager does; returns processes that are left."""
        family = self.family() if self._process.poll() is None else []
        leftovers = shared_memory_of_vllm(family)
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_LIMIT_S)
        _, left = psutil.wait_procs(family, timeout=EXIT_LIMIT_S)
        remove(leftovers)
        self._client.close()
        return left

    def kill(self) -> None:
        """Ends all of it at once, as the kernel does when memory runs out."""
        family = self.family() if self._process.poll() is None else []
        leftovers = shared_memory_of_vllm(family)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(EXIT_LIMIT_S)
        remove(leftovers)
        self._client.close()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
