"""Log lines, in the style and through the handlers of vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm.logger import init_logger

if TYPE_CHECKING:
    from kvtide._native import Segment

logger = init_logger("vllm.kvtide")
"""Below `vllm`, so that vLLM's logging configuration applies."""

GIB = 1 << 30


def progress_logger(segment: Segment) -> Callable[[int, int], None]:
    """Logs the progress of mapping a large segment, which takes time."""

    def log(done: int, total: int) -> None:
        if segment.created and total >= 8 * GIB:
            logger.info("mapped %d of %d GiB of %s", done // GIB, total // GIB, segment.path)

    return log


def log_waiting(path: str, seconds: int) -> None:
    """Logs that another process makes the segment, or hangs while it does."""
    logger.info("waited %d s for %s: another process makes the pool", seconds, path)


def describe_segment(segment: Segment) -> None:
    """Logs what memory the pool has, and what was done to get it; once for each segment."""
    for path in segment.reclaimed:
        logger.info("removed %s, which a crashed engine had left behind", path)
    if not segment.created:
        logger.debug("attached to the pool at %s", segment.path)
        return
    pages = "huge pages" if segment.on_huge_pages else "no huge pages granted"
    logger.info(
        "created a pool of %.2f GiB at %s: %d rows of %.1f KiB (%s)",
        segment.total_bytes / GIB,
        segment.path,
        segment.rows,
        segment.row_bytes / 1024,
        pages,
    )
