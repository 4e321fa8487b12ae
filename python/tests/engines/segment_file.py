"""The shared segment of an engine as a file, to damage rows in it.

Once all of an engine's processes have it, the file has no name any more; it is reached through the
descriptor that one of those processes holds.

Layout (`transport/segment`): a header of 4096 bytes, whose fifth word is the number of rows; the
board of loads, 256 words of 8 bytes for each rank, padded to 4096; the buckets of the index, 4
bytes each, as many as a power of two not below the rows, padded to 64; a line of 64 bytes and 65
bitmaps of a bit for each row, each padded to 64; all that padded to 4096; a record of 32 bytes for
each row; one 16-byte header for each row and rank (state, checksum; both little-endian u64), padded
to 4096; then the rows, each aligned to 4096.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import psutil

HEADER_BYTES = 4096
BOARD_BYTES = 256 * 8
"""Of one rank."""
PAGE_BYTES = 4096
ROWS_OFFSET = 32
BUCKET_BYTES = 4
LINE_BYTES = 64
BITMAPS = 65
RECORD_BYTES = 32
SHARD_HEADER_BYTES = 16
SEALED = 1
"""Lower half of a shard's state; the upper half is the slot's generation."""


def named_segment(engine_id: str) -> Path:
    """Where a segment is while it has a name."""
    return Path("/dev/shm") / f"kvtide-{engine_id}"


def held_segment(engine_id: str, processes: Iterable[psutil.Process]) -> Path:
    """The segment of an engine through a descriptor that one of its `processes` holds."""
    name = str(named_segment(engine_id))
    for process in processes:
        folder = Path(f"/proc/{process.pid}/fd")
        for descriptor in folder.iterdir():
            try:
                if os.readlink(descriptor).startswith(name):
                    return descriptor
            except FileNotFoundError:
                continue  # Closed meanwhile.
    raise FileNotFoundError(f"no process of the engine holds {name}")


def padded(size: int, unit: int = PAGE_BYTES) -> int:
    """A size in whole pages, or other units."""
    return -(-size // unit) * unit


def records_offset(rows: int) -> int:
    """Bytes of buckets and bitmaps, which come before the records."""
    buckets = 1 << (rows - 1).bit_length()
    bitmap = padded(-(-rows // 8), LINE_BYTES)
    return padded(padded(buckets * BUCKET_BYTES, LINE_BYTES) + LINE_BYTES + BITMAPS * bitmap)


def tables_bytes(rows: int, ranks: int) -> int:
    """Buckets, bitmaps, records and shard headers of so many rows."""
    each = RECORD_BYTES + ranks * SHARD_HEADER_BYTES
    return padded(records_offset(rows) + rows * each)


def segment_bytes(rows: int, row_bytes: int, ranks: int) -> int:
    """A segment of exactly so many rows, whose bytes are whole pages."""
    before = HEADER_BYTES + padded(ranks * BOARD_BYTES) + tables_bytes(rows, ranks)
    return before + rows * row_bytes


class SegmentFile:
    """One engine's segment."""

    def __init__(self, path: Path, row_bytes: int, ranks: int = 1) -> None:
        self._path = path
        self._ranks = ranks
        self._row_bytes = row_bytes
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(ROWS_OFFSET)
            self.rows = int.from_bytes(file.read(8), "little")
        tables = HEADER_BYTES + padded(ranks * BOARD_BYTES)
        self._table = tables + records_offset(self.rows) + self.rows * RECORD_BYTES
        self._data = size - self.rows * row_bytes

    def sealed_rows(self) -> list[int]:
        """Rows that were saved completely (they may have been evicted since)."""
        with self._path.open("rb") as file:
            file.seek(self._table)
            table = file.read(self.rows * self._ranks * SHARD_HEADER_BYTES)
        width = self._ranks * SHARD_HEADER_BYTES
        return [
            row
            for row in range(self.rows)
            if all(
                int.from_bytes(table[at : at + 4], "little") == SEALED
                for at in range(row * width, (row + 1) * width, SHARD_HEADER_BYTES)
            )
        ]

    def damage(self, rows: list[int] | None = None, only_rank: int | None = None) -> int:
        """Changes bytes all over these rows, or all sealed ones; returns how many rows."""
        shard = self._row_bytes // self._ranks
        first = 0 if only_rank is None else only_rank * shard
        length = self._row_bytes if only_rank is None else shard
        rows = self.sealed_rows() if rows is None else rows
        descriptor = os.open(self._path, os.O_RDWR)
        try:
            for row in rows:
                start = self._data + row * self._row_bytes + first
                data = bytearray(os.pread(descriptor, length, start))
                # The sign of every eighth float: large, finite errors in all layers and tokens.
                data[3::32] = bytes(byte ^ 0x80 for byte in data[3::32])
                os.pwrite(descriptor, data, start)
        finally:
            os.close(descriptor)
        return len(rows)
