"""What may descend from damaged bytes is served to nobody.

A layered load is compared with its checksums when the step has used it. By then vLLM has the blocks
in its prefix cache, and the requests that live may have computed from them. They go on, but each
block that they complete from then on is taken out of vLLM's prefix cache in the step in which vLLM
puts it there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request


class Suspect(Protocol):
    """A request that may have computed from damaged bytes."""

    request: Request
    blocks: list[int]


class Containment:
    """The suspects, and vLLM's prefix cache."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._prefix_cache: BlockPool | None = None
        self._suspects: dict[str, Suspect] = {}
        self._evicted: dict[str, int] = {}
        """Leading blocks of each that will not come into the prefix cache again."""
        self._may_cache = False
        """Whether a suspect may complete a block in the next step."""

    def bind(self, prefix_cache: BlockPool) -> None:
        """Takes hold of vLLM's own prefix cache."""
        self._prefix_cache = prefix_cache

    def begin(self, live: Mapping[str, Suspect]) -> None:
        """Empties the prefix cache; everyone who lives is a suspect."""
        self._suspects, self._evicted = dict(live), {}
        self._may_cache = bool(live)
        if self._prefix_cache is not None:
            self._prefix_cache.evict_blocks(set(range(self._prefix_cache.num_gpu_blocks)))

    def doubts(self, hit_tokens: int) -> bool:
        """Whether a request with so many tokens in the prefix cache may have hit a block that a
        suspect has completed in the step that is being scheduled."""
        return self._may_cache and hit_tokens > 0

    def end_step(self, scheduled: Mapping[str, int]) -> None:
        """A step has been scheduled: what suspects complete in it is in the prefix cache by now."""
        if not self._suspects:
            return
        self._may_cache = False
        for request_id, suspect in self._suspects.items():
            self._evict(suspect.blocks[self._evicted.get(request_id, 0) :])
            request, tokens = suspect.request, scheduled.get(request_id, 0)
            # vLLM may have counted this step's tokens already or not, the next has as many, and
            # what is generated comes into the cache a step or two after it was counted.
            counted, margin = request.num_computed_tokens, 2 * tokens + 1
            earliest = max(0, counted - margin) // self._block_tokens
            self._evicted[request_id] = earliest
            completes = (counted + margin) // self._block_tokens > earliest
            self._may_cache |= completes or counted < request.num_prompt_tokens

    def release(self, request_id: str) -> None:
        """The request has finished, or begins anew with nothing computed."""
        suspect = self._suspects.pop(request_id, None)
        if suspect is not None:
            self._evict(suspect.blocks)
            self._evicted.pop(request_id, None)
            self._may_cache &= bool(self._suspects)

    def _evict(self, blocks: list[int]) -> None:
        if self._prefix_cache is not None:
            self._prefix_cache.evict_blocks(set(blocks))
