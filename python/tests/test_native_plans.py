"""The calls that plan for all requests of a step at once, on a real pool and worker."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from kvtide._native import BOARD_CELLS, Namespace, Pool, Segment, Sequence, Settings, Worker
from kvtide.messages import MOVE_BYTES, block_of

BLOCK_TOKENS = 16
LAYER_BYTES = 256
LAYERS = 2
BLOCKS = 32
numbers = itertools.count()


class Rig:
    """A pool, and one rank whose KV cache lies in host memory."""

    def __init__(self) -> None:
        settings = Settings(json.dumps({"host_capacity_gb": 0.01, "scrub_mib_per_s": 0}), {})
        name = f"tests-{os.getpid()}-plans{next(numbers)}"

        def segment(rank: int | None) -> Segment:
            return Segment(settings, name, 1, LAYERS, LAYER_BYTES, rank, lambda *_: None)

        self.tensors = [
            torch.randint(0, 256, (BLOCKS, LAYER_BYTES), dtype=torch.uint8) for _ in range(LAYERS)
        ]
        views = [
            (str(i), each.data_ptr(), each.nbytes, list(each.shape), [LAYER_BYTES, 1], 1)
            for i, each in enumerate(self.tensors)
        ]
        self.worker = Worker(
            settings, segment(0), 0, "cpu0", None, BLOCKS, LAYER_BYTES, views, None, self.tensors
        )
        self.segment = segment(None)
        self.namespace = Namespace(
            model=name,
            weights_revision="",
            compute_dtype="",
            kv_dtype="",
            layout="",
            block_tokens=BLOCK_TOKENS,
            ranks=1,
            shard_bytes=LAYERS * LAYER_BYTES,
        )
        self.pool = Pool(settings, self.segment, False)

    def sequence(self, first: int, blocks: int) -> Sequence:
        """So many blocks of tokens that begin with `first`."""
        made = self.namespace.sequence(None, None, None, [])
        made.extend([first, *range(1, blocks * BLOCK_TOKENS)])
        return made


@pytest.fixture
def rig() -> Iterator[Rig]:
    """See `Rig`."""
    made = Rig()
    yield made
    made.worker.close()


def blocks_of(moves: bytes) -> list[int]:
    """The engine's blocks of moves."""
    return [block_of(moves, i) for i in range(len(moves) // MOVE_BYTES)]


def wait_until(condition: Callable[[], bool]) -> None:
    """Copy threads take a moment."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_saves_of_one_call_know_of_each_other(rig: Rig) -> None:
    one, same, other = rig.sequence(1, 3), rig.sequence(1, 4), rig.sequence(2, 2)
    plans = rig.pool.plan_saves([(one, 0, [4, 5, 6]), (same, 0, [7, 8, 9, 10]), (other, 1, [12])])
    assert [blocks_of(moves) for _, moves, _ in plans] == [[4, 5, 6], [10], [12]]
    assert [covered for _, _, covered in plans] == [3, 4, 1]
    jobs = [job for job, _, _ in plans]
    assert len(set(jobs)) == 3
    assert 0 not in jobs
    assert rig.pool.saves_reading([5, 10]) == jobs[:2]
    assert rig.pool.plan_saves([(one, 0, [4, 5, 6])]) == [(0, b"", 3)]
    assert rig.pool.plan_saves([]) == []


def test_loads_are_planned_when_their_saves_have_ended_and_end_on_the_board(rig: Rig) -> None:
    saved, joined = rig.sequence(1, 3), rig.sequence(2, 2)
    [(job, moves, _)] = rig.pool.plan_saves([(saved, 0, [0, 1, 2])])
    rig.worker.save_now([(job, moves)])
    wait_until(lambda: rig.pool.poll() == 0)
    [(late_job, late_moves, _)] = rig.pool.plan_saves([(joined, 0, [3, 4])])
    loads = []
    for sequence, targets in ((saved, [10, 11, 12]), (joined, [13, 14])):
        sequence.match_blocks(rig.pool, 0, len(targets), False)
        load = sequence.begin_load(rig.pool, 0, targets)
        assert load is not None
        loads.append(load)
    ready, waiting = rig.pool.plan_loads(loads, [], 0)
    assert waiting is None, "its blocks are still being saved"
    rig.worker.save_now([(late_job, late_moves)])
    wait_until(lambda: rig.pool.poll() == 0)
    [late] = rig.pool.plan_loads([], loads[1:], 1)
    assert ready is not None
    assert late is not None
    assert [blocks_of(moves) for moves, _, _ in (ready, late)] == [[10, 11, 12], [13, 14]]
    assert ready[1:] == late[1:] == (None, True)

    first, last = (0, 5), (BOARD_CELLS - 1, 6)
    assert rig.segment.ended_loads([first, last]) == [None, None]
    rig.worker.load_async(5, 0, ready[0], False)
    wait_until(lambda: rig.segment.ended_loads([first, last]) == [0, None])
    # A row that is named by an older generation is not loaded.
    stale = late[0][:4] + bytes(4) + late[0][8:]
    rig.worker.load_async(6, BOARD_CELLS - 1, stale, False)
    wait_until(lambda: rig.segment.ended_loads([last, first, (0, 4)]) == [1, 0, None])
    for tensor in rig.tensors:
        assert torch.equal(tensor[10:13], tensor[0:3])
    assert rig.pool.plan_loads([], [], 9) == rig.segment.ended_loads([]) == []
