"""Who holds a lock, since when and for what: a line in the lock file, for whoever finds it locked.

Strategy: the kernel's lock alone counts; the line only tells. It is written by whoever got the lock and read
by whoever did not, so it may be old or half written: what does not match, or names a process that is gone, is
nobody. Both sides of the locks below /run use this, and it needs nothing of ours.
"""

import os
import pwd
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

#: What a holder does, as it is told: "… has been … since".
Activity = Literal["restoring", "verifying", "listing a backup"]

_WORDS: dict[Activity, str] = {"restoring": "restore", "verifying": "verify", "listing a backup": "list"}
_ACTIVITIES = {word: activity for activity, word in _WORDS.items()}
_LINE = re.compile(
    rb"(?P<pid>[0-9]{1,10}) (?P<started>[0-9]{1,20}) (?P<since>[0-9]{1,12}) (?P<user>[a-zA-Z0-9_.-]{1,64})"
    rb" (?P<client>[a-zA-Z0-9_.-]{1,64}) (?P<word>restore|verify|list)\n"
)
_MAX_LINE = 1000
_STARTED_FIELD = 22 - 3  # of /proc/PID/stat (proc(5)), counted from the state, which is the third


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds a lock. `started` in the kernel's ticks, `since` in seconds since the epoch."""

    pid: int
    started: int
    since: int
    user: str
    client: str
    activity: Activity

    def is_alive(self) -> bool:
        """Does that very process still run?"""
        return _start_time(self.pid) == self.started

    def describe(self) -> str:
        """`sys-gui has been restoring since 14:05 on 2026-11-23 (process 4711 of user)`."""
        since = datetime.fromtimestamp(self.since).astimezone()
        return (
            f"{self.client} has been {self.activity} since {since:%H:%M on %Y-%m-%d}"
            f" (process {self.pid} of {self.user})"
        )


def write_holder(file: int, client: str, activity: Activity) -> None:
    """Write into the open lock file that this process has it, for `client`. Raises OSError."""
    pid = os.getpid()
    user = str(os.getuid())
    with suppress(KeyError):
        user = pwd.getpwuid(os.getuid()).pw_name
    line = (
        f"{pid} {_start_time(pid) or 0} {int(time.time())} {_word(user)} {_word(client)} {_WORDS[activity]}\n"
    )
    os.ftruncate(file, 0)
    os.pwrite(file, line.encode(), 0)


def read_holder(path: Path) -> Holder | None:
    """Who has written itself into the lock file; None if nobody can be told."""
    try:
        with open(path, "rb") as file:
            match = _LINE.fullmatch(file.read(_MAX_LINE))
    except OSError:
        return None
    if match is None:
        return None
    return Holder(
        int(match["pid"]),
        int(match["started"]),
        int(match["since"]),
        match["user"].decode(),
        match["client"].decode(),
        _ACTIVITIES[match["word"].decode()],
    )


def _word(text: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_.-]", "-", text)[:64] or "-"


def _start_time(pid: int) -> int | None:
    """When the process started, in the kernel's ticks; None if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[_STARTED_FIELD])
