"""Rows that hold eight bits a number: exactly what the format says, and as near as that allows."""

from __future__ import annotations

import pytest
import torch

from bench.gpu.rig import Layout, Rig, raw

H, D, T = 4, 64, 16
BF16, FP16 = torch.bfloat16, torch.float16
LAYOUTS = [
    Layout("tokens-first", (-1, H, T, 2 * D), order=(0, 2, 1, 3), scales=2 * H),
    Layout("heads-first", (-1, H, T, 2 * D), scales=2 * H),
    Layout("half", (-1, H, T, 2 * D), dtype=FP16, order=(0, 2, 1, 3), scales=2 * H),
    Layout("keys-then-values", (-1, 2 * H, T, D), order=(0, 2, 1, 3), scales=2 * H),
    Layout("one-head", (-1, 1, T, 2 * D), scales=2),
    Layout("latent", (-1, T, 576), scales=1),
    Layout("cross-layer", (-1, H, T, 2 * D), cross_layer=True, scales=2 * H),
    Layout("large", (-1, 8, T, 256), order=(0, 2, 1, 3), scales=16),
]
ROUTES = ["staged", "kernel:2"]
LARGEST = 448.0
"""Of e4m3."""
STEP = 1 / 16
"""Of an e4m3 number with three bits of mantissa, rounded to the nearest: half of 1/8."""


def by_scale(layout: Layout, block: torch.Tensor) -> torch.Tensor:
    """One block of a layer as (scales, numbers), keys and values apart."""
    if block.dim() == 2:
        return block.reshape(1, -1)
    heads, tokens, width = block.shape
    parts = layout.scales // heads
    split = block.reshape(heads, tokens, parts, width // parts)
    return split.transpose(1, 2).reshape(layout.scales, -1)


def expected_row(layout: Layout, block: torch.Tensor) -> bytes:
    """What a layer of a row must hold, by PyTorch's own conversions."""
    numbers = by_scale(layout, block).float()
    # On the CPU, where a division is one: on a GPU, PyTorch multiplies by the reciprocal.
    largest = numbers.abs().amax(dim=1).cpu()
    unit = torch.full_like(largest, LARGEST)
    factor = torch.where(largest > 0, unit / largest, 0.0).to(block.device)
    # The block's numbers in the order of its memory.
    in_memory = torch.empty_like(block, dtype=torch.float32)
    in_memory.copy_(block.float())
    scaled = by_scale(layout, in_memory) * factor[:, None]
    heads = 1 if block.dim() == 2 else block.shape[0]
    parts = layout.scales // heads
    if block.dim() == 2:
        back = scaled.reshape(block.shape)
    else:
        tokens, width = block.shape[1:]
        back = scaled.reshape(heads, parts, tokens, width // parts).transpose(1, 2)
        back = back.reshape(block.shape)
    # A copy with the strides of the block, so that its storage is in the block's order.
    order = sorted(range(block.dim()), key=lambda d: -block.stride(d))
    encoded = back.permute(order).contiguous().to(torch.float8_e4m3fn)
    body = bytes(encoded.view(torch.uint8).flatten().cpu().numpy())
    tail = (largest / unit).numpy().tobytes()
    return body + tail + bytes(-len(tail) % 16)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layered", [False, True], ids=["async", "layered"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_rows_are_what_the_format_says_and_come_back_within_a_step(
    layout: Layout, layered: bool, route: str
) -> None:
    routes = {"gpu_save_route": route, "gpu_load_route": route, "gpu_layered_route": route}
    with Rig(layout, codec="fp8", **routes) as rig:
        source, target = list(range(1, 21)), list(range(30, 50))
        rig.tensors[0][3] = 0  # Nothing but zeros has a scale of zero.
        rig.tensors[1][4] *= 1e-3
        saved = [tensor.clone() for tensor in rig.tensors]
        sequence = rig.sequence(len(source))
        moves = rig.save(sequence, source, by_layer=layered)
        # The row's bytes have the checksum that the GPU computed, by the CPU's reckoning.
        assert sequence.match_blocks(rig.pool, 0, len(source), True) == (len(source), True)
        assert sequence.verify(rig.pool, len(source)) == len(source)
        sequence.release()
        assert all(torch.equal(raw(a), raw(b)) for a, b in zip(saved, rig.tensors, strict=True))
        for at in range(0, len(moves), 12):
            slot, block = (int.from_bytes(moves[at + i : at + i + 4], "little") for i in (0, 8))
            row = rig.row(slot)
            for layer, tensor in enumerate(saved):
                held = row[layer * rig.row_layer_bytes : (layer + 1) * rig.row_layer_bytes]
                assert held == expected_row(layout, tensor[block]), f"block {block}, {layer=}"

        before = rig.snapshot()
        assert rig.load(sequence, target, layered)[:2] == ([], [])
        for layer, (was, now) in enumerate(zip(saved, rig.tensors, strict=True)):
            for from_, to in zip(source, target, strict=True):
                a = by_scale(layout, was[from_]).float()
                b = by_scale(layout, now[to]).float()
                # Below the smallest normal number steps are even: 2^-9 of e4m3's unit.
                bound = a.abs() * STEP + a.abs().amax(dim=1, keepdim=True) / LARGEST * 2**-9
                assert bool(((a - b).abs() <= bound * 1.01).all()), f"{layer=}, block {to}"
        others = [n for n in range(rig.blocks) if n not in target]
        for was, tensor in zip(before, rig.tensors, strict=True):
            kept = torch.equal(rig.pick(was, others), rig.pick(raw(tensor), others))
            assert kept, "a load changed other blocks"


@pytest.mark.parametrize("layered", [False, True], ids=["async", "layered"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_damaged_row_is_told_by_its_checksum(route: str, layered: bool) -> None:
    layout = LAYOUTS[0]
    rows = {"rows_gb": 0.001, "gpu_load_route": route, "gpu_layered_route": route, "codec": "fp8"}
    with Rig(layout, **rows) as rig:
        count = rig.segment.rows
        sequence = rig.sequence(count)
        rig.save(sequence, list(range(1, count + 1)))
        rig.damage(rig.segment.rows - 1)
        failed, damaged, _ = rig.load(sequence, list(range(1, count + 1)), layered)
        assert len(failed) == len(damaged) == 1


@pytest.mark.parametrize("layered", [False, True], ids=["async", "layered"])
def test_more_blocks_than_are_staged_or_sliced_at_once(layered: bool) -> None:
    layout = Layout("large", (-1, 8, T, 256), order=(0, 2, 1, 3), scales=16)
    with Rig(layout, layers=16, blocks=256, rows_gb=0.3, codec="fp8") as rig:
        source, target = list(range(1, 121)), list(range(255, 135, -1))
        sequence = rig.sequence(len(source))
        rig.save(sequence, source)
        assert rig.load(sequence, target, layered)[:2] == ([], [])
        for tensor in rig.tensors:
            was, now = rig.pick(tensor, source).float(), rig.pick(tensor, target).float()
            assert float((was - now).abs().max()) <= float(was.abs().max()) * STEP


def test_a_number_that_is_not_finite_spoils_no_other() -> None:
    layout = LAYOUTS[0]
    with Rig(layout, codec="fp8") as rig:
        source, target = [5], [40]
        block = rig.tensors[0][5]
        block[0, 0, 0], block[0, 1, 3] = float("inf"), float("nan")
        was = block.clone().float()
        sequence = rig.sequence(1)
        rig.save(sequence, source)
        assert rig.load(sequence, target)[:2] == ([], [])
        now = rig.tensors[0][40].float()
        assert bool(now[0, 1, 3].isnan())
        finite = was.isfinite()
        assert float((was - now)[finite].abs().max()) <= float(was[finite].abs().max()) * STEP
        assert float(now[0, 0, 0]) == pytest.approx(
            float(was[0, :, :D][finite[0, :, :D]].abs().max()), rel=0.01
        )


def test_encoding_twice_changes_nothing_more() -> None:
    layout = LAYOUTS[0]
    with Rig(layout, codec="fp8") as rig:
        first, second, third = list(range(1, 11)), list(range(20, 30)), list(range(40, 50))
        one, two = rig.sequence(10, 1), rig.sequence(10, 2)
        rig.save(one, first)
        assert rig.load(one, second)[:2] == ([], [])
        rig.save(two, second)
        assert rig.load(two, third)[:2] == ([], [])
        for tensor in rig.tensors:
            once, twice = rig.pick(tensor, second).float(), rig.pick(tensor, third).float()
            assert float((once - twice).abs().max()) <= float(once.abs().max()) * 2**-7


def test_the_route_that_moves_bytes_as_they_are_is_refused() -> None:
    with (
        pytest.raises(Exception, match='set the route to "staged" or "kernel"'),
        Rig(LAYOUTS[0], codec="fp8", gpu_save_route="dma"),
    ):
        pass
