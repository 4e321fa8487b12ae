"""Where the time of a step goes: what an engine's thread does, and loads beside it.

Wraps methods of a live engine for as long as it is entered; `rows` has one entry a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PARTS = ("add_request", "schedule", "execute_model", "sample_tokens", "update_from_output")


class Timeline:
    """Milliseconds of each part of each step, with what the step computed."""

    def __init__(self, engine: Any, trace: str | None = None) -> None:
        self._engine = engine
        self._core = engine.engine_core.engine_core
        self._trace = trace
        self._profiler: Any = None
        self._wrapped: list[tuple[Any, str]] = []
        self.rows: list[dict[str, Any]] = []
        self._row: dict[str, Any] = {}
        self._added = 0.0
        self._origin = time.perf_counter()

    def __enter__(self) -> Timeline:
        scheduler, executor = self._core.scheduler, self._core.model_executor
        if self._trace is not None:
            from torch import profiler

            self._profiler = profiler.profile(activities=[profiler.ProfilerActivity.CUDA])
            self._profiler.__enter__()
        self._origin = time.perf_counter()
        self._wrap(self._engine, "add_request")
        self._wrap(scheduler, "schedule", self._note_schedule)
        self._wrap(executor, "execute_model")
        self._wrap(executor, "sample_tokens")
        self._wrap(scheduler, "update_from_output", self._note_loads)
        return self

    def __exit__(self, *_exception: object) -> None:
        for owner, name in self._wrapped:
            delattr(owner, name)
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            self._profiler.export_chrome_trace(self._trace)

    def _wrap(self, owner: Any, name: str, note: Callable[[Any], None] | None = None) -> None:
        inner = getattr(owner, name, None)
        if inner is None:
            return

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            spent = (time.perf_counter() - start) * 1e3
            if name == "add_request":
                self._added += spent
                return result
            if name == "schedule":
                at_ms = (start - self._origin) * 1e3
                self._row = {"at_ms": at_ms, "add_request": self._added}
                self._added = 0.0
                self.rows.append(self._row)
            self._row[name] = self._row.get(name, 0.0) + spent
            if note is not None:
                note(result)
            return result

        setattr(owner, name, timed)
        self._wrapped.append((owner, name))

    def _note_schedule(self, output: Any) -> None:
        self._row["tokens"] = output.total_num_scheduled_tokens
        self._row["requests"] = len(output.num_scheduled_tokens)

    def _note_loads(self, _outputs: Any) -> None:
        ended = self._core.scheduler.finished_recving_kv_req_ids
        if ended:
            self._row["loads_ended"] = len(ended)

    def table(self) -> str:
        """Steps with more tokens than requests and those around them, in milliseconds."""
        lines = ["at_ms  period  tokens  requests  loads  " + "  ".join(PARTS)]
        busy = {
            near
            for i, row in enumerate(self.rows)
            if row.get("tokens", 0) > row.get("requests", 0) or "loads_ended" in row
            for near in range(i - 5, i + 3)
        }
        for i, row in enumerate(self.rows):
            if i not in busy:
                continue
            following = self.rows[i + 1]["at_ms"] if i + 1 < len(self.rows) else row["at_ms"]
            parts = "  ".join(f"{row.get(part, 0.0):6.2f}" for part in PARTS)
            lines.append(
                f"{row['at_ms']:9.1f} {following - row['at_ms']:6.1f} {row.get('tokens', 0):6} "
                f"{row.get('requests', 0):4} {row.get('loads_ended', 0):3}   {parts}"
            )
        return "\n".join(lines)
