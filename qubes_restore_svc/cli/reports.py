"""Where the report is to be written: known to be possible before the work begins.

Strategy: every way in which the writing would fail at the end, or would put it over something else, is looked
for in the beginning.
"""

import os
import stat
from pathlib import Path

from qubes_restore_svc.errors import UsageError
from qubes_restore_svc.wire.names import strip_control


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
