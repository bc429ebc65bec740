"""One qube on its way into a Qubes system, and how it gets its settings.

Strategy: the qube exists from the start, because others may be based on it. But it carries two tags until it
is complete: the system's own, with which it cannot be started, and one of ours, by which the next restore or
the guard knows it. It has no network meanwhile. The last step takes the tags away, and with that the qube is
finished.

Settings are applied one after the other, each with its own outcome. A setting that fails becomes a remark,
because a qube without one of its features is better than no qube. The network is the exception: it comes
last, and only if the firewall has been set. So a setting that fails never gives a qube more network than it
should have.
"""

import enum
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from qubes_restore_svc.broker.filesystem import Room
from qubes_restore_svc.broker.interfaces import Definition, NewQube
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.qubes.proof import FEATURE, Proof
from qubes_restore_svc.qubes.system import QubeInUse, QubesSystem
from qubes_restore_svc.qubes.tags import UNFINISHED, set_finished
from qubes_restore_svc.qubes.volume import ROOM_STEP, VolumeImport
from qubes_restore_svc.wire.messages import FirewallRule, QubeSettings
from qubes_restore_svc.wire.names import VolumeName
from qubes_restore_svc.wire.report import VolumeReport

#: Seconds that an import which was cut short may take to end before its qube is removed nevertheless.
IMPORT_END_TIMEOUT_S = 60.0

#: The properties that other qubes of the same restore may need before this qube is finished.
_EARLY_PROPERTIES = ("template_for_dispvms", "provides_network")


#: Most remarks on one qube; past that, only their number is told.
MAX_REMARKS = 40

#: The feature that holds the qube's menu entries, separated by spaces.
MENU_FEATURE = "menu-items"

#: Lets nothing through. qubesd takes no empty list of rules; what no rule matches is dropped.
DROP_ALL = ("action=drop",)

#: The parts of a rule as qubesd reads them; the comment, which may hold spaces, has to be the last.
_RULE_KEYS = (
    "action", "proto", "dsthost", "dst4", "dst6", "dstports", "icmptype", "specialtarget", "expire",
    "comment",
)  # fmt: skip


class _State(enum.Enum):
    OPEN = "open"
    COMPLETE = "complete"
    CONDEMNED = "condemned"  # to be removed, and still there
    GONE = "gone"


class QubesQube:
    """A `QubeTransaction` on a Qubes system.

    `client` is the domain that it is restored for. `something_freed` is called when other qubes may have
    become removable: this one is gone, or has another template.
    """

    def __init__(
        self,
        system: QubesSystem,
        qube: NewQube,
        definition: Definition,
        *,
        pool: str | None,
        client: str = "dom0",
        something_freed: Callable[[], None],
    ) -> None:
        """Create the qube. Raises QubeExists, NoSpace or HostFailed; then nothing is left."""
        self._system = system
        self._qube = qube
        self._client = client
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
            tags=UNFINISHED,
            properties={"netvm": ""},
        )
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
        """A sink for a volume; raises HostFailed if the qube has no such volume, or has this one already."""
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

    def commit(
        self,
        settings: QubeSettings,
        definition: Definition | None,
        volumes: Sequence[VolumeReport] = (),
    ) -> Sequence[str]:
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
            has_firewall = settings.firewall is not None
            proof = Proof.of(self._qube, self._client, volumes, firewall=has_firewall)
            try:
                self._system.set_feature(name, FEATURE, proof.text)
            except HostFailed as error:  # only a restore that is to go on would miss it
                remarks.append(error.reason)
            remarks += set_finished(self._system, name, self._qube.backup_id)
            self._state = _State.COMPLETE
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

    def _check_open(self) -> None:
        if self._state is not _State.OPEN:
            raise self._failure("this qube has been committed or rolled back")

    def _failure(self, reason: str, volume: VolumeName | None = None) -> HostFailed:
        return HostFailed(reason, qube=self._qube.name, volume=volume)


# --- Settings ------------------------------------------------------------------------------------


def apply_settings(
    system: QubesSystem, name: str, settings: QubeSettings, definition: Definition
) -> tuple[str, ...]:
    """Give the qube `name`, which has no netvm, its settings; brings clauses on what could not be set."""
    attempt = _Attempts()
    for key, value in definition.properties.items():
        attempt(system.set_property, name, key, value)
    for key, value in definition.features.items():
        attempt(system.set_feature, name, key, value)
    for tag in definition.tags:
        attempt(system.add_tag, name, tag)
    for device in definition.devices:
        attempt(system.assign_device, name, device)
    if settings.notes:
        attempt(system.set_notes, name, settings.notes)
    if settings.appmenus:
        # The feature is a list separated by spaces, so a name that has one cannot stand in it.
        fitting = [entry for entry in settings.appmenus if " " not in entry]
        if lost := len(settings.appmenus) - len(fitting):
            attempt.remarks.append(f"{lost} menu entries have names that no menu can hold")
        attempt(system.set_feature, name, MENU_FEATURE, " ".join(fitting))
    dispvm = definition.default_dispvm
    if dispvm is not None and not attempt(system.set_default_dispvm, name, dispvm) and dispvm:
        attempt(system.set_default_dispvm, name, "")
    is_guarded = _set_firewall(system, name, settings.firewall, attempt)
    if definition.netvm != "" and not is_guarded:
        attempt.remarks.append("it has no netvm, because its firewall could not be set")
    elif definition.netvm != "" and not attempt(system.set_property, name, "netvm", definition.netvm):
        attempt.remarks.append("it has no netvm")
    # The last ones are on the firewall and the netvm, which matter most.
    remarks, more = attempt.remarks, len(attempt.remarks) - MAX_REMARKS
    if more > 0:
        remarks = [*remarks[: MAX_REMARKS - 10], f"{more} more settings failed", *remarks[-10:]]
    return tuple(remarks)


def rule_text(rule: FirewallRule) -> str:
    """The rule as qubesd reads it. Whether it makes sense is for qubesd to say."""
    values = rule.model_dump(exclude_none=True)
    return " ".join(f"{key}={values[key]}" for key in _RULE_KEYS if key in values)


class _Attempts:
    """Does what may fail, and keeps clauses on what did."""

    def __init__(self) -> None:
        self.remarks: list[str] = []

    def __call__(self, action: Callable[..., None], *arguments: object) -> bool:
        try:
            action(*arguments)
        except HostFailed as error:
            self.remarks.append(error.reason)
            return False
        return True


def _set_firewall(
    system: QubesSystem, name: str, rules: Sequence[FirewallRule] | None, attempt: _Attempts
) -> bool:
    """Whether the qube may be connected. No rules at all in the backup: the default, accept."""
    if rules is None:
        return True
    try:
        system.set_firewall(name, [rule_text(rule) for rule in rules] or DROP_ALL)
    except HostFailed as error:
        if not attempt(system.set_firewall, name, DROP_ALL):
            return False
        attempt.remarks.append(
            f"its firewall lets nothing through now, because its rules were not accepted ({error.reason});"
            " set them with qvm-firewall"
        )
    return True
