"""One run over the selected qubes: what the worker says becomes qubes on the host and lines in the report.

Strategy: one message after the other, each checked against the ledger first. A qube is a transaction that
begins with its first volume, after that of its template, and is committed when the worker has closed it,
everything promised is there, and what it needs of the other qubes is finished; whatever goes wrong in between
rolls it back. Only the copying of a volume runs beside the messages.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

from qubes_restore_svc.broker.client import STALL_S, SessionClient
from qubes_restore_svc.broker.estimate import Estimate
from qubes_restore_svc.broker.interfaces import Comparison, Host, Link, NewQube, QubeTransaction
from qubes_restore_svc.broker.ledger import Ledger, believed_error
from qubes_restore_svc.broker.plan import Planned
from qubes_restore_svc.broker.qube_runs import (
    MAX_WAITING_SETTINGS,
    QubeRun,
    QubeRuns,
    QubeStage,
    without_dispvm,
)
from qubes_restore_svc.broker.receiver import VolumeCopy
from qubes_restore_svc.errors import (
    BadMetadata,
    Cancelled,
    MissingDependency,
    ProtocolViolation,
    RestoreError,
    SkippedOnRequest,
    WorkerLost,
)
from qubes_restore_svc.waiting import in_thread, to_the_end
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire import qrexec_call
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.names import DigestKind, VolumeName
from qubes_restore_svc.wire.report import Observer, QubeReport, Report, VolumeReport, warn

_Finding = Literal["missing", "differs", "newer"]
_Outcome = Literal["restored", "verified", "same", "incomplete", "failed"] | _Finding

#: What is not the same here, the worst first.
_FINDINGS: tuple[_Finding, ...] = get_args(_Finding)

_TOO_MUCH_WAITS = (
    "its settings would have to wait for its template or its netvm, which come later in the backup; and"
    f" {MAX_WAITING_SETTINGS >> 20} MiB of settings wait already, far more than real qubes have"
)


class RestoreRun:
    """Restores the qubes that were planned to `host`, or verifies them if `host` is None.

    A report of the mode `compare` makes it a comparison with the qubes of `host`. To the worker, that is a
    restore.
    `report` has a report of each qube of the plan, and takes the warnings that belong to none of them.
    `tail_timeout_s`: seconds that the rest of a volume may take to arrive once the worker has called it
    complete.
    `only`: nothing but this volume of each qube is wanted, and `planned` has no others. That something else
    of it is damaged or lost is a warning.
    """

    def __init__(
        self,
        link: Link,
        client: SessionClient,
        planned: Planned,
        host: Host | None,
        observer: Observer,
        report: Report,
        *,
        digest: DigestKind = "fsverity",
        ignore_size_limit: bool = False,
        tail_timeout_s: float = STALL_S,
        only: VolumeName | None = None,
    ) -> None:
        self._only = only
        self._tail_timeout_s = tail_timeout_s
        self._report = report
        self._link = link
        self._client = client
        self._backup_id = planned.plan.backup_id
        self._pool = planned.pool
        self._host = host
        self._observer = observer
        self._digest: DigestKind = digest
        self._here = planned.here
        self._reports_here = {
            qube.key: its_report
            for qube, its_report in zip(planned.plan.qubes, report.qubes, strict=False)
            if qube.key in planned.here
        }
        self._notes_here = {qube.key: qube.notes for qube in planned.plan.qubes if qube.key in planned.here}
        self._ledger = Ledger(
            planned.sources.values(), digest, ignore_size_limit=ignore_size_limit, here=planned.here
        )
        self._qubes = QubeRuns(planned, report)
        self._begun: list[QubeRun] = []
        self._copy: VolumeCopy | None = None
        self._estimate = Estimate()
        self._creates = host is not None and report.mode == "restore"

    async def run(self) -> None:
        """Do it all. If the session ended early, raises the reason; everything unfinished is rolled back by
        then."""
        mode: Literal["restore", "verify"] = "verify" if self._host is None else "restore"
        here = tuple(
            m.QubeHere(
                key=key, volumes=tuple(volume.name for volume in one.volumes), firewall=one.has_firewall
            )
            for key, one in self._here.items()
        )
        for key, report in self._reports_here.items():
            report.volumes = self._here[key].volumes
            for note in self._notes_here[key]:
                self._warn(report, note)
            self._observer.qube_finished(report)
        request = m.Start(mode=mode, keys=self._qubes.keys, here=here, only=self._only, digest=self._digest)
        try:
            async with contextlib.aclosing(self._client.start(request)) as messages:
                async for message in messages:
                    await self._take(message)
        except BaseException as caught:
            error = RestoreError("the restore failed")  # for a mistake of ours
            if isinstance(caught, RestoreError):
                error = caught
            elif isinstance(caught, asyncio.CancelledError):
                error = Cancelled("it was cancelled")
            await to_the_end(self._abandon(error))
            raise

    async def _take(self, message: m.WorkerMessage) -> None:
        await self._check_copy()
        if isinstance(message, m.Progress):
            self._observer.progress(self._estimate.of(message, time.monotonic()))
        elif isinstance(message, m.Log):
            self._log(message)
        elif isinstance(message, m.VolumeReady):
            self._ledger.announce(message)
            await self._volume_ready(self._qubes[message.key], message)
        elif isinstance(message, m.VolumeDone):
            self._ledger.answer(message)
            await self._volume_done(self._qubes[message.key], message)
        elif isinstance(message, m.QubeSettings):
            self._ledger.settle(message)
            await self._settle(self._qubes[message.key], message)
        elif isinstance(message, m.QubeIncomplete):
            self._ledger.take_back(message)
            await self._take_back(message.key, believed_error(message.error))
        elif isinstance(message, m.Finished):
            self._ledger.finish()
            self._report.derivations = message.derivations
            await self._doubt_the_end()
        if self._host is not None:
            while ready := self._qubes.next_ready():
                await self._commit(ready, self._host)

    def _log(self, message: m.Log) -> None:
        qube = self._qubes.get(message.key)
        report = self._reports_here.get(message.key or "") if qube is None else qube.report
        if message.level == "warning":
            warn(report or self._report, message.text)
        name = f"{report.name}: " if report is not None else ""
        self._observer.log(message.level, name + message.text)

    async def _doubt_the_end(self) -> None:
        """Everything that was promised is there. But if the source has failed, there may have been more, such
        as a firewall."""
        fault = await self._link.archive_fault()
        if (gaps := self._link.archive_gaps) is not None:
            self._warn_of_source(gaps)
        if fault is None or any(volume.error for qube in self._qubes for volume in qube.report.volumes):
            return
        self._warn_of_source(
            f"{fault.reason}, after the last file that has come; settings files may be missing"
        )

    def _warn_of_source(self, text: str) -> None:
        warn(self._report, text)
        self._observer.log("warning", text)

    # --- One volume ---------------------------------------------------------------------------------

    async def _volume_ready(self, qube: QubeRun, ready: m.VolumeReady) -> None:
        qube.volume(ready.volume)  # it is in the report from now on, promised or not
        self._observer.volume_started(qube.name, ready.volume, ready.image_size)
        if self._host is None or qube.finished:  # it failed here, and the worker did not know yet
            return
        try:
            transaction = await self._transaction(qube, self._host)
            sink = await in_thread(transaction.create_volume, ready.volume, ready.image_size)
        except RestoreError as error:
            await self._volume_failed(qube, ready.volume, error)
            return
        argument = qrexec_call.volume_argument(ready.key, ready.volume)
        try:
            connection = await self._link.call(qrexec_call.VOLUME, argument)
        except WorkerLost as error:
            raise await self._client.lost(error.reason) from error
        self._copy = VolumeCopy(ready, connection, sink, self._client.fail)

    async def _check_copy(self) -> None:
        """A fault of the stream counts at once, even if the worker still says something else."""
        failure = None if self._copy is None else self._copy.failure
        if isinstance(failure, ProtocolViolation):
            raise failure
        if self._copy is not None and failure is not None:
            ready = self._copy.ready
            await self._volume_failed(self._qubes[ready.key], ready.volume, failure)

    async def _volume_done(self, qube: QubeRun, done: m.VolumeDone) -> None:
        host_error, comparison = None, None
        if self._copy is not None:
            host_error = await self._copy.finish(done, self._tail_timeout_s)
            comparison = self._copy.comparison
            self._copy = None
        elif self._host is not None and done.outcome == "ok" and not qube.finished:
            raise ProtocolViolation("a volume that is said to be complete and was never sent")
        if done.outcome == "ok" and host_error is None and not qube.finished:
            volume = qube.volume(done.volume)
            volume.outcome = "ok"
            volume.size, volume.data_bytes = done.image_size, done.data_bytes
            volume.fsverity, volume.sha256 = done.fsverity, done.sha256
            if comparison is not None:
                _take_comparison(qube, volume, comparison)
        elif host_error is not None:  # the reason why the worker stopped, whatever it says
            await self._volume_failed(qube, done.volume, host_error)
        else:
            outcome: Literal["failed", "skipped"] = "failed" if done.outcome == "failed" else "skipped"
            reason = await self._client.explained(_reason(done))
            await self._volume_failed(qube, done.volume, reason, outcome)

    # --- One qube -----------------------------------------------------------------------------------

    async def _transaction(self, qube: QubeRun, host: Host) -> QubeTransaction:
        if qube.transaction is not None:
            return qube.transaction
        await self._begin_template(qube, host)
        new = NewQube(
            qube.name, qube.source, self._backup_id, qube.report.warnings, qube.definition, self._pool
        )

        def begin() -> QubeTransaction:
            qube.transaction = host.begin(new)  # a cancel meanwhile finds it
            self._begun.append(qube)
            return qube.transaction

        transaction = await in_thread(begin)
        qube.stage = QubeStage.OPEN
        return transaction

    async def _begin_template(self, qube: QubeRun, host: Host) -> None:
        """Begin the template that this run is to bring. Raises if that fails and `qube` gets no other."""
        template = self._qubes.unfinished_template_of(qube)
        if template is None:
            return
        try:
            await self._transaction(template, host)
        except RestoreError as error:
            await self._fail(template, error)
        if qube.finished:
            raise _without_template(template)

    async def _volume_failed(
        self,
        qube: QubeRun,
        name: VolumeName,
        error: RestoreError,
        outcome: Literal["failed", "skipped"] = "failed",
    ) -> None:
        """A restore gives the qube up; a verify goes on with its other volumes."""
        volume = qube.volume(name)
        if volume.error is None:  # the first one is the reason of the others
            volume.outcome, volume.error = outcome, ErrorInfo.of(error).without_place()
        if qube.finished:
            return
        if self._host is not None:
            await self._fail(qube, error.at(volume=name))
        else:
            qube.blame(error)

    async def _settle(self, qube: QubeRun, settings: m.QubeSettings) -> None:
        if qube.finished:
            return
        error = None if settings.error is None else believed_error(settings.error)
        if error is not None and self._only is not None:
            self._warn(qube.report, f"what else there is of it is not whole: {error.reason}")
        if error is not None and self._only is None:
            await self._fail(qube, await self._client.explained(error))
        elif not all(volume.is_whole for volume in qube.report.volumes):
            await self._fail(qube, RestoreError("not all of its volumes are complete"))
        elif self._host is None:
            self._conclude(qube, "verified")
        else:
            await self._settle_complete(qube, self._host, settings)

    async def _settle_complete(self, qube: QubeRun, host: Host, settings: m.QubeSettings) -> None:
        try:
            await self._transaction(qube, host)  # one without volumes has not begun yet
        except RestoreError as error:
            if not qube.finished:
                await self._fail(qube, error)
            return
        qube.settle(settings)
        if self._qubes.waiting_settings > MAX_WAITING_SETTINGS and not self._qubes.is_ready(qube):
            await self._fail(qube, BadMetadata(_TOO_MUCH_WAITS, advice="Restore fewer qubes at a time."))

    async def _take_back(self, key: str, error: RestoreError) -> None:
        """Something that the qube must not lack came too late. What waits is rolled back; what was committed
        stays, because it is somebody's by now, and is called incomplete. It loses its network if it does not
        run: the firewall may be what it lacks."""
        qube = self._qubes.get(key)
        if qube is not None and not qube.finished:
            await self._fail(qube, error)
            return
        report = self._reports_here[key] if qube is None else qube.report
        if not (report.succeeded or report.is_different):
            return
        if self._creates:
            now = ", without a netvm now" if await self._taken_back(report, from_before=qube is None) else ""
            error.advice = (
                f"It had been created by then and is still there{now}. Look at what it lacks, a firewall"
                " above all, before you start it; or remove it."
            )
        report.error = ErrorInfo.of(error.at(qube=report.name)).without_place()
        report.outcome = "incomplete" if self._creates else "failed"
        self._observer.qube_finished(report)

    async def _taken_back(self, report: QubeReport, *, from_before: bool) -> bool:
        """Let it count as restored no more; does it have no network now?"""
        assert self._host is not None
        try:
            return await in_thread(
                partial(self._host.take_back, report.name, self._backup_id, from_before=from_before)
            )
        except RestoreError as error:
            self._warn(report, f"its proof, or its netvm, could not be taken away: {error.reason}")
            return False

    async def _commit(self, qube: QubeRun, host: Host) -> None:
        transaction, settings = qube.transaction, qube.take_settings()
        assert transaction is not None
        for warning in self._qubes.resolve_references(qube):
            self._warn(qube.report, warning)

        def commit() -> Sequence[str]:
            remarks = transaction.commit(settings, qube.definition, qube.report.volumes)
            qube.transaction = None  # a cancel from here on finds it restored, not half done
            return remarks

        try:
            remarks = await in_thread(commit)
        except RestoreError as error:
            await self._fail(qube, error)
            return
        except asyncio.CancelledError:
            if qube.transaction is None:
                self._conclude(qube, self._success(qube))
            raise
        for remark in remarks:
            self._warn(qube.report, remark)
        self._conclude(qube, self._success(qube))
        for waiting in self._qubes.waiting_for_dispvm(qube):
            try:
                await in_thread(host.set_default_dispvm, waiting.name, qube.name)
            except RestoreError as error:
                self._warn(
                    waiting.report, f"its default disposable template could not be set: {error.reason}"
                )

    async def _fail(self, qube: QubeRun, error: RestoreError) -> None:
        """Give the qube up: it is rolled back before anything else, and the worker is told."""
        qube.finish()
        qube.blame(error.at(qube=qube.name))
        await self._give_up_template(qube)
        await self._roll_back(qube)
        self._conclude(qube, "failed")
        self._tell_without_dispvm(qube)
        if self._host is not None:
            await self._client.skip_qube(qube.key)

    async def _give_up_template(self, template: QubeRun) -> None:
        """Before a template is removed: its dependents fall back on another one, or are given up as well."""
        for qube in self._qubes.dependents_of(template):
            fallback = None if qube.set_up is None else qube.set_up.fallback_template
            if fallback is None or qube.definition is None:
                await self._fail(qube, _without_template(template))
                continue
            try:
                if qube.transaction is not None:
                    await in_thread(qube.transaction.change_template, fallback)
            except RestoreError as error:
                await self._fail(qube, error)
                continue
            qube.definition = replace(qube.definition, template=fallback)
            self._warn(qube.report, f"its template is {fallback} now: {template.name} could not be restored")

    async def _roll_back(self, qube: QubeRun) -> None:
        """Roll the qube's transaction back; what cannot be removed is told, and is no reason to stop."""
        if qube.transaction is None:
            return
        try:
            await in_thread(qube.transaction.rollback)
        except RestoreError as error:
            self._warn(qube.report, f"what had been written could not be removed: {error.reason}")
        qube.transaction = None

    def _warn(self, report: QubeReport, text: str) -> None:
        warn(report, text)
        self._observer.log("warning", f"{report.name}: {text}")

    def _tell_without_dispvm(self, dispvm: QubeRun) -> None:
        for waiting in self._qubes.waiting_for_dispvm(dispvm):
            self._warn(waiting.report, without_dispvm(dispvm))

    def _success(self, qube: QubeRun) -> _Outcome:
        """The outcome of a complete qube; after a comparison, the worst of the results of its volumes."""
        if self._creates:
            return "restored"
        found = {volume.outcome for volume in qube.report.volumes}
        return next((one for one in _FINDINGS if one in found), "same")

    def _conclude(self, qube: QubeRun, outcome: _Outcome) -> None:
        qube.finish()
        qube.report.outcome = outcome
        self._observer.qube_finished(qube.report)

    async def _abandon(self, error: RestoreError) -> None:
        """The session is over before its time: roll back whatever is not finished."""
        copy, self._copy = self._copy, None
        if copy is not None:
            await copy.end()
            qube, reason = self._qubes[copy.ready.key], copy.failure or error
            volume = qube.volume(copy.ready.volume)
            volume.outcome, volume.error = "failed", ErrorInfo.of(reason).without_place()
            qube.blame(reason)
        for qube in reversed(self._begun):  # a template has begun before what depends on it
            await self._roll_back(qube)
        for qube in self._qubes:
            if not qube.finished:
                qube.finish()
                qube.blame(error)
                self._tell_without_dispvm(qube)


def _without_template(template: QubeRun) -> RestoreError:
    return MissingDependency(f"its template {template.name} could not be restored")


def _take_comparison(qube: QubeRun, volume: VolumeReport, comparison: Comparison) -> None:
    volume.outcome, volume.difference = comparison.outcome, comparison.difference
    if comparison.error is not None:
        volume.error = ErrorInfo.of(comparison.error).without_place()
        qube.blame(comparison.error)


def _reason(done: m.VolumeDone) -> RestoreError:
    """The worker's reason why a volume is not there."""
    if done.error is not None:
        return believed_error(done.error)
    return SkippedOnRequest("left out, because the qube cannot be restored completely", advice="")
