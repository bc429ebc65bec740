"""`qvm-backup-restore --mgmt-vm`: restore or verify a backup on a Qubes system.

Strategy: whatever can be refused is refused before the passphrase is typed. Then one asyncio task, which a
signal cancels, calls dom0's service; in it the plan is shown and the question asked. Then come the report,
the table, the exit status. Whatever ends the restore becomes the report's error. Where the service sent no
report, one is made of what it has said until then: the plan, and the qubes that were finished.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from typing import Never

from pydantic import SecretStr

from qubes_restore_svc.cli.displays import make_display, with_clock
from qubes_restore_svc.cli.inputs import Passphrases, archive_size, open_archive
from qubes_restore_svc.cli.process import Interruption, carry_out
from qubes_restore_svc.cli.qvm_arguments import (
    RestoreArguments,
    check_way,
    is_file_here,
    parse_restore_arguments,
    restore_request,
    way_to_dom0,
)
from qubes_restore_svc.cli.qvm_review import PlanReview, can_ask
from qubes_restore_svc.cli.report_output import check_report_path, keep_report, show_error, show_report
from qubes_restore_svc.cli.tables import listed
from qubes_restore_svc.client.aio import RestoreCall
from qubes_restore_svc.client.transports import Handed, ProgramTransport, Transport
from qubes_restore_svc.errors import Cancelled, ExitStatus, RestoreError, UsageError, WrongPassphrase
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.report import Observer, QubeReport, Report, RestoreProgress, warn

PROGRAM = "qvm-backup-restore"

#: Makes the way to dom0 from what a service that is started there is handed over.
Way = Callable[[Handed], Transport]


def main(words: Sequence[str], way: Way = way_to_dom0) -> Never:
    """The entry point of the command, with its arguments; exits."""
    carry_out(PROGRAM, lambda interruption: run(words, interruption, way))


def run(words: Sequence[str], interruption: Interruption, way: Way) -> int:
    """Carry out the command and return its exit status. Raises RestoreError."""
    arguments = parse_restore_arguments(words)
    started = datetime.now(UTC)
    with _archive(arguments) as archive_fd:
        if arguments.report is not None:
            check_report_path(arguments.report, archive_fd, arguments.passphrase_file)
        try:
            if arguments.must_ask and not can_ask():
                raise UsageError(
                    "there is no terminal to ask on whether to proceed",
                    advice="Use --yes, or give the passphrase in a file (-p FILE).",
                )
            prompt = _Prompt(arguments, interruption)
            transport = way(Handed(archive_fd, prompt))
            check_way(transport)
            request = restore_request(arguments, archive_fd, transport)
            total = None if archive_fd is None else archive_size(archive_fd)
            report, review = _carried_out(arguments, transport, request, prompt, total, interruption)
        except RestoreError as error:
            interruption.hold()
            report = Report.begun(arguments.mode, started)
            report.close(error)
            keep_report(PROGRAM, arguments.report, report)
            raise
    return _told(arguments, report, review, interruption)


@contextmanager
def _archive(arguments: RestoreArguments) -> Iterator[int | None]:
    """The descriptor of a backup that is a file here; None for one in another domain."""
    if not is_file_here(arguments):
        yield None
        return
    archive_fd = open_archive(arguments.location)
    try:
        yield archive_fd
    finally:
        close_read(archive_fd)


class _Prompt:
    """Gets the passphrase when it is called, which it is when it is wanted."""

    def __init__(self, arguments: RestoreArguments, interruption: Interruption) -> None:
        self.fault: Exception | None = None  #: why there is none
        self.before: Callable[[], object] = lambda: None  #: is called before another one is asked for
        self.answered: Callable[[], object] = lambda: None  #: is called when it is there
        stdin_is_backup = is_file_here(arguments) and arguments.location == "-"
        self._passphrases = Passphrases(arguments.passphrase_file, stdin_is_backup=stdin_is_backup)
        self._asked = False
        self._interruption = interruption

    @property
    def has_other(self) -> bool:
        """Is there another one to try?"""
        return self._passphrases.has_other

    def __call__(self) -> str:
        """Raises RestoreError, WrongPassphrase if there is no other one; a signal raises Cancelled."""
        passphrase: str | None
        try:
            with self._interruption.raising():
                if not self._asked:
                    self._asked = True
                    passphrase = self._passphrases.first()
                else:
                    self.before()
                    passphrase = self._passphrases.other()
        except Exception as error:
            self.fault = error
            raise
        self.answered()
        if passphrase is None:
            raise WrongPassphrase("the backup opens with no passphrase that was given")
        return passphrase


def _carried_out(
    arguments: RestoreArguments,
    transport: Transport,
    request: c.OpenBackup,
    prompt: _Prompt,
    total: int | None,
    interruption: Interruption,
) -> tuple[Report, PlanReview]:
    """Have it done, and come back with what came of it. Raises RestoreError if it did not begin."""
    is_asked_for = isinstance(transport, ProgramTransport)  # otherwise the passphrase is in the request
    while True:
        if not is_asked_for:
            request = request.model_copy(update={"passphrase": SecretStr(prompt())})
        display = make_display(
            verbose=arguments.loudness > 0,
            quiet=arguments.loudness < 0,
            total=total,
            creates=arguments.mode == "restore",
        )
        review = PlanReview(PROGRAM, arguments, display, request.choice)
        with closing(display), ExitStack() as before_the_passphrase:
            if is_asked_for:
                prompt.before = lambda: before_the_passphrase.enter_context(display.paused())  # noqa: B023
                prompt.answered = before_the_passphrase.close
                prompt.before()
            job = with_clock(display, called(transport, request, display, review))
            report = interruption.run(job, display.ending)
        if prompt.fault is not None:
            raise prompt.fault
        is_wrong = report.error is not None and report.error.kind == WrongPassphrase.kind
        if is_asked_for or not is_wrong or not prompt.has_other:
            return report, review


def _told(arguments: RestoreArguments, report: Report, review: PlanReview, interruption: Interruption) -> int:
    """Write and show the report; the exit status."""
    written = keep_report(PROGRAM, arguments.report, report)
    interruption.resume()
    if review.seen and not review.accepted:
        show_error(PROGRAM, report)  # the table has been seen, and nothing has happened since
        shown = True
    else:
        templates = [qube.name for qube in report.qubes if qube.klass == "TemplateVM" and qube.succeeded]
        update = [f"Install updates for the restored templates: {listed(templates)}."]
        what_next = update if templates and report.mode == "restore" else []
        shown = show_report(PROGRAM, report, quiet=arguments.loudness < 0, what_next=what_next)
    # A person who asked for a report, or for the table, relies on it.
    untold = report.status == ExitStatus.COMPLETE and not (written and shown)
    return ExitStatus.PARTLY if untold else report.status


# --- The call ------------------------------------------------------------------------------------


async def called(
    transport: Transport,
    request: c.OpenBackup,
    observer: Observer,
    review: Callable[[c.Plan], Awaitable[c.Choice | None]],
) -> Report:
    """Have dom0 do what is asked for, once `review` has let the plan pass, or another that it has chosen.

    Comes back with a report also if the task is cancelled.
    """
    assert request.mode != "list"
    report = Report.begun(request.mode)
    heard = _Heard(observer, report)
    error: RestoreError | None = None
    try:
        # The service in dom0 is a child of this command, which ends when nothing half done is left.
        call = RestoreCall(transport, request, heard, patient=isinstance(transport, ProgramTransport))
        try:
            async with call:
                await _reviewed(call, review, report)
                return await call.confirm()
        except asyncio.CancelledError:
            if call.report is None:
                raise
            return call.report
    except RestoreError as caught:
        error = caught
    except asyncio.CancelledError:
        error = Cancelled("it was cancelled", advice="")
    assert error is not None, "it has come back otherwise"
    known = {qube.name: qube for qube in heard.finished}
    report.qubes = tuple(known.get(qube.name, qube) for qube in report.qubes)
    for qube in report.qubes:  # of those that were under way, what ended the call
        if qube.outcome == "failed" and qube.error is None and not isinstance(error, Cancelled):
            qube.error = ErrorInfo.of(error).without_place()
    report.close(error)
    return report


class _Heard(Observer):
    """Passes on to the display what dom0 says, and keeps what a report needs if none comes."""

    def __init__(self, observer: Observer, report: Report) -> None:
        self.finished: list[QubeReport] = []
        self._report = report
        self._observer = observer

    def progress(self, progress: RestoreProgress) -> None:
        self._observer.progress(progress)

    def log(self, level: str, text: str) -> None:
        if level == "warning":
            warn(self._report, text)
        self._observer.log(level, text)

    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        self._observer.volume_started(qube, volume, image_size)

    def qube_finished(self, report: QubeReport) -> None:
        self.finished.append(report)
        self._observer.qube_finished(report)


async def _reviewed(
    call: RestoreCall, review: Callable[[c.Plan], Awaitable[c.Choice | None]], report: Report
) -> None:
    """Show the plan, and those that are made from other choices; one that does not pass cancels the call."""
    while True:
        plan = call.plan
        report.backup_id, report.qubes = plan.backup_id, plan.reports()
        try:
            choice = await review(plan)
        except RestoreError as error:
            report.qubes = plan.reports(error)
            # So that the next restore need not wait until dom0 has put away what it had begun.
            await call.cancel()
            await call.wait_ended()
            raise
        if choice is None:
            return
        await call.choose(choice)
