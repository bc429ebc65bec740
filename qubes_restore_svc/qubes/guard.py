"""The second holder of a lock: a process that stays after this one is killed, until it has cleared up.

Strategy: a child that does nothing but read from a pipe. When its parent ends, however it ends, the pipe does
too; if the child has not been dismissed by then, the parent was killed, and the child clears up. It keeps the
lock under which the parent worked until it is through, so that nobody else begins in between.
"""

import fcntl
import gc
import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from qubes_restore_svc.broker.filesystem import reporting
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.qubes.system import QubesSystem, insist

#: What a terminal, a logout or a shutdown sends to a restore is not meant for its guard.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGPIPE)

#: Seconds that a guard tries to reach a qubesd that does not answer.
CONNECT_TIMEOUT_S = 60.0

_STARTING = "starting the process that clears up if this one is killed"


class Guard:
    """The child. `clear_up` gets the names of the qubes that were being created.

    `clear_up` runs in a process of its own without standard streams, and in no other; it must make its own
    connections, and may take its time. `file` is the descriptor of the lock file at `path`, which the guard
    lets go of, and removes, when it has cleared up.
    """

    def __init__(self, file: int, path: Path, clear_up: Callable[[Iterable[str]], None]) -> None:
        """Start it. Raises HostFailed."""
        with reporting(_STARTING):
            reader, writer = os.pipe()
        # Nothing may reach the child before it has chosen what it ignores.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        try:
            with reporting(_STARTING):
                guard = os.fork()
            if guard == 0:
                _be_guard(reader, file, path, clear_up)
        except BaseException:
            close_read(writer)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            close_read(reader)
        os.set_blocking(writer, False)
        self._pipe: int | None = writer
        self._child = guard

    def creating(self, name: str) -> None:
        """The qube `name` is about to be created: without its tags, only the guard knows that it is ours."""
        self._tell(f"+{name}\n")

    def created(self, name: str) -> None:
        """The qube has its tags, or there is none."""
        self._tell(f"-{name}\n")

    def dismiss(self) -> None:
        """End it; it clears nothing up, and has let go of the lock. Harmless the second time."""
        pipe, self._pipe = self._pipe, None
        if pipe is None:
            return
        with suppress(ProcessLookupError):
            os.kill(self._child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self._child, 0)
        close_read(pipe)

    def _tell(self, line: str) -> None:
        if self._pipe is not None:
            with suppress(OSError):  # somebody has ended the guard; the restore goes on without
                os.write(self._pipe, line.encode())


def unlock(file: int, path: Path) -> None:
    """Remove the lock file, let go of the lock, and close the descriptor."""
    with suppress(OSError):
        os.unlink(path)
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would not do as long as a child has it too
    close_read(file)


def connect_patiently() -> QubesSystem:
    """The connection of a guard, which has nobody to tell that there is none yet. Raises RestoreError."""
    return insist(QubesSystem.connect, CONNECT_TIMEOUT_S)


# --- The child -----------------------------------------------------------------------------------


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
            close_read(int(name))


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
