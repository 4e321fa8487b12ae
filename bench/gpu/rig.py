"""A pool and a worker over tensors of any shape, without vLLM."""

from __future__ import annotations

import itertools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kvtide import _native
from kvtide.encoding import scaled_dimensions

BLOCK_TOKENS = 16
ROW_ALIGN_BYTES = 4096
TIMEOUT_S = 20.0
MOVE_BYTES = 12
OTHER_SEED = 999
SAVES_AT_ONCE = 32
"""Blocks of each of two sequences."""
APART = 2
"""Of a sequence, one block in so many is loaded where no row may lie next to another."""
_numbers = itertools.count()


@dataclass(frozen=True)
class Layout:
    """How the KV cache of one layer lies in memory."""

    name: str
    shape: tuple[int, ...]
    """With -1 where blocks are counted."""
    dtype: torch.dtype = torch.bfloat16
    offset: int = 0
    """Elements of the storage before the first."""
    order: tuple[int, ...] = ()
    """Dimensions from the outermost in memory to the innermost; as in the shape if empty."""
    cross_layer: bool = False
    """Whether all layers share one storage, block by block."""
    scales: int = 0
    """Of a block in one layer where rows are encoded; then it holds numbers, not any bytes."""

    def tensors(self, layers: int, blocks: int) -> list[torch.Tensor]:
        """One view a layer, filled with random bytes."""
        shape = tuple(blocks if n == -1 else n for n in self.shape)
        order = self.order or tuple(range(len(shape)))
        memory = [shape[d] for d in order]
        inverse = [order.index(d) for d in range(len(shape))]
        if self.cross_layer:
            assert self.shape[0] == -1
            storage = self._random((blocks, layers, *memory[1:]))
            return [storage[:, layer].permute(inverse) for layer in range(layers)]
        return [self._random(tuple(memory)).permute(inverse) for _ in range(layers)]

    def _random(self, shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel() + self.offset
        size = torch.empty(0, dtype=self.dtype).element_size()
        if self.scales:
            numbers = torch.randn(count, device="cuda") * 3
            return numbers.to(self.dtype)[self.offset :].view(shape)
        raw = torch.randint(0, 256, (count * size,), dtype=torch.uint8, device="cuda")
        return raw.view(self.dtype)[self.offset :].view(shape)

    def layer_bytes(self) -> int:
        """Bytes of a block in one layer."""
        size = torch.empty(0, dtype=self.dtype).element_size()
        elements = 1
        for n in self.shape:
            elements *= 1 if n == -1 else n
        return elements * size

    def block_dimension(self) -> int:
        """Where blocks are counted."""
        return self.shape.index(-1)


def slots_of(moves: bytes, one_in: int = 1) -> list[int]:
    """The row of one in so many moves."""
    starts = range(0, len(moves), MOVE_BYTES * one_in)
    return [int.from_bytes(moves[start : start + 4], "little") for start in starts]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's elements as integers, so that NaN equals itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.view(kinds[tensor.element_size()])


class Rig:
    """One rank's KV cache and a pool for it."""

    def __init__(
        self, layout: Layout, layers: int = 3, blocks: int = 64, rows_gb: float = 0.05, **extra: Any
    ) -> None:
        self.layout, self.layers, self.blocks = layout, layers, blocks
        self.tensors = layout.tensors(layers, blocks)
        settings = {"host_capacity_gb": rows_gb, "scrub_mib_per_s": 0, "huge_pages": "off"} | extra
        self.settings = _native.Settings(json.dumps(settings), {})
        row_layer_bytes = self.settings.row_layer_bytes(layout.layer_bytes(), layout.scales)
        self.row_layer_bytes = row_layer_bytes
        name = f"gpu-{os.getpid()}-{next(_numbers)}"
        # No scheduler's side comes, so the file keeps its name.
        self.segment = _native.Segment(
            self.settings, name, 1, layers, row_layer_bytes, 0, lambda *_: None
        )
        self.segment.populate(lambda _done, _total: None)
        views = [self._view(i, tensor) for i, tensor in enumerate(self.tensors)]
        self.worker = _native.Worker(
            self.settings,
            self.segment,
            0,
            "gpu",
            torch.cuda.current_device(),
            blocks,
            layout.layer_bytes(),
            views,
            self._encoding(views),
            self.tensors,
        )
        self.worker.use_stream(torch.cuda.current_stream().cuda_stream)
        self.namespace = _native.Namespace(
            model=name,
            weights_revision="",
            compute_dtype="",
            kv_dtype="",
            layout="",
            block_tokens=BLOCK_TOKENS,
            ranks=1,
            shard_bytes=layers * row_layer_bytes,
        )
        self.pool = _native.Pool(self.settings, self.segment, False)
        self._jobs = itertools.count(1 << 40)

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.worker.close()
        path = Path(self.segment.path)
        del self.worker, self.pool, self.segment
        path.unlink(missing_ok=True)

    def _view(self, index: int, tensor: torch.Tensor) -> tuple:
        size = tensor.element_size()
        offset = tensor.storage_offset() * size
        return (
            f"layers.{index}",
            tensor.data_ptr(),
            tensor.untyped_storage().nbytes() - offset,
            list(tensor.shape),
            [stride * size for stride in tensor.stride()],
            size,
        )

    def _encoding(self, views: list[tuple]) -> tuple[str, list[list[tuple[int, int]]]] | None:
        if self.settings.codec == "none":
            return None
        dimensions = [
            scaled_dimensions(name, shape, strides, item_bytes, self.layout.scales)
            for name, _, _, shape, strides, item_bytes in views
        ]
        return str(self.layout.dtype).removeprefix("torch."), dimensions

    def sequence(self, blocks: int, seed: int = 0) -> _native.Sequence:
        """A sequence of so many blocks; equal seeds make equal keys."""
        fresh = self.namespace.sequence(None, None, None, [])
        fresh.extend([seed * 1_000_003 + i for i in range(blocks * BLOCK_TOKENS)])
        return fresh

    def save(
        self,
        sequence: _native.Sequence,
        blocks: list[int],
        by_layer: bool = False,
        start: int = 0,
    ) -> bytes:
        """Saves blocks as those of the sequence from `start` on, all at once or as a step computes
        them; the moves."""
        [(job, moves, _)] = self.pool.plan_saves([(sequence, start, blocks)])
        if by_layer:
            self.worker.begin_step([(job, moves)])
            for layer in range(self.layers):
                self.worker.layer_computed(layer)
            self.worker.end_step()
        else:
            self.worker.save_now([(job, moves)])
        self.worker.finish_saves([job])
        self.pool.poll()
        return moves

    def save_apart(self, blocks: list[int]) -> _native.Sequence:
        """Saves blocks into rows none of which lies next to another, if one in `APART` of the
        sequence's is loaded: each block is saved more than once."""
        repeated = [block for block in blocks for _ in range(APART)]
        sequence = self.sequence(len(repeated))
        moves = self.save(sequence, repeated)
        rows = sorted(slots_of(moves, APART))
        assert all(b > a + 1 for a, b in itertools.pairwise(rows)), "rows do not lie apart"
        return sequence

    def save_in_stretches(self, sequence: _native.Sequence, blocks: list[int]) -> None:
        """Saves blocks as those of an answer that is computed beside another."""
        other = self.sequence(len(blocks), seed=OTHER_SEED)
        for start in range(0, len(blocks), SAVES_AT_ONCE):
            jobs = []
            for i, block in enumerate(blocks[start : start + SAVES_AT_ONCE], start):
                for each in (sequence, other):
                    [(job, moves, _)] = self.pool.plan_saves([(each, i, [block])])
                    jobs.append((job, moves))
            self.worker.save_now(jobs)
            self.worker.finish_saves([job for job, _ in jobs])
            self.pool.poll()

    def begin_load(
        self, sequence: _native.Sequence, blocks: list[int], one_in: int = 1
    ) -> tuple[_native.Load, bytes]:
        """What keeps the rows of a load into blocks, and its moves: one in so many of the
        sequence's."""
        targets = [block for block in blocks for _ in range(one_in)]
        found, complete = sequence.match_blocks(self.pool, 0, len(targets), False)
        assert (found, complete) == (len(targets), True)
        load = sequence.begin_load(self.pool, 0, targets)
        assert load is not None
        [plan] = self.pool.plan_loads([load], [], 0)
        assert plan is not None
        moves, lost, last = plan
        assert lost is None
        assert last
        starts = range(0, len(moves), MOVE_BYTES * one_in)
        return load, b"".join(moves[start : start + MOVE_BYTES] for start in starts)

    def load(
        self,
        sequence: _native.Sequence,
        blocks: list[int],
        layered: bool = False,
        one_in: int = 1,
    ) -> tuple:
        """Loads into blocks; (failed places, damaged slots, bytes)."""
        _lease, moves = self.begin_load(sequence, blocks, one_in)
        job = next(self._jobs)
        if layered:
            self.worker.load_layered(job, moves, True)
            for layer in range(self.layers):
                self.worker.wait_layer(layer)
            self.worker.end_step()
        else:
            self.worker.load_async(job, 0, moves, True)
        return self.await_load(job)

    def await_load(self, job: int) -> tuple:
        """How a load ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            for ended, failed, damaged, size, _ in self.worker.take_loads():
                assert ended == job
                return failed, damaged, size
            time.sleep(0.0002)
        raise TimeoutError(f"load {job} has not ended")

    def snapshot(self) -> list[torch.Tensor]:
        """The KV cache now."""
        return [raw(tensor).clone() for tensor in self.tensors]

    def poison(self, blocks: list[int]) -> None:
        """Overwrites blocks with bytes that no test saves."""
        for tensor in self.tensors:
            pattern = torch.tensor([0xA5] * tensor.element_size(), dtype=torch.uint8)
            value = raw(pattern.view(tensor.dtype)).item()
            raw(tensor).index_fill_(
                self.layout.block_dimension(), torch.tensor(blocks, device="cuda"), value
            )

    def pick(self, tensor: torch.Tensor, blocks: list[int]) -> torch.Tensor:
        """Some blocks of a (raw) tensor."""
        index = torch.tensor(blocks, device="cuda")
        return tensor.index_select(self.layout.block_dimension(), index)

    def row(self, slot: int) -> bytes:
        """What the segment's file has in a row."""
        with Path(self.segment.path).open("rb") as file:
            file.seek(-self._offset_from_end(slot), os.SEEK_END)
            return file.read(self.layers * self.row_layer_bytes)

    def damage(self, slot: int) -> None:
        """Flips a bit in the middle of a row in the segment's file."""
        offset = self._offset_from_end(slot) - self.segment.row_bytes // 2
        with Path(self.segment.path).open("r+b") as file:
            file.seek(-offset, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-offset, os.SEEK_END)
            file.write(bytes([byte ^ 0x20]))

    def _offset_from_end(self, slot: int) -> int:
        stride = -(-self.segment.row_bytes // ROW_ALIGN_BYTES) * ROW_ALIGN_BYTES
        return (self.segment.rows - slot) * stride
