"""The host that needs no Qubes: every restored qube becomes a directory of sparse images and a `qube.json`.

Strategy: the lock is on the directory itself, so no lock file stays behind. Everything happens relative to
the descriptor that holds the lock. Who has the lock knows that no other restore is running. So it is safe to
remove what a killed one left.

A qube is a directory of its name, with its images and the record. The record holds every setting of the
backup as data, for people and programs to read; no setting in it is acted upon here.
`broker/image_directory.py` makes such a directory appear as a whole, or not at all. So a record that is found
under a qube's own name proves that the qube was finished, and from which backup: everything was on the disk
before the name was.
"""

import fcntl
import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from qubes_restore_svc.broker.filesystem import (
    make_directory,
    make_file,
    open_directory,
    reporting,
    sync_directory,
    write_fully,
)
from qubes_restore_svc.broker.image_directory import (
    VOLUME_FILES,
    ImageDirectory,
    clear_partials,
    partial_name,
)
from qubes_restore_svc.broker.interfaces import Definition, HostView, NewQube, RestoredQube
from qubes_restore_svc.errors import HostFailed, ProtocolViolation, QubeExists, RestoreInProgress
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.local.documents import QubeRecord, RecordedVolume
from qubes_restore_svc.owners import interference
from qubes_restore_svc.wire.connection import parse_object
from qubes_restore_svc.wire.messages import QubeSettings
from qubes_restore_svc.wire.names import QUBE_NAME, VolumeName, strip_control
from qubes_restore_svc.wire.report import VolumeReport, remarks

RECORD = "qube.json"

#: What a record is called while it is written that takes the place of another.
_NEW_RECORD = f".{RECORD}.new"
#: Bytes of a record at the most: settings and the rest fit into 2 MiB each, and are indented here.
_MAX_RECORD = 32 << 20

_FILES = frozenset({RECORD, *VOLUME_FILES.values()})
_LOCK_ATTEMPTS = 16


class DirectoryHost:
    """A `Host` that creates qubes in a directory.

    The directory is created (mode 0700) by `lock` if only its last component is missing, and removed again
    at the end if nothing came to stand in it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._shown = strip_control(str(path))
        self._mutex = threading.RLock()
        self._directory: int | None = None
        self._qubes: list[DirectoryQube] = []
        self.cleared: tuple[str, ...] = ()  #: partial directories of a killed restore that `lock` removed
        self.kept: tuple[str, ...] = ()  #: those that it did not touch, or could not remove

    @contextmanager
    def lock(self) -> Iterator[tuple[str, ...]]:
        """The one-restore lock; at its end, qubes that were neither committed nor rolled back are.

        Brings remarks on what an interrupted restore left. Raises RestoreInProgress when somebody else
        holds it, HostFailed when the directory cannot be used.
        """
        directory, created = self._open_locked()
        with ExitStack() as stack:
            stack.callback(self._unlock, directory, created)
            with reporting(f"reading {self._shown}"):
                self.cleared, self.kept = clear_unfinished(directory)
            with self._mutex:
                self._directory = directory
            stack.callback(self._end_qubes)
            yield tuple(self._remarks())

    def existing_names(self) -> frozenset[str]:
        """The names of everything in the directory, as they are written; none if there is no directory.

        Two names that differ in case only are one on FAT and exFAT: `begin` asks the file system.
        """
        with self._mutex, reporting(f"reading {self._shown}"):
            try:
                return frozenset(os.listdir(self._target()))
            except FileNotFoundError:
                return frozenset()

    def view(self) -> HostView:
        """The names that are taken: a directory knows neither templates nor netvms."""
        return HostView(self.existing_names())

    def set_default_dispvm(self, qube: str, default_dispvm: str) -> None:
        """A directory keeps what the backup says; there is nothing to be set."""

    def restored_from(self, backup_id: str) -> Sequence[RestoredQube]:
        """The qubes whose records name this backup, and whose images are all there, of their full size.

        What another user made does not count. What the images hold is not read.
        """
        with self._mutex, reporting(f"reading {self._shown}"):
            names = sorted(name for name in self.existing_names() if re.fullmatch(QUBE_NAME, name))
            found = (self._restored(name, backup_id) for name in names)
            return tuple(qube for qube in found if qube is not None)

    def take_back(self, qube: str, backup_id: str, *, from_before: bool) -> bool:
        """Say in its record that it is not complete. What lies in a directory has no network."""
        with self._mutex, reporting(f"writing {RECORD}", qube=qube):
            inside = open_directory(qube, dir_fd=self._locked_directory())
            try:
                record = read_record(inside)
                if record is not None and record.backup_id == backup_id:
                    replace_record(inside, record.model_copy(update={"complete": False}))
            finally:
                close_read(inside)
        return False

    def _restored(self, name: str, backup_id: str) -> RestoredQube | None:
        try:
            inside = open_directory(name, dir_fd=self._locked_directory())
        except OSError:  # a file, or a directory of somebody else
            return None
        try:
            if os.fstat(inside).st_uid not in (0, os.geteuid()):
                return None  # in a directory like /tmp, another user can make such a directory
            record = read_record(inside)
            if record is None or (record.backup_id, record.name) != (backup_id, name):
                return None
            return record.restored() if _is_whole(record, inside) else None
        except OSError:
            return None
        finally:
            close_read(inside)

    def _locked_directory(self) -> int:
        if self._directory is None:
            raise HostFailed("the directory is not locked for this restore")
        return self._directory

    def free_space(self, pool: str | None = None) -> int | None:
        """Bytes that an ordinary user can still write, as far as the file system tells."""
        with self._mutex, reporting(f"asking for the free space of {self._shown}"):
            try:
                answer = os.statvfs(self._target())
            except FileNotFoundError:
                return None
        # Some network and FUSE file systems answer with zeros.
        return answer.f_bavail * answer.f_frsize if answer.f_blocks else None

    def begin(self, qube: NewQube) -> "DirectoryQube":
        """Start a qube, under the lock; raises QubeExists, NoSpace or HostFailed."""
        with self._mutex:
            if self._directory is None:
                raise HostFailed("the directory is not locked for this restore", qube=qube.name)
            check_name(qube.name)  # before the file system is asked for it
            if self._is_taken(qube.name):
                raise QubeExists(f"{self._shown} has something of that name", qube=qube.name)
            if not self._is_still(self._directory):
                raise HostFailed(f"{self._shown} was moved or replaced meanwhile", qube=qube.name)
            transaction = DirectoryQube(self._directory, qube)
            self._qubes.append(transaction)
            return transaction

    def _is_taken(self, name: str) -> bool:
        with reporting(f"looking for {name}"):
            try:
                os.stat(name, dir_fd=self._directory, follow_symlinks=False)
            except FileNotFoundError:
                return False
            return True

    def _remarks(self) -> Iterator[str]:
        for name in self.cleared:
            yield f"{name} was removed from {self._shown}: a restore that was interrupted had left it"
        for name in self.kept:
            yield f"{name} in {self._shown} looks like the rest of a restore, but cannot be removed safely"

    def _target(self) -> int | Path:
        return self._path if self._directory is None else self._directory

    def _open_locked(self) -> tuple[int, bool]:
        """A locked descriptor of the directory, and whether this call created it."""
        for _ in range(_LOCK_ATTEMPTS):
            found = self._open_existing()
            directory = self._create() if found is None else found
            if directory is None:
                continue
            created = found is None
            try:
                self._take_lock(directory)
                # Between opening and locking, the restore that had created it may have removed it.
                if self._is_still(directory):
                    self._check_writable(directory)
                    self._check_undisturbed()
                    return directory, created
            except RestoreInProgress:
                close_read(directory)  # it is in use, no matter who created it
                raise
            except BaseException:
                self._unlock(directory, created)
                raise
            close_read(directory)
        raise HostFailed(f"{self._shown} is created and removed again and again by somebody else")

    def _open_existing(self) -> int | None:
        with reporting(f"opening {self._shown}"):
            try:
                return os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                if self._path.is_symlink():
                    raise HostFailed(f"{self._shown} is a symbolic link to nothing") from None
                return None
            except NotADirectoryError:
                raise HostFailed(f"{self._shown} is not a directory") from None

    def _create(self) -> int | None:
        with reporting(f"creating {self._shown}"):
            try:
                directory = make_directory(self._path)
            except FileExistsError:
                return None
            except FileNotFoundError:
                raise HostFailed(f"the directory that is to hold {self._shown} does not exist") from None
            try:
                self._sync_parent()
            except BaseException:
                self._unlock(directory, created=True)
                raise
            return directory

    def _take_lock(self, directory: int) -> None:
        with reporting(f"locking {self._shown}"):
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RestoreInProgress(f"another restore writes to {self._shown}") from None

    def _sync_parent(self) -> None:
        # A parent that we may write to but not read cannot be opened, and so not be synced.
        with suppress(PermissionError):
            parent = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                sync_directory(parent)
            finally:
                close_read(parent)

    def _is_still(self, directory: int) -> bool:
        try:
            return os.path.samestat(os.fstat(directory), os.stat(self._path))
        except OSError:
            return False

    def _check_writable(self, directory: int) -> None:
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=directory):
            raise HostFailed(f"{self._shown} cannot be written to")

    def _check_undisturbed(self) -> None:
        with reporting(f"looking at who may write to {self._shown}"):
            why = interference(self._path)
        if why is not None:
            raise HostFailed(
                f"{strip_control(why)}, who could put other files in the place of those that are restored",
                advice="Restore to a directory of your own. As root, that is below /root; or restore as the"
                " user whose directory it is, without sudo.",
            )

    def _end_qubes(self) -> None:
        with self._mutex:
            qubes, self._qubes = self._qubes, []
            self._directory = None
            with ExitStack() as stack:
                for qube in qubes:
                    stack.callback(qube.rollback)

    def _unlock(self, directory: int, created: bool) -> None:
        if created and self._is_still(directory):
            with suppress(OSError):  # something stands in it: it stays
                os.rmdir(self._path)
        with suppress(OSError):
            # Closing alone would not do while a child is between fork and exec: it has the descriptor too.
            fcntl.flock(directory, fcntl.LOCK_UN)
        close_read(directory)


class DirectoryQube(ImageDirectory):
    """A `QubeTransaction` in a directory."""

    def __init__(self, directory: int, qube: NewQube) -> None:
        """Create the partial directory in `directory`, which stays open until this has ended.

        Raises HostFailed, also when something that is not ours has the partial name.
        """
        check_name(qube.name)
        self._qube = qube
        partial = partial_name(qube.name)
        with reporting(f"creating {partial}", qube=qube.name):
            try:
                super().__init__(directory, qube.name, qube.name, _FILES)
            except FileExistsError:
                reason = f"{partial} is in the way, and not a restore's leftover"
                raise HostFailed(reason, qube=qube.name) from None

    def change_template(self, template: str) -> None:
        """A directory has no templates, so this is never called."""
        raise self._failure("a directory has no templates")

    def commit(
        self,
        settings: QubeSettings,
        definition: Definition | None = None,
        volumes: Sequence[VolumeReport] = (),
    ) -> Sequence[str]:
        """Write the record and give the qube its name, all of it on disk when this returns; no remarks.

        Raises QubeExists if the name has been taken since `begin`, NoSpace, or HostFailed (also when a
        volume is not finished). After any of these the qube can only be rolled back.
        """
        name = self._qube.name
        with self._mutex:
            self._check_open()
            if settings.key != self._qube.source.key:
                raise self._failure("the settings are those of another qube")
            with reporting(f"writing {RECORD}", qube=name):
                content = record(self._qube, settings, self._sizes(), volumes)
                write_record(self._inside, RECORD, content)
            with reporting("giving the complete qube its name", qube=name):
                if self._publish([name]) is None:
                    raise QubeExists("something of that name has appeared in the directory", qube=name)
        return ()


def check_name(qube_name: str) -> None:
    """Raises HostFailed for what no qube can be called.

    Names were checked long before they come here. The check stands here again because here it is that a
    `/` or a leading dot would do harm.
    """
    if not re.fullmatch(QUBE_NAME, qube_name):
        shown = strip_control(qube_name[:64])
        raise HostFailed("a directory for a qube of that name cannot be created", qube=shown)


def clear_unfinished(directory: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """See `clear_partials`, for the qubes of restores to this directory that were killed."""
    return clear_partials(directory, QUBE_NAME, _FILES)


def record(
    qube: NewQube,
    settings: QubeSettings,
    sizes: Mapping[VolumeName, int],
    volumes: Sequence[VolumeReport] = (),
) -> QubeRecord:
    """What `qube.json` says; `sizes` are those of the volumes that were written, in bytes.

    `volumes` has their digests.
    """
    source = qube.source
    warnings = list(qube.warnings)
    if settings.error is not None:
        warnings.append(str(settings.error.to_error()))
    digests = {volume.name: (volume.fsverity, volume.sha256) for volume in volumes}
    recorded = []
    for name, size in sizes.items():
        fsverity, sha256 = digests.get(name, (None, None))
        recorded.append(
            RecordedVolume.model_validate(
                {
                    "name": name,
                    "size": size,
                    "file": VOLUME_FILES[name],
                    "fsverity": fsverity,
                    "sha256": sha256,
                }
            )
        )
    fields = dict(source) | {
        "backup_id": qube.backup_id,
        "name": qube.name,
        "name_in_backup": source.name,
        "tags": tuple(sorted(source.tags)),
        "firewall": settings.firewall,
        "notes": settings.notes,
        "appmenus": settings.appmenus,
        "volumes": tuple(recorded),
        "warnings": remarks(warnings),
    }
    return QubeRecord.model_validate(fields)


def write_record(inside: int, file_name: str, content: QubeRecord) -> None:
    """Write it to a new file in the open directory `inside`, and to the disk. Raises OSError."""
    file = make_file(file_name, dir_fd=inside)
    try:
        write_fully(file, memoryview(content.text().encode()), 0)
        os.fsync(file)
    finally:
        os.close(file)


def replace_record(inside: int, content: QubeRecord) -> None:
    """Put this one in the place of the record in `inside`, in one step. Raises OSError."""
    with suppress(FileNotFoundError):
        os.unlink(_NEW_RECORD, dir_fd=inside)
    write_record(inside, _NEW_RECORD, content)
    os.rename(_NEW_RECORD, RECORD, src_dir_fd=inside, dst_dir_fd=inside)
    sync_directory(inside)


def read_record(inside: int) -> QubeRecord | None:
    """The record in the open directory `inside`; None if there is none that this program can read.

    Raises OSError if the system does not give it.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(RECORD, flags, dir_fd=inside)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        untrusted_content = file.read(_MAX_RECORD + 1)
    try:
        return QubeRecord.model_validate(parse_object(untrusted_content))
    except (ProtocolViolation, ValidationError):
        return None


def _is_whole(record: QubeRecord, inside: int) -> bool:
    """Is each image that the record tells of there, of its size? Raises OSError."""
    for volume in record.volumes:
        try:
            status = os.stat(volume.file, dir_fd=inside, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(status.st_mode) or status.st_size != volume.size:
            return False
    return True
