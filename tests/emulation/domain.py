"""One emulated domain: its directories, its environment, and the processes that run in it.

Strategy: every process is started in a session of its own that the domain remembers; a program that a test
runs in the domain is known by its environment, which names the domain. To stop the domain is to kill all of
these, whatever they have started in the meantime.
"""

import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).resolve().parents[2]
#: The environment variable that names the directory of the domain in which a program runs.
VARIABLE = "EMULATED_DOMAIN"

#: Run by the interpreter with the repository, a module and its arguments: nothing of the environment counts.
_LAUNCH = (
    "import sys, importlib; sys.path.insert(0, sys.argv.pop(1)); module = sys.argv.pop(1); "
    "sys.exit(importlib.import_module(module).main())"
)


def write_program(path: Path, module: str, *arguments: str) -> None:
    """Make `path` a program that calls main() of a module of this repository, `arguments` before its own."""
    words = [sys.executable, "-IS", "-c", _LAUNCH, str(REPOSITORY), module, *arguments]
    path.unlink(missing_ok=True)
    path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
    path.chmod(0o755)


class Domain:
    """A domain's directories in `folder`, which are made if they are not there, and its processes."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self._folder = folder
        self.services = folder / "qubes-rpc"
        self.config = folder / "rpc-config"
        self.run = folder / "run"  #: XDG_RUNTIME_DIR
        self.bin = folder / "bin"  #: first on PATH
        self.home = folder / "home"
        self.tmp = folder / "tmp"
        self.journal = folder / "journal"
        self.socket = folder / "qrexec.sock"  #: its way to the switchboard
        for directory in (self.services, self.config, self.run, self.bin, self.home, self.tmp):
            directory.mkdir(parents=True, exist_ok=True)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._at_stop: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._stopped = False

    def environment(self) -> dict[str, str]:
        """What programs of the domain find in their environment."""
        return {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(self.run),
            "TMPDIR": str(self.tmp),
            "LANG": "C.UTF-8",
            "USER": "user",
            VARIABLE: str(self._folder),
        }

    def start(
        self,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str],
        stdin: int,
        stdout: int,
        stderr: int | IO[bytes],
        pass_fds: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a process of the domain; raises OSError, also when the domain was stopped."""
        with self._lock:
            if self._stopped:
                raise ProcessLookupError(f"{self.name} is not running")
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=pass_fds,
                cwd=self.home,
                start_new_session=True,
            )
            self._processes.append(process)
            return process

    def at_stop(self, action: Callable[[], None]) -> None:
        """Do this, too, when the domain is stopped. It may raise OSError."""
        self._at_stop.append(action)

    def processes(self) -> set[int]:
        """All processes that run in the domain now."""
        sessions = {process.pid for process in self._processes}
        return set(_members(sessions, f"{VARIABLE}={self._folder}".encode()))

    def freeze(self) -> None:
        """Let no process of the domain do anything more, and no new one start."""
        with self._lock:
            self._stopped = True
        frozen: set[int] = set()
        while new := self.processes() - frozen:
            for pid in new:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            frozen |= new

    def stop(self) -> None:
        """Kill every process of the domain, and let no new one start. What is in `run` is gone then."""
        with self._lock:
            self._stopped = True
        for action in self._at_stop:
            with suppress(OSError):
                action()
        while members := self.processes():
            for pid in members:
                _kill(pid)
        for process in self._processes:
            process.wait()
        shutil.rmtree(self.run, ignore_errors=True)

    def log(self, data: bytes) -> None:
        """Append to the domain's journal."""
        with self.journal.open("ab") as journal:
            journal.write(data)


def _members(sessions: set[int], variable: bytes) -> Iterator[int]:
    """The processes that live in one of these sessions, or have that variable; not this one."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with suppress(OSError):
            state = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            if state[0] in "ZX":
                continue
            environment = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            if int(state[3]) in sessions or variable in environment:
                yield int(entry)


def _kill(pid: int) -> None:
    """Kill a process and return when it has ended."""
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            ended = select.poll()
            ended.register(descriptor, select.POLLIN)
            ended.poll()
        finally:
            os.close(descriptor)
