"""The host that compares: the qubes of a Qubes system against those of the backup.

Strategy: dom0 never opens a volume of the qube itself, because LVM removes no volume that is open: the person
could not remove his qube, nor revert its volume. qubesd clones the volumes, in the storage pools in which
they lie, into a qube that is made for this. That qube carries the tags of an unfinished one. So nobody can
start it, and what a killed comparison leaves is cleared up like what a killed restore leaves. dom0 reads the
clone and compares. It tells the worker nothing.

A clone is what the volume was when its qube was last shut down, also if the qube runs.
"""

import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from qubes_restore_svc.broker.comparison import ComparedVolume, NotHere, looking
from qubes_restore_svc.broker.interfaces import Definition, HostView, NewQube, QubeTransaction, VolumeSink
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.qubes.host import QubesHost
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.qubes.tags import UNFINISHED, WORKER_NAME
from qubes_restore_svc.wire.messages import QubeSettings
from qubes_restore_svc.wire.names import VolumeName, backup_time
from qubes_restore_svc.wire.report import VolumeReport

#: What the qube with the clones is called: this, and eight digits.
CLONE_PREFIX = "restore-compare-"

_RUNS = "it runs: compared is what it was when it was last shut down"


class ComparedSystem(QubesHost):
    """A `Host` for a comparison with the qubes of a system. Its lock is that of a restore."""

    def view(self) -> HostView:
        """The qubes that can be compared. Raises HostFailed."""
        view = super().view()
        assert view.qubes_system is not None
        qubes = view.qubes_system.qubes.values()
        names = (
            qube.name for qube in qubes if qube.klass != "AdminVM" and not WORKER_NAME.fullmatch(qube.name)
        )
        return replace(view, names=frozenset(names), remarks=())

    def free_space(self, pool: str | None = None) -> int | None:
        """Clones take none, in the pools that are read here."""
        return None

    def _begun(self, qube: NewQube) -> QubeTransaction:
        return ComparedQube(self._system, qube)


class ComparedQube:
    """A `QubeTransaction` of which nothing comes but what was found."""

    def __init__(self, system: QubesSystem, qube: NewQube) -> None:
        """Make the qube that gets the clones. Raises HostFailed; then nothing is left."""
        self._system = system
        self._qube = qube
        self._sinks: dict[VolumeName, VolumeSink] = {}
        self._pools = system.saved_volume_pools(qube.name)
        self._runs = system.is_running(qube.name)
        self._clone = f"{CLONE_PREFIX}{secrets.randbelow(10**8):08}"
        try:
            system.create(
                self._clone,
                "StandaloneVM",
                "gray",
                pools=self._pools,
                tags=UNFINISHED,
                properties={"netvm": ""},
            )
        except HostFailed as error:
            error.reason = f"making the qube {self._clone} for its clones: {error.reason}"
            raise

    def create_volume(self, volume: VolumeName, image_size: int) -> VolumeSink:
        """A clone of the volume that is here; never raises, see `VolumeSink.finish`."""
        try:
            self._sinks[volume] = self._cloned(volume)
        except HostFailed as error:
            self._sinks[volume] = NotHere(error)
        return self._sinks[volume]

    def change_template(self, template: str) -> None:
        """Nothing is set up."""

    def commit(
        self,
        settings: QubeSettings,
        definition: Definition | None,
        volumes: Sequence[VolumeReport] = (),
    ) -> Sequence[str]:
        """Remove the clones. Brings remarks on what cannot be said of a volume alone."""
        remarks = [_RUNS] if self._runs else []
        remarks += [
            f"its volume {volume} is here, and not in the backup"
            for volume in sorted(self._pools)
            if volume not in self._sinks
        ]
        with suppress(HostFailed):  # it is tried once more before the lock is let go of, and then told
            self.rollback()
        return remarks

    def rollback(self) -> None:
        """Remove the clones. Raises HostFailed if they cannot be removed."""
        for sink in self._sinks.values():
            if isinstance(sink, ComparedVolume):
                sink.close()  # what is open cannot be removed
        self._system.remove(self._clone)

    def _cloned(self, volume: VolumeName) -> VolumeSink:
        name = self._qube.name
        if volume not in self._pools:
            return NotHere()
        changed = self._system.volume_changed(name, volume)
        self._system.clone_volume(self._clone, volume, name)
        path = self._system.volume_file(self._clone, volume)
        with looking(f"opening {path}", qube=name, volume=volume):
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        backed_up = backup_time(self._qube.backup_id)
        newer = changed is not None and backed_up is not None and changed > backed_up
        return ComparedVolume(file, f"the clone of {volume}", name, volume, newer=newer)
