"""The qubes of a run: how far each has come, and what it needs of the others.

Strategy: one small object a qube with a named stage, and a collection that answers questions about them and
does nothing. A qube may need another one of the same restore, its template or netvm, wherever in the archive
that stands; it is ready to be committed when it is settled and what it needs is finished. No qube has to wait
for its default_dispvm (which may be the qube itself): it is set when both are finished.
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, replace

from qubes_restore_svc.broker.interfaces import Definition, QubeTransaction
from qubes_restore_svc.broker.plan import Planned
from qubes_restore_svc.broker.references import SetUp
from qubes_restore_svc.errors import RestoreError
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.connection import parse_object
from qubes_restore_svc.wire.models import ErrorInfo, validated
from qubes_restore_svc.wire.names import VolumeName
from qubes_restore_svc.wire.report import QubeReport, Report, VolumeReport
from qubes_restore_svc.wire.restore_call import PlanQube

#: Bytes of settings that may wait until templates and netvms are finished: 4096 qubes have 16 KiB each.
MAX_WAITING_SETTINGS = 64 << 20


class QubeStage(enum.Enum):
    """How far a qube has come."""

    WAITING = "waiting"  # nothing of it has come
    OPEN = "open"  # its transaction has begun
    SETTLED = "settled"  # all of it is here; it waits for what it needs
    FINISHED = "finished"  # committed, verified or failed: its report says which


@dataclass(slots=True, eq=False)
class QubeRun:
    """One qube of a run. `definition` is the planned one, with its references as they have turned out."""

    planned: PlanQube
    report: QubeReport
    source: m.ManifestQube
    set_up: SetUp | None  #: None: it is only verified, or the host has no system
    definition: Definition | None
    stage: QubeStage = QubeStage.WAITING
    transaction: QubeTransaction | None = None
    settings: bytes = b""  #: the message as JSON, while it waits for what it needs

    @property
    def key(self) -> str:
        """What the archive calls it."""
        return self.planned.key

    @property
    def name(self) -> str:
        """What it is called here."""
        return self.planned.new_name

    @property
    def template_key(self) -> str | None:
        """The key of its template, if that is a qube of the same restore."""
        return None if self.set_up is None else self.set_up.template_key

    @property
    def netvm_key(self) -> str | None:
        """The same of its netvm."""
        return None if self.set_up is None else self.set_up.netvm_key

    @property
    def default_dispvm_key(self) -> str | None:
        """The same of its default_dispvm."""
        return None if self.set_up is None else self.set_up.default_dispvm_key

    @property
    def finished(self) -> bool:
        """Is there nothing more to be done with it?"""
        return self.stage is QubeStage.FINISHED

    def settle(self, settings: m.QubeSettings) -> None:
        """All of it is here: keep its settings, in their smallest form, until `take_settings`."""
        self.settings = settings.model_dump_json(exclude_defaults=True).encode()
        self.stage = QubeStage.SETTLED

    def take_settings(self) -> m.QubeSettings:
        """The settings that were kept, which are kept no longer."""
        kept, self.settings = self.settings, b""
        return validated(m.QubeSettings, parse_object(kept))

    def finish(self) -> None:
        """There is nothing more to be done with it, and nothing to be kept but its report."""
        self.stage, self.settings = QubeStage.FINISHED, b""

    def blame(self, error: RestoreError) -> None:
        """Take this as the reason of its failure, unless there was one before, which led to this one."""
        if self.report.error is None:
            self.report.error = ErrorInfo.of(error).without_place()

    def volume(self, name: VolumeName) -> VolumeReport:
        """The report of one of its volumes; a new one if nothing promised it."""
        for volume in self.report.volumes:
            if volume.name == name:
                return volume
        self.report.volumes += (VolumeReport(name=name, outcome="not reached"),)
        return self.report.volumes[-1]


class QubeRuns:
    """All qubes that a plan takes. Their results go into their reports, in `report`."""

    def __init__(self, planned: Planned, report: Report) -> None:
        self._by_key: dict[str, QubeRun] = {}
        self._by_dispvm: dict[str | None, list[QubeRun]] = {}
        for qube, its_report in zip(planned.plan.qubes, report.qubes, strict=False):
            if qube.decision == "take":
                set_up = planned.set_ups.get(qube.key)
                definition = None if set_up is None else set_up.definition
                source = planned.sources[qube.key]
                run = QubeRun(qube, its_report, source, set_up, definition)
                self._by_key[qube.key] = run
                self._by_dispvm.setdefault(run.default_dispvm_key, []).append(run)

    def __iter__(self) -> Iterator[QubeRun]:
        return iter(self._by_key.values())

    def __getitem__(self, key: str) -> QubeRun:
        return self._by_key[key]

    def get(self, key: str | None) -> QubeRun | None:
        """The qube of this key, or None if the run has none."""
        return self._by_key.get(key or "")

    @property
    def keys(self) -> tuple[str, ...]:
        """Their keys, in the order of the backup."""
        return tuple(self._by_key)

    @property
    def waiting_settings(self) -> int:
        """Bytes of settings that wait."""
        return sum(len(qube.settings) for qube in self)

    def unfinished_template_of(self, qube: QubeRun) -> QubeRun | None:
        """The template of `qube`, if this run is still to bring it."""
        template = self.get(qube.template_key)
        return None if template is None or template.finished else template

    def dependents_of(self, template: QubeRun) -> list[QubeRun]:
        """The unfinished qubes that are to have `template` as theirs."""
        return [qube for qube in self if qube.template_key == template.key and not qube.finished]

    def next_ready(self) -> QubeRun | None:
        """A settled qube; every qube that it needs is finished."""
        return next((qube for qube in self if self.is_ready(qube)), None)

    def is_ready(self, qube: QubeRun) -> bool:
        """Is it settled, and all that it needs finished?"""
        needed = (self.get(qube.template_key), self.get(qube.netvm_key))
        return qube.stage is QubeStage.SETTLED and all(other is None or other.finished for other in needed)

    def resolve_references(self, qube: QubeRun) -> Iterator[str]:
        """Adapt the definition of a ready qube to the results of the others; yields warnings."""
        if qube.definition is None:
            return
        netvm = self.get(qube.netvm_key)
        if netvm is not None and not netvm.report.succeeded:
            qube.definition = replace(qube.definition, netvm="")
            yield f"it has no netvm now: {netvm.name} could not be restored"
        dispvm = self.get(qube.default_dispvm_key)
        if dispvm is not None and not dispvm.report.succeeded:
            qube.definition = replace(qube.definition, default_dispvm="")
            if dispvm.finished and dispvm is not qube:
                yield without_dispvm(dispvm)

    def waiting_for_dispvm(self, dispvm: QubeRun) -> list[QubeRun]:
        """The restored qubes that are to have `dispvm`, finished just now, as their default_dispvm."""
        return [qube for qube in self._by_dispvm.get(dispvm.key, ()) if qube.report.succeeded]


def without_dispvm(dispvm: QubeRun) -> str:
    """The warning for a qube whose default_dispvm has failed."""
    return f"it has no default disposable template now: {dispvm.name} could not be restored"
