"""A backup that lies in a file of dom0, for a caller that may have it read.

Strategy: the path is followed once, to a descriptor that can neither read nor write (O_PATH), so that nothing
happens to what it leads to, be it a device or a pipe. What was found is judged by that descriptor: a regular
file, and its real place below the real place of a directory that was granted. Only then it is opened, through
the descriptor, so that nobody can put something else in its place. Everything that can be wrong sounds alike:
a symbolic link must not tell whether there is something where it points.
"""

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from qubes_restore_svc.errors import UsageError
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.wire.names import strip_control

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@contextlib.contextmanager
def granted_file(text: str, directories: Sequence[Path]) -> Iterator[int]:
    """A descriptor of the file, open for reading; it must lie below one of `directories`.

    Raises UsageError, always the same.
    """
    fd = _opened_below(text, directories)
    if fd is None:
        raise UsageError(
            f"{strip_control(text)} in dom0 is not a file that can be read from here",
            advice="Name a backup below a directory that is granted to this qube.",
        )
    try:
        yield fd
    finally:
        close_read(fd)


@contextlib.contextmanager
def any_file(text: str) -> Iterator[int]:
    """A descriptor of the file or device, open for reading, for programs of dom0. Raises UsageError."""
    shown = strip_control(text)
    if not os.path.isabs(text):
        raise UsageError(f"{shown} is not a whole path", advice="It has to begin with /.")
    try:
        fd = os.open(text, _READ)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{shown} cannot be opened: {reason}") from None
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
            what = "a directory" if stat.S_ISDIR(mode) else "a pipe or a socket"
            raise UsageError(f"{shown} is {what}, not a backup")
        os.set_blocking(fd, True)
        yield fd
    finally:
        close_read(fd)


def size_of(fd: int) -> int | None:
    """Bytes of the file, if it is one."""
    status = os.fstat(fd)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _opened_below(text: str, directories: Sequence[Path]) -> int | None:
    try:
        place = os.open(text, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        way = f"/proc/self/fd/{place}"
        real = Path(os.readlink(way))
        if not stat.S_ISREG(os.fstat(place).st_mode):
            return None
        if not any(real.is_relative_to(os.path.realpath(directory)) for directory in directories):
            return None
        fd = os.open(way, _READ)
    except (OSError, ValueError):
        return None
    finally:
        close_read(place)
    os.set_blocking(fd, True)
    return fd
