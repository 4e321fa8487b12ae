"""Boots `vllm serve` on loopback, waits for it, and takes the whole process group down again."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

SERVED_NAME = "demo"
POLL_INTERVAL_S = 0.5
STOP_GRACE_S = 10.0
LOG_TAIL_LINES = 40

# Nothing is fetched and nothing is reported. One OpenMP thread keeps vLLM's sums in one order, and
# leaves the other cores to the client. Without the multiprocessing executor the engine boots in
# half the time.
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}


class ServerError(Exception):
    """The server did not come up, or died; the message carries the end of its log."""


@dataclass(frozen=True)
class ServerConfig:
    """How to serve. `python` belongs to the environment whose vLLM is wanted."""

    python: Path
    model: Path
    dtype: str
    log: Path
    gpu_cache_bytes: int
    block_size: int
    concurrency: int
    boot_timeout_s: float
    port: int | None = None
    # None serves stock vLLM; a capacity in GB adds kvtide with that much host memory.
    host_capacity_gb: float | None = None

    def transfer_config(self) -> dict | None:
        """The value of `--kv-transfer-config`, as the README gives it."""
        if self.host_capacity_gb is None:
            return None
        return {
            "kv_connector": "OffloadingConnectorV1Type3",
            "kv_connector_module_path": "kvtide.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"host_capacity_gb": self.host_capacity_gb},
        }

    def command(self, port: int) -> list[str]:
        """The command line; prefix caching is vLLM's default, and said all the same."""
        command = [str(self.python.with_name("vllm")), "serve", str(self.model)]
        command += ["--served-model-name", SERVED_NAME, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--dtype", self.dtype, "--enforce-eager", "--enable-prefix-caching"]
        command += ["--block-size", str(self.block_size), "--max-model-len", "auto"]
        command += ["--kv-cache-memory-bytes", str(self.gpu_cache_bytes)]
        command += ["--max-num-seqs", str(max(self.concurrency, 2))]
        if transfer := self.transfer_config():
            command += ["--kv-transfer-config", json.dumps(transfer)]
        return command


def kv_bytes_per_token(model: Path, dtype: str) -> int:
    """Bytes of KV cache that one token takes, over all layers, from the model's config.json."""
    shape = json.loads((model / "config.json").read_text())
    head_dim = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    element_bytes = {"float32": 4, "bfloat16": 2}[dtype]
    # Keys and values.
    return 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head_dim * element_bytes


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def log_tail(log: Path) -> str:
    """The last lines of the server's log, for an error message."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return "\n".join(["--- end of " + str(log), *lines[-LOG_TAIL_LINES:], "---"])


@dataclass(frozen=True)
class Server:
    """A running server."""

    config: ServerConfig
    process: subprocess.Popen
    base_url: str
    boot_s: float

    def metrics_page(self) -> str:
        """The text of `/metrics`."""
        return httpx.get(f"{self.base_url}/metrics", timeout=30).raise_for_status().text

    def check_alive(self) -> None:
        """Raises with the log's end if the server has exited."""
        if (status := self.process.poll()) is not None:
            raise ServerError(f"the server exited ({status}).\n{log_tail(self.config.log)}")


def group_is_gone(process: subprocess.Popen) -> bool:
    """True once neither the server nor anything it started runs."""
    # Reaps the server itself, which as a zombie would keep its group in being.
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def stop(process: subprocess.Popen) -> None:
    """Ends the server and every process it started: politely, then, or on a second ^C, not."""
    gone = group_is_gone(process)
    try:
        if not gone:
            os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_GRACE_S
        # The engine process may outlive the API server, and has the KV cache to put away.
        while not (gone := group_is_gone(process)) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        if not gone:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_ready(
    process: subprocess.Popen, config: ServerConfig, base_url: str, tick: Callable[[float], None]
) -> float:
    """Polls `/health`; returns the seconds the boot took."""
    started = time.monotonic()
    while True:
        waited_s = time.monotonic() - started
        if (status := process.poll()) is not None:
            raise ServerError(f"vllm serve exited ({status}) at boot.\n{log_tail(config.log)}")
        if waited_s > config.boot_timeout_s:
            raise ServerError(
                f"vllm serve was not ready after {waited_s:.0f} s; "
                f"--boot-timeout allows more.\n{log_tail(config.log)}"
            )
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{base_url}/health", timeout=2).status_code == httpx.codes.OK:
                return waited_s
        tick(waited_s)
        time.sleep(POLL_INTERVAL_S)


@contextlib.contextmanager
def serving(config: ServerConfig, tick: Callable[[float], None]) -> Iterator[Server]:
    """A ready server for the length of a `with` block, stopped whatever happens inside."""
    port = config.port or free_port()
    base_url = f"http://127.0.0.1:{port}"
    config.log.parent.mkdir(parents=True, exist_ok=True)
    with config.log.open("w") as log:
        process = subprocess.Popen(
            config.command(port),
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Its own group: a ^C reaches only the demo, which then stops the group as a whole.
            start_new_session=True,
        )
    try:
        boot_s = wait_until_ready(process, config, base_url, tick)
        yield Server(config, process, base_url, boot_s)
    finally:
        stop(process)
