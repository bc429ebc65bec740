"""What is kept of every restore on this machine: its report, and a log of what was said.

Strategy: people look for these files later, so a fault here never fails the restore. What cannot be written
is told once, through the `warn` of the caller. Both files may hold names of qubes: only their owner and group
may read them, whatever the umask is. (qrexec starts services of dom0 with umask 0077, and the group reads the
files, too.)
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from qubes_restore_svc.report_file import write_report
from qubes_restore_svc.wire.report import Observer, QubeReport, Report

_MODE = 0o640
_REPORT_NAME = re.compile(r"(?:restore|verify)-([0-9]{8}T[0-9]{6}Z-[0-9]+)\.json")


def file_report(
    directory: Path, keep: int, report: Report, warn: Callable[[str], None], asked_by: str | None = None
) -> None:
    """Put the report into the directory, and delete the oldest of those that are there beyond `keep`.

    `asked_by`: see `write_report`.
    """
    name = f"{report.mode}-{report.started:%Y%m%dT%H%M%SZ}-{os.getpid()}.json"
    try:
        write_report(directory / name, report, _MODE, asked_by)
        found = sorted(
            (match[1], entry) for entry in os.listdir(directory) if (match := _REPORT_NAME.fullmatch(entry))
        )
        for _, entry in found[: max(0, len(found) - keep)]:
            (directory / entry).unlink(missing_ok=True)
    except OSError as error:
        warn(f"the report cannot be kept in {directory}: {error.strerror}")


class LogFile:
    """Appends lines to a file, each with the time. After the first that fails it tries no more."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path = path
        self._warn = warn
        self._works = True

    def write(self, text: str) -> None:
        """Append a line."""
        if not self._works:
            return
        line = f"{datetime.now().astimezone().isoformat(timespec='seconds')} [{os.getpid()}] {text}\n"
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open(self._path, flags, _MODE), "ab") as file:
                if file.tell() == 0:  # it is new: whatever the umask, the group may read it
                    with suppress(PermissionError):  # logrotate has created it, with a mode of its own
                        os.fchmod(file.fileno(), _MODE)
                file.write(line.encode("utf-8", "replace"))
        except OSError as error:
            self._works = False
            self._warn(f"the log cannot be written to {self._path}: {error.strerror}")


class LoggedObserver(Observer):
    """An observer whose words, but not its progress, go to a log as well."""

    def __init__(self, observer: Observer, log: LogFile) -> None:
        self._observer = observer
        self._log = log

    def progress(self, archive_bytes: int, image_bytes: int) -> None:
        """Passed on only."""
        self._observer.progress(archive_bytes, image_bytes)

    def log(self, level: str, text: str) -> None:
        """Both."""
        self._observer.log(level, text)
        self._log.write(f"{level}: {text}")

    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        """Both."""
        self._observer.volume_started(qube, volume, image_size)
        self._log.write(f"{qube}/{volume}: begun")

    def qube_finished(self, report: QubeReport) -> None:
        """Both."""
        self._observer.qube_finished(report)
        reason = "" if report.error is None else f": {report.error.reason}"
        self._log.write(f"{report.name}: {report.outcome}{reason}")
