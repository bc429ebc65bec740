"""What the kernel tells of another process, by its id.

Strategy: one function a figure, on files of proc(5) and on the process's CPU clock, which is exact to the
nanosecond and counts threads that have ended. A process that is gone, or that may not be looked at, counts
nothing: whoever samples keeps the last figure he got. A child that has ended and was not waited for can
still be asked, except for its memory.
"""

import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Io:
    """Bytes: `read` by system calls of the read family (not from sockets); `written` to pages of files that
    lie on a disk. With those of descendants that were waited for."""

    read: int = 0
    written: int = 0


def cpu_s(pid: int) -> float:
    """CPU time of all threads, also of those that have ended; seconds."""
    try:
        # The number that clock_getcpuclockid(3) makes: the process, and 2 for "as the scheduler counts".
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return 0.0


def peak_memory(pid: int) -> int:
    """Most memory that was resident at once since the program was started, bytes."""
    return parse_peak_memory(_read(f"{pid}/status"))


def io(pid: int) -> Io:
    """Bytes read and written."""
    return parse_io(_read(f"{pid}/io"))


def descendants(pid: int) -> list[int]:
    """Children, their children, and so on."""
    found: list[int] = []
    todo = [pid]
    while todo:
        for task in (_PROC / str(todo.pop()) / "task").glob("[0-9]*"):
            children = [int(child) for child in _read(f"{task.relative_to(_PROC)}/children").split()]
            found += children
            todo += children
    return found


def parse_peak_memory(status: str) -> int:
    """Bytes of VmHWM in the text of /proc/PID/status; 0 if it has none."""
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024


def parse_io(text: str) -> Io:
    """The figures in the text of /proc/PID/io; zeros if it is empty."""
    values = dict(line.split(": ") for line in text.splitlines())
    return Io(int(values.get("rchar", 0)), int(values.get("write_bytes", 0)))


def _read(name: str) -> str:
    try:
        return (_PROC / name).read_text()
    except OSError:
        return ""
