"""Booting and stopping, with small stand-ins for `vllm`."""

import json
import stat
import sys
import time
from pathlib import Path

import pytest

from bench.demo.server import ServerConfig, ServerError, kv_bytes_per_token, serving

# Starts a child in the same group, as vLLM starts its engine, and serves /health.
GOOD = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def config(folder: Path, program: str, *, timeout_s: float = 20.0, **more: float) -> ServerConfig:
    """A configuration whose `vllm` command is `program`."""
    vllm = folder / "vllm"
    vllm.write_text(f"#!{sys.executable}\n{program}")
    vllm.chmod(vllm.stat().st_mode | stat.S_IXUSR)
    return ServerConfig(
        python=folder / "python",
        model=folder / "model",
        dtype="float32",
        log=folder / "server.log",
        gpu_cache_bytes=64 << 20,
        block_size=32,
        concurrency=2,
        boot_timeout_s=timeout_s,
        **more,
    )


def is_running(pid: int) -> bool:
    """False once a process has ended, reaped or not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
def test_the_whole_group_is_gone_afterwards(
    tmp_path: Path, failure: type[BaseException] | None
) -> None:
    child = 0
    try:
        with serving(config(tmp_path, GOOD), lambda _: None) as server:
            child = int((tmp_path / "server.log").read_text().split()[1])
            assert is_running(child)
            assert is_running(server.process.pid)
            if failure:
                raise failure
    except (RuntimeError, KeyboardInterrupt):
        pass
    deadline = time.monotonic() + 5
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def test_a_failed_boot_shows_the_end_of_the_log(tmp_path: Path) -> None:
    broken = config(tmp_path, "print('no such model'); raise SystemExit(3)")
    told = pytest.raises(ServerError, match=r"exited \(3\)(?s:.*)no such model")
    with told, serving(broken, lambda _: None):
        pass


def test_a_boot_that_hangs_is_given_up(tmp_path: Path) -> None:
    hanging = config(tmp_path, "import time; time.sleep(600)", timeout_s=1.0)
    with pytest.raises(ServerError, match="--boot-timeout"), serving(hanging, lambda _: None):
        pass


def test_only_a_host_capacity_turns_kvtide_on(tmp_path: Path) -> None:
    stock = config(tmp_path, "")
    assert "--kv-transfer-config" not in stock.command(1)
    command = config(tmp_path, "", host_capacity_gb=2.5).command(1)
    transfer = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector_module_path"] == "kvtide.vllm"
    assert transfer["kv_connector_extra_config"] == {"host_capacity_gb": 2.5}
    # But for that option, both runs are served alike.
    assert command[: len(stock.command(1))] == stock.command(1)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 46080), ("bfloat16", 23040)])
def test_kv_size_follows_from_the_model(tmp_path: Path, dtype: str, expected: int) -> None:
    shape = {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert kv_bytes_per_token(tmp_path, dtype) == expected
