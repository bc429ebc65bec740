"""The command as a process, run as a person or a script runs it, with a look at what it leaves behind.

Strategy: every run gets a mark, the name of a directory on its module path. The worker's command line holds
that path, so all processes of one run are found by its mark, in whatever namespace. A backup can come
through a pipe whose writer is the test: the run then stands wherever in the archive the test wants it.
"""

import contextlib
import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.support.backup_writer import (
    PASSPHRASE,
    BackupWriter,
    RawMember,
    join_members,
    outer_member,
    sample_qube,
)
from tests.support.damage import with_cost
from tests.support.documents import checked
from tests.support.fixtures import REPOSITORY

#: Seconds within which a person must be back at the prompt.
AT_ONCE_S = 5.0
#: Seconds after which a test gives up.
PATIENCE_S = 60.0

CHUNK = 1 << 16


def small_backup() -> BackupWriter:
    """Three qubes of several chunks each, and dom0's home, cheap to derive."""
    qubes = [
        sample_qube("work", 1 << 20, 0.75, seed=1),
        sample_qube("vault", 1 << 19, 0.5, seed=2),
        sample_qube("debian", 1 << 18, 0.6, "TemplateVM", seed=4),
    ]
    return BackupWriter(qubes, chunk_size=CHUNK, log_n=10, dom0_home=True)


def costly_backup(log_n: int = 19) -> bytes:
    """A cheap first qube, and a second one whose later chunks claim to be costly.

    They are not what they claim, which shows only when a key has been derived for seconds.
    """
    writer = BackupWriter(
        [sample_qube("vault", 1 << 18, 0.5, seed=2), sample_qube("work", 1 << 20, 0.75, seed=1)],
        chunk_size=CHUNK,
        log_n=10,
    )
    members = [
        replace(member, data=with_cost(member.data, log_n)) if _is_late_chunk_of_work(member) else member
        for member in writer.members()
    ]
    return join_members(members)


def offsets(writer: BackupWriter) -> dict[str, tuple[int, int]]:
    """Where each member of the archive begins and ends, by its name."""
    found: dict[str, tuple[int, int]] = {}
    position = 0
    for member in writer.members():
        size = len(outer_member(member))
        found[member.name] = (position, position + size)
        position += size
    return found


@dataclass
class Run:
    """A command that is running; `mark` is in the command line of all its processes but the first."""

    process: subprocess.Popen[bytes]
    mark: str
    report: Path | None = None
    began: float = field(default_factory=time.monotonic)

    def feed(self, data: bytes) -> None:
        """Send a part of the backup; the run may be gone meanwhile."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(data)
            self.process.stdin.flush()

    def wait_taken(self) -> None:
        """Wait until the worker has read all that it was sent; it waits for more then."""
        assert self.process.stdin is not None
        pipe = self.process.stdin.fileno()
        wait_for(lambda: fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)) == bytes(4))

    def end_of_backup(self) -> None:
        """Nothing more comes."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> float:
        """Signal the process group, as a terminal does; the seconds until the run is over."""
        began = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        return self.seconds_until_over(began)

    def seconds_until_over(self, since: float | None = None) -> float:
        """Wait for the end of the run."""
        began = time.monotonic() if since is None else since
        self.process.wait(PATIENCE_S)
        return time.monotonic() - began

    def outcome(self) -> "Outcome":
        """All that the run said, once it is over."""
        output, errors = self.process.stdout, self.process.stderr
        assert output is not None and errors is not None
        said = Outcome(self.process.wait(PATIENCE_S), output.read().decode(), errors.read().decode(), None)
        if self.report is not None and self.report.exists():
            said.report = checked(self.report.read_text(), "report")
        return said

    def processes(self) -> list[int]:
        """All processes of this run but the first."""
        return processes_with(self.mark)

    def worker(self) -> int:
        """The process that reads the archive."""
        wait_for(lambda: any(map(is_worker, self.processes())))
        return next(process for process in self.processes() if is_worker(process))


@dataclass
class Outcome:
    """A run that is over."""

    status: int
    output: str
    errors: str
    report: dict[str, object] | None

    @property
    def everything(self) -> str:
        """All text that came out of it."""
        return self.output + self.errors + json.dumps(self.report, ensure_ascii=False)


def command(*arguments: str | Path) -> list[str]:
    """The command line of `qubes-restore-svc` with these arguments."""
    return [sys.executable, "-m", "qubes_restore_svc", *map(str, arguments)]


def environment(mark: str) -> dict[str, str]:
    """An environment in which processes bear `mark`.

    Byte code is not cached: that is what Python does with source code that was not installed.
    """
    return {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}:/nonexistent/{mark}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "",
        "LC_ALL": "C.UTF-8",
    }


@contextlib.contextmanager
def running(
    *arguments: str | Path,
    prefix: Sequence[str] = (),
    report: Path | None = None,
    feed: bool = False,
    cwd: Path | None = None,
) -> Iterator[Run]:
    """Start the command in a process group of its own; whatever happens, nothing of it stays.

    `feed`: its standard input is a pipe of the test's. `prefix` is a program that runs it.
    """
    mark = f"mark-{secrets.token_hex(8)}"
    if report is not None:
        arguments = (*arguments, "--report", report)
    process = subprocess.Popen(
        [*prefix, *command(*arguments)],
        stdin=subprocess.PIPE if feed else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(mark),
        cwd=cwd or REPOSITORY,
        start_new_session=True,
    )
    run = Run(process, mark, report)
    try:
        yield run
    finally:
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if process.poll() is None:
            process.kill()
            process.wait()
        for left in run.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)


def finished(*arguments: str | Path, report: Path | None = None, input: bytes | None = None) -> Outcome:
    """Run the command to its end."""
    with running(*arguments, report=report, feed=input is not None) as run:
        if input is not None:
            run.feed(input)
            run.end_of_backup()
        return run.outcome()


def passphrase_file(directory: Path, passphrase: str = PASSPHRASE) -> Path:
    """A file for `-p`."""
    path = directory / "passphrase"
    path.write_text(passphrase + "\n", encoding="utf-8")
    return path


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)


def processes_with(mark: str) -> list[int]:
    """All processes of the machine with `mark` in their command lines."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def is_worker(process: int) -> bool:
    """Is it the Python that reads the archive, and not bubblewrap around it?"""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        return words[0] == os.fsencode(sys.executable) and b"--calls-fd" in words
    return False


def _is_late_chunk_of_work(member: RawMember) -> bool:
    return member.name.startswith("vm11/private.img.") and member.name not in (
        "vm11/private.img.000.enc",
        "vm11/private.img.001.enc",
    )
