"""The report, for the person: shown at the end of a run, and written to the file that was asked for.

Strategy: everything that is shown is taken from the report, so that what is said, what is written and the
exit status agree. The table is the result, on standard output; all other words go to standard error. At the
beginning, this looks for every reason for which the writing would fail at the end, or would overwrite
something else.
"""

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from qubes_restore_svc.cli.tables import differences, failures, left_out, report_table
from qubes_restore_svc.cli.terminal import print_result, say, say_wrapped, width_of
from qubes_restore_svc.errors import ExitStatus, UsageError
from qubes_restore_svc.report_file import write_report
from qubes_restore_svc.wire.names import strip_control
from qubes_restore_svc.wire.report import Report, RunMode


def show_report(
    program: str, report: Report, *, quiet: bool, with_table: bool = True, what_next: Sequence[str] = ()
) -> bool:
    """The table, the failures with their reasons, what was left out, one line to sum it up, and what next.

    False if the table could not be written; that has been said, then.
    """
    table = report_table(report, width_of(sys.stdout)) if with_table else ""
    shown = quiet or not table or print_result(program, table) is not False
    width = width_of(sys.stderr)
    for line in failures(report, width):
        say(line)
    if not quiet:
        for line in differences(report, width):
            say(line)
        for line in left_out(report, width):
            say(line)
    show_error(program, report)
    wanted = [qube for qube in report.qubes if qube.outcome != "left out"]
    if wanted and not quiet:
        done = sum(qube.succeeded for qube in wanted)
        verb = _DONE[report.mode]
        warned = sum(qube.succeeded and bool(qube.warnings) for qube in wanted)
        warnings = f", {warned} with warnings" if warned else ""
        if before := sum(qube.outcome == "already restored" for qube in wanted):
            warnings += f", {before} of them by an earlier run (and not read again)"
        for outcome, text in _DIFFERENT.items():
            if count := sum(qube.outcome == outcome for qube in wanted):
                warnings += f", {count} {text[count > 1]}"
        count = len(report.warnings)
        above = f" See the {f'{count} warnings' if count > 1 else 'warning'} above." if count else ""
        say(f"{done} of {len(wanted)} qube{'s' * (len(wanted) != 1)} {verb}{warnings}.{above}")
        for line in what_next:
            say(line)
    return shown


_DONE: dict[RunMode, str] = {
    "verify": "verified",
    "restore": "restored",
    "compare": "the same as in the backup",
}


#: The results of compared qubes, in the singular and in the plural.
_DIFFERENT = {
    "differs": ("differs", "differ"),
    "newer": ("is newer", "are newer"),
    "missing": ("is missing", "are missing"),
}


def show_error(program: str, report: Report) -> None:
    """The error that ended the whole run, if there was one."""
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


# --- Before the work begins ---------------------------------------------------------------------------


def check_report_path(
    path: Path, archive_fd: int | None, passphrase_file: str | None = None, target: Path | None = None
) -> None:
    """Hours of work should not end with a report that cannot be written, or with one over something else.

    `archive_fd` is None for a backup that is no file here. Raises UsageError.
    """
    if target is not None and os.path.realpath(path) == os.path.realpath(target):
        raise _refused(path, "it is the directory for the qubes")
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise _refused(path, "it is a symbolic link to nothing") from None
        _check_parent(path)
        return
    except OSError as error:
        raise _refused(path, error.strerror) from None
    if archive_fd is not None and os.path.samestat(status, os.fstat(archive_fd)):
        raise _refused(path, "it is the backup")
    if passphrase_file not in (None, "-") and _is_file(passphrase_file, status):
        raise _refused(path, "it is the passphrase file")
    if stat.S_ISDIR(status.st_mode):
        raise _refused(path, "it is a directory")
    if stat.S_ISREG(status.st_mode):
        _check_parent(Path(os.path.realpath(path)))
    if not os.access(path, os.W_OK):
        raise _refused(path, "no permission")


def _is_file(path: str | None, status: os.stat_result) -> bool:
    try:
        return path is not None and os.path.samestat(status, os.stat(path))
    except OSError:
        return False


def _check_parent(path: Path) -> None:
    parent = path.absolute().parent
    if not parent.is_dir():
        raise _refused(path, "there is no such directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _refused(path, "its directory cannot be written to")


def _refused(path: Path, why: str | None) -> UsageError:
    return UsageError(f"the report cannot be written to {strip_control(str(path))}: {why}", advice="")
