"""`qvm-backup-restore --mgmt-vm`: restore or verify a backup on a Qubes system.

Strategy: as the other command: whatever can be refused is refused before the passphrase is typed; then one
asyncio task that a signal cancels, in which the plan is shown and the question asked; then the report, the
table, the exit status. Who carries it out comes from `qvm_parts`; a test can give it somebody else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from typing import Never

from qubes_restore_svc.broker.client import SessionOptions
from qubes_restore_svc.cli.inputs import archive_size, open_archive, read_passphrase
from qubes_restore_svc.cli.process import Interruption, carry_out
from qubes_restore_svc.cli.progress import make_display, with_clock
from qubes_restore_svc.cli.question import can_ask
from qubes_restore_svc.cli.qvm_arguments import RestoreArguments, parse_restore_arguments
from qubes_restore_svc.cli.qvm_parts import Assemble, is_file_here, on_qubes
from qubes_restore_svc.cli.qvm_remote import RemoteRestorer
from qubes_restore_svc.cli.qvm_review import PlanReview
from qubes_restore_svc.cli.reports import check_report_path
from qubes_restore_svc.cli.results import keep_report, show_error, show_report
from qubes_restore_svc.errors import ExitStatus, RestoreError, UsageError
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.wire.report import Report
from qubes_restore_svc.wire.restore_call import Choice

PROGRAM = "qvm-backup-restore"


def main(words: Sequence[str], assemble: Assemble = on_qubes) -> Never:
    """The entry point of the command, with its arguments; exits."""
    carry_out(PROGRAM, lambda interruption: run(words, interruption, assemble))


def run(words: Sequence[str], interruption: Interruption, assemble: Assemble) -> int:
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
            choice = _choice(arguments)
            prompt = _Prompt(arguments, interruption)
            restorer = assemble(arguments, archive_fd, prompt)
            total = None if archive_fd is None else archive_size(archive_fd)
            report, review = _carried_out(arguments, choice, restorer, prompt, total, interruption)
        except RestoreError as error:
            interruption.hold()
            report = Report.begun("verify" if arguments.verify_only else "restore", started)
            report.close(error)
            keep_report(PROGRAM, arguments.report, report)
            raise
    return _told(arguments, report, review, interruption)


class _Prompt:
    """Gets the passphrase when it is called, which it is when it is wanted."""

    def __init__(self, arguments: RestoreArguments, interruption: Interruption) -> None:
        self.fault: Exception | None = None  #: why there is none
        self.answered: Callable[[], object] = lambda: None  #: is called when it is there
        self._arguments = arguments
        self._interruption = interruption

    def __call__(self) -> str:
        """Raises RestoreError; a signal raises Cancelled."""
        stdin_is_backup = is_file_here(self._arguments) and self._arguments.location == "-"
        try:
            with self._interruption.raising():
                # The stock qvm-backup has cut white space off when it encrypted with such a file.
                passphrase = read_passphrase(
                    self._arguments.passphrase_file, stdin_is_backup=stdin_is_backup, white_space_at_end=False
                )
        except Exception as error:
            self.fault = error
            raise
        self.answered()
        return passphrase


def _carried_out(
    arguments: RestoreArguments,
    choice: Choice,
    restorer: RemoteRestorer,
    prompt: _Prompt,
    total: int | None,
    interruption: Interruption,
) -> tuple[Report, PlanReview]:
    """Have it done, and come back with what came of it. Raises RestoreError if it did not begin."""
    interruption.run(restorer.check())
    interruption.resume()
    passphrase = "" if restorer.asks_for_passphrase else prompt()
    display = make_display(verbose=arguments.loudness > 0, quiet=arguments.loudness < 0, total=total)
    review = PlanReview(PROGRAM, arguments, display, restorer.check_plan)
    job = restorer.run(
        _session_options(arguments, passphrase),
        choice,
        display,
        review,
        verify_only=arguments.verify_only,
    )
    with closing(display), ExitStack() as before_the_passphrase:
        if restorer.asks_for_passphrase:
            before_the_passphrase.enter_context(display.paused())
            prompt.answered = before_the_passphrase.close
        report = interruption.run(with_clock(display, job), display.ending)
    if prompt.fault is not None:
        raise prompt.fault
    return report, review


def _told(arguments: RestoreArguments, report: Report, review: PlanReview, interruption: Interruption) -> int:
    """Write and show the report; the exit status."""
    written = keep_report(PROGRAM, arguments.report, report)
    interruption.resume()
    if review.seen and not review.accepted:
        show_error(PROGRAM, report)  # the table has been seen, and nothing has happened since
        shown = True
    else:
        shown = show_report(PROGRAM, report, quiet=arguments.loudness < 0)
    # Whoever asked for a report, or for the table, relies on it.
    untold = report.status == ExitStatus.COMPLETE and not (written and shown)
    return ExitStatus.PARTLY if untold else report.status


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


def _session_options(arguments: RestoreArguments, passphrase: str) -> SessionOptions:
    return SessionOptions(
        passphrase=passphrase,
        compression_filter=arguments.compression_filter,
        ignore_size_limit=arguments.ignore_size_limit,
        ignore_cost_limit=arguments.ignore_cost_limit,
        stall_timeout_s=arguments.stall_timeout,
        ahead=not arguments.qubes,
    )


def _choice(arguments: RestoreArguments) -> Choice:
    return Choice.asked(
        names=tuple(arguments.qubes),
        exclude=tuple(arguments.exclude),
        conflicts=arguments.conflicts,
        missing=arguments.missing,
        dom0_home=arguments.dom0_home is True,
        ignore_username_mismatch=arguments.ignore_username_mismatch,
    )
