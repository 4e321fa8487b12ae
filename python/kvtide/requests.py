"""The live requests: their tokens' hashes, their blocks, what was last offered to vLLM for them.

A request is entered when it arrives and leaves when it has finished. `matching.py` sets what is
offered, `saves.py` follows the blocks, `loads.py` notes that a load has failed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvtide.transfer_params import NOTHING_SAID, TransferParams

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.v1.request import Request

    from kvtide._native import Namespace, Sequence, Settings

EXPIRY_PERIOD_S = 1.0
"""Between looks for matches that were never used."""


@dataclass(slots=True, eq=False)
class RequestState:
    """One request, from its arrival to its end."""

    request: Request
    sequence: Sequence
    blocks: list[int] = field(default_factory=list)
    """The engine's blocks of this request, in order."""
    saved: int = 0
    """Leading blocks that need no more saving."""
    boundary: int = 0
    """Tokens at which the next block is complete."""
    match: tuple[int, int, bool] | None = None
    """The last answer to vLLM: first block, number of blocks, whether async."""
    epoch: int = 0
    """The epoch of saves in which the request last began."""
    load_failed: bool = False
    """Whether its load has failed: it computes then, rather than to try the same again."""
    resident: int = 0
    """Leading tokens that the engine had itself when it last asked."""
    asked: TransferParams = NOTHING_SAID
    """What the request says of transfers."""

    def let_go(self) -> None:
        """Nothing is to be loaded for it now."""
        self.match = None
        self.sequence.release()

    def hash_known_tokens(self) -> None:
        """Hashes the tokens that have come since the last time."""
        hashed = self.sequence.tokens
        if hashed < self.request.num_tokens:
            self.sequence.extend(self.request.all_token_ids[hashed:])


class Requests:
    """The live requests by id."""

    def __init__(self, settings: Settings, namespace: Namespace) -> None:
        self._settings = settings
        self._namespace = namespace
        self._states: dict[str, RequestState] = {}
        self._next_expiry = 0.0

    @property
    def states(self) -> Mapping[str, RequestState]:
        """All of them, by id."""
        return self._states

    def add(self, request: Request) -> None:
        """Hashes the prompt while the request waits for its turn."""
        if request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None:
            return  # Its bytes are not determined by token ids.
        if request.resumable:
            return  # A session's later chunks bring media items that are not known now.
        lora = request.lora_request
        sequence = self._namespace.sequence(
            self._settings.tenant,
            request.cache_salt,
            None if lora is None else (lora.lora_name, lora.lora_path),
            [
                (item.identifier, item.mm_position.offset, item.mm_position.length)
                for item in request.mm_features
            ],
        )
        sequence.extend(request.prompt_token_ids)
        asked = TransferParams.of(request)
        self._states[request.request_id] = RequestState(request, sequence, asked=asked)

    def get(self, request_id: str) -> RequestState | None:
        """The request, unless its tokens are not known or it has finished."""
        return self._states.get(request_id)

    def pop(self, request_id: str) -> RequestState | None:
        """The request has finished."""
        return self._states.pop(request_id, None)

    def expire_matches(self, now: float) -> None:
        """Lets go of matches that were not used in time."""
        if now < self._next_expiry:
            return
        self._next_expiry = now + EXPIRY_PERIOD_S
        for state in self._states.values():
            if state.match is not None and state.sequence.expire():
                state.match = None
