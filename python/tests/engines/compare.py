"""Whether two runs of the model gave the same."""

from __future__ import annotations

import math
from typing import Any

Output = dict[str, Any]
LOGPROB_TOLERANCE = 1e-5
"""What another order of float32 sums can cost. An error of 1 % in one layer of the KV cache is
hundreds of times larger: `test_the_comparison_sees_an_error_of_one_percent_in_one_layer`."""


def differences(got: list[Output], wanted: list[Output]) -> list[str]:
    """Where tokens or logprobs differ; `wanted` may go on for longer than `got`."""
    found = []
    assert len(got) == len(wanted)
    for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
        if one is None or not one["tokens"]:
            found.append(f"prompt {index}: no output: {one}")
            continue
        length = len(one["tokens"])
        if one["tokens"] != other["tokens"][:length]:
            found.append(f"prompt {index}: {one['tokens']} instead of {other['tokens'][:length]}")
        worst = max(
            abs(a - b) for a, b in zip(one["logprobs"], other["logprobs"][:length], strict=True)
        )
        if not worst <= LOGPROB_TOLERANCE or math.isnan(worst):
            found.append(f"prompt {index}: logprobs differ by up to {worst}")
    return found


def assert_same(got: list[Output], wanted: list[Output], when: str) -> None:
    """Fails with every difference."""
    found = differences(got, wanted)
    assert not found, f"{when}:\n" + "\n".join(found)


def cached_tokens(outputs: list[Output]) -> list[int]:
    """How much of each prompt came from a cache, vLLM's own or the pool."""
    return [output["cached"] for output in outputs]
