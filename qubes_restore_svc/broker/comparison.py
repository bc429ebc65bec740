"""Compares a volume of the backup with the volume that is here: a sink that writes nothing.

Strategy: it compares the bytes that come with those that are here at the same place, in blocks of 4 KiB; a
difference ends nothing. Where the backup has a hole, it reads only the data that is here: a hole on both
sides costs nothing. Behind its end a volume counts as zeros, and the sizes are compared separately. So a
volume that was only made larger differs in its size, and in no block.

A fault of the volume here never stops the worker, because the other volumes of the qube are compared all the
same. The comparison keeps it as its result.
"""

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from qubes_restore_svc.broker.filesystem import reporting
from qubes_restore_svc.broker.interfaces import Comparison
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.wire.names import MAX_COUNT, VolumeName
from qubes_restore_svc.wire.report import MAX_PLACES, Difference, Place

#: Bytes of the blocks that differ as a whole, or not at all.
BLOCK = 4096

_ZEROS = memoryview(bytes(1 << 20))


@contextmanager
def looking(doing: str, *, qube: str | None = None, volume: str | None = None) -> Iterator[None]:
    """Turn an OSError of the block into HostFailed, as `reporting` does, with the advice for a comparison."""
    try:
        with reporting(doing, qube=qube, volume=volume):
            yield
    except HostFailed as error:
        if error.advice == error.default_advice:
            error.advice = "Settle the cause and compare it again."
        raise


class ComparedVolume:
    """A `VolumeSink` that compares what it gets with an open file or block device.

    Messages call it `shown`. `newer`: somebody has written to it after the backup, so a difference is no
    surprise.
    """

    def __init__(self, file: int, shown: str, qube: str, volume: VolumeName, *, newer: bool = False) -> None:
        """The descriptor `file` is open for reading, and is closed when this has ended."""
        self._file = file
        self._shown = shown
        self._qube = qube
        self._volume: VolumeName = volume
        self._newer = newer
        self._at_first = _written(file)
        self._end = 0  #: bytes that were compared
        self._differences = _Places()
        self._error: HostFailed | None = None
        self._mutex = threading.Lock()
        self._abandoned = False
        self._closed = False
        self.was_changed = False  #: meanwhile, so that what was found may be true of neither state

    def write(self, offset: int, data: memoryview) -> None:
        """Compare `data` (1 byte to 1 MiB) with what is at `offset`; offsets rise from call to call."""

        def step() -> None:
            self._compare_hole(offset)
            self._compare(offset, data)
            self._end = offset + len(data)

        self._carry_out(step)

    def finish(self, size: int) -> Comparison:
        """The volume of the backup has `size` bytes."""
        found: list[Comparison] = []

        def step() -> None:
            here = os.lseek(self._file, 0, os.SEEK_END)
            self._compare_hole(here)
            self.was_changed = _written(self._file) != self._at_first
            found.append(self._found(size, here))

        self._carry_out(step)
        self.abandon()
        return found[0] if found else Comparison("failed", error=self._error or self._given_up())

    def abandon(self) -> None:
        """Close the file. Waits for nothing: a thread that is in a step closes it at the end of that step."""
        self._abandoned = True
        if self._mutex.acquire(blocking=False):
            try:
                self._close()
            finally:
                self._mutex.release()

    def close(self) -> None:
        """The same, and wait until it is closed, for the end of a step at the most."""
        self._abandoned = True
        with self._mutex:
            self._close()

    def _found(self, size: int, here: int) -> Comparison:
        difference = self._differences.difference(here, max(size, here))
        if here == size and not difference.different_bytes:
            return Comparison("same")
        outcome: Literal["newer", "differs"] = "newer" if self._newer else "differs"
        return Comparison(outcome, difference)

    def _carry_out(self, step: Callable[[], None]) -> None:
        """Keep the error of a step that fails; no step runs after that."""
        with self._mutex:
            if self._error is None and not self._closed:
                try:
                    with looking(f"reading {self._shown}", qube=self._qube, volume=self._volume):
                        step()
                except HostFailed as error:
                    self._error = error
        if self._abandoned:  # meanwhile, perhaps
            self.abandon()

    def _compare_hole(self, end: int) -> None:
        """From where the last data ended to `end`, the volume of the backup is zeros."""
        position = self._end
        while position < end:
            position, stop = self._next_data(position, end)
            while position < stop:
                count = min(len(_ZEROS), stop - position)
                self._compare(position, _ZEROS[:count])
                position += count

    def _next_data(self, position: int, end: int) -> tuple[int, int]:
        """The first data here between the two; where there is none, from `end` to `end`."""
        try:
            start = os.lseek(self._file, position, os.SEEK_DATA)
            stop = os.lseek(self._file, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # there is no more data
                return end, end
            if error.errno != errno.EINVAL:
                raise
            # A block device does not tell its holes (`fixed_size_llseek` in the kernel's fs/read_write.c).
            start, stop = position, os.lseek(self._file, 0, os.SEEK_END)
        return (start, min(end, stop)) if start < min(end, stop) else (end, end)

    def _compare(self, offset: int, data: memoryview) -> None:
        if self._abandoned:
            raise self._given_up()
        here = self._read(offset, len(data))
        # Always block by block: the sender of the data can measure how long this takes, and must not learn
        # what is here. Within a block, the place of a difference makes a tenth of a microsecond.
        position = 0
        while position < len(data):
            stop = position + BLOCK - (offset + position) % BLOCK
            if here[position:stop] != bytes(data[position:stop]):
                self._differences.add((offset + position) // BLOCK)
            position = stop

    def _read(self, offset: int, size: int) -> bytes:
        """What is here, and zeros behind its end."""
        found = os.pread(self._file, size, offset)
        while len(found) < size:
            part = os.pread(self._file, size - len(found), offset + len(found))
            found += part or bytes(size - len(found))
        return found

    def _given_up(self) -> HostFailed:
        return HostFailed("it was given up", qube=self._qube, volume=self._volume)

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            close_read(self._file)


class NotHere:
    """A `VolumeSink` for a volume that is not here, or that cannot be compared and why."""

    def __init__(self, error: HostFailed | None = None) -> None:
        self._found = Comparison("missing") if error is None else Comparison("failed", error=error)

    def write(self, offset: int, data: memoryview) -> None:
        """There is nothing to compare it with."""

    def finish(self, size: int) -> Comparison:
        """What was known from the start."""
        return self._found

    def abandon(self) -> None:
        """There is nothing to be given back."""


class _Places:
    """Blocks that differ: how many, and the first of the places in which they lie."""

    def __init__(self) -> None:
        self._places: list[tuple[int, int]] = []  #: first block, and the one behind the last
        self._more = 0
        self._blocks = 0
        self._end = 0  #: the block behind the last one

    def add(self, block: int) -> None:
        """A block differs. The numbers rise, and one may come twice."""
        if block < self._end:
            return
        if block > self._end or not self._blocks:
            if len(self._places) < MAX_PLACES:
                self._places.append((block, block))
            else:
                self._more += 1
        if not self._more:
            self._places[-1] = (self._places[-1][0], block + 1)
        self._blocks += 1
        self._end = block + 1

    def difference(self, size: int, longest: int) -> Difference:
        """All of it. `size` is that of the volume here, `longest` that of the longer of the two."""
        beyond = max(0, self._end * BLOCK - longest)
        return Difference(
            size=size,
            different_bytes=self._blocks * BLOCK - beyond,
            places=tuple(
                Place(offset=first * BLOCK, length=min(end * BLOCK, longest) - first * BLOCK)
                for first, end in self._places
            ),
            more_places=min(self._more, MAX_COUNT),
        )


def _written(file: int) -> tuple[int, int]:
    """If the pair changes, somebody has written to it; for a block device, nothing shows that."""
    status = os.fstat(file)
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (0, 0)
