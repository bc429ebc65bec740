"""Dropping what is zero from the extents of an image, whether or not the archive's sparse map knew of it.

Strategy: what no extent covers is zero anyway, so a block of zeros need not travel to the host, nor be
written there. Blocks lie on multiples of `BLOCK` in the image, as those of file systems and of thin pools do;
a shorter run would cost more as an extent of its own than it saves.
"""

from collections.abc import Iterable, Iterator

from qubes_restore_svc.archive.inner_tar import Extent

#: Bytes of a block: the smallest hole that ext4, xfs and btrfs keep.
BLOCK = 4096

_ZEROS = bytes(BLOCK)


def without_zeros(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same image in extents without whole blocks of zeros; what `extents` raises passes through."""
    for extent in extents:
        # Searching and comparing are fast in bytes, and slow in a view of them.
        data = extent.data.tobytes()
        for start, end in _runs(data, -extent.offset % BLOCK):
            yield Extent(extent.offset + start, extent.data[start:end])


def _runs(data: bytes, first_block: int) -> Iterator[tuple[int, int]]:
    """What of `data` is kept, as (start, end). Its blocks begin at `first_block` and every BLOCK bytes."""
    start = 0
    while start < len(data):
        hole = _next_hole(data, start, first_block)
        if hole > start:
            yield start, hole
        start = hole
        while data.startswith(_ZEROS, start):
            start += BLOCK


def _next_hole(data: bytes, start: int, first_block: int) -> int:
    """Where the next whole block of zeros begins, from `start` on; the end of `data` if there is none."""
    while (found := data.find(_ZEROS, start)) >= 0:
        block = found + (first_block - found) % BLOCK
        if data.startswith(_ZEROS, block):
            return block
        start = block
    return len(data)
