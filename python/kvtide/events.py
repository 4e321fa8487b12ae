"""The pool's content for those who follow vLLM's KV events, such as routers.

Events carry vLLM's own block hashes and the medium `CPU`, so that a consumer that knows a block
from vLLM's events for GPU memory recognises it here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from kvtide.log import logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

    from kvtide._native import Pool, Sequence

MEDIUM = "CPU"


class EventLog:
    """Translates between keys of the pool and hashes of vLLM; one entry for each block held."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._saving: dict[bytes, BlockStored] = {}
        self._held: dict[bytes, BlockRemoved] = {}
        self._pending: list[KVCacheEvent] = []

    @classmethod
    def of(cls, config: VllmConfig, block_tokens: int) -> EventLog | None:
        """A log, if the engine publishes events."""
        events = config.kv_events_config
        if events is None or not events.enable_kv_cache_events:
            return None
        if not config.cache_config.enable_prefix_caching:
            logger.warning("KV events are disabled: turn on vLLM's prefix caching to publish them")
            return None
        return cls(block_tokens)

    def note_save(self, request: Request, sequence: Sequence, first: int, end: int) -> None:
        """Blocks `first` to `end` of the request may become held."""
        hashes = request.block_hashes
        lora = request.lora_request
        for index, key in enumerate(sequence.keys(first, end), start=first):
            if key in self._held or index >= len(hashes):
                continue
            start = index * self._block_tokens
            stored = maybe_convert_block_hash(hashes[index])
            self._saving[key] = BlockStored(
                block_hashes=[stored],
                parent_block_hash=maybe_convert_block_hash(hashes[index - 1]) if index else None,
                token_ids=list(request.all_token_ids[start : start + self._block_tokens]),
                block_size=self._block_tokens,
                lora_id=lora.adapter_id if lora is not None else None,
                medium=MEDIUM,
                lora_name=lora.lora_name if lora is not None else None,
            )

    def take(self, pool: Pool) -> list[KVCacheEvent]:
        """What happened since the last call, oldest first."""
        self.collect(pool)
        events, self._pending = self._pending, []
        return events

    def collect(self, pool: Pool) -> None:
        """Translates what happened so far, for the next call of `take`."""
        for what, key in pool.take_events():
            if what == "stored":
                stored = self._saving.pop(key, None)
                if stored is not None:
                    self._held[key] = BlockRemoved(stored.block_hashes, MEDIUM)
                    self._pending.append(stored)
            elif what == "removed":
                self._saving.pop(key, None)
                removed = self._held.pop(key, None)
                if removed is not None:
                    self._pending.append(removed)
            else:
                self._pending.extend(self._held.values())
                self._held.clear()
                self._saving.clear()
