"""One qube on its way into a directory: a hidden directory, then sparse files in it, then its real name.

Strategy: all is written under the partial name and forced to disk; the last step, one rename, makes it a
qube. It has one state and one lock, as its image files have: see `image_file`.
"""

import os
import threading
from collections.abc import Sequence

from qubes_restore_svc.broker.filesystem import (
    NAME_TAKEN,
    make_directory,
    make_file,
    rename_new,
    reporting,
    sync_directory,
    write_fully,
)
from qubes_restore_svc.broker.host import Definition, NewQube
from qubes_restore_svc.broker.image_file import ImageFile, State
from qubes_restore_svc.errors import HostFailed, QubeExists
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.local.directory_layout import (
    RECORD,
    leads_to,
    partial_name,
    record,
    remove_partial,
)
from qubes_restore_svc.wire.messages import QubeSettings
from qubes_restore_svc.wire.names import VolumeName


class DirectoryQube:
    """A `QubeTransaction` in a directory."""

    def __init__(self, directory: int, qube: NewQube) -> None:
        """Create the partial directory in `directory`, which stays open until this has ended.

        Raises HostFailed, also when something that is not ours has the partial name.
        """
        self._directory = directory
        self._qube = qube
        self._partial = partial_name(qube.name)
        self._sinks: dict[VolumeName, ImageFile] = {}
        self._mutex = threading.Lock()
        self._state = State.OPEN
        with reporting(f"creating {self._partial}", qube=qube.name):
            try:
                self._inside = make_directory(self._partial, dir_fd=directory)
            except FileExistsError:
                raise self._failure(f"{self._partial} is in the way, and not a restore's leftover") from None

    def create_volume(self, volume: VolumeName, image_size: int) -> ImageFile:
        """A sink for `volume`; raises HostFailed, also when it has one or cannot be as large here."""
        with self._mutex:
            self._check_open()
            sink = ImageFile(self._inside, self._qube.name, volume, image_size)
            self._sinks[volume] = sink
            return sink

    def change_template(self, template: str) -> None:
        """A directory has no templates, so this is never called."""
        raise self._failure("a directory has no templates")

    def commit(self, settings: QubeSettings, definition: Definition | None = None) -> Sequence[str]:
        """Write the record and give the qube its name, all of it on disk when this returns; no remarks.

        Raises QubeExists if the name has been taken since `begin`, NoSpace, or HostFailed (also when a
        volume is not finished). After any of these the qube can only be rolled back.
        """
        with self._mutex:
            self._check_open()
            if settings.key != self._qube.source.key:
                raise self._failure("the settings are those of another qube")
            with reporting(f"writing {RECORD}", qube=self._qube.name):
                self._write_record(record(self._qube, settings, self._sizes()))
                sync_directory(self._inside)
            with reporting("giving the complete qube its name", qube=self._qube.name):
                self._publish()
            self._leave(State.COMPLETE)
        return ()

    def rollback(self) -> None:
        """Remove all that was created; raises HostFailed if it cannot, or if others put something there."""
        with self._mutex:
            if self._state is not State.OPEN:
                return
            for sink in self._sinks.values():
                sink.abandon()
            for sink in self._sinks.values():
                sink.wait_ended()
            try:
                with reporting(f"removing {self._partial}", qube=self._qube.name):
                    remove_partial(self._partial, self._inside, dir_fd=self._directory)
            finally:
                self._leave(State.GONE)

    def _check_open(self) -> None:
        if self._state is not State.OPEN:
            raise self._failure("this qube has been committed or rolled back")

    def _sizes(self) -> dict[VolumeName, int]:
        sizes: dict[VolumeName, int] = {}
        for volume, sink in self._sinks.items():
            if sink.size is None:
                raise HostFailed("the volume is not complete", qube=self._qube.name, volume=volume)
            sizes[volume] = sink.size
        return sizes

    def _write_record(self, content: bytes) -> None:
        file = make_file(RECORD, dir_fd=self._inside)
        try:
            write_fully(file, memoryview(content), 0)
            os.fsync(file)
        finally:
            os.close(file)

    def _publish(self) -> None:
        name = self._qube.name
        try:
            rename_new(self._partial, name, dir_fd=self._directory)
        except OSError as error:
            if error.errno not in NAME_TAKEN:
                raise
            raise QubeExists("something of that name has appeared in the directory", qube=name) from error
        try:
            if not leads_to(name, self._inside, dir_fd=self._directory):
                raise self._failure(
                    f"what is called {name} now is not what was restored: somebody else changes the directory"
                )
            sync_directory(self._directory)
        except OSError:
            # Not known to be there, or to last, so not a success: back to where a rollback finds it.
            os.rename(name, self._partial, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            raise

    def _leave(self, state: State) -> None:
        self._state = state
        close_read(self._inside)

    def _failure(self, reason: str) -> HostFailed:
        return HostFailed(reason, qube=self._qube.name)
