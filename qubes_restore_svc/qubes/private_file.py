"""Reading a file that decides what others may do: only if nobody but root and the user could have written it.

Strategy: open once, then look at what was opened. The directory counts too: whoever may write there can put
another file in its place.
"""

import os
import stat
from pathlib import Path

from qubes_restore_svc.errors import BadConfiguration
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.owners import writers_besides


def read_private_text(path: Path, max_size: int) -> str | None:
    """The text (UTF-8) of a file of at most `max_size` bytes; None if there is none.

    Raises BadConfiguration if it cannot be read, or if others than root and the user may write it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        if path.is_symlink():
            raise BadConfiguration(f"{path} is a link to a file that is not there") from None
        return None
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            what = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise BadConfiguration(f"{path} is {what}", advice="Put a text file there, or nothing.")
        _check_writers(path, status)
        directory = Path(os.path.realpath(path)).parent
        _check_writers(directory, os.stat(directory))
        with open(descriptor, "rb", closefd=False) as file:
            untrusted_data = file.read(max_size + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    finally:
        close_read(descriptor)
    if len(untrusted_data) > max_size:
        raise BadConfiguration(f"{path} is larger than {max_size >> 10} KiB")
    try:
        return untrusted_data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = untrusted_data.count(b"\n", 0, error.start) + 1
        raise BadConfiguration(f"{path}, line {line}: this is not UTF-8") from None


def _check_writers(path: Path, status: os.stat_result) -> None:
    writer = writers_besides(status, os.geteuid())
    if writer is not None:
        raise BadConfiguration(
            f"{path}: {writer} may write to it, and whoever does chooses what a backup may bring back",
            advice=f"Run `chown root:root {path}` and `chmod go-w {path}`, after a look at what is in it.",
        )


def _unreadable(path: Path, error: OSError) -> BadConfiguration:
    return BadConfiguration(
        f"{path} cannot be read ({error.strerror})", advice="Without the file, the defaults hold."
    )
