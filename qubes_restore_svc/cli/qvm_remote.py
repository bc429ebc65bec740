"""The restore as a qube has it done: a `Restorer` that calls dom0's restore service.

Strategy: what dom0 says is shown by whatever shows it in dom0. As there, whatever ends the restore becomes
the report's error. Where dom0 sent no report, one is made of what it has said until then: the plan, and the
qubes that were finished.
"""

import asyncio
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pydantic import SecretStr, ValidationError

from qubes_restore_svc.broker.client import SessionOptions
from qubes_restore_svc.broker.job import Confirm
from qubes_restore_svc.cli.qvm_arguments import RestoreArguments
from qubes_restore_svc.client.aio import RestoreCall
from qubes_restore_svc.client.transports import (
    SERVICE_PROGRAM,
    Handed,
    ProgramTransport,
    QrexecTransport,
    Transport,
)
from qubes_restore_svc.errors import Cancelled, HostFailed, RestoreError, UsageError
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.location import QubePath, QubeService
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.names import strip_control
from qubes_restore_svc.wire.report import Observer, QubeReport, Report, warn
from qubes_restore_svc.wire.service import HANDED_OVER


def restorer_in_dom0(
    arguments: RestoreArguments,
    archive_fd: int | None,
    passphrase: Callable[[], str],
    command: Sequence[str] = SERVICE_PROGRAM,
) -> "RemoteRestorer":
    """The restorer for dom0: its service is started as a child. Raises UsageError.

    `archive_fd`: the backup, open, if it is a file here. `passphrase` is asked for when the service wants it.
    `command` is the service's program.
    """
    transport = ProgramTransport(command, Handed(archive_fd, passphrase))
    location = _location(arguments) or _checked_location("dom0", HANDED_OVER)
    return RemoteRestorer(transport, location, _wishes(arguments), arguments.pool)


def remote_restorer(
    arguments: RestoreArguments, archive_fd: int | None, transport: Transport | None = None
) -> "RemoteRestorer":
    """The restorer for a qube. `archive_fd`: the backup, open, if it is a file here. Raises UsageError."""
    location = _location(arguments)
    if location is None and arguments.in_dom0:
        location = _checked_location("dom0", arguments.location)
    elif location is None:
        assert archive_fd is not None, "a backup in this qube is open by now"
        location = _checked_location(None, _file_here(arguments.location, archive_fd))
    return RemoteRestorer(
        QrexecTransport() if transport is None else transport, location, _wishes(arguments), arguments.pool
    )


class RemoteRestorer:
    """Has dom0 carry out one restore or verification."""

    def __init__(
        self, transport: Transport, location: c.BackupLocation, wishes: c.WorkerWishes, pool: str | None
    ) -> None:
        self._transport = transport
        self._location = location
        self._wishes = wishes
        self._pool = pool

    async def check(self) -> None:
        """Whether dom0 can be called at all. Raises HostFailed; all else is told when the call is made."""
        if isinstance(self._transport, QrexecTransport) and not Path(self._transport.program).exists():
            raise HostFailed(f"there is no {self._transport.program}", advice="Run it in a qube, or in dom0.")

    @property
    def asks_for_passphrase(self) -> bool:
        """Does the service ask for it when it wants it? Otherwise it is one of the options."""
        return isinstance(self._transport, ProgramTransport)

    def check_plan(self, plan: c.Plan) -> None:
        """Raises UsageError for a plan beyond the limits of dom0's administrator."""
        if plan.excess is not None:
            raise plan.excess.to_error()

    async def run(
        self,
        options: SessionOptions,
        choice: c.Choice,
        observer: Observer,
        confirm: Confirm | None,
        *,
        verify_only: bool,
    ) -> Report:
        """As `run_job`: comes back with a report also if the task is cancelled."""
        report = Report.begun("verify" if verify_only else "restore")
        watched = _Watched(observer, report)
        error: RestoreError | None = None
        try:
            request = self._request(options, choice, report)
            call = RestoreCall(self._transport, request, watched)
            try:
                async with call:
                    await _agree(call, confirm, report)
                    return await call.confirm()
            except asyncio.CancelledError:
                if call.report is None:
                    raise
                return call.report
        except RestoreError as caught:
            error = caught
        except asyncio.CancelledError:
            error = Cancelled("it was cancelled", advice="")
        _complete(report, watched.finished, error)
        report.close(error)
        return report

    def _request(self, options: SessionOptions, choice: c.Choice, report: Report) -> c.OpenBackup:
        try:
            return c.OpenBackup(
                mode=report.mode,
                location=self._location,
                passphrase=SecretStr(options.passphrase),
                choice=choice,
                compression_filter=options.compression_filter,
                ignore_size_limit=options.ignore_size_limit,
                ignore_cost_limit=options.ignore_cost_limit,
                stall_timeout=options.stall_timeout_s,
                pool=self._pool,
                worker=self._wishes,
            )
        except ValidationError as error:
            raise _unfit(error, "what was asked for cannot be told to dom0") from None


class _Watched(Observer):
    """Passes on to the display what dom0 says, and keeps what a report needs if none comes."""

    def __init__(self, observer: Observer, report: Report) -> None:
        self.finished: list[QubeReport] = []
        self._report = report
        self._observer = observer

    def progress(self, archive_bytes: int, image_bytes: int) -> None:
        self._observer.progress(archive_bytes, image_bytes)

    def log(self, level: str, text: str) -> None:
        if level == "warning":
            warn(self._report, text)
        self._observer.log(level, text)

    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        self._observer.volume_started(qube, volume, image_size)

    def qube_finished(self, report: QubeReport) -> None:
        self.finished.append(report)
        self._observer.qube_finished(report)


async def _agree(call: RestoreCall, confirm: Confirm | None, report: Report) -> None:
    """Show every plan until nothing else is wanted; a plan that is refused, here, cancels the call."""
    while True:
        plan = call.plan
        report.backup_id, report.qubes = plan.backup_id, plan.reports()
        if confirm is None:
            return
        try:
            other = await confirm(plan)
        except RestoreError as error:
            for planned, qube in zip(plan.qubes, report.qubes, strict=False):
                if planned.decision == "take":  # nothing is wrong with it; this is why it has not come
                    qube.error = ErrorInfo.of(error).without_place()
            # So that the next restore need not wait until dom0 has put away what it had begun.
            await call.cancel()
            await call.wait_ended()
            raise
        if other is None:
            return
        await call.choose(other)


def _complete(report: Report, finished: Iterable[QubeReport], error: RestoreError | None) -> None:
    """Put in what is known of each qube; of those that were under way, what ended the call."""
    known = {qube.name: qube for qube in finished}
    report.qubes = tuple(known.get(qube.name, qube) for qube in report.qubes)
    for qube in report.qubes:
        if qube.outcome == "failed" and qube.error is None and error is not None:
            qube.error = None if isinstance(error, Cancelled) else ErrorInfo.of(error).without_place()


# --- What dom0 is asked for ------------------------------------------------------------------------


def _location(arguments: RestoreArguments) -> c.BackupLocation | None:
    """Where the backup lies if that is another qube."""
    if arguments.storage_qube is None:
        return None
    if arguments.location_is_service:
        text = QubeService(arguments.storage_qube, arguments.location).service
    else:
        path = QubePath(arguments.storage_qube, arguments.location)
        text = path.line.decode("utf-8", "surrogateescape").rstrip("\n")
    return _checked_location(arguments.storage_qube, text, arguments.location_is_service)


def _checked_location(qube: str | None, text: str, service: bool = False) -> c.BackupLocation:
    try:
        return c.BackupLocation(qube=qube, text=text, service=service)
    except ValidationError as error:
        raise _unfit(error, "the location of the backup cannot be told to dom0") from None


def _file_here(location: str, archive_fd: int) -> str:
    """The absolute path of a backup that is a file of this qube: this qube will be asked for it by dom0."""
    if location == "-":
        raise UsageError(
            "a backup on standard input cannot be restored from here",
            advice="Put it into a file, or name a command that writes it, with -d and the name of this qube.",
        )
    path = os.path.realpath(location)
    shown = strip_control(location)
    # What is no file, the agent here would take for a command; and it drops spaces (qubes.RestoreById).
    if not stat.S_ISREG(os.fstat(archive_fd).st_mode):
        raise UsageError(f"{shown} is not a file", advice="Copy the backup into one.")
    if path != path.strip():
        raise UsageError(f"the name of {shown} ends with a space", advice="Rename it.")
    return path


def _wishes(arguments: RestoreArguments) -> c.WorkerWishes:
    try:
        return c.WorkerWishes(template=arguments.template, memory=arguments.memory, vcpus=arguments.vcpus)
    except ValidationError as error:
        raise _unfit(error, "the qube that reads the backup cannot be as it was asked for") from None


def _unfit(error: ValidationError, what: str) -> UsageError:
    """What does not fit into a message; the value, which may be a passphrase, is not repeated."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return UsageError(
        f"{what} ({where}: {strip_control(first['msg'])})" if where else f"{what}: {first['msg']}"
    )
