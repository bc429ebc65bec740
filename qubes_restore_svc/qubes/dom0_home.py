"""dom0's home, delivered as one archive file, which nobody opens here.

Strategy: a hidden directory in the home of dom0's user takes the file; when that is complete and on the disk,
one rename gives the directory its name. What is in the archive was written by whoever made the backup: it is
for the person to look into, and not in dom0.
"""

import enum
import grp
import os
import pwd
import re
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from pathlib import Path

from qubes_restore_svc.broker.filesystem import (
    NAME_TAKEN,
    make_directory,
    open_directory,
    rename_new,
    reporting,
    sync_directory,
)
from qubes_restore_svc.broker.host import Definition, NewQube
from qubes_restore_svc.broker.image_file import VOLUME_FILES, ImageFile
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.wire.messages import QubeSettings
from qubes_restore_svc.wire.names import VolumeName, strip_control

#: The archive's name in the directory.
ARCHIVE_NAME = "dom0-home.tar"

_GROUP = "qubes"
_UNFINISHED_NAME = VOLUME_FILES["home"]
_PARTIAL = re.compile(r"\.home-restore-[0-9]{4}-[0-9]{2}-[0-9]{2}-[0-9]{6}(-[0-9]+)?\.partial")
_MAX_ATTEMPTS = 100


def dom0_user() -> str:
    """The account that dom0's home belongs to: the first member of the group `qubes`, else this one."""
    with suppress(KeyError, IndexError):
        return grp.getgrnam(_GROUP).gr_mem[0]
    with suppress(KeyError):
        return pwd.getpwuid(os.getuid()).pw_name
    return str(os.getuid())


def dom0_home(user: str) -> Path:
    """The home of that account; raises HostFailed if there is no such account."""
    try:
        return Path(pwd.getpwnam(user).pw_dir)
    except KeyError:
        raise HostFailed(f"dom0 has no account {user!r}") from None


class _State(enum.Enum):
    OPEN = "open"
    COMPLETE = "complete"
    GONE = "gone"


class Dom0Home:
    """A `QubeTransaction` for dom0's home, into a new directory in `home`."""

    def __init__(self, home: Path, qube: NewQube) -> None:
        """Create the hidden directory. Raises HostFailed or NoSpace; then nothing is left."""
        self._qube = qube
        self._shown = strip_control(str(home))
        self._mutex = threading.Lock()
        self._sink: ImageFile | None = None
        self._state = _State.OPEN
        with self._reporting(f"opening {self._shown}"):
            self._home = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._name, self._inside = self._make_directory()
        except BaseException:
            close_read(self._home)
            raise

    def create_volume(self, volume: VolumeName, image_size: int) -> ImageFile:
        """A sink for the archive, of at most `image_size` bytes. Raises HostFailed or NoSpace."""
        with self._mutex:
            self._check_open()
            if volume != "home":
                raise HostFailed("dom0 has no such volume to be restored", qube="dom0", volume=volume)
            self._sink = ImageFile(self._inside, self._qube.name, volume, image_size)
            return self._sink

    def change_template(self, template: str) -> None:
        """dom0 has no template, so this is never called."""
        raise HostFailed("dom0 has no template", qube=self._qube.name)

    def commit(self, settings: QubeSettings, definition: Definition | None) -> Sequence[str]:
        """Give the directory its name, all of it on the disk; brings a remark on where it is.

        Raises HostFailed or NoSpace; the home can then only be rolled back.
        """
        with self._mutex:
            self._check_open()
            if settings.key != self._qube.source.key or self._sink is None or self._sink.size is None:
                raise HostFailed("the archive of its home is not complete", qube=self._qube.name)
            with self._reporting("giving the archive its name"):
                os.rename(_UNFINISHED_NAME, ARCHIVE_NAME, src_dir_fd=self._inside, dst_dir_fd=self._inside)
                self._give_to_owner()
                sync_directory(self._inside)
                self._publish()
            self._leave(_State.COMPLETE)
        return (
            f"dom0's home is in {self._shown}/{self._name}/{ARCHIVE_NAME}, as it came; look into it in a"
            " disposable, not in dom0",
        )

    def rollback(self) -> None:
        """Remove all that was created. Does nothing after `commit` or a second time. Raises HostFailed."""
        with self._mutex:
            if self._state is not _State.OPEN:
                return
            if self._sink is not None:
                self._sink.abandon()
                self._sink.wait_ended()
            partial = _partial(self._name)
            try:
                with self._reporting(f"removing {partial}"):
                    _remove(partial, self._home)
            finally:
                self._leave(_State.GONE)

    def _make_directory(self) -> tuple[str, int]:
        now = datetime.now().strftime("home-restore-%Y-%m-%d-%H%M%S")
        with self._reporting("creating the directory for dom0's home"):
            for attempt in range(_MAX_ATTEMPTS):
                name = f"{now}-{attempt}" if attempt else now
                with suppress(FileExistsError):
                    return name, make_directory(_partial(name), dir_fd=self._home)
        raise HostFailed(f"too many things named like {now} are in {self._shown}", qube=self._qube.name)

    def _publish(self) -> None:
        """Rename the directory; to a name with a number if somebody has taken this one."""
        partial = _partial(self._name)
        plain = self._name
        for attempt in range(_MAX_ATTEMPTS):
            name = f"{plain}-{attempt}" if attempt else plain
            try:
                rename_new(partial, name, dir_fd=self._home)
            except OSError as error:
                if error.errno in NAME_TAKEN:
                    continue
                raise
            try:
                sync_directory(self._home)
            except OSError:
                # Not known to last, so not a success: back to where a rollback finds it.
                os.rename(name, partial, src_dir_fd=self._home, dst_dir_fd=self._home)
                raise
            self._name = name
            return
        raise HostFailed(f"{plain} and all names like it are taken in {self._shown}", qube=self._qube.name)

    def _give_to_owner(self) -> None:
        """Run by root, the restore leaves the files to whom the home belongs."""
        owner = os.fstat(self._home)
        if os.geteuid() == 0 and owner.st_uid != 0:
            os.chown(ARCHIVE_NAME, owner.st_uid, owner.st_gid, dir_fd=self._inside, follow_symlinks=False)
            os.fchown(self._inside, owner.st_uid, owner.st_gid)

    def _check_open(self) -> None:
        if self._state is not _State.OPEN:
            raise HostFailed("dom0's home has been committed or rolled back", qube=self._qube.name)

    def _leave(self, state: _State) -> None:
        self._state = state
        for descriptor in (self._inside, self._home):
            close_read(descriptor)

    def _reporting(self, doing: str) -> AbstractContextManager[None]:
        return reporting(doing, qube=self._qube.name)


def clear_unfinished_homes(home: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Remove the hidden directories of restores that were killed. Only under the restore lock.

    Returns the names of those that were removed, and of those that could not be or hold something else.
    """
    cleared: list[str] = []
    kept: list[str] = []
    try:
        directory = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return (), ()
    try:
        for name in sorted(os.listdir(directory)):
            if _PARTIAL.fullmatch(name):
                outcome = kept
                with suppress(OSError):
                    _remove(name, directory)
                    outcome = cleared
                outcome.append(name)
    finally:
        close_read(directory)
    return tuple(cleared), tuple(kept)


def _partial(name: str) -> str:
    return f".{name}.partial"


def _remove(partial: str, home: int) -> None:
    """Remove a hidden directory and our file in it; OSError if anything else is in it."""
    try:
        inside = open_directory(partial, dir_fd=home)
    except FileNotFoundError:
        return
    try:
        for name in (_UNFINISHED_NAME, ARCHIVE_NAME):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=inside)
    finally:
        close_read(inside)
    os.rmdir(partial, dir_fd=home)
