"""One worker at a time on a Qubes system, also between programs and users.

Strategy: a lock on a file below /run, which the kernel gives back however its holder ends. The file is
removed while the lock is still held; whoever got a lock on a file that is not there any more tries again.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from qubes_restore_svc.errors import HostFailed, RestoreInProgress
from qubes_restore_svc.holders import Activity, read_holder, write_holder

#: Writable for the group qubes in dom0, and gone after a reboot.
LOCK_PATH = Path("/run/qubes/restore-svc-worker.lock")

_MODE = 0o660


@contextlib.contextmanager
def worker_lock(
    path: Path = LOCK_PATH, client: str = "dom0", activity: Activity = "restoring"
) -> Iterator[None]:
    """Hold the lock, for `client` and that `activity`: whoever comes meanwhile is told.

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
        yield
    finally:
        _unlock(descriptor, path)


def _who(path: Path) -> str:
    holder = read_holder(path)
    if holder is None or not holder.is_alive():  # it has not written itself down yet
        return "another restore or verification has a worker running"
    return holder.describe()


def _unlock(descriptor: int, path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
    os.close(descriptor)


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
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    mine = os.fstat(descriptor)
    try:
        there = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
