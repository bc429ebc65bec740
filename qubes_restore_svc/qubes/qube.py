"""One qube on its way into a Qubes system.

Strategy: the qube exists from the start, for others may be based on it, but it carries two tags until it is
complete: the system's own, with which it cannot be started, and one of ours, by which whoever clears up knows
it. It has no network meanwhile. Taking the tags away is the last step, and what makes it a finished qube.
"""

import enum
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from qubes_restore_svc.broker.filesystem import Room
from qubes_restore_svc.broker.host import Definition, NewQube, restored_tag
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.qubes.faults import QubeInUse
from qubes_restore_svc.qubes.settings import apply_settings
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.qubes.volume import ROOM_STEP, VolumeImport
from qubes_restore_svc.wire.messages import QubeSettings
from qubes_restore_svc.wire.names import VolumeName

#: Qubes' own: a qube that carries it cannot be started.
IN_PROGRESS_TAG = "backup-restore-in-progress"
#: Ours, beside the other one: an unfinished qube of this program, which a later restore may remove.
UNFINISHED_TAG = "restore-svc-unfinished"

#: Seconds that an import which was cut short may take to end before its qube is removed nevertheless.
IMPORT_END_TIMEOUT_S = 60.0

#: What other qubes of the same restore may need to see before this one is finished.
_EARLY_PROPERTIES = ("template_for_dispvms", "provides_network")


class _State(enum.Enum):
    OPEN = "open"
    COMPLETE = "complete"
    CONDEMNED = "condemned"  # to be removed, and still there
    GONE = "gone"


class QubesQube:
    """A `QubeTransaction` on a Qubes system.

    `something_freed` is called when other qubes may have become removable: this one is gone, or has another
    template.
    """

    def __init__(
        self,
        system: QubesSystem,
        qube: NewQube,
        definition: Definition,
        *,
        pool: str | None,
        something_freed: Callable[[], None],
    ) -> None:
        """Create the qube. Raises QubeExists, NoSpace or HostFailed; then nothing is left."""
        self._system = system
        self._qube = qube
        self._something_freed = something_freed
        self._mutex = threading.RLock()
        self._sinks: dict[VolumeName, VolumeImport] = {}
        self._state = _State.OPEN
        system.create(
            qube.name,
            qube.source.klass,
            definition.label,
            template=definition.template,
            pool=pool,
            tags=(IN_PROGRESS_TAG, UNFINISHED_TAG),
        )
        try:
            system.set_property(qube.name, "netvm", "")
        except HostFailed as error:
            self._undo_creation(error)
            raise
        for key in _EARLY_PROPERTIES:
            if key in definition.properties:
                with suppress(HostFailed):  # it is set once more at the end, which tells
                    system.set_property(qube.name, key, definition.properties[key])

    @property
    def name(self) -> str:
        """The qube's name here."""
        return self._qube.name

    @property
    def is_gone(self) -> bool:
        """Has it been removed?"""
        return self._state is _State.GONE

    def create_volume(self, volume: VolumeName, image_size: int) -> VolumeImport:
        """A sink for a volume; raises HostFailed if the qube keeps none of that name, or has this one."""
        with self._mutex:
            self._check_open()
            if volume in self._sinks:
                raise self._failure("this volume has been written already", volume)
            if volume not in self._system.saved_volumes(self._qube.name):
                raise self._failure(f"a qube of class {self._qube.source.klass} keeps none here", volume)
            name = self._qube.name
            sink = VolumeImport(
                lambda stream, size: self._system.import_volume(name, volume, stream, size),
                name,
                volume,
                image_size,
                Room(
                    lambda: self._system.volume_room(name, volume),
                    ROOM_STEP,
                    qube=name,
                    volume=volume,
                    where="in the storage pool",
                ),
            )
            self._sinks[volume] = sink
            return sink

    def change_template(self, template: str) -> None:
        """Base the qube on another template, which is there. Raises HostFailed."""
        with self._mutex:
            self._check_open()
            self._system.set_property(self._qube.name, "template", template)
        self._something_freed()

    def commit(self, settings: QubeSettings, definition: Definition | None) -> Sequence[str]:
        """Apply the settings, then let the qube be started; brings remarks on what could not be set.

        Raises HostFailed if a volume is not finished or the qube cannot be released.
        """
        with self._mutex:
            self._check_open()
            if settings.key != self._qube.source.key or definition is None:
                raise self._failure("the settings are not those of this qube")
            for volume, sink in self._sinks.items():
                if sink.size is None:
                    raise self._failure("the volume is not complete", volume)
            name = self._qube.name
            remarks = list(apply_settings(self._system, name, settings, definition))
            try:
                self._system.add_tag(name, restored_tag(self._qube.backup_id))
            except HostFailed as error:
                remarks.append(error.reason)
            self._system.discard_tag(name, IN_PROGRESS_TAG)
            self._state = _State.COMPLETE
            try:
                self._system.discard_tag(name, UNFINISHED_TAG)
            except HostFailed as error:  # alone it says nothing, and the next restore removes it
                remarks.append(error.reason)
            return tuple(remarks)

    def rollback(self) -> None:
        """Remove the qube with all that has been written. Does nothing after `commit` or when it is gone.

        As long as others of this restore refer to it, it stays condemned, to be removed with them. Raises
        HostFailed if it cannot be removed.
        """
        for sink in tuple(self._sinks.values()):  # before the mutex: nobody has to wait for a writer
            sink.abandon()
        with self._mutex:
            if self._state in (_State.COMPLETE, _State.GONE):
                return
            self._state = _State.CONDEMNED
            hanging = [
                volume for volume, sink in self._sinks.items() if not sink.wait_ended(IMPORT_END_TIMEOUT_S)
            ]
            with suppress(QubeInUse):
                self._remove()
        if self.is_gone:
            self._something_freed()
            if hanging:
                what = " and ".join(hanging)
                raise self._failure(
                    f"the import of {what} does not end; the storage pool may keep what it wrote"
                )

    def remove_condemned(self) -> None:
        """Remove it if it was rolled back and is still there. Raises HostFailed if it cannot be removed."""
        with self._mutex:
            if self._state is _State.CONDEMNED:
                self._remove()

    def _remove(self) -> None:
        try:
            self._system.remove(self._qube.name)
        except HostFailed as error:
            error.advice = f"It cannot be started. Remove it with `qvm-remove {self._qube.name}`."
            raise
        self._state = _State.GONE

    def _undo_creation(self, error: HostFailed) -> None:
        self._state = _State.CONDEMNED
        try:
            self._remove()
        except HostFailed as left:
            error.reason += f"; what was created is still there, because {left.reason}"
            error.advice = left.advice

    def _check_open(self) -> None:
        if self._state is not _State.OPEN:
            raise self._failure("this qube has been committed or rolled back")

    def _failure(self, reason: str, volume: VolumeName | None = None) -> HostFailed:
        return HostFailed(reason, qube=self._qube.name, volume=volume)
