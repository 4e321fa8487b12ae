"""`python -m bench.demo`: the same chat traffic on stock vLLM without and with kvtide.

Boots `vllm serve` twice, one after the other, plays the workload over the OpenAI API, and compares
speed, cache hits and every output token. Writes `report.json`, `ttft.png` and the servers' logs to
`target/demo`. Exit status: 0 if outputs agree and kvtide loaded something, 1 if not, 2 if a run
could not be made.
"""

import argparse
import asyncio
import importlib.metadata
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

try:
    import httpx
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    sys.exit(
        f"demo: error: {missing.name} is not installed for {sys.executable}. Run `make demo`, or "
        "use the Python of the environment that python/env/provision.py makes."
    )

from bench.demo import client, metrics, plot, report, server, workload

REPOSITORY = Path(__file__).resolve().parents[2]
PROVISION = REPOSITORY / "python" / "env" / "provision.py"
MODELS = REPOSITORY / "python" / "env" / "models.py"
# At the defaults: two of SmolLM2's longest prompts, under half of the workload's distinct tokens.
GPU_CACHE_TOKENS = 4352
MODEL_NAME = "SmolLM2-135M-Instruct"
# Saves end shortly after the last answer; the counters are read once they have.
SETTLE_S = 1.0


class DemoError(Exception):
    """The demo cannot run; the message says what to do."""


def log(message: str) -> None:
    """Progress for a person; stdout carries only the result."""
    tqdm.write(f"demo: {message}", file=sys.stderr)
    sys.stderr.flush()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo",
        description="Compare stock vLLM without and with kvtide on multi-turn chat traffic.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    traffic = parser.add_argument_group("workload")
    traffic.add_argument("--conversations", type=int, default=8)
    traffic.add_argument("--turns", type=int, default=5, help="requests per conversation")
    traffic.add_argument("--shops", type=int, default=4, help="different system prompts")
    traffic.add_argument(
        "--entries", type=int, default=34, help="articles in a system prompt, about 30 tokens each"
    )
    traffic.add_argument("--max-tokens", type=int, default=48, help="longest answer")
    traffic.add_argument("--concurrency", type=int, default=2, help="requests in flight")
    traffic.add_argument("--seed", type=int, default=1)
    serving = parser.add_argument_group("server")
    serving.add_argument(
        "--gpu-cache-mib",
        type=int,
        help=f"vLLM's own KV cache; room for {GPU_CACHE_TOKENS} tokens if not given",
    )
    serving.add_argument("--host-gb", type=float, default=1.0, help="kvtide's host memory")
    serving.add_argument("--block-size", type=int, default=32, help="tokens; a multiple of 32")
    # In bfloat16, stock vLLM's own answers change with batching and with what its prefix cache
    # holds (20 and 3 of 40 requests), so they could not show whether kvtide changes any.
    serving.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="with bfloat16, outputs may differ between runs, with or without kvtide",
    )
    serving.add_argument("--port", type=int, help="a free one if not given")
    serving.add_argument("--model", type=Path, help="model folder instead of SmolLM2-135M")
    serving.add_argument(
        "--vllm-version", help="made by provision.py; the running environment's if not given"
    )
    serving.add_argument("--boot-timeout", type=float, default=180.0, help="seconds per server")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=REPOSITORY / "target" / "demo")
    output.add_argument("--json", action="store_true", help="print the report as JSON, no table")
    output.add_argument("--baseline-only", action="store_true", help="run without kvtide only")
    options = parser.parse_args(arguments)
    for name in ("conversations", "turns", "shops", "entries", "max_tokens", "concurrency"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.block_size % 32:
        parser.error("--block-size must be a multiple of 32: vLLM's CPU attention needs it")
    return options


def output_of(command: list[str | Path], what: str) -> str:
    """The last line a helper prints; its progress goes to our stderr."""
    try:
        finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise DemoError(f"{what} failed: {error}") from error
    return finished.stdout.strip().splitlines()[-1]


def find_python(vllm_version: str | None) -> Path:
    """The Python whose vLLM will serve."""
    if vllm_version:
        made = output_of([sys.executable, PROVISION, "vllm", vllm_version], "provision.py")
        return Path(made) / "bin" / "python"
    # The link itself, not its target: its neighbours are the environment's commands.
    python = Path(sys.executable)
    if not python.with_name("vllm").exists():
        raise DemoError(
            f"{python} has no vllm beside it. Run `make demo`, or give --vllm-version 0.32.0."
        )
    return python


def installed_versions(python: Path) -> dict[str, str]:
    """Versions, in the serving environment, of what decides the result."""
    probe = (
        "import importlib.metadata as m, importlib.util, json, platform\n"
        "found = {'python': platform.python_version()}\n"
        "for name in ('vllm', 'torch', 'transformers', 'kvtide'):\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError:\n"
        # On PYTHONPATH, as a developer may have it, it has no version.
        "        if importlib.util.find_spec(name): found[name] = 'source tree'\n"
        "print(json.dumps(found))\n"
    )
    versions = json.loads(output_of([python, "-c", probe], "asking for installed versions"))
    return versions | {"httpx": importlib.metadata.version("httpx")}


def play_run(
    name: str, config: server.ServerConfig, options: argparse.Namespace, cast: list
) -> report.Run:
    """Boots one server, plays the whole workload, reads its counters, stops it."""
    log(f"{name}: booting vllm serve (log: {config.log})")
    told_s = 0.0

    def still_booting(waited_s: float) -> None:
        nonlocal told_s
        if waited_s - told_s >= 15:
            told_s = waited_s
            log(f"{name}: still booting after {waited_s:.0f} s")

    with server.serving(config, still_booting) as running:
        log(f"{name}: ready after {running.boot_s:.0f} s")
        total = options.conversations * options.turns
        # Without a terminal a bar is a line per update, so fewer of them.
        pause_s = 0.2 if sys.stderr.isatty() else 10.0
        try:
            asyncio.run(client.warm_up(running.base_url, server.SERVED_NAME))
            before = metrics.Counters.from_page(running.metrics_page())
            with tqdm(
                total=total, desc=name, unit="req", mininterval=pause_s, ascii=True
            ) as progress:
                started = time.perf_counter()
                answers = asyncio.run(
                    client.play(
                        running.base_url,
                        server.SERVED_NAME,
                        cast,
                        concurrency=options.concurrency,
                        max_tokens=options.max_tokens,
                        on_answer=lambda _: progress.update(),
                    )
                )
                wall_s = time.perf_counter() - started
            time.sleep(SETTLE_S)
            after = metrics.Counters.from_page(running.metrics_page())
        except (httpx.HTTPError, client.ClientError) as error:
            running.check_alive()
            tail = server.log_tail(config.log)
            raise DemoError(f"{name}: {type(error).__name__}: {error}\n{tail}") from error
    return report.Run(name, answers, after.since(before), wall_s, running.boot_s)


def verdict(runs: list[report.Run]) -> list[str]:
    """What is wrong with the result, in words; empty is good."""
    if len(runs) < 2:
        return []
    wrong = []
    if differing := report.differences(*runs):
        requests = len(runs[0].answers)
        wrong.append(f"outputs differ in {len(differing)} of {requests} requests, first in:")
        wrong.append(f"  {differing[0]}")
    counters = runs[1].counters
    if not counters.has_kvtide:
        wrong.append("kvtide's counters are missing from /metrics, so nothing shows that it ran")
    elif counters.loaded_tokens <= 0:
        wrong.append(
            "kvtide loaded nothing. If vLLM's own cache held the whole workload, lower "
            "--gpu-cache-mib or raise --conversations; else look for errors in kvtide.log"
        )
    return wrong


def run_demo(options: argparse.Namespace) -> int:
    """Everything from preparation to the exit status."""
    python = find_python(options.vllm_version)
    versions = installed_versions(python)
    names = ["vllm"] if options.baseline_only else ["vllm", "kvtide"]
    if "kvtide" in names and "kvtide" not in versions:
        raise DemoError(
            f"kvtide is not installed beside {python}. Run `make demo`, which builds it, "
            "or add --baseline-only."
        )
    if options.model and not (options.model / "config.json").is_file():
        raise DemoError(f"{options.model} is no model folder: it has no config.json")
    model = options.model or Path(output_of([python, MODELS, "smollm2"], "models.py"))
    cast = workload.conversations(
        options.conversations, options.turns, options.shops, options.entries, options.seed
    )
    per_token = server.kv_bytes_per_token(model, options.dtype)
    given = options.gpu_cache_mib
    gpu_cache_bytes = given << 20 if given else GPU_CACHE_TOKENS * per_token
    runs = []
    for name in names:
        config = server.ServerConfig(
            python=python,
            model=model,
            dtype=options.dtype,
            log=options.out / f"{name}.log",
            gpu_cache_bytes=gpu_cache_bytes,
            block_size=options.block_size,
            concurrency=options.concurrency,
            boot_timeout_s=options.boot_timeout,
            port=options.port,
            host_capacity_gb=options.host_gb if name == "kvtide" else None,
        )
        runs.append(play_run(name, config, options, cast))
    settings = {
        key: value if isinstance(value, int | float | None) else str(value)
        for key, value in vars(options).items()
        if key not in ("out", "json", "port", "model")
    }
    result = report.build(
        runs,
        model=MODEL_NAME if model.name.startswith("smollm2-") else model.name,
        settings=settings | {"gpu_cache_tokens": gpu_cache_bytes // per_token},
        environment=server.ENVIRONMENT,
        machine=report.describe_machine(),
        command=shlex.join(["python", "-m", "bench.demo", *sys.argv[1:]]),
        commit=report.describe_commit(REPOSITORY),
        versions=versions,
        finished_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    (options.out / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    plot.draw(result, options.out / "ttft.png")
    print(json.dumps(result, indent=1) if options.json else report.table(result))
    log(f"wrote {options.out / 'report.json'} and {options.out / 'ttft.png'}")
    wrong = verdict(runs)
    for line in wrong:
        log(f"FAILED: {line}" if not line.startswith(" ") else line)
    if not wrong and len(runs) > 1:
        log(f"outputs of all {len(runs[0].answers)} requests are identical")
    return 1 if wrong else 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point; turns every expected failure into a message and a status."""
    options = parse(arguments)

    def interrupt(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    # A polite kill must stop the server too, as ^C does.
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)
    try:
        return run_demo(options)
    except (DemoError, server.ServerError) as error:
        log(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        log("interrupted; the server is stopped")
        return 130
    except BrokenPipeError:
        # The reader of our output went away; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


if __name__ == "__main__":
    sys.exit(main())
