"""An image file being written: sparse, forced to the disk when it is complete.

Strategy: one state and one lock. A broker that gives up abandons the file while a thread of it may still be
in a write, and a descriptor that is closed under a write could be another file's a moment later. After any
failure the file takes no more data, so that no later success can hide it.
"""

import enum
import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from qubes_restore_svc.broker.filesystem import Room, disk_of, make_file, reporting, write_fully
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.wire.names import MAX_NUMBER, VolumeName

#: The name of each volume's file, in a restored qube's directory.
VOLUME_FILES: dict[VolumeName, str] = {"root": "root.img", "private": "private.img", "home": "home.tar"}

#: Bytes after which the system is told to begin writing out. A restore is paced by its key derivations, so
#: the disk has time to spare on the way; left to the end, the data waits in memory and so does the person.
WRITEBACK_STEP = 32 << 20


class State(enum.Enum):
    """How far a qube or a volume has come; only `OPEN` is ever left."""

    OPEN = "open"
    COMPLETE = "complete"
    GONE = "gone"


class ImageFile:
    """A `VolumeSink`: a sparse file in a qube's partial directory."""

    def __init__(self, directory: int, qube: str, volume: VolumeName, image_size: int) -> None:
        """Create the file in the open `directory`, for at most `image_size` bytes."""
        self._qube = qube
        self._volume: VolumeName = volume
        self._name = VOLUME_FILES[volume]
        self._image_size = image_size
        self._end = 0
        self._handed_over = 0
        self._wanted_out = 0
        self._mutex = threading.Lock()
        self._abandoned = False
        self._state = State.OPEN
        if not 0 <= image_size <= MAX_NUMBER:
            raise self._failure(f"{image_size} bytes is not the size of an image")
        with reporting(f"creating {self._name}", qube=qube, volume=volume):
            self._file = make_file(self._name, dir_fd=directory)
        self._room = Room(lambda: disk_of(self._file), WRITEBACK_STEP, qube=qube, volume=volume)
        try:
            if volume != "home":  # its size is a ceiling
                self._check_capacity()
        except BaseException:
            self._leave(State.GONE)
            raise

    @property
    def size(self) -> int | None:
        """Bytes of the finished file; None before that."""
        return self._end if self._state is State.COMPLETE else None

    def write(self, offset: int, data: memoryview) -> None:
        """Put `data` at `offset`, in bytes; raises HostFailed or NoSpace, and then takes no more."""
        with self._step("writing"):
            if not self._end <= offset <= self._image_size - len(data):
                raise self._failure(
                    f"{len(data)} bytes at {offset}, outside of the {self._end} to {self._image_size} left"
                )
            self._room.take(len(data))
            write_fully(self._file, data, offset)
            self._end = offset + len(data)
            self._begin_writeback()

    def finish(self, size: int) -> None:
        """Make the file `size` bytes long and wait until it is on disk; raises HostFailed or NoSpace."""
        with self._step("completing"):
            if not self._end <= size <= self._image_size:
                raise self._failure(
                    f"a size of {size} bytes, where {self._end} to {self._image_size} are possible"
                )
            os.ftruncate(self._file, size)
            # Through the descriptor that wrote: another one might not be told of a write that failed.
            os.fsync(self._file)
            actual = os.fstat(self._file).st_size
            if actual != size:
                raise self._failure(f"{self._name} has {actual} bytes instead of {size}")
            self._end = size
            self._leave(State.COMPLETE)

    def abandon(self) -> None:
        """Close the file, unfinished; the transaction's rollback removes it. Harmless after `finish`.

        Waits for nothing: whoever is in a step closes the file at the end of it.
        """
        self._abandoned = True
        if self._mutex.acquire(blocking=False):
            try:
                if self._state is State.OPEN:
                    self._leave(State.GONE)
            finally:
                self._mutex.release()

    def wait_ended(self) -> None:
        """Wait until nobody writes to the abandoned file any more."""
        with self._mutex:
            pass

    @contextmanager
    def _step(self, doing: str) -> Iterator[None]:
        try:
            with self._mutex:
                if self._state is not State.OPEN or self._abandoned:
                    raise self._failure(f"{self._name} takes no more data")
                try:
                    with reporting(f"{doing} {self._name}", qube=self._qube, volume=self._volume):
                        yield
                except BaseException:
                    self._leave(State.GONE)
                    raise
        finally:
            if self._abandoned:  # meanwhile, perhaps
                self.abandon()

    def _check_capacity(self) -> None:
        """Refuse a size past the file system's limit now instead of after hours of writing."""
        try:
            # Seeking past the limit is refused, and unlike truncating it costs nothing: FAT knows no holes
            # and would write the zeros.
            os.lseek(self._file, self._image_size, os.SEEK_SET)
        except OSError as error:
            if error.errno != errno.EINVAL:
                return
            raise self._failure(
                f"an image of {self._image_size} bytes is more than one file can hold here"
            ) from error

    def _begin_writeback(self) -> None:
        if self._end - self._wanted_out < WRITEBACK_STEP:
            return
        # Starts writing out what is new and drops from memory what is out by now, which is the part before.
        with suppress(OSError):
            length = self._end - self._handed_over
            os.posix_fadvise(self._file, self._handed_over, length, os.POSIX_FADV_DONTNEED)
        self._handed_over, self._wanted_out = self._wanted_out, self._end

    def _leave(self, state: State) -> None:
        self._state = state
        with suppress(OSError):  # what matters has been synced or is given up
            os.close(self._file)

    def _failure(self, reason: str) -> HostFailed:
        return HostFailed(reason, qube=self._qube, volume=self._volume)
