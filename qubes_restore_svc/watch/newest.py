"""Which backup is the newest in a place, and how the command that verifies gets it.

Strategy: in a directory here, it is the file that was written last. In another qube, a shell looks there: it
is the beginning of a command whose output is the backup. A command that runs here becomes a child, and its
output a pipe.
"""

import contextlib
import os
import shlex
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.watch.places import Place
from qubes_restore_svc.wire.names import strip_control

#: Seconds that a command may take to end when nobody reads its output any more.
_GRACE_S = 5.0


@dataclass
class Found:
    """A backup: what it is called, and what names it to the command that verifies."""

    shown: str
    location: str
    modified: float | None = None  #: when a file was written, seconds since 1970
    ended: int = 0  #: exit code of the command that brought it, negative for a signal; known in the end
    was_stopped: bool = False  #: the command was killed here, because nobody read its output any more

    @property
    def broke_off(self) -> bool:
        """Did the command fail? SIGPIPE, if nobody reads its output any more, is no failure."""
        return not self.was_stopped and self.ended not in (0, -signal.SIGPIPE, 128 + signal.SIGPIPE)


class NoBackup(Exception):
    """There is none in the place; the text is a clause that says so."""


@contextlib.contextmanager
def newest_backup(place: Place) -> Iterator[Found]:
    """The newest backup in a place. What is started for it has ended afterwards.

    Raises NoBackup, HostFailed.
    """
    if place.qube is not None:
        shown = place.file or place.command or f"{place.directory}/{place.pattern}"
        yield Found(f"{place.qube}: {shown}", place.file or _command_there(place))
    elif place.command is not None:
        yield from _output_of(place.command)
    else:
        yield _file_here(place)


def _command_there(place: Place) -> str:
    """A location that the agent of the qube runs as a command, once for each time that it is read."""
    command = place.command
    if command is None:
        directory, pattern = shlex.quote(f"{place.directory}/"), shlex.quote(place.pattern)
        command = (
            f'cat -- "$(find {directory} -maxdepth 1 -type f -name {pattern} -mmin +{place.settle_minutes}'
            " -printf '%T@ %p\\n' | sort -rn | head -n 1 | cut -d ' ' -f 2-)\""
        )
    return f"sh -c {shlex.quote(command)}"


def _file_here(place: Place) -> Found:
    try:
        if place.file is not None:
            path = Path(place.file).expanduser()
            return _found(path, path.stat().st_mtime)
        assert place.directory is not None
        directory, now = Path(place.directory).expanduser(), time.time()
        found = []
        for entry in os.scandir(directory):
            with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
                if fnmatchcase(entry.name, place.pattern) and entry.is_file():
                    found.append((entry.stat().st_mtime, entry.name))
    except FileNotFoundError as error:
        raise NoBackup(f"{strip_control(str(error.filename))} is not there") from None
    except OSError as error:
        raise HostFailed(f"{strip_control(str(error.filename))} cannot be read: {error.strerror}") from None
    settled = [(at, name) for at, name in found if abs(now - at) >= place.settle_minutes * 60]
    if not settled:
        what = "is complete yet" if found else f"is called {place.pattern}"
        raise NoBackup(strip_control(f"no file in {directory} {what}"))
    modified, name = max(settled)
    return _found(directory / name, modified)


def _found(path: Path, modified: float) -> Found:
    return Found(str(path), str(path.absolute()), modified)


def _output_of(command: str) -> Iterator[Found]:
    """Runs the command in a process group of its own, with a pipe for its output."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        words = ["/bin/sh", "-c", command]
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, writing, 1),
        ]
        try:
            child = os.posix_spawn(
                "/bin/sh", words, os.environ, file_actions=actions, setpgroup=0, setsigdef=[signal.SIGPIPE]
            )
        finally:
            close_read(writing)
    except OSError as error:
        close_read(reading)
        raise HostFailed(f"the command cannot be started: {error.strerror}") from None
    found = Found(command, f"/dev/fd/{reading}")
    try:
        yield found
    finally:
        close_read(reading)
        _end(child, found)


def _end(child: int, found: Found) -> None:
    """Wait for a child. Who writes to a pipe that nobody reads ends by that; others are killed."""
    deadline = time.monotonic() + _GRACE_S
    while True:
        process, status = os.waitpid(child, os.WNOHANG)
        if process == child:
            break
        if time.monotonic() >= deadline:
            os.killpg(child, signal.SIGKILL)
            found.was_stopped = True
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.02)
    found.ended = os.waitstatus_to_exitcode(status)
