"""The three locks of a Qubes system, each a file below /run, and who holds one.

Strategy: the kernel's lock alone counts, so it ends with its holders. There are two of them: the process that
restores, and a guard, a process that clears up if the first one is killed, and lets go of the lock then. If
the holder is gone, the next caller is told that the lock will be free soon. The file itself tells who holds
the lock, since when and what for. It may be old or half written: an entry that does not match counts as no
holder.
"""

import fcntl
import os
import pwd
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import ValidationError

from qubes_restore_svc.broker.filesystem import reporting
from qubes_restore_svc.errors import HostFailed, ProtocolViolation, RestoreInProgress
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.qubes.guard import Guard, unlock
from qubes_restore_svc.wire.connection import parse_object
from qubes_restore_svc.wire.models import Model
from qubes_restore_svc.wire.names import Count, FreeText, Size, Timestamp

#: A restore holds it. /run/qubes can be written to by the group `qubes`, and a reboot empties it.
RESTORE_LOCK = Path("/run/qubes/qubes-restore-svc.lock")
#: A restore, a verification or a list holds it while its worker runs.
WORKER_LOCK = Path("/run/qubes/restore-svc-worker.lock")
#: LOCKFILE of `qubesadmin.backup.dispvm`: the stock restore in a disposable.
STOCK_LOCK = Path("/run/qubes/backup-paranoid-restore.lock")

#: What a holder does, as it is told: "… has been … since".
Activity = Literal["restoring", "verifying", "listing a backup", "comparing"]

_MODE = 0o660


@dataclass(frozen=True, slots=True)
class LockKind:
    """What is told when a lock is held: by an unknown process, or by a guard that clears up."""

    running: str
    clearing: str


RESTORE = LockKind(
    "another restore is running", "what a restore left that was killed is still being cleared up"
)
WORKER = LockKind(
    "another restore or verification has a worker running",
    "the worker of a restore that was killed is still being removed",
)


class GuardedLock:
    """The lock file at `path`, and its guard, which does `clear_up`. Use it with `with`.

    `clear_up` gets the names of the qubes that were being created; see `Guard`. `client` is the domain that
    the lock is held for, and `activity` what it does: the next process that wants the lock is told both.
    """

    def __init__(
        self,
        kind: LockKind,
        path: Path,
        clear_up: Callable[[Iterable[str]], None],
        client: str = "dom0",
        activity: Activity = "restoring",
    ) -> None:
        self._kind = kind
        self._path = path
        self._clear_up = clear_up
        self._client = client
        self._activity: Activity = activity
        self._held = ExitStack()
        self._guard: Guard | None = None
        self._being_created: set[str] = set()

    @property
    def being_created(self) -> frozenset[str]:
        """The qubes that are ours and have no tags that say so."""
        return frozenset(self._being_created)

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> None:
        """Take the lock and start the guard. Raises RestoreInProgress or HostFailed."""
        file = self._locked()
        with ExitStack() as held:
            held.callback(unlock, file, self._path)
            with reporting(f"writing {self._path}"):
                write_holder(file, self._client, self._activity)
            self._guard = Guard(file, self._path, self._clear_up)
            held.callback(self._guard.dismiss)
            self._held = held.pop_all()

    def release(self) -> None:
        """Dismiss the guard and let go of the lock. Harmless if it is not held."""
        self._held.close()

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
                raise RestoreInProgress(self._kind.running if holder is None else holder.describe())
            clearing = RestoreInProgress(self._kind.clearing, advice="Try again in a minute.")
            clearing.ends_soon = True
            raise clearing


def try_lock(path: Path) -> int | None:
    """A descriptor of the lock file at `path`, with the lock; None if somebody else has it. Raises OSError.

    The holder removes the file before it lets go of the lock. So a lock on a file that has been removed does
    not count.
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


@contextmanager
def stock_lock(path: Path = STOCK_LOCK) -> Iterator[None]:
    """Hold the lock of the stock restore in a disposable. The file stays where it is, as with that one.

    The stock restore takes the tag `backup-restore-in-progress` from every qube when it begins and when it
    ends (`qubesadmin.backup.dispvm`), ours included, which could then be started half restored. Raises
    RestoreInProgress while it runs, HostFailed if the file cannot be had.
    """
    with reporting(f"locking {path}"):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, _MODE)
    try:
        with suppress(PermissionError):  # somebody else has created it
            os.fchmod(file, _MODE)  # whatever the umask: it stays, and the next one may not be root
        with reporting(f"locking {path}"):
            try:
                # The stock command takes a lock of this kind, and the two kinds of locks do not see each
                # other.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise RestoreInProgress("the stock qvm-backup-restore is running in paranoid mode") from None
        yield
    finally:
        close_read(file)


# --- Who holds one -------------------------------------------------------------------------------

_MAX_LINE = 1000
_STARTED_FIELD = 22 - 3  # of /proc/PID/stat (proc(5)), counted from the state, which is the third


class Holder(Model):
    """A process that holds a lock: a JSON object in the lock file. `started` is in the kernel's ticks."""

    pid: Count
    started: Size
    since: Timestamp
    user: FreeText
    client: FreeText
    activity: Activity

    def is_alive(self) -> bool:
        """Does that very process still run?"""
        return _start_time(self.pid) == self.started

    def describe(self) -> str:
        """`sys-gui has been restoring since 14:05 on 2026-11-23 (process 4711 of user)`."""
        since = self.since.astimezone()
        return (
            f"{self.client} has been {self.activity} since {since:%H:%M on %Y-%m-%d}"
            f" (process {self.pid} of {self.user})"
        )


def write_holder(file: int, client: str, activity: Activity) -> None:
    """Write into the open lock file that this process has it, for `client`. Raises OSError."""
    pid = os.getpid()
    user = str(os.getuid())
    with suppress(KeyError):
        user = pwd.getpwuid(os.getuid()).pw_name
    started, now = _start_time(pid) or 0, datetime.now(UTC)
    holder = Holder(pid=pid, started=started, since=now, user=user, client=client, activity=activity)
    os.ftruncate(file, 0)
    os.pwrite(file, holder.model_dump_json().encode(), 0)


def read_holder(path: Path) -> Holder | None:
    """Who has written itself into the lock file; None if nobody can be told."""
    try:
        with open(path, "rb") as file:
            return Holder.model_validate(parse_object(file.read(_MAX_LINE)))
    except (OSError, ProtocolViolation, ValidationError):
        return None


def _start_time(pid: int) -> int | None:
    """When the process started, in the kernel's ticks; None if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[_STARTED_FIELD])
