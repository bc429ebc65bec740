"""dom0's home, delivered as one archive file, which nobody opens here.

Strategy: a hidden directory in the home of dom0's user takes the file; when that is complete and on the disk,
one rename gives the directory its name. The content of the archive was written by the person who made the
backup: the person has to look into it, and not in dom0.
"""

import grp
import os
import pwd
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from qubes_restore_svc.broker.filesystem import reporting
from qubes_restore_svc.broker.image_directory import (
    VOLUME_FILES,
    BuildState,
    ImageDirectory,
    ImageFile,
    clear_partials,
)
from qubes_restore_svc.broker.interfaces import Definition, NewQube
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.wire.messages import QubeSettings
from qubes_restore_svc.wire.names import VolumeName, strip_control
from qubes_restore_svc.wire.report import VolumeReport

#: The archive's name in the directory.
ARCHIVE_NAME = "dom0-home.tar"

_GROUP = "qubes"
_UNFINISHED_NAME = VOLUME_FILES["home"]
_FILES = frozenset({_UNFINISHED_NAME, ARCHIVE_NAME})
_NAME = r"home-restore-[0-9]{4}-[0-9]{2}-[0-9]{2}-[0-9]{6}(-[0-9]+)?"
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


class Dom0Home(ImageDirectory):
    """A `QubeTransaction` for dom0's home, into a new directory in `home`."""

    def __init__(self, home: Path, qube: NewQube) -> None:
        """Create the hidden directory. Raises HostFailed or NoSpace; then nothing is left."""
        self._qube = qube
        self._shown = strip_control(str(home))
        now = datetime.now().strftime("home-restore-%Y-%m-%d-%H%M%S")
        with reporting(f"opening {self._shown}", qube=qube.name):
            directory = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with reporting("creating the directory for dom0's home", qube=qube.name):
                for self._name in _numbered(now):
                    with suppress(FileExistsError):
                        super().__init__(directory, self._name, qube.name, _FILES)
                        return
            raise HostFailed(f"too many things named like {now} are in {self._shown}", qube=qube.name)
        except BaseException:
            close_read(directory)
            raise

    def create_volume(self, volume: VolumeName, image_size: int) -> ImageFile:
        """A sink for the archive, of at most `image_size` bytes. Raises HostFailed or NoSpace."""
        if volume != "home":
            raise HostFailed("dom0 has no such volume to be restored", qube="dom0", volume=volume)
        return super().create_volume(volume, image_size)

    def change_template(self, template: str) -> None:
        """dom0 has no template, so this is never called."""
        raise self._failure("dom0 has no template")

    def commit(
        self,
        settings: QubeSettings,
        definition: Definition | None,
        volumes: Sequence[VolumeReport] = (),
    ) -> Sequence[str]:
        """Give the directory its name, all of it on the disk; brings a remark on where it is.

        It gets a name with a number if somebody has taken this one. Raises HostFailed or NoSpace; the home
        can then only be rolled back.
        """
        with self._mutex:
            self._check_open()
            if settings.key != self._qube.source.key or not self._sizes():
                raise self._failure("the archive of its home is not complete")
            with reporting("giving the archive its name", qube=self._qube.name):
                os.rename(_UNFINISHED_NAME, ARCHIVE_NAME, src_dir_fd=self._inside, dst_dir_fd=self._inside)
                self._give_to_owner()
                name = self._publish(_numbered(self._name))
            if name is None:
                raise self._failure(f"{self._name} and all names like it are taken in {self._shown}")
        return (
            f"dom0's home is in {self._shown}/{name}/{ARCHIVE_NAME}, as it came; look into it in a"
            " disposable, not in dom0",
        )

    def _give_to_owner(self) -> None:
        """Run by root, the restore leaves the files to whom the home belongs."""
        owner = os.fstat(self._parent)
        if os.geteuid() == 0 and owner.st_uid != 0:
            os.chown(ARCHIVE_NAME, owner.st_uid, owner.st_gid, dir_fd=self._inside, follow_symlinks=False)
            os.fchown(self._inside, owner.st_uid, owner.st_gid)

    def _leave(self, state: BuildState) -> None:
        super()._leave(state)
        close_read(self._parent)


def clear_unfinished_homes(home: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """See `clear_partials`, for the homes of restores that were killed. Only under the restore lock."""
    try:
        directory = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return (), ()
    try:
        return clear_partials(directory, _NAME, _FILES)
    finally:
        close_read(directory)


def _numbered(name: str) -> Iterator[str]:
    """The name, and then as many with a number as are tried."""
    return (f"{name}-{attempt}" if attempt else name for attempt in range(_MAX_ATTEMPTS))
