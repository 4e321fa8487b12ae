"""What a request says of transfers, in vLLM's `kv_transfer_params`, and what it is answered.

Routers of prefill and decode tell the prefill engine that another one decodes
(`do_remote_decode`), and hand what it answers to the decode engine. Blocks are found by their
content, so nothing has to be said: the answer is what such a router waits for. `max_load_tokens`,
`max_offload_tokens` and `kv_load_tiers` mean what they mean to vLLM's own OffloadingConnector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtide.log import logger

if TYPE_CHECKING:
    from vllm.v1.request import Request

MEDIUM, LOCALITY = "CPU", "LOCAL"
"""Of the pool, in the words of `kv_load_tiers`."""
MEDIA, LOCALITIES = {MEDIUM, "STORAGE"}, {LOCALITY, "REMOTE"}


@dataclass(frozen=True, slots=True)
class TransferParams:
    """See the module's documentation."""

    load_tokens: int | None = None
    """What is loaded at most, behind what the engine has itself; None for any number."""
    save_tokens: int | None = None
    """Of the leading tokens, what is saved at most."""
    remote_decode: bool = False
    """Whether another engine decodes."""

    @classmethod
    def of(cls, request: Request) -> TransferParams:
        """Those of a request. What means nothing is named in the log and passed over."""
        said = getattr(request, "kv_transfer_params", None)
        if not said:
            return NOTHING_SAID
        load_tokens = count(said, "max_load_tokens")
        if not allows_the_pool(said.get("kv_load_tiers")):
            load_tokens = 0
        return cls(
            load_tokens, count(said, "max_offload_tokens"), bool(said.get("do_remote_decode"))
        )

    def answer(self, request: Request, engine_id: str, ranks: int) -> dict[str, Any] | None:
        """What a router hands to the decode engine. There is no host and no port: a connector that
        would fetch blocks from there has to compute."""
        if not self.remote_decode:
            return None
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": engine_id,
            "remote_request_id": request.request_id,
            "remote_block_ids": [],
            "remote_num_tokens": request.num_computed_tokens,
            "tp_size": ranks,
        }


NOTHING_SAID = TransferParams()


def count(said: dict[str, Any], name: str) -> int | None:
    """A number of tokens."""
    value = said.get(name)
    if value is None or (type(value) is int and value >= 0):
        return value
    logger.warning("%s must be a whole number from 0 on, not %r; it is ignored", name, value)
    return None


def allows_the_pool(tiers: Any) -> bool:
    """Whether `kv_load_tiers`, a list of media and localities, has the pool."""
    if tiers is None:
        return True
    if not isinstance(tiers, list):
        logger.warning("kv_load_tiers must be a list, not %r; it is ignored", tiers)
        return True
    known = [tier for each in tiers if (tier := tier_of(each)) is not None]
    if tiers and not known:
        return True
    return any(medium in (None, MEDIUM) and place in (None, LOCALITY) for medium, place in known)


def tier_of(said: Any) -> tuple[str | None, str | None] | None:
    """Medium and locality of an entry; None if it has none that vLLM knows."""
    if isinstance(said, dict):
        medium, place = (
            value.upper() if isinstance(value := said.get(key), str) else value
            for key in ("medium", "locality")
        )
        if medium in {None, *MEDIA} and place in {None, *LOCALITIES}:
            return medium, place
    logger.warning("kv_load_tiers: %r is no tier; it is ignored", said)
    return None
