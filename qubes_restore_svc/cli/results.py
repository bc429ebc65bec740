"""The end of a run, for the person: the table of what is there, why the rest is not, and the report's file.

Strategy: everything is taken from the report, so that what is said, what is written and the exit status
agree. The table is the result, on standard output; all other words go to standard error.
"""

import sys
from pathlib import Path

from qubes_restore_svc.cli.tables import failures, left_out, report_table
from qubes_restore_svc.cli.terminal import print_result, say, say_wrapped, width_of
from qubes_restore_svc.errors import ExitStatus
from qubes_restore_svc.report_file import write_report
from qubes_restore_svc.wire.report import Report


def show_report(program: str, report: Report, *, quiet: bool) -> bool:
    """The table, the failures with their reasons, what was left out, and one line to sum it up.

    False if the table could not be written; that has been said, then.
    """
    table = report_table(report, width_of(sys.stdout))
    shown = quiet or not table or print_result(program, table) is not False
    width = width_of(sys.stderr)
    for line in failures(report, width):
        say(line)
    if not quiet:
        for line in left_out(report, width):
            say(line)
    show_error(program, report)
    wanted = [qube for qube in report.qubes if qube.outcome != "left out"]
    if wanted and not quiet:
        done = sum(qube.succeeded for qube in wanted)
        verb = "verified" if report.mode == "verify" else "restored"
        say(f"{done} of {len(wanted)} qube{'s' * (len(wanted) != 1)} {verb}.")
    return shown


def show_error(program: str, report: Report) -> None:
    """What ended the whole run, if something did."""
    if report.error is None:
        return
    advice = f" {report.error.advice}" if report.error.advice else ""
    cancelled = report.status == ExitStatus.CANCELLED
    say_wrapped("cancelled" if cancelled else f"{program}: {report.error.reason}.{advice}")


def keep_report(program: str, path: Path | None, report: Report) -> bool:
    """Write the report to the file that was asked for, if one was.

    False if it could not be written; that has been said, then.
    """
    if path is not None:
        try:
            write_report(path, report)
        except OSError as error:
            say_wrapped(f"{program}: the report cannot be written: {error.strerror}")
            return False
    return True
