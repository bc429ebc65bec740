"""Who else could change a file or a directory: asked before anything depends on what is in it.

It is loaded before the stock command, and so imports little.
"""

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from qubes_restore_svc.errors import BadConfiguration
from qubes_restore_svc.hardening import close_read

#: Largest private text that is read, bytes.
MAX_SIZE = 1 << 20

#: Groups that may write: their members command dom0 anyway.
_TRUSTED_GROUPS = ("root", "qubes")


def writers_besides(status: os.stat_result, user_id: int) -> str | None:
    """Who else than root and `user_id` may write to what has this status (a clause's subject), if anybody.

    In a directory where everybody may write, but only delete what is theirs (`/tmp`), the owner counts.
    """
    if status.st_uid not in (0, user_id):
        return f"its owner, {user_name(status.st_uid)},"
    if stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX:
        return None
    if status.st_mode & stat.S_IWOTH:
        return "everybody"
    if status.st_mode & stat.S_IWGRP:
        group = _group_name(status.st_gid)
        if group not in _TRUSTED_GROUPS:
            return f"the group {group}"
    return None


def interference(directory: Path) -> str | None:
    """Who could put other files in the place of what is written to `directory`, a clause, if anybody could.

    For root, nobody but root may write to it, or to a directory on the way to it. Other users may share a
    directory with a group or with everybody, but it must be theirs, or root's.
    """
    user_id = os.geteuid()
    if user_id != 0:
        status = os.stat(directory)
        if status.st_uid not in (0, user_id):
            return f"{directory} belongs to {user_name(status.st_uid)}"
        return None
    for place in _way_to(directory):
        status = os.stat(place)
        if status.st_uid != 0:
            return f"{place} belongs to {user_name(status.st_uid)}"
        writer = writers_besides(status, 0)
        if writer is not None:
            return f"{writer} may write to {place}"
    return None


def read_private_text(path: Path, decides: str = "what a backup may bring back") -> str | None:
    """The text (UTF-8) of a file of at most MAX_SIZE bytes; None if there is none.

    `decides`: what whoever can write it decides, a clause.
    Raises BadConfiguration if it cannot be read, or if others than root and the user may write to it. The
    directory counts too: who may write there can put another file in its place.
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
        directory = Path(os.path.realpath(path)).parent
        for where, its_status in ((path, status), (directory, os.stat(directory))):
            if (writer := writers_besides(its_status, os.geteuid())) is not None:
                why = f"who can do that decides {decides}"
                mend = (
                    f"Run `chown root:root {where}` and `chmod go-w {where}`, after a look at what is in it."
                )
                raise BadConfiguration(f"{where}: {writer} may write to it, and {why}", advice=mend)
        with open(descriptor, "rb", closefd=False) as file:
            untrusted_data = file.read(MAX_SIZE + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    finally:
        close_read(descriptor)
    if len(untrusted_data) > MAX_SIZE:
        raise BadConfiguration(f"{path} is larger than {MAX_SIZE >> 10} KiB")
    try:
        return untrusted_data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = untrusted_data.count(b"\n", 0, error.start) + 1
        raise BadConfiguration(f"{path}, line {line}: this is not UTF-8") from None


def user_name(user_id: int) -> str:
    """The user's name, or `user 1000` if it has none."""
    try:
        return pwd.getpwuid(user_id).pw_name
    except KeyError:
        return f"user {user_id}"


def _way_to(directory: Path) -> Iterator[Path]:
    """The directory and those above it, as it is named and as it is after all symbolic links."""
    named, real = directory.absolute(), Path(os.path.realpath(directory))
    yield from dict.fromkeys((named, *named.parents, real, *real.parents))


def _group_name(group_id: int) -> str:
    try:
        return grp.getgrgid(group_id).gr_name
    except KeyError:
        return str(group_id)


def _unreadable(path: Path, error: OSError) -> BadConfiguration:
    return BadConfiguration(
        f"{path} cannot be read ({error.strerror})", advice="Without the file, the defaults hold."
    )
