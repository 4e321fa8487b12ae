"""Blocks come back byte for byte, over every route and from every layout; nothing else changes."""

from __future__ import annotations

import random

import pytest
import torch

from bench.gpu.rig import APART, Layout, Rig, raw, slots_of

H, D, T = 4, 64, 16
LAYOUTS = [
    Layout("split", (2, -1, T, H, D)),
    Layout("split-heads-first", (2, -1, T, H, D), order=(0, 1, 3, 2, 4)),
    Layout("interleaved", (-1, 2, T, H, D)),
    Layout("interleaved-heads-first", (-1, 2, T, H, D), order=(0, 1, 3, 2, 4)),
    Layout("fp8", (2, -1, T, H, D), dtype=torch.float8_e4m3fn),
    Layout("float32", (2, -1, T, H, D), dtype=torch.float32),
    Layout("mla", (-1, T, 576)),
    Layout("cross-layer", (-1, 2, T, H, D), cross_layer=True),
    Layout("large-pieces", (2, -1, T, 8, 128)),
    Layout("small-pieces", (2, -1, T, 1, 8)),
    Layout("odd-size", (2, -1, T, 3, 27)),
    Layout("odd-bytes", (-1, T, 37), dtype=torch.uint8),
    Layout("misaligned-2", (2, -1, T, H, D), offset=1),
    Layout("misaligned-8", (2, -1, T, H, D), offset=4),
    Layout("misaligned-odd", (-1, T, 100), dtype=torch.uint8, offset=3),
]
ROUTES = ["dma", "staged:8", "kernel:2"]


@pytest.mark.parametrize("layered", [False, True], ids=["async", "layered"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_blocks_come_back_whole_and_nothing_else_changes(
    layout: Layout, route: str, layered: bool
) -> None:
    routes = {"gpu_save_route": route, "gpu_load_route": route, "gpu_layered_route": route}
    with Rig(layout, **routes) as rig:
        blocks = random.Random(1).sample(range(1, rig.blocks), k=40)
        source, target = blocks[:20], blocks[20:]
        before = rig.snapshot()
        sequence = rig.sequence(len(source))
        rig.save(sequence, source, by_layer=layered)
        # The row's bytes have the checksum that the GPU computed, by the CPU's reckoning.
        assert sequence.match_blocks(rig.pool, 0, len(source), True) == (len(source), True)
        assert sequence.verify(rig.pool, len(source)) == len(source)
        sequence.release()
        assert all(map(torch.equal, before, rig.snapshot())), "a save changed the KV cache"

        rig.poison(target)
        expected = rig.snapshot()
        index = torch.tensor(target, device="cuda")
        for want, was in zip(expected, before, strict=True):
            want.index_copy_(layout.block_dimension(), index, rig.pick(was, source))
        failed, damaged, size = rig.load(sequence, target, layered)
        assert (failed, damaged) == ([], [])
        assert size == len(target) * rig.layers * layout.layer_bytes()
        for layer, (want, tensor) in enumerate(zip(expected, rig.tensors, strict=True)):
            assert torch.equal(want, raw(tensor)), f"layer {layer}"


@pytest.mark.parametrize("layered", [False, True], ids=["async", "layered"])
@pytest.mark.parametrize("route", ROUTES)
def test_more_blocks_than_are_staged_or_sliced_at_once(route: str, layered: bool) -> None:
    layout = Layout("large", (2, -1, T, 8, 128))
    routes = {"gpu_save_route": route, "gpu_load_route": route, "gpu_layered_route": route}
    with Rig(layout, layers=16, blocks=256, rows_gb=0.3, **routes) as rig:
        source = list(range(1, 121))
        target = list(range(255, 135, -1))
        sequence = rig.sequence(len(source))
        rig.save(sequence, source)
        rig.poison(target)
        before = rig.snapshot()
        assert rig.load(sequence, target, layered)[:2] == ([], [])
        for was, tensor in zip(before, rig.tensors, strict=True):
            assert torch.equal(rig.pick(raw(tensor), target), rig.pick(was, source))


@pytest.mark.parametrize("layered", [False, True], ids=["async", "layered"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_damaged_row_is_told_by_its_checksum(route: str, layered: bool) -> None:
    layout = Layout("split", (2, -1, T, H, D))
    rows = {"rows_gb": 0.002, "gpu_load_route": route, "gpu_layered_route": route}
    with Rig(layout, **rows) as rig:
        count = rig.segment.rows
        sequence = rig.sequence(count)
        rig.save(sequence, list(range(1, count + 1)))
        rig.damage(rig.segment.rows - 1)
        failed, damaged, _ = rig.load(sequence, list(range(1, count + 1)), layered)
        assert len(failed) == len(damaged) == 1


@pytest.mark.parametrize("layered", [False, True], ids=["async", "layered"])
@pytest.mark.parametrize("route", ROUTES)
def test_rows_alone_and_next_to_each_other_go_to_their_own_blocks(
    route: str, layered: bool
) -> None:
    layout = Layout("split", (2, -1, T, H, D))
    routes = {"gpu_save_route": route, "gpu_load_route": route, "gpu_layered_route": route}
    with Rig(layout, rows_gb=0.004, **routes) as rig:
        runs = [(0, 1), (1, 9), (10, 3), (13, 4), (17, 6)]
        shuffled = random.Random(3).sample(range(1, rig.blocks), k=23 * 2 + len(runs))
        source, target, others = shuffled[:23], shuffled[23:46], shuffled[46:]
        saved = rig.snapshot()
        sequence, other = rig.sequence(23), rig.sequence(len(runs), 1)
        # The last run first: rows do not rise with the places of a prompt either.
        for i, (start, count) in enumerate(reversed(runs)):
            rig.save(sequence, source[start : start + count], start=start)
            rig.save(other, others[i : i + 1], start=i)
        _lease, moves = rig.begin_load(sequence, target)
        slots = slots_of(moves)
        rows = sorted(slots)
        cuts = [i for i in range(1, len(rows)) if rows[i] > rows[i - 1] + 1]
        lengths = [end - begin for begin, end in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
        assert sorted(lengths) == sorted(count for _, count in runs)
        rig.poison(target)
        assert rig.load(sequence, target, layered)[:2] == ([], [])
        for was, tensor in zip(saved, rig.tensors, strict=True):
            assert torch.equal(rig.pick(raw(tensor), target), rig.pick(was, source))
        rig.damage(slots[12])
        failed, damaged, _ = rig.load(sequence, target, layered)
        assert failed == [12]
        assert [slot for slot, _ in damaged] == [slots[12]]


@pytest.mark.parametrize(
    ("layers", "route"),
    [(33, {"gpu_layered_route": "staged:64"}), (15, {})],
    ids=["layers-together", "by-kernels"],
)
def test_many_rows_that_lie_apart_are_there_when_their_layer_is(
    layers: int, route: dict[str, str]
) -> None:
    layout = Layout("large", (2, -1, T, 8, 128))
    # By layers of their own they are more copies than the engine's thread may put on the stream;
    # of 33 layers four are copied at once, of 15 none.
    with Rig(layout, layers=layers, blocks=620, rows_gb=1.4, **route) as rig:
        source, target = list(range(1, 301)), list(range(301, 601))
        sequence = rig.save_apart(source)
        _lease, moves = rig.begin_load(sequence, target, APART)
        before = rig.snapshot()
        rig.poison(target)
        rig.worker.load_layered(7, moves, True)
        seen = []
        for layer, tensor in enumerate(rig.tensors):
            rig.worker.wait_layer(layer)
            seen.append(rig.pick(raw(tensor), target))
        rig.worker.end_step()
        assert rig.await_load(7)[:2] == ([], [])
        for was, now in zip(before, seen, strict=True):
            assert torch.equal(now, rig.pick(was, source))


def test_a_load_waits_for_what_the_engine_still_does_with_the_blocks() -> None:
    layout = Layout("split", (2, -1, T, 8, 128))
    with Rig(layout, layers=4) as rig:
        source, target = list(range(1, 21)), list(range(30, 50))
        sequence = rig.sequence(len(source))
        rig.save(sequence, source)
        saved = rig.snapshot()
        for layered in (False, True):
            torch.cuda._sleep(50_000_000)
            rig.poison(target)  # Runs on the device after the sleep, and before any load.
            assert rig.load(sequence, target, layered)[:2] == ([], [])
            for was, tensor in zip(saved, rig.tensors, strict=True):
                assert torch.equal(rig.pick(raw(tensor), target), rig.pick(was, source))


def saved_and_planned(rig: Rig, blocks: list[int]) -> tuple[object, bytes]:
    """Saves blocks; what keeps their rows, and the moves of a load back into them."""
    sequence = rig.sequence(len(blocks))
    rig.save(sequence, blocks)
    lease, moves = rig.begin_load(sequence, blocks)
    return (sequence, lease), moves


@pytest.mark.parametrize("behind_steps", [True, False])
def test_an_async_load_is_held_up_by_earlier_steps_only_where_it_must(behind_steps: bool) -> None:
    layout = Layout("split", (2, -1, T, 8, 128))
    with Rig(layout, layers=4) as rig:
        blocks = list(range(1, 21))
        _lease, moves = saved_and_planned(rig, blocks)
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)  # Half a second.
        rig.worker.step_held_back()
        slept = torch.cuda.Event()
        slept.record()
        rig.worker.load_async(3, 0, moves, behind_steps)
        assert rig.await_load(3)[:2] == ([], [])
        assert slept.query() == behind_steps
        torch.cuda.synchronize()


@pytest.mark.parametrize("behind_steps", [True, False])
def test_a_layered_load_is_held_up_by_earlier_steps_only_where_it_must(behind_steps: bool) -> None:
    layout = Layout("split", (2, -1, T, 8, 128))
    with Rig(layout, layers=4) as rig:
        source, target = list(range(1, 21)), list(range(30, 50))
        sequence = rig.sequence(len(source))
        rig.save(sequence, source)
        _lease, moves = rig.begin_load(sequence, target)
        rig.poison(target)
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)  # Half a second.
        slept = torch.cuda.Event()
        slept.record()
        rig.worker.load_layered(3, moves, behind_steps)
        rig.worker.finish_layers()
        assert slept.query() == behind_steps
        rig.worker.end_step()
        assert rig.await_load(3)[:2] == ([], [])
        for tensor in rig.tensors:
            assert torch.equal(rig.pick(raw(tensor), target), rig.pick(raw(tensor), source))


def test_a_load_behind_earlier_steps_does_not_wait_for_the_step_that_begins() -> None:
    layout = Layout("split", (2, -1, T, 8, 128))
    with Rig(layout, layers=4) as rig:
        blocks = list(range(1, 21))
        _lease, moves = saved_and_planned(rig, blocks)
        torch.cuda.synchronize()
        rig.worker.step_held_back()
        torch.cuda._sleep(1_000_000_000)
        slept = torch.cuda.Event()
        slept.record()
        rig.worker.load_async(3, 0, moves, True)
        assert rig.await_load(3)[:2] == ([], [])
        assert not slept.query()
        torch.cuda.synchronize()


def test_every_layer_is_there_when_several_come_with_one_launch() -> None:
    layout = Layout("split", (2, -1, T, 8, 128))
    with Rig(layout, layers=9, blocks=520, rows_gb=0.4) as rig:
        # Half of 32 MiB a layer, so five launches, the last of which has fewer layers.
        blocks = list(range(1, 257))
        _lease, moves = saved_and_planned(rig, blocks)
        saved = rig.snapshot()
        rig.poison(blocks)
        rig.worker.load_layered(7, moves, True)
        seen = []
        for layer, tensor in enumerate(rig.tensors):
            rig.worker.wait_layer(layer)
            seen.append(raw(tensor).clone())
        rig.worker.end_step()
        rig.await_load(7)
        for was, now in zip(saved, seen, strict=True):
            assert torch.equal(rig.pick(was, blocks), rig.pick(now, blocks))


def test_a_layered_load_holds_back_the_stream_and_not_the_thread() -> None:
    layout = Layout("split", (2, -1, T, 8, 128))
    with Rig(layout, layers=8, blocks=1024, rows_gb=1.0) as rig:
        blocks = list(range(1, 1001))
        _lease, moves = saved_and_planned(rig, blocks)
        saved = rig.snapshot()
        rig.poison(blocks)
        torch.cuda.synchronize()
        rig.worker.load_layered(7, moves, True)
        seen = []
        for layer, tensor in enumerate(rig.tensors):
            rig.worker.wait_layer(layer)
            seen.append(raw(tensor).clone())
        done = torch.cuda.Event()
        done.record()
        assert not done.query(), "the thread waited for 0.5 GB"
        torch.cuda.synchronize()
        rig.worker.end_step()
        for was, now in zip(saved, seen, strict=True):
            assert torch.equal(rig.pick(was, blocks), rig.pick(now, blocks))
        rig.await_load(7)


def test_a_save_reads_what_the_step_wrote_before_it_told_of_the_layer() -> None:
    layout = Layout("split", (2, -1, T, 8, 128))
    with Rig(layout, layers=4) as rig:
        blocks = list(range(1, 21))
        sequence = rig.sequence(len(blocks))
        [(job, moves, _)] = rig.pool.plan_saves([(sequence, 0, blocks)])
        rig.worker.begin_step([(job, moves)])
        for layer, tensor in enumerate(rig.tensors):
            torch.cuda._sleep(10_000_000)
            raw(tensor).fill_(layer + 1)
            rig.worker.layer_computed(layer)
        rig.worker.end_step()
        rig.worker.finish_saves([job])
        rig.pool.poll()
        for tensor in rig.tensors:
            raw(tensor).fill_(99)
        assert rig.load(sequence, blocks)[:2] == ([], [])
        for layer, tensor in enumerate(rig.tensors):
            assert bool((rig.pick(raw(tensor), blocks) == layer + 1).all()), f"layer {layer}"


def test_what_waits_for_a_save_on_the_stream_does_not_spoil_it() -> None:
    layout = Layout("split", (2, -1, T, 8, 128))
    with Rig(layout, layers=16, blocks=420, rows_gb=0.5) as rig:
        blocks = list(range(1, 401))
        for round_ in range(1, 6):
            for tensor in rig.tensors:
                raw(tensor).fill_(round_)
            sequence = rig.sequence(len(blocks), round_)
            [(job, moves, _)] = rig.pool.plan_saves([(sequence, 0, blocks)])
            rig.worker.save_now([(job, moves)])
            rig.worker.wait_saves([job])
            for tensor in rig.tensors:
                raw(tensor).fill_(99)
            rig.worker.finish_saves([job])
            rig.pool.poll()
            assert rig.load(sequence, blocks)[:2] == ([], [])
            for layer, tensor in enumerate(rig.tensors):
                kept = bool((rig.pick(raw(tensor), blocks) == round_).all())
                assert kept, f"round {round_}, layer {layer}"
            rig.pool.clear()


def test_a_short_load_is_not_held_up_by_a_long_one() -> None:
    layout = Layout("split", (2, -1, T, 8, 128))
    with Rig(layout, layers=32, blocks=1100, rows_gb=2.4, gpu_load_route="staged") as rig:
        long, short = list(range(1, 1001)), list(range(1001, 1005))
        long_sequence, short_sequence = rig.sequence(len(long), 1), rig.sequence(len(short), 2)
        rig.save(long_sequence, long)
        rig.save(short_sequence, short)
        jobs = []
        for job, (sequence, blocks) in enumerate(
            [(long_sequence, long), (short_sequence, short)], start=1
        ):
            lease, moves = rig.begin_load(sequence, blocks)
            jobs.append((job, moves, lease))
        for job, moves, _ in jobs:
            rig.worker.load_async(job, 0, moves, True)
        ended: list[int] = []
        while len(ended) < 2:
            ended += [job for job, *_ in rig.worker.take_loads()]
        assert ended == [2, 1]
