"""What suspects complete leaves the prefix cache in the step in which it comes there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from kvtide.containment import Containment

BLOCK = 16


@dataclass
class Request:
    """The counts of one request of vLLM."""

    num_prompt_tokens: int
    num_computed_tokens: int


@dataclass
class Suspect:
    """A request, and the blocks that it has."""

    request: Any
    blocks: list[int]


@dataclass
class PrefixCache:
    """vLLM's, as far as it matters here."""

    num_gpu_blocks: int = 64
    cached: set[int] = field(default_factory=set)

    def evict_blocks(self, blocks: set[int]) -> None:
        self.cached -= blocks


@pytest.mark.parametrize("counted_first", [True, False])
@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("chunks", [[1] * 70, [40, 33, 16, *[1] * 40], [7] * 12])
def test_a_block_is_in_the_cache_only_while_hits_are_doubted(
    chunks: list[int], lag: int, counted_first: bool
) -> None:
    cache, containment = PrefixCache(cached={1, 2, 3}), Containment(BLOCK)
    containment.bind(cache)  # type: ignore[arg-type]
    prompt = sum(chunk for chunk in chunks if chunk > 1)
    request = Request(num_prompt_tokens=prompt, num_computed_tokens=0)
    containment.begin({"r": Suspect(request, list(range(1, 40)))})
    assert cache.cached == set()
    in_cache, doubted = 0, 0
    for chunk in chunks:
        # vLLM schedules: the step's tokens, and what of earlier ones it knows by now.
        complete = (request.num_computed_tokens + chunk - lag) // BLOCK
        if complete > in_cache:
            assert containment.doubts(BLOCK), "another request of this step may hit it"
            assert not containment.doubts(0)
            cache.cached |= set(range(in_cache + 1, complete + 1))
            in_cache = complete
        doubted += containment.doubts(BLOCK)
        request.num_computed_tokens += chunk * counted_first
        containment.end_step({"r": chunk})
        request.num_computed_tokens += chunk * (not counted_first)
        assert cache.cached == set()
    assert in_cache >= 2
    if prompt == 0:
        assert doubted <= len(chunks) // 2, "others are held back only near a block's end"


def test_who_has_finished_or_begins_anew_holds_nobody_back() -> None:
    cache, containment = PrefixCache(), Containment(BLOCK)
    containment.bind(cache)  # type: ignore[arg-type]
    containment.begin({"r": Suspect(Request(100, 20), [5, 6]), "s": Suspect(Request(9, 3), [7])})
    cache.cached = {5, 9}
    containment.release("r")
    assert cache.cached == {9}
    assert containment.doubts(1)
    containment.release("s")
    containment.release("unknown")
    assert not containment.doubts(1)
