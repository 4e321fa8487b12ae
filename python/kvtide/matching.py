"""What can be loaded for a request, and how: from vLLM's question to the load.

A layered load cannot be taken back, so only blocks that are complete in host memory are offered for
one. All else loads async, where a failure is reported to vLLM and recomputed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtide.log import logger

if TYPE_CHECKING:
    from kvtide._native import Pool, Settings
    from kvtide.cost import StepCost
    from kvtide.loads import LoadLedger
    from kvtide.requests import RequestState
    from kvtide.stats import Stats


class Matching:
    """See the module's documentation."""

    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        loads: LoadLedger,
        cost: StepCost,
        stats: Stats,
        *,
        block_tokens: int,
        certain: bool,
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._loads = loads
        self._cost = cost
        self._stats = stats
        self._block_tokens = block_tokens
        self._certain = certain
        """Whether a load that fails would fail its request: then only verified blocks match."""
        self._verifies = certain or settings.verify == "always"
        if certain:
            logger.warning(
                'kv_load_failure_policy is not "recompute": every match is verified on the '
                "scheduler's thread, and blocks still being saved are not used. Set it to "
                '"recompute" to avoid both'
            )

    def offer(self, state: RequestState, resident: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded behind the `resident` ones that the engine has itself, and
        whether async; None if vLLM has to ask again in the next step."""
        state.resident = resident
        if state.request.skip_reading_prefix_cache or state.load_failed:
            state.let_go()
            return 0, False
        first = resident // self._block_tokens
        answer = self._match(state, first)
        if answer is None:
            # More loads would only queue behind each other while holding blocks.
            state.let_go()
            self._stats.count("deferred_lookups", 1)
            return None, False
        blocks, asynchronous = answer
        if blocks == 0:
            state.let_go()
            return 0, False
        state.match = (first, blocks, asynchronous)
        return blocks * self._block_tokens, asynchronous

    def _match(self, state: RequestState, first: int) -> tuple[int, bool] | None:
        """How many blocks can be loaded from `first` on, and whether async; None if the request has
        to wait until another async load has ended.

        vLLM asks for the request at the head of its queue in every step. The sequence keeps what it
        has matched and verified for the last answer; what has to wait anyway is not verified.
        """
        tokens = state.request.num_tokens
        # At least one token must be computed, for its logits.
        last = (tokens - 1) // self._block_tokens
        if first >= last:
            return 0, False
        state.hash_known_tokens()
        pool, certain = self._pool, self._certain
        has_room = self._loads.has_room()
        if not has_room and self._loads_only_async():
            # Many may wait like this, and all of them are asked.
            return None if state.sequence.is_held(pool, first, certain) else (0, False)
        # An async load may bring the last token's block too: vLLM computes that token again when
        # the load has ended, in a step of one token, which a decode graph can run.
        end = tokens // self._block_tokens
        if state.asked.load_tokens is not None:
            end = min(end, first + state.asked.load_tokens // self._block_tokens)
        blocks, complete = state.sequence.match_blocks(pool, first, end, certain)
        layered = min(blocks, last - first)
        rest = tokens - (first + layered) * self._block_tokens
        asynchronous = not complete or self.prefers_async(layered, rest)
        if asynchronous and not has_room and blocks:
            return None
        if not asynchronous:
            blocks = layered
        if self._verifies and complete:
            blocks = state.sequence.verify(pool, blocks)
        return blocks, asynchronous

    def _loads_only_async(self) -> bool:
        """Whether anything that is loaded now is loaded async."""
        if self._settings.load != "auto":
            return self._settings.load == "async"
        return len(self._loads) > 0  # It would share the link with those.

    def prefers_async(self, blocks: int, rest: int) -> bool:
        """How to load so many blocks of a prompt of which `rest` tokens are to be computed."""
        if self._loads_only_async():
            return True
        if self._settings.load != "auto":
            return False
        return not self._cost.is_alone() and not self._cost.hides(blocks, rest)

    def use_match(self, state: RequestState, tokens: int) -> None:
        """The request has its blocks, and `tokens` of them are to be loaded: the match becomes a
        load. With 0 the request computes; its match ends."""
        request = state.request
        match, state.match = state.match, None
        if tokens == 0:
            # vLLM has noted as computed what an async load has brought, but not yet its own hit.
            self._cost.admit(request.num_tokens - max(state.resident, request.num_computed_tokens))
            state.sequence.release()
            state.load_failed = False
            return
        assert match is not None, "vLLM loads what was not matched"
        first, _, asynchronous = match
        count = tokens // self._block_tokens
        targets = state.blocks[first : first + count]
        load = state.sequence.begin_load(self._pool, first, targets)
        assert load is not None, "a match is held until it is used"
        if asynchronous:
            self._loads.add_async(state, load, targets)
        else:
            self._loads.add_layered(load, targets)
            rest = request.num_tokens - (first + count) * self._block_tokens
            self._cost.admit(rest, layered_blocks=count)
        self._stats.count("hit_tokens", tokens)
        kind = "loaded_tokens_async" if asynchronous else "loaded_tokens_layered"
        self._stats.count(kind, tokens)
