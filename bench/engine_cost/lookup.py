"""Hashing and looking up a warm prompt through the Python extension."""

from __future__ import annotations

import statistics
import time

TOKENS = 131_072
BLOCK_TOKENS = 16
REPEATS = 50


def measure() -> dict[str, float]:
    """Medians in milliseconds: from a Python list of tokens, and hashed before."""
    import os

    from kvtide import _native

    settings = _native.Settings('{"host_capacity_gb": 0.1, "scrub_mib_per_s": 0}', {})
    segment = _native.Segment(settings, f"bench-{os.getpid()}", 1, 1, 64, 0, lambda *_: None)
    namespace = _native.Namespace(
        model="bench",
        weights_revision="",
        compute_dtype="",
        kv_dtype="",
        layout="",
        block_tokens=BLOCK_TOKENS,
        ranks=1,
        shard_bytes=64,
    )
    pool = _native.Pool(settings, segment, False)
    tokens = [(i * 2_654_435_761) % 128_000 for i in range(TOKENS)]
    blocks = TOKENS // BLOCK_TOKENS

    def sequence() -> _native.Sequence:
        fresh = namespace.sequence(None, None, None, [])
        fresh.extend(tokens)
        return fresh

    # Blocks that are being saved are found like complete ones; no engine is needed to fill them.
    [(_, _, covered)] = pool.plan_saves([(sequence(), 0, list(range(blocks)))])
    assert covered == blocks, "the pool is too small"
    from_tokens, hashed = [], []
    warm = sequence()
    for _ in range(REPEATS):
        start = time.perf_counter()
        fresh = sequence()
        found, _ = fresh.match_blocks(pool, 0, blocks, False)
        from_tokens.append(time.perf_counter() - start)
        assert found == blocks
        fresh.release()
        warm.release()
        start = time.perf_counter()
        warm.match_blocks(pool, 0, blocks, False)
        hashed.append(time.perf_counter() - start)
    gauges = pool.gauges()
    return {
        "index_bytes_a_block": gauges["index_bytes"] / gauges["slots"],
        "from_tokens_ms": statistics.median(from_tokens) * 1e3,
        "hashed_before_ms": statistics.median(hashed) * 1e3,
    }
