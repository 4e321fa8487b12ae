"""The pool's content for those who follow vLLM's KV events, such as routers.

Events carry the medium `CPU` and else what vLLM's own events carry for the same block in GPU
memory, so that a consumer recognises it here: hashes, what besides tokens went into them (salt,
LoRA, media), group and kind of the KV cache, session.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, maybe_convert_block_hash
from vllm.v1.kv_cache_interface import get_kv_cache_spec_kind, get_kv_cache_spec_sliding_window

from kvtide.log import logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

    from kvtide._native import Pool, Sequence

MEDIUM = "CPU"
GROUP = 0
"""kvtide carries models with one group of KV cache."""

publish_extra_keys = getattr(kv_cache_utils, "to_event_extra_keys", list)
"""vLLM 0.32 hashes extra keys with a tag each and publishes them without."""


class EventLog:
    """Translates between keys of the pool and hashes of vLLM; one entry for each block held."""

    def __init__(self, kv_cache: KVCacheConfig, block_tokens: int) -> None:
        spec = kv_cache.kv_cache_groups[GROUP].kv_cache_spec
        self._kind = get_kv_cache_spec_kind(spec).value
        self._sliding_window = get_kv_cache_spec_sliding_window(spec)
        self._block_tokens = block_tokens
        self._saving: dict[bytes, BlockStored] = {}
        self._held: dict[bytes, BlockRemoved] = {}
        self._pending: list[KVCacheEvent] = []

    @classmethod
    def of(cls, config: VllmConfig, kv_cache: KVCacheConfig, block_tokens: int) -> EventLog | None:
        """A log, if the engine publishes events."""
        events = config.kv_events_config
        if events is None or not events.enable_kv_cache_events:
            return None
        if not config.cache_config.enable_prefix_caching:
            logger.warning("KV events are disabled: turn on vLLM's prefix caching to publish them")
            return None
        return cls(kv_cache, block_tokens)

    def note_save(self, request: Request, sequence: Sequence, first: int, end: int) -> None:
        """Blocks `first` to `end` of the request may become held."""
        known = len(request.block_hashes)
        item = 0  # Of the media, from which on a block may hold some.
        for index, key in enumerate(sequence.keys(first, end), start=first):
            if key in self._held or index >= known:
                continue
            start = index * self._block_tokens
            extra_keys, item = generate_block_hash_extra_keys(
                request, start, start + self._block_tokens, item
            )
            self._saving[key] = self._stored(request, index, extra_keys)

    def _stored(
        self, request: Request, index: int, extra_keys: tuple[Any, ...] | None
    ) -> BlockStored:
        """That the block `index` of the request is held."""
        hashes = request.block_hashes
        lora = request.lora_request
        start = index * self._block_tokens
        end = start + self._block_tokens
        newer: dict[str, Any] = {}
        if "session_id" in BlockStored.__struct_fields__:  # Since vLLM 0.32.
            newer["session_id"] = request.session_id
        return BlockStored(
            block_hashes=[maybe_convert_block_hash(hashes[index])],
            parent_block_hash=maybe_convert_block_hash(hashes[index - 1]) if index else None,
            token_ids=list(request.all_token_ids[start:end]),
            block_size=self._block_tokens,
            lora_id=lora.adapter_id if lora is not None else None,
            medium=MEDIUM,
            lora_name=lora.lora_name if lora is not None else None,
            extra_keys=publish_extra_keys([extra_keys]),
            group_idx=GROUP,
            kv_cache_spec_kind=self._kind,
            kv_cache_spec_sliding_window=self._sliding_window,
            **newer,
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
                    removal = BlockRemoved(stored.block_hashes, MEDIUM, group_idx=GROUP)
                    self._held[key] = removal
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
