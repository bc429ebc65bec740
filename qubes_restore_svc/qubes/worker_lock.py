"""One worker at a time on a Qubes system, also between programs and users.

Strategy: a lock on a file below /run, which the kernel gives back however its holder ends. The file is
removed while the lock is still held; whoever got a lock on a file that is not there any more tries again. A
holder can leave the lock to a guard that clears up after it: then the process that stands in the file is
gone, and whoever comes waits.
"""

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from qubes_restore_svc.errors import HostFailed, RestoreInProgress
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.qubes.holders import Activity, read_holder, write_holder

#: Writable for the group qubes in dom0, and gone after a reboot.
LOCK_PATH = Path("/run/qubes/restore-svc-worker.lock")

#: Seconds to wait for a guard that clears up; to kill a qube can take a minute.
CLEARING_TIMEOUT_S = 90.0

_MODE = 0o660
_PAUSE_S = 0.1


@contextlib.contextmanager
def worker_lock(
    path: Path = LOCK_PATH, client: str = "dom0", activity: Activity = "restoring"
) -> Iterator[int]:
    """Hold the lock, for `client` and that `activity`: whoever comes meanwhile is told. Its descriptor.

    Raises RestoreInProgress if somebody else has it, HostFailed if nobody can.
    """
    try:
        descriptor = _locked(path)
        try:
            write_holder(descriptor, client, activity)
        except BaseException:
            _unlock(descriptor, path)
            raise
    except BlockingIOError:
        raise RestoreInProgress(_who(path)) from None
    except OSError as error:
        raise HostFailed(
            f"the lock {path} cannot be taken: {error.strerror}",
            advice="Run this in dom0, as a user of the group qubes.",
        ) from error
    try:
        yield descriptor
    finally:
        _unlock(descriptor, path)


async def wait_cleared(path: Path = LOCK_PATH) -> None:
    """Return when nobody has the lock who only clears up after a holder that was killed.

    Raises RestoreInProgress if that takes too long.
    """
    deadline = time.monotonic() + CLEARING_TIMEOUT_S
    while _is_left_to_guard(path):
        if time.monotonic() > deadline:
            raise RestoreInProgress(
                "the worker of a restore that was killed is still being removed",
                advice="Try again in a minute.",
            )
        await asyncio.sleep(_PAUSE_S)


def _is_left_to_guard(path: Path) -> bool:
    holder = read_holder(path)
    if holder is None or holder.is_alive():
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # it is gone, or will be told of by whoever takes the lock
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        close_read(descriptor)
    return False


def _who(path: Path) -> str:
    holder = read_holder(path)
    if holder is None or not holder.is_alive():  # it has not written itself down yet
        return "another restore or verification has a worker running"
    return holder.describe()


def _unlock(descriptor: int, path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
    close_read(descriptor)


def _locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                with contextlib.suppress(PermissionError):  # another user of the group has created it
                    os.fchmod(descriptor, _MODE)  # whatever the umask: the group has to be able to take it
                return descriptor
        except BaseException:
            close_read(descriptor)
            raise
        close_read(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    mine = os.fstat(descriptor)
    try:
        there = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
