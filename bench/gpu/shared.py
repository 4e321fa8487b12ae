"""`python -m bench.gpu.shared`: engines that share the pool of one `kvtide serve`.

Starts the daemon and prints a table of medians:

* a second engine on the same GPU reloads what the first has computed, beside the first doing so;
* an engine that is started anew against the daemon serves its first reload;
* with two GPUs, one engine prefills a prompt and another decodes: the time from the prefill's
  answer to the first token, beside computing the prompt again. Nothing is handed over between them
  but the prompt.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench.daemon import Daemon
from bench.gpu.engine import POOL_PROMPTS
from bench.gpu.process import Engine

PROMPTS = 8
"""Reloaded, or handed over, for each figure."""
ANSWER = 16
"""Tokens that the decoding engine answers with."""


class Run:
    """The figures, by name."""

    def __init__(self, arguments: argparse.Namespace, pool: str, folder: Path) -> None:
        self._arguments = arguments
        self._pool = pool
        self._folder = folder
        self._seed = 1000
        self.found: dict[str, Any] = {}

    def engine(self, name: str, gpu: int) -> Engine:
        """A booted engine on the daemon's pool."""
        arguments = self._arguments
        engine = Engine(
            name,
            arguments.out / f"{name}.log",
            gpu,
            connector="kvtide",
            host_gb=arguments.host_gb,
            extra={"pool": self._pool},
            folder=str(self._folder),
            utilization=arguments.utilization,
        )
        engine.booted()
        return engine

    def fresh(self, count: int) -> list[int]:
        """Seeds that no engine has seen."""
        self._seed += count
        return list(range(self._seed - count, self._seed))

    def evict(self, engine: Engine) -> None:
        """Drives everything out of the engine's GPU memory."""
        engine("batch", seeds=self.fresh(POOL_PROMPTS), output=1)
        engine("idle", seconds=0.3)

    def note(self, what: str, seconds: list[float]) -> None:
        """Keeps and prints a figure, in milliseconds."""
        self.found[what] = [round(1e3 * each, 2) for each in seconds]
        print(f"{what:50} {1e3 * median(seconds):8.1f} ms", flush=True)

    def warm_up(self, engine: Engine) -> None:
        """Kernels are chosen before anything is timed, those of loads too."""
        seeds = self.fresh(3)
        engine("each", seeds=seeds, output=2)
        self.evict(engine)
        engine("each", seeds=seeds, output=2)

    def second_engine(self, first: Engine, second: Engine) -> None:
        """What the first has computed, reloaded by both."""
        for engine in (first, second):
            self.warm_up(engine)
        seeds = self.fresh(PROMPTS)
        self.note("cold, first engine", first("each", seeds=seeds, output=1))
        first("idle", seconds=0.3)
        self.note("reload, second engine", second("each", seeds=seeds, output=1))
        self.evict(first)
        self.note("reload, first engine", first("each", seeds=seeds, output=1))

    def restarted_engine(self, first: Engine, gpu: int) -> Engine:
        """A new engine's first prompt was computed by one that is gone."""
        seeds = self.fresh(PROMPTS)
        first("batch", seeds=seeds, output=1)
        first("idle", seconds=0.3)
        first.close()
        again = self.engine("again", gpu)
        # Only cold prompts: what a first load costs is to be seen.
        again("each", seeds=self.fresh(2), output=1)
        times = again("each", seeds=seeds, output=1)
        self.note("reload after a restart, the first", times[:1])
        self.note("reload after a restart, the others", times[1:])
        return again

    def handed_over(self, prefill: Engine, decode: Engine) -> None:
        """Prefill on one GPU, decode on another, as a proxy asks them: one after the other."""
        self.warm_up(decode)
        prefilled, decoded = [], []
        for seed in self.fresh(PROMPTS):
            prefilled += prefill("each", seeds=[seed], output=1)
            decoded += decode("each", seeds=[seed], output=1)
        self.note("prefill on GPU 0", prefilled)
        self.note("first token on GPU 1 after it", decoded)
        anew = decode("each", seeds=self.fresh(PROMPTS), output=1)
        self.note("first token on GPU 1, computed anew", anew)
        seeds = self.fresh(PROMPTS)
        prefill("batch", seeds=seeds, output=1)
        self.note("all at once, answered on GPU 1", [decode("batch", seeds=seeds, output=ANSWER)])
        anew = [decode("batch", seeds=self.fresh(PROMPTS), output=ANSWER)]
        self.note("all at once, computed anew on GPU 1", anew)


def main() -> None:
    """See the module's documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--kvtide", type=Path, required=True, help="the program `kvtide`")
    parser.add_argument("--host-gb", type=int, default=32, help="of the daemon")
    parser.add_argument("--gpus", type=int, default=1, choices=(1, 2))
    parser.add_argument(
        "--utilization", type=float, default=0.32, help="share of a GPU that each engine may take"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="kvtide-bench-"))
    daemon = Daemon(arguments.kvtide, folder, arguments.host_gb)
    run = Run(arguments, daemon.pool, folder)
    try:
        first = run.engine("first", 0)
        second = run.engine("second", 0)
        run.second_engine(first, second)
        second.close()
        first = run.restarted_engine(first, 0)
        if arguments.gpus == 2:
            other = run.engine("other", 1)
            run.handed_over(first, other)
            other.close()
        first.close()
    finally:
        (arguments.out / "shared_pool.json").write_text(json.dumps(run.found, indent=1))
        daemon.close()


if __name__ == "__main__":
    main()
