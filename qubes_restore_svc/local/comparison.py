"""The host that compares: the images in a directory, as `extract` made it, against those of the backup.

Strategy: nothing is written, and the lock is shared: other comparisons may run, a restore to it may
not. Every file is opened relative to an open directory, read-only, and only if it is an ordinary file: a
symbolic link is not followed, because where it leads is not what was extracted.
"""

import fcntl
import os
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qubes_restore_svc.broker.comparison import ComparedVolume, NotHere, looking
from qubes_restore_svc.broker.filesystem import open_directory
from qubes_restore_svc.broker.image_directory import VOLUME_FILES
from qubes_restore_svc.broker.interfaces import Definition, HostView, NewQube, RestoredQube, VolumeSink
from qubes_restore_svc.errors import HostFailed, RestoreInProgress
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.local.directory import RECORD
from qubes_restore_svc.wire.messages import QubeSettings
from qubes_restore_svc.wire.names import QUBE_NAME, VolumeName, strip_control
from qubes_restore_svc.wire.report import VolumeReport

_FILES = (RECORD, *VOLUME_FILES.values())


class ComparedDirectory:
    """A `Host` for a comparison with the qubes in a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shown = strip_control(str(path))
        self._mutex = threading.Lock()
        self._directory: int | None = None
        self._qubes: list[ComparedQube] = []

    @contextmanager
    def lock(self) -> Iterator[Sequence[str]]:
        """No restore may write to the directory meanwhile. Raises RestoreInProgress or HostFailed."""
        with looking(f"opening {self._shown}"):
            directory = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with ExitStack() as stack:
            stack.callback(close_read, directory)
            with looking(f"locking {self._shown}"):
                try:
                    fcntl.flock(directory, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RestoreInProgress(f"a restore writes to {self._shown}") from None
            with self._mutex:
                self._directory = directory
            stack.callback(self._end)
            yield ()

    def view(self) -> HostView:
        """The qubes that were extracted here, and what has the name of one and is a symbolic link."""
        with self._mutex, looking(f"reading {self._shown}"):
            names = os.listdir(self._opened())
            return HostView(frozenset(name for name in names if self._is_qube(name)))

    def free_space(self, pool: str | None = None) -> int | None:
        """Nothing is written."""
        return None

    def begin(self, qube: NewQube) -> "ComparedQube":
        """Find a qube. Raises HostFailed."""
        with self._mutex, looking(f"opening {qube.name} in {self._shown}", qube=qube.name):
            status = os.stat(qube.name, dir_fd=self._opened(), follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                reason = f"{qube.name} in {self._shown} is {_kind(status.st_mode)}, and no directory"
                raise HostFailed(reason, qube=qube.name, advice="")
            found = ComparedQube(open_directory(qube.name, dir_fd=self._opened()), qube)
            self._qubes.append(found)
            return found

    def set_default_dispvm(self, qube: str, default_dispvm: str) -> None:
        """Nothing is set."""

    def restored_from(self, backup_id: str) -> Sequence[RestoredQube]:
        """Nothing is restored."""
        return ()

    def take_back(self, qube: str, backup_id: str, *, from_before: bool) -> bool:
        """Nothing is set."""
        return False

    def _is_qube(self, name: str) -> bool:
        if not re.fullmatch(QUBE_NAME, name):
            return False
        mode = _mode(name, self._opened())
        if mode is None or not stat.S_ISDIR(mode):
            return mode is not None and stat.S_ISLNK(mode)
        return any(_exists(f"{name}/{file}", self._opened()) for file in _FILES)

    def _opened(self) -> int:
        if self._directory is None:
            raise HostFailed("the directory is not locked for this comparison")
        return self._directory

    def _end(self) -> None:
        with self._mutex:
            qubes, self._qubes, self._directory = self._qubes, [], None
        for qube in qubes:
            qube.rollback()


class ComparedQube:
    """A `QubeTransaction` that writes nothing and gives only the results of its comparison."""

    def __init__(self, directory: int, qube: NewQube) -> None:
        """`directory` is that of the qube, open; it is closed when this has ended."""
        self._directory: int | None = directory
        self._qube = qube
        self._volumes: dict[VolumeName, VolumeSink] = {}

    def create_volume(self, volume: VolumeName, image_size: int) -> VolumeSink:
        """What is here of the volume; never raises, see `VolumeSink.finish`."""
        try:
            self._volumes[volume] = self._open(volume)
        except HostFailed as error:
            self._volumes[volume] = NotHere(error)
        return self._volumes[volume]

    def change_template(self, template: str) -> None:
        """A directory has no templates."""

    def commit(
        self,
        settings: QubeSettings,
        definition: Definition | None,
        volumes: Sequence[VolumeReport] = (),
    ) -> Sequence[str]:
        """End with this qube. Returns remarks that belong to no single volume."""
        remarks = [
            f"{file} is here, and not in the backup"
            for volume, file in VOLUME_FILES.items()
            if volume not in self._volumes and self._directory is not None and _exists(file, self._directory)
        ]
        for volume, sink in self._volumes.items():
            if isinstance(sink, ComparedVolume) and sink.was_changed:
                remarks.append(f"{VOLUME_FILES[volume]} was written to while it was compared")
        self.rollback()
        return remarks

    def rollback(self) -> None:
        """Let the qube go."""
        for sink in self._volumes.values():
            sink.abandon()
        directory, self._directory = self._directory, None
        if directory is not None:
            close_read(directory)

    def _open(self, volume: VolumeName) -> VolumeSink:
        name, qube = VOLUME_FILES[volume], self._qube.name
        with looking(f"opening {name}", qube=qube, volume=volume):
            try:
                mode = os.stat(name, dir_fd=self._directory, follow_symlinks=False).st_mode
                # What was a file a moment ago may be a pipe now, which must not let this wait.
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                file = os.open(name, flags, dir_fd=self._directory) if stat.S_ISREG(mode) else None
            except FileNotFoundError:
                return NotHere()
            if file is not None and not stat.S_ISREG(mode := os.fstat(file).st_mode):
                close_read(file)
                file = None
            if file is None:
                reason = f"{name} is {_kind(mode)}, and no file"
                raise HostFailed(reason, qube=qube, volume=volume, advice="")
            return ComparedVolume(file, name, qube, volume)


def _mode(path: str, directory: int) -> int | None:
    """What it is; None if it is not there."""
    try:
        return os.stat(path, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None


def _exists(path: str, directory: int) -> bool:
    """Is it there, as far as we may know?"""
    try:
        return _mode(path, directory) is not None
    except PermissionError:
        return True


_KINDS = (
    (stat.S_ISLNK, "a symbolic link, which is not followed"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISREG, "a file"),
)


def _kind(mode: int) -> str:
    return next((kind for is_of, kind in _KINDS if is_of(mode)), "a device, a pipe or a socket")
