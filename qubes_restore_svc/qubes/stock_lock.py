"""The lock of the stock restore in a disposable, held for as long as a restore of ours lasts.

That restore takes the tag `backup-restore-in-progress` from every qube when it begins and when it ends
(`qubesadmin.backup.dispvm`), ours included, which could then be started half restored. The two must not run
at the same time.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qubes_restore_svc.broker.filesystem import reporting
from qubes_restore_svc.errors import RestoreInProgress
from qubes_restore_svc.hardening import close_read

#: LOCKFILE of `qubesadmin.backup.dispvm`.
STOCK_LOCK = Path("/run/qubes/backup-paranoid-restore.lock")
_MODE = 0o660


@contextmanager
def stock_lock(path: Path = STOCK_LOCK) -> Iterator[None]:
    """Hold the lock file, which stays where it is, as with the stock command. Raises RestoreInProgress while
    that runs, HostFailed if the file cannot be had."""
    with reporting(f"locking {path}"):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, _MODE)
    try:
        with reporting(f"locking {path}"):
            try:
                # Of this kind, because the stock command's is: the two kinds do not see each other.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise RestoreInProgress("the stock qvm-backup-restore is running in paranoid mode") from None
        yield
    finally:
        close_read(file)
