"""Calls that play a script in place of dom0's broker, and plans and reports for them.

Strategy: `Script` makes the calls that the adapter asks for, and notes what each is asked. A test says what
is answered: plans are made from the choice as the broker would, in a few lines; a restore goes step by step,
and waits at a step until the test lets it go on, or cancels.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from qubes_restore_svc.client.sync import BlockingRestoreCall
from qubes_restore_svc.errors import Cancelled, RestoreError, UsageError
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.messages import RefusedQube, VolumeInfo
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.names import VmClass
from qubes_restore_svc.wire.report import Observer, QubeReport, Report, RestoreProgress
from tests.support.reports import NOON

#: Generous: only a test that fails waits so long.
LONG_S = 60.0
MIB = 1 << 20

Step = Callable[["ScriptedCall"], None]


def qube(
    name: str, klass: VmClass = "AppVM", template: str | None = "debian-12", size: int = 100 * MIB
) -> c.PlanQube:
    """A qube of the backup that fits."""
    home = klass == "AdminVM"
    return c.PlanQube(
        key=f"vm-{name.replace('.', '-')}",
        name=name,
        klass=klass,
        label="black" if home else "red",
        template=None if home or klass == "TemplateVM" else template,
        netvm=None,
        home_user="user" if home else None,
        backup_size=size,
        volumes=(VolumeInfo(name="home") if home else VolumeInfo(name="private", size=size),),
        decision="take",
        new_name=name,
        new_template=None if home or klass == "TemplateVM" else template,
    )


def refused(planned: c.PlanQube, problem: c.Problem, error: RestoreError) -> c.PlanQube:
    """The same, and it does not fit."""
    return planned.model_copy(
        update={"decision": "refuse", "problem": problem, "error": ErrorInfo.of(error), "new_template": None}
    )


def result(name: str, error: RestoreError | None = None, mode: str = "restore") -> QubeReport:
    """What came of a qube."""
    return QubeReport.model_validate(
        {
            "name": name,
            "klass": "AppVM",
            "outcome": "failed" if error else "verified" if mode == "verify" else "restored",
            "error": None if error is None else ErrorInfo.of(error),
        }
    )


@dataclass
class Script:
    """What dom0 answers. `opens` and `chosen` note what it was asked."""

    qubes: Sequence[c.PlanQube]
    steps: Sequence[Step] = ()
    refusal: RestoreError | None = None  #: instead of the first plan
    archive_size: int | None = None
    unlisted: tuple[RefusedQube, ...] = ()
    offers: c.Offers = field(default_factory=c.Offers)
    limit: int | None = None  #: qubes that the administrator allows
    hold_opening: bool = False  #: until it is cancelled
    may_close: threading.Event | None = None  #: if given, a call is left only when it is set
    opens: list[c.OpenBackup] = field(default_factory=list)
    chosen: list[c.Choice] = field(default_factory=list)
    calls: list["ScriptedCall"] = field(default_factory=list)
    opening: threading.Event = field(default_factory=threading.Event)

    def __call__(self, request: c.OpenBackup, observer: Observer) -> "ScriptedCall":
        self.opens.append(request)
        self.calls.append(ScriptedCall(self, request, observer))
        return self.calls[-1]

    @property
    def is_closed(self) -> bool:
        """Has every call been left again?"""
        return all(call.closed.wait(LONG_S) for call in self.calls)

    def plan(self, number: int, mode: c.Mode, choice: c.Choice) -> c.Plan:
        """What the broker would decide, for names that are in the backup."""
        qubes = tuple(self._decided(planned, mode, choice) for planned in self.qubes)
        taken = sum(one.decision == "take" for one in qubes)
        is_too_much = self.limit is not None and taken > self.limit
        error = UsageError(f"{taken} qubes are to be restored", advice="Restore fewer.")
        return c.Plan(
            number=number,
            mode=mode,
            backup_id="20261123T140559-1234",
            archive_size=self.archive_size,
            qubes=qubes,
            unlisted=self.unlisted,
            offers=self.offers,
            excess=ErrorInfo.of(error) if is_too_much else None,
        )

    def _decided(self, planned: c.PlanQube, mode: c.Mode, choice: c.Choice) -> c.PlanQube:
        home = planned.klass == "AdminVM"
        problem: c.Problem | None = None
        if planned.name in choice.exclude:
            problem = "excluded"
        elif choice.names and planned.name not in choice.names:
            problem = "not-selected"
        elif home and not (choice.names or choice.dom0_home or mode == "verify"):
            problem = "home-not-asked-for"
        chosen = next((one for one in choice.qubes if one.name == planned.name), None)
        if problem is None and chosen is not None:
            return planned.model_copy(
                update={
                    "decision": "take",
                    "problem": None,
                    "error": None,
                    "settled_by": (),
                    "new_name": chosen.new_name or planned.name,
                    "new_template": chosen.template or planned.template,
                    "new_netvm": chosen.netvm,
                }
            )
        if problem is None:
            return planned
        return planned.model_copy(
            update={"decision": "leave-out", "problem": problem, "error": None, "new_template": None}
        )


class ScriptedCall(BlockingRestoreCall):
    """One call, which has neither a transport nor a thread."""

    def __init__(self, script: Script, request: c.OpenBackup, observer: Observer) -> None:
        self.observer = observer
        self.request = request
        self.results: list[QubeReport] = []
        self.error: RestoreError | None = None
        self.confirmed = threading.Event()
        self.cancelled = threading.Event()
        self.closed = threading.Event()
        self._script = script
        self._number = 0
        self._plan: c.Plan | None = None

    @property
    def plan(self) -> c.Plan:
        assert self._plan is not None
        return self._plan

    def __enter__(self) -> Self:
        self._script.opening.set()
        try:
            if self._script.hold_opening:
                assert self.cancelled.wait(LONG_S)
            if self.cancelled.is_set():
                raise Cancelled("the call was cancelled", advice="")
            if self._script.refusal is not None:
                raise self._script.refusal
        except RestoreError:
            self.closed.set()
            raise
        self._make_plan(self.request.choice)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._plan is not None, "only what was entered is left"
        assert not self.closed.is_set(), "and only once"
        assert self._script.may_close is None or self._script.may_close.wait(LONG_S)
        self.closed.set()

    def choose(self, choice: c.Choice) -> c.Plan:
        assert not self.closed.is_set()
        self._script.chosen.append(choice)
        return self._make_plan(choice)

    def confirm(self) -> Report:
        assert not self.closed.is_set()
        self.confirmed.set()
        for step in self._script.steps:
            step(self)
            if self.cancelled.is_set():
                break
        return self._report()

    def cancel(self) -> None:
        self.cancelled.set()

    def _make_plan(self, choice: c.Choice) -> c.Plan:
        self._number += 1
        self._plan = self._script.plan(self._number, self.request.mode, choice)
        return self._plan

    def _report(self) -> Report:
        reached = {found.name for found in self.results}
        rest = [
            result(qube.new_name, Cancelled("the restore was cancelled"))
            for qube in self.plan.taken
            if qube.new_name not in reached
        ]
        found = [*self.results, *rest]
        failed = any(not one.succeeded for one in found)
        status = 130 if self.cancelled.is_set() else 3 if failed else 0
        error = Cancelled("the restore was cancelled") if self.cancelled.is_set() else self.error
        return Report(
            mode="verify" if self.request.mode == "verify" else "restore",
            tool_version="1",
            backup_id=self.plan.backup_id,
            started=NOON,
            finished=NOON,
            status=1 if self.error else status,
            error=None if error is None else ErrorInfo.of(error),
            qubes=tuple(found),
        )


def finish(name: str, error: RestoreError | None = None) -> Step:
    """A step: the qube's volume comes, and it is through."""

    def step(call: ScriptedCall) -> None:
        begin(name)(call)
        call.results.append(result(name, error, call.request.mode))
        call.observer.qube_finished(call.results[-1])

    return step


def begin(name: str, volume: str = "private", size: int = 100 * MIB) -> Step:
    """A step: a volume begins."""
    return lambda call: call.observer.volume_started(name, volume, size)


def move(percent: int | None) -> Step:
    """A step: so much is done."""
    return lambda call: call.observer.progress(RestoreProgress(archive_bytes=0, percent=percent))


def wait_for(event: threading.Event) -> Step:
    """A step: until the test says so, or cancels."""

    def step(call: ScriptedCall) -> None:
        while not event.wait(0.01) and not call.cancelled.is_set():
            pass

    return step


def until_cancelled(call: ScriptedCall) -> None:
    """A step that goes on until the call is cancelled."""
    assert call.cancelled.wait(LONG_S)


def undo_when(event: threading.Event, name: str) -> Step:
    """A step: in a qube until it is cancelled, and then until the test lets the undoing end.

    It is one step, because a call that is cancelled between two steps does not begin the second.
    """

    def step(call: ScriptedCall) -> None:
        begin(name)(call)
        until_cancelled(call)
        event.wait(LONG_S)

    return step
