"""What travels between the scheduler's and the workers' side inside vLLM's own messages."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

MOVE_BYTES = 12
"""Bytes of one move: slot, generation and block, each as a little-endian u32."""


def block_of(moves: bytes, index: int) -> int:
    """The engine's block of a move."""
    end = (index + 1) * MOVE_BYTES
    return int.from_bytes(moves[end - 4 : end], "little")


@dataclass(slots=True)
class AsyncLoad:
    """A part of one request's load beside the steps."""

    job: int
    cell: int
    """Of the board, where workers publish that it has ended."""
    request_id: str
    moves: bytes
    lost_block: int | None
    """The first block that will not be loaded, because the pool lost it after the match."""
    behind_steps: bool
    """Whether steps that have begun may still use the blocks that it overwrites."""


class CancelledLoad(NamedTuple):
    """An async load that has not ended in time."""

    job: int
    request_id: str
    blocks: list[int]
    """All blocks that the request's load was to bring, with the first of its parts; they will be
    computed."""


class LayeredLoad(NamedTuple):
    """The load of what a step reads, layer by layer."""

    job: int
    moves: bytes
    behind_steps: bool
    """As in `AsyncLoad`."""


@dataclass(slots=True)
class StepPlan(KVConnectorMetadata):
    """What workers do in one step."""

    wait_saves: list[int] = field(default_factory=list)
    """Saves that read blocks which this step overwrites: they end before it begins."""
    save_now: list[tuple[int, bytes]] = field(default_factory=list)
    """(job, moves) of blocks that earlier steps computed."""
    save_step: list[tuple[int, bytes]] = field(default_factory=list)
    """(job, moves) of blocks that are complete once this step has computed them."""
    layered: LayeredLoad | None = None
    loads: list[AsyncLoad] = field(default_factory=list)
    cancelled: list[CancelledLoad] = field(default_factory=list)
    memory: int | None = None
    """Nonce of the memory that the pool has now, for workers to attach to it; no other plan has
    anything to save or load before they have."""


@dataclass(slots=True)
class WorkerReport(KVConnectorWorkerMetadata):
    """What a worker reports to the scheduler's side, besides what vLLM itself collects."""

    ended: dict[int, int] = field(default_factory=dict)
    """Layered load job → number of ranks on which it has ended."""
    damaged: set[tuple[int, int]] = field(default_factory=set)
    """(slot, generation) of rows whose bytes did not have their checksum."""
    failed: dict[int, int] = field(default_factory=dict)
    """Async load job → number of ranks on which it failed, at least for some blocks, and whose bad
    blocks come with this report."""
    cancelled: dict[int, int] = field(default_factory=dict)
    """Cancelled load job → number of ranks that write into its blocks no more, and that give all of
    them as bad with this report."""
    segments: set[int] = field(default_factory=set)
    """Nonces of the segments that ranks have; each rank reports its own once."""
    loading: bool = False
    """Whether async loads run. vLLM asks the scheduler's side for ended ones only when workers have
    reported something."""
    spoiled: bool = False
    """Whether a layered load has put damaged bytes into the engine's KV cache."""
    load_rate: float | None = None
    """Bytes per second of layered loads, reported once; of several ranks the lowest."""

    def is_empty(self) -> bool:
        """Whether there is nothing to report."""
        lists = self.ended or self.damaged or self.failed or self.cancelled or self.segments
        return not (lists or self.spoiled or self.loading) and self.load_rate is None

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """The reports of two ranks as one."""
        assert isinstance(other, WorkerReport)
        return WorkerReport(
            ended=dict(Counter(self.ended) + Counter(other.ended)),
            damaged=self.damaged | other.damaged,
            failed=dict(Counter(self.failed) + Counter(other.failed)),
            cancelled=dict(Counter(self.cancelled) + Counter(other.cancelled)),
            segments=self.segments | other.segments,
            loading=self.loading or other.loading,
            spoiled=self.spoiled or other.spoiled,
            load_rate=min(filter(None, (self.load_rate, other.load_rate)), default=None),
        )
