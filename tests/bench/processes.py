"""One command, run to its end and measured from outside.

Strategy: the command is a child of ours. Until it ends, it and its descendants are looked at every TICK_S;
when it has ended, and before it is waited for, its own CPU time and bytes are still there and exact. Of
descendants that nobody waits for (a worker is killed with its namespace) the last look counts, so at most
TICK_S of them are missing. Looking costs less than 1 % of one core.
"""

import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from . import proc

#: Seconds between two looks.
TICK_S = 0.05
#: Seconds over which the use of the cores is taken together, at least.
WINDOW_S = 0.1
#: Share of all cores' time from which on they count as all busy.
BUSY_FROM = 0.9

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds and bytes of one run.

    `own` is the process itself, `others` its descendants as they were last seen (peak memory: of the
    largest), `waited` is the process with all descendants that were waited for. `busy` is the share of
    the wall time that lies in windows of WINDOW_S in which all of them used BUSY_FROM of `cores`.
    """

    wall_s: float
    own_cpu_s: float
    others_cpu_s: float
    waited_cpu_s: float
    own_peak: int
    others_peak: int
    waited_written: int
    others_written: int
    others_read: int
    busy: float


class CommandFailed(Exception):
    """The command ended with another status than 0."""


class _Watch:
    """What was last seen of each process."""

    def __init__(self, pid: int, start: float) -> None:
        self._pid = pid
        self._cpu_s: dict[int, float] = {}
        self._peak: dict[int, int] = {}
        self._io: dict[int, proc.Io] = {}
        self.timeline: list[tuple[float, float]] = [(start, 0.0)]  #: (time, CPU used so far)

    def look(self) -> None:
        for pid in (self._pid, *proc.descendants(self._pid)):
            self._cpu_s[pid] = max(self._cpu_s.get(pid, 0.0), proc.cpu_s(pid))
            self._peak[pid] = max(self._peak.get(pid, 0), proc.peak_memory(pid))
            seen, before = proc.io(pid), self._io.get(pid, proc.Io())
            self._io[pid] = proc.Io(max(seen.read, before.read), max(seen.written, before.written))
        self.timeline.append((time.monotonic(), sum(self._cpu_s.values())))

    def result(self, waited_cpu_s: float) -> Measured:
        own = self._pid
        return Measured(
            wall_s=self.timeline[-1][0] - self.timeline[0][0],
            own_cpu_s=self._cpu_s[own],
            others_cpu_s=sum(_without(own, self._cpu_s)),
            waited_cpu_s=waited_cpu_s,
            own_peak=self._peak[own],
            others_peak=max(_without(own, self._peak), default=0),
            waited_written=self._io[own].written,
            others_written=sum(count.written for count in _without(own, self._io)),
            others_read=max((count.read for count in _without(own, self._io)), default=0),
            busy=busy_share(self.timeline, cores()),
        )


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measured:
    """Run a command to its end. Raises CommandFailed; its standard error is ours, its output is dropped.

    Everything that is to be written anywhere is written out before, so that it is not on its bill.
    """
    os.sync()
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        env=None if environment is None else {**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        watch = _Watch(process.pid, start)
        with open(os.pidfd_open(process.pid), "rb") as ended:
            poll = select.poll()
            poll.register(ended, select.POLLIN)
            while not poll.poll(TICK_S * 1000):
                watch.look()
        watch.look()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise CommandFailed(f"{' '.join(command)} ended with status {process.returncode}")
    return watch.result(usage.ru_utime + usage.ru_stime)


def cores() -> int:
    """How many cores this process, and what it starts, may run on."""
    return len(os.sched_getaffinity(0))


def busy_share(timeline: Sequence[tuple[float, float]], cores: int) -> float:
    """The share of the time in which all cores were busy, 0 to 1.

    `timeline` is (time, CPU time used up to then), both in seconds, rising. It is cut into windows of at
    least WINDOW_S; the last one may be shorter.
    """
    busy_s = 0.0
    start, used = timeline[0]
    for number, (now, total) in enumerate(timeline):
        last = number == len(timeline) - 1
        if now - start < WINDOW_S * 0.999 and not last:
            continue
        if now > start and total - used >= BUSY_FROM * cores * (now - start):
            busy_s += now - start
        start, used = now, total
    whole_s = timeline[-1][0] - timeline[0][0]
    return busy_s / whole_s if whole_s > 0 else 0.0


def _without(key: int, values: Mapping[int, _T]) -> list[_T]:
    return [value for other, value in values.items() if other != key]
