"""One restore at a time on a Qubes system, also for the guard that outlives a killed one.

Strategy: the lock is the kernel's, on a file below /run, so that it ends with its holders. There are two of
them: the restore, and its guard, which clears up before it lets go of the lock. Whoever finds the lock held
by a process that is gone is told that this ends soon.
"""

import fcntl
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from qubes_restore_svc.broker.filesystem import reporting
from qubes_restore_svc.errors import HostFailed, RestoreInProgress
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.qubes.guard import Guard, unlock
from qubes_restore_svc.qubes.holders import read_holder, write_holder

#: Below /run/qubes, which the group `qubes` may write to, and which a reboot empties.
RESTORE_LOCK = Path("/run/qubes/qubes-restore-svc.lock")
#: The lock of whoever has a worker running, restore or verification.
WORKER_LOCK = Path("/run/qubes/restore-svc-worker.lock")

_MODE = 0o660


class RestoreLock:
    """The lock file at `path`, and the guard, which does `clear_up`.

    `client` is the domain that the restore is for: whoever comes meanwhile is told.
    """

    def __init__(self, path: Path, clear_up: Callable[[Iterable[str]], None], client: str = "dom0") -> None:
        self._path = path
        self._client = client
        self._clear_up = clear_up
        self._file: int | None = None
        self._guard: Guard | None = None
        self._being_created: set[str] = set()

    @property
    def being_created(self) -> frozenset[str]:
        """The qubes that are ours and have no tags that say so."""
        return frozenset(self._being_created)

    def take(self) -> None:
        """Take the lock and start the guard. Raises RestoreInProgress or HostFailed."""
        file = self._locked()
        try:
            with reporting(f"writing {self._path}"):
                write_holder(file, self._client, "restoring")
            self._guard = Guard(file, self._path, self._clear_up)
        except BaseException:
            unlock(file, self._path)
            raise
        self._file = file

    def release(self) -> None:
        """Dismiss the guard and let go of the lock."""
        if self._guard is not None:
            self._guard.dismiss()
        file, self._file = self._file, None
        if file is not None:
            unlock(file, self._path)

    def creating(self, name: str) -> None:
        """The qube `name` is about to be created; see `Guard`."""
        self._being_created.add(name)
        if self._guard is not None:
            self._guard.creating(name)

    def created(self, name: str) -> None:
        """The qube has its tags, or there is none."""
        self._being_created.discard(name)
        if self._guard is not None:
            self._guard.created(name)

    def _locked(self) -> int:
        while True:
            try:
                with reporting(f"locking {self._path}"):
                    file = try_lock(self._path)
            except HostFailed as error:
                error.advice = "Run it in dom0, as a user of the group qubes."
                raise
            if file is not None:
                return file
            holder = read_holder(self._path)
            if holder is None and not self._path.exists():  # it has been let go of this very moment
                continue
            if holder is None or holder.is_alive():
                raise RestoreInProgress("another restore is running" if holder is None else holder.describe())
            clearing = RestoreInProgress(
                "what a restore left that was killed is still being cleared up",
                advice="Try again in a minute.",
            )
            clearing.ends_soon = True
            raise clearing


def try_lock(path: Path) -> int | None:
    """A descriptor of the lock file at `path`, with the lock; None if somebody else has it. Raises OSError.

    Whoever lets go of it removes the file first, so a lock on a file that is not there any more is none.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False)):
                with suppress(PermissionError):  # another member of the group has created it
                    os.fchmod(file, _MODE)  # whatever the umask: the group has to be able to take it
                return file
        except BlockingIOError:
            close_read(file)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            close_read(file)
            raise
        close_read(file)
