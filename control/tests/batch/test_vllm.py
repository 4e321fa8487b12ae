"""One batch on real vLLM: its answers are those that vLLM gives when it is asked directly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from rig import die_with_parent, ended, free_port, results, server, submit, wait_until

ROOT = Path(__file__).resolve().parents[3]
VERSION = "0.32.0"
MODEL = "tiny"
BOOT_S = 300.0
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
    # Boots in half the time.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's URL."""
    folder = ROOT / "python" / "env"
    python = (
        Path(output_of(sys.executable, folder / "provision.py", "vllm", VERSION)) / "bin/python"
    )
    model = output_of(python, folder / "models.py", "tiny")
    port = free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", "67108864", "--block-size", "32"]
    command += ["--max-num-seqs", "8", "--scheduling-policy", "priority"]
    command += ["--enable-prompt-tokens-details"]
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env={**os.environ, **OFFLINE},
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until("vLLM", is_ready, BOOT_S)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_batch_on_vllm_gives_what_vllm_gives(engine: str, data: Path) -> None:
    system = "You answer in one word, whatever you are asked, and never in two. " * 8
    bodies = {
        f"request-{n}": {
            "model": MODEL,
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": f"What is {n}?"},
            ],
            "max_tokens": 8,
            "temperature": 0,
        }
        for n in range(12)
    }
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
        for name, body in bodies.items()
    ]
    lines.append({**lines[0], "custom_id": "wrong", "body": {"model": MODEL, "messages": 7}})
    with server(data, engine, "--priority", "100") as running:
        client = running.client()
        assert [model.id for model in client.models.list()] == [MODEL]
        batch = ended(client, submit(client, lines), patience_s=300)
        assert batch.status == "completed"
        found = {item["custom_id"]: item for item in results(client, batch.output_file_id)}
        (refused,) = results(client, batch.error_file_id)
    direct = OpenAI(base_url=f"{engine}/v1", api_key="none")
    assert set(found) == set(bodies)
    for name, body in bodies.items():
        answer = direct.chat.completions.create(**body)  # type: ignore[call-overload]
        body = found[name]["response"]["body"]
        assert body["choices"][0]["message"]["content"] == answer.choices[0].message.content
    assert refused["custom_id"] == "wrong"
    assert refused["response"]["status_code"] in (400, 422)
    assert batch.usage is not None
    assert batch.usage.output_tokens == sum(
        item["response"]["body"]["usage"]["completion_tokens"] for item in found.values()
    )
    # The common prefix was computed once, or a few times, and found in the cache by the others.
    assert batch.usage.input_tokens_details.cached_tokens > batch.usage.input_tokens / 4
