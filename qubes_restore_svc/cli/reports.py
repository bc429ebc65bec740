"""The report as a file: known to be possible before the work begins, and there in one piece after it.

Strategy: an ordinary file is replaced by a new one that is complete; what is none (`/dev/stdout`, a
pipe, a device) is written to where it is, never replaced.
"""

import contextlib
import os
import stat
from pathlib import Path

from qubes_restore_svc.broker.report import Report
from qubes_restore_svc.errors import UsageError
from qubes_restore_svc.wire.names import strip_control

_ATTEMPTS = 100


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


def write_report(path: Path, report: Report, mode: int = 0o666) -> None:
    """Write `report` as JSON; raises OSError. `mode`: permissions of a new file, less the umask."""
    content = (report.model_dump_json(indent=2) + "\n").encode()
    if path.exists() and not path.is_file():
        # A pipe without a reader would let an ordinary open wait, past every signal.
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        os.set_blocking(fd, True)
        with open(fd, "wb") as special:
            special.write(content)
        return
    path = Path(os.path.realpath(path))
    fd, partial = _new_file_beside(path, mode)
    try:
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            with contextlib.suppress(OSError):  # not every file system can
                os.fsync(fd)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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


def _new_file_beside(path: Path, mode: int) -> tuple[int, Path]:
    for number in range(_ATTEMPTS):
        partial = path.with_name(f".qubes-restore-svc-report-{os.getpid()}-{number}")
        with contextlib.suppress(FileExistsError):
            return os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), partial
    raise FileExistsError(f"{path.parent} is full of unfinished reports")
