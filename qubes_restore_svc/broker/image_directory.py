"""Image files in a new directory, which is hidden while it is written, and then appears whole or is removed.

Strategy: all is written under the name `.NAME.partial` and forced to the disk; the last step, one rename,
gives the directory its name. Only that name and the names of a few files are ever created, and so only they
are ever removed. Directory and file have one state and one lock each. A broker that gives up abandons a file
while a thread of it may still be in a write, and a descriptor that is closed under a write could be another
file's a moment later. After any failure a file takes no more data, so that no later success can hide it.
"""

import enum
import errno
import os
import re
import stat
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress

from qubes_restore_svc.broker.filesystem import (
    NAME_TAKEN,
    Room,
    disk_of,
    make_directory,
    make_file,
    open_directory,
    rename_new,
    reporting,
    sync_directory,
    write_fully,
)
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.wire.names import MAX_NUMBER, VolumeName

#: The name of each volume's file, in a restored qube's directory.
VOLUME_FILES: dict[VolumeName, str] = {"root": "root.img", "private": "private.img", "home": "home.tar"}

#: Bytes after which the system is told to begin writing out. The key derivations take most of the time of a
#: restore, so the disk has time to write on the way. Otherwise the data would wait in memory, and in the end
#: the person would wait for the disk.
WRITEBACK_STEP = 32 << 20


class BuildState(enum.Enum):
    """The state of a qube or a volume. `OPEN` is the only state that can change."""

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
        self._state = BuildState.OPEN
        if not 0 <= image_size <= MAX_NUMBER:
            raise self._failure(f"{image_size} bytes is not the size of an image")
        with reporting(f"creating {self._name}", qube=qube, volume=volume):
            self._file = make_file(self._name, dir_fd=directory)
        self._room = Room(lambda: disk_of(self._file), WRITEBACK_STEP, qube=qube, volume=volume)
        try:
            if volume != "home":  # its size is a ceiling
                self._check_capacity()
        except BaseException:
            self._leave(BuildState.GONE)
            raise

    @property
    def size(self) -> int | None:
        """Bytes of the finished file; None before that."""
        return self._end if self._state is BuildState.COMPLETE else None

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
            # Through the descriptor that wrote: the kernel may not report a failed write through another one.
            os.fsync(self._file)
            actual = os.fstat(self._file).st_size
            if actual != size:
                raise self._failure(f"{self._name} has {actual} bytes instead of {size}")
            self._end = size
            self._leave(BuildState.COMPLETE)

    def abandon(self) -> None:
        """Close the file, unfinished; the transaction's rollback removes it. Harmless after `finish`.

        Waits for nothing: a thread that is in a step closes the file at the end of that step.
        """
        self._abandoned = True
        if self._mutex.acquire(blocking=False):
            try:
                if self._state is BuildState.OPEN:
                    self._leave(BuildState.GONE)
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
                if self._state is not BuildState.OPEN or self._abandoned:
                    raise self._failure(f"{self._name} takes no more data")
                try:
                    with reporting(f"{doing} {self._name}", qube=self._qube, volume=self._volume):
                        yield
                except BaseException:
                    self._leave(BuildState.GONE)
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

    def _leave(self, state: BuildState) -> None:
        self._state = state
        with suppress(OSError):  # what matters has been synced or is given up
            os.close(self._file)

    def _failure(self, reason: str) -> HostFailed:
        return HostFailed(reason, qube=self._qube, volume=self._volume)


class ImageDirectory:
    """A new directory for the images of one qube; the base of a `QubeTransaction`.

    `parent` is the open directory that it is created in, and must stay open until this has ended. `files` are
    the names of all files that will ever be created in it.
    """

    def __init__(self, parent: int, name: str, qube: str, files: Collection[str]) -> None:
        """Create it. Raises OSError; FileExistsError if anything has the hidden name."""
        self._parent = parent
        self._partial = partial_name(name)
        self._qube_name = qube
        self._files = files
        self._sinks: dict[VolumeName, ImageFile] = {}
        self._mutex = threading.Lock()
        self._state = BuildState.OPEN
        self._inside = make_directory(self._partial, dir_fd=parent)

    def create_volume(self, volume: VolumeName, image_size: int) -> ImageFile:
        """A sink for `volume`; raises HostFailed, also when it has one or cannot be as large here."""
        with self._mutex:
            self._check_open()
            sink = ImageFile(self._inside, self._qube_name, volume, image_size)
            self._sinks[volume] = sink
            return sink

    def rollback(self) -> None:
        """Remove all that was created; raises HostFailed if it cannot, or if others put something there.

        Does nothing after a commit, or a second time.
        """
        with self._mutex:
            if self._state is not BuildState.OPEN:
                return
            for sink in self._sinks.values():
                sink.abandon()
            for sink in self._sinks.values():
                sink.wait_ended()
            try:
                with reporting(f"removing {self._partial}", qube=self._qube_name):
                    _remove(self._partial, self._inside, self._files, dir_fd=self._parent)
            finally:
                self._leave(BuildState.GONE)

    def _check_open(self) -> None:
        if self._state is not BuildState.OPEN:
            raise self._failure("it has been committed or rolled back")

    def _sizes(self) -> dict[VolumeName, int]:
        """Bytes of each volume; raises HostFailed if one is not complete."""
        sizes: dict[VolumeName, int] = {}
        for volume, sink in self._sinks.items():
            if sink.size is None:
                raise HostFailed("the volume is not complete", qube=self._qube_name, volume=volume)
            sizes[volume] = sink.size
        return sizes

    def _publish(self, names: Iterable[str]) -> str | None:
        """Give the complete directory the first of `names` that is free; None if no name is free.

        Raises OSError or HostFailed. After either, and after None, it can only be rolled back.
        """
        sync_directory(self._inside)
        for name in names:
            try:
                rename_new(self._partial, name, dir_fd=self._parent)
            except OSError as error:
                if error.errno in NAME_TAKEN:
                    continue
                raise
            try:
                if not _leads_to(name, self._inside, dir_fd=self._parent):
                    raise self._failure(
                        f"what is called {name} now is not what was restored: somebody else changes the"
                        " directory"
                    )
                sync_directory(self._parent)
            except OSError:
                # It may not be there, or not last, so this is no success: move it back to where a rollback
                # finds it.
                os.rename(name, self._partial, src_dir_fd=self._parent, dst_dir_fd=self._parent)
                raise
            self._leave(BuildState.COMPLETE)
            return name
        return None

    def _leave(self, state: BuildState) -> None:
        self._state = state
        close_read(self._inside)

    def _failure(self, reason: str) -> HostFailed:
        return HostFailed(reason, qube=self._qube_name)


def partial_name(name: str) -> str:
    """What the directory `name` is called until it is complete."""
    return f".{name}.partial"


def clear_partials(
    directory: int, names: str, files: Collection[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Remove what killed restores have left in `directory`. Only under the lock.

    `names` is a pattern for the names that such directories were to get, and `files` are those that may be in
    them. Returns the hidden names of those that were removed, and of those that were not because they are not
    directories, hold something else, or could not be removed.
    """
    cleared: list[str] = []
    kept: list[str] = []
    for name in sorted(os.listdir(directory)):
        if not re.fullmatch(rf"\.{names}\.partial", name):
            continue
        outcome = kept
        with suppress(OSError):
            inside = open_directory(name, dir_fd=directory)
            try:
                if _holds_only(files, inside):
                    _remove(name, inside, files, dir_fd=directory)
                    outcome = cleared
            finally:
                close_read(inside)
        outcome.append(name)
    return tuple(cleared), tuple(kept)


def _remove(partial: str, inside: int, files: Collection[str], *, dir_fd: int) -> None:
    """Remove our files in the directory `inside`, and the directory if it still has this name.

    OSError if something else is left in it. What has its name instead is not touched.
    """
    for file in sorted(files):
        with suppress(FileNotFoundError):
            os.unlink(file, dir_fd=inside)
    if _leads_to(partial, inside, dir_fd=dir_fd):
        os.rmdir(partial, dir_fd=dir_fd)


def _leads_to(name: str, descriptor: int, *, dir_fd: int) -> bool:
    """Does the name stand for the very directory that is open as `descriptor`, and not for a link to it?"""
    try:
        return os.path.samestat(os.stat(name, dir_fd=dir_fd, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holds_only(files: Collection[str], inside: int) -> bool:
    return all(
        file in files and stat.S_ISREG(os.stat(file, dir_fd=inside, follow_symlinks=False).st_mode)
        for file in os.listdir(inside)
    )
