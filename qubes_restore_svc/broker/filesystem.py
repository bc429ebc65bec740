"""What the directory host does in a file system, in steps that no other process can disturb.

Strategy: every name is taken relative to an open directory and no symbolic link is followed below it, so that
what other programs do to a path while a restore runs cannot lead a write elsewhere. What is created is new
(never something that was there), and for its owner alone whatever the umask. The functions raise OSError;
`reporting` turns that into an error that a person can act on.
"""

import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qubes_restore_svc.errors import HostFailed, NoSpace, size_text
from qubes_restore_svc.hardening import close_read

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600

#: What `rename_new` fails with when the new name is taken.
NAME_TAKEN = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR})

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_OFFERED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
_NO_MODES_HERE = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP})
_CLEARER = {errno.EFBIG: "larger than a file may be here (file system, or ulimit -f)"}


#: Bytes of a disk that a restore leaves free, or a twentieth of the disk if that is less: whatever else runs
#: here would fail on a full one.
RESERVE = 1 << 30


class Room:
    """What may be written of a volume before the reserve of its disk is reached.

    `ask` tells the disk's free bytes and its size; None if that is not known. It is asked again after `step`
    bytes at the most, and the more often the less is left.
    """

    def __init__(
        self,
        ask: Callable[[], tuple[int, int] | None],
        step: int,
        *,
        qube: str,
        volume: str,
        where: str = "on the disk",
    ) -> None:
        self._ask = ask
        self._qube = qube
        self._volume = volume
        self._step = step
        self._where = where
        self._left = 0

    def take(self, count: int) -> None:
        """`count` bytes are about to be written. Raises NoSpace if they would reach into the reserve."""
        if count > self._left:
            answer = self._ask()
            if answer is None:
                self._left = self._step
                return
            free, size = answer
            reserve = min(RESERVE, size // 20)
            if free - count < reserve:
                raise NoSpace(
                    f"{size_text(free)} are left {self._where}, of which {size_text(reserve)} stay free for"
                    " whatever else runs there",
                    qube=self._qube,
                    volume=self._volume,
                )
            self._left = min((free - reserve - count) // 2, self._step) + count
        self._left -= count


def disk_of(file: int) -> tuple[int, int] | None:
    """Free bytes and size of the disk of an open file. Some network and FUSE file systems tell zeros."""
    answer = os.fstatvfs(file)
    return (answer.f_bavail * answer.f_frsize, answer.f_blocks * answer.f_frsize) if answer.f_blocks else None


@contextmanager
def reporting(doing: str, *, qube: str | None = None, volume: str | None = None) -> Iterator[None]:
    """Turn an OSError of the block into NoSpace or HostFailed; `doing` reads like "writing private.img"."""
    try:
        yield
    except OSError as error:
        kind = NoSpace if error.errno in _NO_ROOM else HostFailed
        why = _CLEARER.get(error.errno or 0) or error.strerror or type(error).__name__
        raise kind(f"{doing} failed: {why}", qube=qube, volume=volume) from error


def make_directory(name: str | Path, *, dir_fd: int | None = None) -> int:
    """A descriptor of a new directory, mode 0700. FileExistsError if anything has the name."""
    os.mkdir(name, DIRECTORY_MODE, dir_fd=dir_fd)
    try:
        # A umask can keep even the owner out; O_PATH opens the directory all the same.
        handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            _set_mode(handle, f"/proc/self/fd/{handle}", DIRECTORY_MODE)
            return open_directory(".", dir_fd=handle)
        finally:
            close_read(handle)
    except BaseException:
        with suppress(OSError):
            os.rmdir(name, dir_fd=dir_fd)
        raise


def open_directory(name: str, *, dir_fd: int) -> int:
    """A descriptor of the directory `name`; OSError if it is a symbolic link."""
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)


def make_file(name: str, *, dir_fd: int) -> int:
    """A write-only descriptor of a new file, mode 0600. FileExistsError if anything has the name."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(name, flags, FILE_MODE, dir_fd=dir_fd)
    try:
        _set_mode(file, file, FILE_MODE)
    except BaseException:
        os.close(file)
        raise
    return file


def write_fully(file: int, data: memoryview, offset: int) -> None:
    """Write all of `data` (its items are bytes) at `offset`, in as many calls as it takes."""
    done = 0
    while done < len(data):
        written = os.pwrite(file, data[done:], offset + done)
        if written == 0:
            raise OSError(errno.EIO, "the system took no data")
        done += written


def sync_directory(directory: int) -> None:
    """Wait until the directory's entries are on disk, on file systems that can do that."""
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise


def rename_new(old: str, new: str, *, dir_fd: int) -> None:
    """Rename the directory `old` in `dir_fd`; an errno of `NAME_TAKEN` if anything is called `new`.

    A plain rename would replace an empty directory, so the kernel is told not to replace (renameat2, with
    RENAME_NOREPLACE; its own system call because Python has no binding). NFS and some FUSE file systems do
    not offer that. There, mkdir claims the name first, which fails if anything is there, and the plain
    rename replaces our own empty directory and nothing else; killed right between the two, it leaves that
    empty directory.
    """
    try:
        _rename_without_replacing(old, new, dir_fd)
        return
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
    os.mkdir(new, DIRECTORY_MODE, dir_fd=dir_fd)
    try:
        os.rename(old, new, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        with suppress(OSError):
            os.rmdir(new, dir_fd=dir_fd)
        raise


def _set_mode(handle: int, target: int | str, mode: int) -> None:
    """chmod `target`, unless its mode is right or cannot be changed. `handle` has the same file open."""
    if stat.S_IMODE(os.fstat(handle).st_mode) & 0o777 == mode:
        return
    try:
        os.chmod(target, mode)
    except OSError as error:
        # FAT and its kin have no modes; who may read is up to the mount there.
        if error.errno not in _NO_MODES_HERE:
            raise


def _rename_without_replacing(old: str, new: str, directory: int) -> None:
    rename_noreplace = 1  # linux/fs.h
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    where = ctypes.c_int(directory)
    result = renameat2(where, os.fsencode(old), where, os.fsencode(new), ctypes.c_uint(rename_noreplace))
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
