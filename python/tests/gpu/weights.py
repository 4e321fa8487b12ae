"""Weights under which the output of a model depends on every part of its prompt.

vLLM's dummy weights are all within 0.001, those of norms too, so that nothing but the last token
has any effect on the next: no comparison of outputs would see a KV cache with other contents.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch

SHARPNESS = 1.6
"""Scale of queries, keys and values. The products of the former two deviate by its square, so of
thousands of tokens a head heeds a handful, wherever they are. With 1 it would heed all alike, and
what any of them holds would hardly matter."""
SUMMED_OVER_RANKS = ("o_proj", "down_proj")
"""Layers of which every rank has some columns."""


@torch.inference_mode()
def spread(worker: Any) -> int:
    """Runs in every worker; returns how many numbers were written.

    They are random, of a scale that keeps that of what passes through them, and the same at every
    start. They are written in place: CUDA graphs have their addresses.
    """
    ranks = worker.parallel_config.tensor_parallel_size
    count = 0
    for name, weight in worker.get_model().named_parameters():
        if weight.dim() == 1:
            weight.fill_(1)  # A norm's.
        else:
            seed = zlib.crc32(f"{name} of rank {worker.rank}".encode())
            numbers = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            weight.copy_(numbers.mul_(deviation(name, weight.shape[1], ranks)))
        count += weight.numel()
    return count


def deviation(name: str, columns: int, ranks: int) -> float:
    """Of the numbers of a weight matrix."""
    if "embed_tokens" in name:
        return 1.0
    terms = columns * (ranks if any(part in name for part in SUMMED_OVER_RANKS) else 1)
    return (SHARPNESS if "qkv_proj" in name else 1.0) / math.sqrt(terms)
