"""The report as a file, which is there in one piece or not at all.

Strategy: an ordinary file is replaced by a new one that is complete; anything else (`/dev/stdout`, a pipe, a
device) is written to, never replaced.
"""

import contextlib
import errno
import os
from pathlib import Path

from qubes_restore_svc.owners import interference, user_name
from qubes_restore_svc.wire.documents import Document
from qubes_restore_svc.wire.names import QubeName
from qubes_restore_svc.wire.report import Report

_ATTEMPTS = 100

#: Bytes that a report may have; one of 250 qubes has less than a tenth of it.
MAX_REPORT = 8 << 20


class KeptReport(Report, Document):
    """What came of everything, and who asked for it."""

    asked_by: QubeName | None = None  #: the domain that asked, if it is another than the one that keeps this


def write_report(path: Path, report: Report, mode: int | None = None, asked_by: str | None = None) -> None:
    """Write `report` as JSON, shortened until it fits MAX_REPORT; raises OSError.

    `mode`: the permissions of a file that is kept for others too, whatever the umask; None leaves them to the
    umask. What exists and is replaced counts as new. `asked_by`: the domain that asked for the restore, if it
    was another than the one that keeps the report.
    """
    kept = KeptReport.model_validate(dict(report) | {"asked_by": asked_by})
    fitting = kept.fitting(MAX_REPORT, lambda form: len(form.text().encode()))
    write_whole(path, fitting.text().encode(), mode)


def write_whole(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write `content` in one piece, with permissions as for `write_report`; raises OSError."""
    if path.exists() and not path.is_file():
        # A pipe without a reader would let an ordinary open wait, past every signal.
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        os.set_blocking(fd, True)
        with open(fd, "wb") as special:
            special.write(content)
        return
    if path.is_symlink() and path.lstat().st_uid not in (0, os.geteuid()):
        raise PermissionError(errno.EPERM, f"{path} is a symbolic link of {user_name(path.lstat().st_uid)}")
    path = Path(os.path.realpath(path))
    if (why := interference(path.parent)) is not None and os.geteuid() == 0:
        raise PermissionError(errno.EPERM, f"{why}, who could put another file in its place")
    fd, partial = _new_file_beside(path, 0o666 if mode is None else mode)
    try:
        with open(fd, "wb") as file:
            if mode is not None:
                with contextlib.suppress(PermissionError):  # FAT has no modes
                    os.fchmod(fd, mode)
            file.write(content)
            file.flush()
            with contextlib.suppress(OSError):  # not every file system can
                os.fsync(fd)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _new_file_beside(path: Path, mode: int) -> tuple[int, Path]:
    for number in range(_ATTEMPTS):
        partial = path.with_name(f".qubes-restore-svc-report-{os.getpid()}-{number}")
        with contextlib.suppress(FileExistsError):
            return os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), partial
    raise FileExistsError(f"{path.parent} is full of unfinished reports")
