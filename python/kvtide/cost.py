"""What the step that is being scheduled computes, and which loads that would hide.

Others would wait with a request for what the step does not hide of its layered load: those that
run, and those that were admitted to the same step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtide._native import CostModel

if TYPE_CHECKING:
    from vllm.config import SchedulerConfig
    from vllm.v1.core.sched.output import SchedulerOutput


class StepCost:
    """See the module's documentation."""

    def __init__(self, shard_bytes: int, step_tokens: int, prompt_tokens: int) -> None:
        self._shard_bytes = shard_bytes
        self._step_tokens, self._prompt_tokens = step_tokens, prompt_tokens
        """As from `step_limits`."""
        self._model = CostModel()
        self._running: set[str] = set()
        """Requests of the last step that have not finished since."""
        self._admitted: list[int] = []
        """Prompt tokens that each request computes which was admitted to this step."""
        self._layered_blocks = 0
        """How many blocks this step's layered loads bring."""

    def set_load_rate(self, bytes_per_s: float) -> None:
        """What a worker's layered loads reach."""
        self._model.set_load_rate(bytes_per_s)

    def is_alone(self) -> bool:
        """Whether a request that is admitted now would be the step's only one."""
        return not self._running and not self._admitted

    def hides(self, blocks: int, rest: int) -> bool:
        """Whether the step takes longer than its layered loads if so many blocks are added, of a
        prompt of which `rest` tokens are to be computed."""
        tokens = min(sum(self._admitted) + min(rest, self._prompt_tokens), self._step_tokens)
        loading = (self._layered_blocks + blocks) * self._shard_bytes
        return self._model.hides(loading, tokens, bool(self._running))

    def admit(self, tokens: int, layered_blocks: int = 0) -> None:
        """The step computes so many tokens of a prompt, behind what a layered load brings."""
        self._admitted.append(min(tokens, self._prompt_tokens))
        self._layered_blocks += layered_blocks

    def forget(self, request_id: str) -> None:
        """The request has finished."""
        self._running.discard(request_id)

    def end_step(self, output: SchedulerOutput, now: float) -> None:
        """The step is scheduled, at `now`; what is admitted from here on belongs to the next."""
        if not self._running:
            self._model.idle()
        loads, self._layered_blocks = self._layered_blocks > 0, 0
        self._admitted.clear()
        self._running = set(output.num_scheduled_tokens)
        # A decoding request computes one token.
        prompt_tokens = output.total_num_scheduled_tokens - len(self._running)
        self._model.observe_step(now, prompt_tokens, loads)


def step_limits(config: SchedulerConfig) -> tuple[int, int]:
    """Tokens that a step computes at most, and of one prompt if the step computes others too."""
    step = config.max_num_scheduled_tokens or config.max_num_batched_tokens
    # vLLM can raise this threshold where few requests wait. Then the step computes more than is
    # predicted, and a load is async that need not be.
    return step, min(config.long_prefill_token_threshold or step, step)
