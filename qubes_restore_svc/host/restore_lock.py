"""One restore at a time on a Qubes system, and a guard that outlives it.

Strategy: the lock is the kernel's, on a file below /run, so that it ends with its holders. There are two of
them: the restore, and a child of it that does nothing but read from a pipe. When the restore ends, however it
ends, the pipe does too; if the guard has not been dismissed by then, the restore was killed, and the guard
clears up before it lets go of the lock. Whoever finds the lock held by a process that is gone waits for that.
"""

import fcntl
import gc
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from qubes_restore_svc.errors import HostFailed, RestoreInProgress
from qubes_restore_svc.holders import read_holder, write_holder
from qubes_restore_svc.host.filesystem import reporting

#: Below /run/qubes, which the group `qubes` may write to, and which a reboot empties.
RESTORE_LOCK = Path("/run/qubes/qubes-restore-svc.lock")
#: The lock of whoever has a worker running, restore or verification.
WORKER_LOCK = Path("/run/qubes/restore-svc-worker.lock")

#: Seconds to wait for a guard that clears up.
CLEARING_TIMEOUT_S = 30.0

#: What a terminal, a logout or a shutdown sends to a restore is not meant for its guard.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGPIPE)

_PAUSE_S = 0.1
_MODE = 0o660


class RestoreLock:
    """The lock file at `path`, and the guard. `clear_up` gets the names of qubes that were being created.

    `client` is the domain that the restore is for: whoever comes meanwhile is told.
    `clear_up` runs in a process of its own without standard streams, and in no other; it must make its own
    connections, and may take its time.
    """

    def __init__(self, path: Path, clear_up: Callable[[Iterable[str]], None], client: str = "dom0") -> None:
        self._path = path
        self._client = client
        self._clear_up = clear_up
        self._file: int | None = None
        self._pipe: int | None = None
        self._guard: int | None = None
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
            with reporting("starting the process that clears up if this one is killed"):
                self._start_guard(file)
        except BaseException:
            unlock(file, self._path)
            raise
        self._file = file

    def release(self) -> None:
        """Dismiss the guard and let go of the lock."""
        guard, self._guard = self._guard, None
        if guard is not None:
            with suppress(ProcessLookupError):
                os.kill(guard, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(guard, 0)
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            os.close(pipe)
        file, self._file = self._file, None
        if file is not None:
            unlock(file, self._path)

    def creating(self, name: str) -> None:
        """The qube `name` is about to be created: without its tags, only the guard knows that it is ours."""
        self._being_created.add(name)
        self._tell(f"+{name}\n")

    def created(self, name: str) -> None:
        """The qube has its tags, or there is none."""
        self._being_created.discard(name)
        self._tell(f"-{name}\n")

    def _tell(self, line: str) -> None:
        if self._pipe is not None:
            with suppress(OSError):  # somebody has ended the guard; the restore goes on without
                os.write(self._pipe, line.encode())

    def _locked(self) -> int:
        deadline = time.monotonic() + CLEARING_TIMEOUT_S
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
            if time.monotonic() > deadline:
                raise RestoreInProgress(
                    "what a restore left that was killed is still being cleared up",
                    advice="Try again in a minute.",
                )
            time.sleep(_PAUSE_S)

    def _start_guard(self, file: int) -> None:
        reader, writer = os.pipe()
        # Nothing may reach the child before it has chosen what it ignores.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        try:
            guard = os.fork()
            if guard == 0:
                _be_guard(reader, file, self._path, self._clear_up)
        except BaseException:
            os.close(writer)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(reader)
        os.set_blocking(writer, False)
        self._pipe, self._guard = writer, guard


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
            os.close(file)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def unlock(file: int, path: Path) -> None:
    """Remove the lock file, let go of the lock, and close the descriptor."""
    with suppress(OSError):
        os.unlink(path)
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would not do as long as a child has it too
    os.close(file)


# --- The guard -----------------------------------------------------------------------------------


def _be_guard(reader: int, file: int, path: Path, clear_up: Callable[[Iterable[str]], None]) -> None:
    """What the child does, to the end of its life. It inherits everything, and keeps two descriptors."""
    try:
        # Objects of the restore still stand for descriptors that are closed now; none of them may be
        # collected, and close another file of the same number.
        gc.disable()
        reader, file = (fcntl.fcntl(kept, fcntl.F_DUPFD_CLOEXEC, 3) for kept in (reader, file))
        _detach({reader, file})
        being_created = _read_until_end(reader)
        clear_up(being_created)
        unlock(file, path)
    finally:
        os._exit(0)


def _detach(kept: set[int]) -> None:
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    os.chdir("/")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with suppress(OSError):
                os.close(int(name))


def _read_until_end(reader: int) -> set[str]:
    """The qubes that were being created when the restore ended. Blocks until it does."""
    received = b""
    while part := os.read(reader, 4096):
        received += part
    names: set[str] = set()
    for line in received.decode(errors="replace").splitlines():
        if line.startswith("+"):
            names.add(line[1:])
        elif line.startswith("-"):
            names.discard(line[1:])
    return names
