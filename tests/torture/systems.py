"""Real commands on a system that fails them: faults of system calls, and signals.

Strategy: strace takes hold of the broker or of the worker while the worker waits for the rest of the backup,
and lets the N-th call of one kind fail in every thread; so the fault hits a restore at work, not the start of
an interpreter. `command` is traced from its first call on, the sandbox with it: what the interpreter says of
a fault that hits itself is not ours, all else is judged alike. Signals need no tracer; their moment is drawn.
"""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qubes_restore_svc.errors import ExitStatus
from tests.support.compare import sha256
from tests.system.support import Outcome as Ended
from tests.system.support import (
    Run,
    finished,
    offsets,
    passphrase_file,
    processes_with,
    running,
    small_backup,
    wait_for,
)

from .judge import DAMAGE_KINDS, OUR_MISTAKE
from .runner import Outcome, Tell, silent

#: System calls of broker and worker, and the errors that each of them may really give.
FAULTS: dict[str, tuple[int, ...]] = {
    "read": (errno.EIO, errno.EINTR),
    "pread64": (errno.EIO, errno.EINTR, errno.ENOMEM),
    "preadv2": (errno.EIO, errno.EINTR),
    "write": (errno.ENOSPC, errno.EIO, errno.EINTR, errno.EAGAIN),
    "pwrite64": (errno.ENOSPC, errno.EIO, errno.EINTR, errno.ENOMEM),
    "openat": (errno.EMFILE, errno.ENOMEM, errno.EIO, errno.EINTR),
    "close": (errno.EIO, errno.EINTR, errno.ENOSPC),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EINTR),
    "ftruncate": (errno.ENOSPC, errno.EIO, errno.EINTR),
    "mkdirat": (errno.ENOSPC, errno.EIO, errno.ENOMEM),
    "renameat2": (errno.ENOSPC, errno.EIO, errno.ENOMEM),
    "newfstatat": (errno.EIO, errno.ENOMEM),
    "getdents64": (errno.EIO, errno.ENOMEM),
    "mmap": (errno.ENOMEM, errno.EAGAIN),
    "mprotect": (errno.ENOMEM,),
    "clone3": (errno.EAGAIN, errno.ENOMEM),
    "socketpair": (errno.EMFILE, errno.ENOMEM),
    "sendto": (errno.ENOMEM, errno.EINTR, errno.EAGAIN),
    "sendmsg": (errno.ENOMEM, errno.EMFILE, errno.EAGAIN, errno.EINTR),
    "recvfrom": (errno.ENOMEM, errno.EINTR, errno.EAGAIN),
    "recvmsg": (errno.ENOMEM, errno.EMFILE, errno.EINTR),
    "epoll_wait": (errno.EINTR,),
    "epoll_ctl": (errno.ENOSPC, errno.ENOMEM),
}
_SIDES = ("broker", "worker", "command")
_WHEN = {"broker": (1, 2, 3, 5, 8, 13), "worker": (1, 2, 3, 5, 8, 13), "command": (1, 4, 16, 64, 256)}
#: What a worker never calls.
_BROKER_ALONE = {"pwrite64", "fsync", "ftruncate", "mkdirat", "renameat2", "newfstatat", "getdents64"}
#: Seconds in which a run has to end: those that a silent worker is waited for among them.
_PATIENCE_S = 60
#: Seconds that a signal may come after the start.
_SPAN_S = 2.0
#: Seconds in which a cancel is answered, and what tracing and another run beside it may cost.
_AT_ONCE_S = 4.0
_STATUSES = set(ExitStatus)


@dataclass(frozen=True, slots=True)
class CallCase:
    """One fault: the `when`-th `call` of each thread of `side` fails with the error number `error`."""

    side: str
    call: str
    error: int
    when: int

    def __str__(self) -> str:
        return f"{errno.errorcode[self.error]} at {self.call} {self.when} of the {self.side}"

    @property
    def injection(self) -> list[str]:
        """Arguments of strace."""
        fault = f"inject={self.call}:error={errno.errorcode[self.error]}:when={self.when}"
        return ["-f", "-qqq", "-e", f"trace={self.call}", "-e", fault]


def call_cases() -> list[CallCase]:
    """All of them, those at work before those of the start."""
    return [
        CallCase(side, call, error, when)
        for side in _SIDES
        for call, errors in FAULTS.items()
        for error in errors
        for when in _WHEN[side]
        if side != "worker" or call not in _BROKER_ALONE
    ]


@dataclass(frozen=True, slots=True)
class SignalCase:
    """A signal to the command (`group`), the broker alone, or the worker, `delay` seconds after the start."""

    whom: str
    number: signal.Signals
    delay: float

    def __str__(self) -> str:
        return f"{self.number.name} to the {self.whom} after {self.delay:.3f} s"


def signal_cases() -> list[SignalCase]:
    """Seven hundred moments."""
    kinds = [
        *[("group", number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        *[("broker", number) for number in (signal.SIGTERM, signal.SIGKILL)],
        *[("worker", number) for number in (signal.SIGTERM, signal.SIGKILL)],
    ]
    drawn = random.Random(700)
    return [SignalCase(*kinds[number % len(kinds)], drawn.uniform(0, _SPAN_S)) for number in range(700)]


#: What of a campaign has a length, and a name to be called by.
SYSTEM_CAMPAIGNS: dict[str, Callable[[], Sequence[CallCase | SignalCase]]] = {
    "calls": call_cases,
    "signals": signal_cases,
}


def run_system_campaign(
    campaign: str, numbers: Sequence[int], processes: int, tell: Tell = silent
) -> Outcome:
    """Run the cases of these numbers, `processes` at a time."""
    cases, outcome = SYSTEM_CAMPAIGNS[campaign](), Outcome()
    with ThreadPoolExecutor(processes) as pool:
        results = pool.map(lambda number: run_system_case(cases[number]), numbers)
        for done, (number, (status, faults)) in enumerate(zip(numbers, results, strict=True), 1):
            outcome.statuses[status] += 1
            told = [f"{campaign} {number} ({cases[number]}): {fault}" for fault in faults]
            outcome.faults += told
            tell(done, told)
    return outcome


def run_system_case(case: CallCase | SignalCase) -> tuple[str, list[str]]:
    """Run the command once; its status as text, and what was wrong."""
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        directory = Path(name)
        try:
            if isinstance(case, CallCase):
                return _run_call_case(case, directory)
            return _run_signal_case(case, directory)
        except subprocess.TimeoutExpired:
            return "hung", [f"it did not end within {_PATIENCE_S} s"]


# --- Faults of system calls ------------------------------------------------------------------------


@cache
def _backup() -> tuple[bytes, int]:
    """The archive, and how much of it comes before the fault: header, qubes.xml, and one chunk."""
    writer = small_backup()
    return writer.to_bytes(), offsets(writer)["vm10/private.img.000.enc"][1]


def _run_call_case(case: CallCase, directory: Path) -> tuple[str, list[str]]:
    archive, first = _backup()
    target, report = directory / "target", directory / "report.json"
    arguments = ("extract", "-", "--to", target, "-p", passphrase_file(directory))
    trace = directory / "trace"
    prefix = ["strace", "-o", str(trace), *case.injection] if case.side == "command" else []
    with running(*arguments, report=report, feed=True, prefix=prefix) as run:
        if case.side == "command":
            _feed(run, archive)
        else:
            run.feed(archive[:first])
            worker = run.worker()
            run.wait_taken()
            with _attached(case, run.process.pid if case.side == "broker" else worker, trace):
                _feed(run, archive[first:])
                _wait(run)
        _wait(run)
        ended = run.outcome()
        # strace ends with the signal that ended what it traced, or with its status.
        struck = "INJECTED" in trace.read_text(errors="replace")
        faults = _judge(ended, target, run.mark, of_the_start=case.side == "command")
    if case.side != "command":
        faults += _unnamed(ended, case.error)
    if not struck and ended.status != ExitStatus.COMPLETE:
        faults.append("nothing was injected, and it failed")
    return (str(ended.status) if struck else "not struck"), [*faults, *(_said(ended) if faults else [])]


def _wait(run: Run) -> None:
    try:
        run.process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        run.process.kill()  # or whoever feeds it would wait for ever
        raise


def _feed(run: Run, data: bytes) -> None:
    """Send the rest of the backup, from a thread: nobody may take it."""

    def feed() -> None:
        run.feed(data)
        run.end_of_backup()

    threading.Thread(target=feed, daemon=True).start()


@contextlib.contextmanager
def _attached(case: CallCase, process: int, trace: Path) -> Iterator[None]:
    """strace holds all threads of the process."""
    tracer = subprocess.Popen(
        ["strace", "-o", str(trace), *case.injection, "-p", str(process)], stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: tracer.poll() is not None or _traced(process))
        yield
    finally:
        tracer.terminate()
        tracer.wait()


def _traced(process: int) -> bool:
    with contextlib.suppress(OSError):
        threads = list(Path(f"/proc/{process}/task").iterdir())
        return all("TracerPid:\t0\n" not in (thread / "status").read_text() for thread in threads)
    return True


# --- Signals -----------------------------------------------------------------------------------------


def _run_signal_case(case: SignalCase, directory: Path) -> tuple[str, list[str]]:
    backup, target, report = directory / "backup", directory / "target", directory / "report.json"
    backup.write_bytes(_backup()[0])
    arguments = ("extract", backup, "--to", target, "-p", passphrase_file(directory))
    with running(*arguments, report=report) as run:
        time.sleep(case.delay)
        started = bool(run.processes())
        began = time.monotonic()
        _send(case, run)
        run.process.wait(_PATIENCE_S)
        took = time.monotonic() - began
        ended = run.outcome()
        killed = ended.status in (-signal.SIGKILL, -case.number)
        if not killed:
            faults = _judge(ended, target, run.mark)
        elif case.number != signal.SIGKILL and started:
            faults = [f"it died of {case.number.name} without a word"]
        else:
            faults = _after_death(run, arguments, target)
    answers = {ExitStatus.CANCELLED, ExitStatus.COMPLETE} | (set() if started else {ExitStatus.NOTHING})
    if case.whom != "worker" and not killed and ended.status not in answers:
        faults.append(f"status {ended.status} after a cancel")
    if case.whom != "worker" and took > _AT_ONCE_S:
        faults.append(f"it took {took:.1f} s to end")
    return str(ended.status), [*faults, *(_said(ended) if faults else [])]


def _send(case: SignalCase, run: Run) -> None:
    with contextlib.suppress(ProcessLookupError, StopIteration):
        if case.whom == "group":
            os.killpg(run.process.pid, case.number)
        elif case.whom == "broker":
            os.kill(run.process.pid, case.number)
        else:
            for process in run.processes():
                os.kill(process, case.number)


def _after_death(run: Run, arguments: tuple[str | Path, ...], target: Path) -> list[str]:
    """A broker that was killed cannot clean up: its processes end with it, the rest the next run removes."""
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not run.processes())
    faults = [f"{len(run.processes())} processes are left"] if run.processes() else []
    there = sorted(path.name for path in target.iterdir() if path.name[0] != ".") if target.exists() else []
    rest = [word for name in there for word in ("--exclude", name)]
    again = finished(*arguments, *rest) if len(there) < 3 else None
    if again is not None and again.status != ExitStatus.COMPLETE:
        faults.append(f"the next restore ends with status {again.status}: {again.errors}")
    hidden = [path.name for path in target.iterdir() if path.name[0] == "."] if target.exists() else []
    if hidden and again is not None:
        faults.append(f"{hidden} are left, even after the next restore")
    return faults + _wrong_images(target)


# --- The four questions -------------------------------------------------------------------------------


@cache
def _expected() -> dict[str, str]:
    return {
        f"{qube.name}/{volume}.img": image.sha256()
        for qube in small_backup().qubes
        for volume, image in qube.volumes.items()
    }


def _judge(ended: Ended, target: Path, mark: str, *, of_the_start: bool = False) -> list[str]:
    """What is wrong whatever was done to it. `of_the_start`: the loader or the interpreter may have been hit,
    whose statuses are not ours, as long as nothing came of it."""
    faults = _wrong_images(target)
    there = {path.name for path in target.iterdir()} if target.exists() else set()
    faults += [f"{name} is left" for name in sorted(there) if name.startswith(".")]
    complete = {"work", "vault", "debian"}
    if ended.status not in _STATUSES and (there or ended.report or not of_the_start):
        faults.append(f"status {ended.status}")
    if ended.status == ExitStatus.COMPLETE and there != complete:
        faults.append(f"status 0 with {sorted(there)}")
    if ended.report is not None:
        faults += _differs(ended.report, ended.status, there)
    with contextlib.suppress(AssertionError):
        _wait_shortly(lambda: not processes_with(mark))
    if left := processes_with(mark):
        faults.append(f"{len(left)} processes are left")
    return faults


def _differs(report: dict[str, object], status: int, there: set[str]) -> list[str]:
    qubes = report["qubes"]
    assert isinstance(qubes, list)
    restored = {qube["name"] for qube in qubes if qube["outcome"] == "restored"}
    faults = [] if restored == there else [f"restored {sorted(restored)}, and there are {sorted(there)}"]
    if report["status"] != status and (report["status"], status) != (ExitStatus.COMPLETE, ExitStatus.PARTLY):
        faults.append(f"the report says {report['status']}, the status is {status}")
    return faults


def _wrong_images(target: Path) -> list[str]:
    found = {str(path.relative_to(target)): sha256(path) for path in target.glob("[!.]*/*.img")}
    wrong = [name for name, digest in found.items() if _expected().get(name) != digest]
    whole = {name.split("/")[0] for name in found}
    missing = [name for name in _expected() if name.split("/")[0] in whole and name not in found]
    return [f"{name} is not what went in" for name in wrong] + [f"{name} is missing" for name in missing]


def _unnamed(ended: Ended, error: int) -> list[str]:
    """Is the cause what is named, and nobody else blamed?"""
    faults = [f"it says {phrase!r}" for phrase in OUR_MISTAKE if phrase in ended.everything]
    kinds = _kinds(ended.report)
    faults += [f"it is blamed on the backup ({kind})" for kind in sorted(kinds & DAMAGE_KINDS)]
    if ended.status != ExitStatus.COMPLETE and not _names(ended, error):
        faults.append(f"the cause is not named ({os.strerror(error)})")
    return faults


def _names(ended: Ended, error: int) -> bool:
    words = {
        errno.ENOMEM: ("memory", "threads"),
        errno.EAGAIN: ("temporarily unavailable", "threads", "processes", "memory"),
        errno.EMFILE: ("files open", "open files", "descriptors"),
        errno.ENOSPC: ("no space", "no room"),
        errno.EIO: ("input/output error", "read error"),
        errno.EINTR: ("interrupted",),
    }[error]
    return any(word in ended.everything.lower() for word in words)


def _kinds(found: object) -> set[str]:
    """The kinds of all errors in a report."""
    if isinstance(found, dict):
        own = {found["kind"]} if isinstance(found.get("kind"), str) else set()
        return own.union(*map(_kinds, found.values()))
    return set[str]().union(*map(_kinds, found)) if isinstance(found, list) else set()


def _said(ended: Ended) -> list[str]:
    """What goes with a fault, so that it can be understood without another run."""
    errors = [line for line in ended.errors.splitlines() if line.strip()]
    report = json.dumps(ended.report)[:600] if ended.report else "no report"
    return [f"    it said: {' | '.join(errors)[-900:] or 'nothing'}; {report}"]


def _wait_shortly(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 2
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
