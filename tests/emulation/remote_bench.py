"""An emulated Qubes on which a GUI domain asks dom0 for a restore: everything real but Qubes itself.

Strategy: `RemoteBench` is the whole system, dom0's service installed and nothing granted. Who asks is a
`Program` (a process of the GUI domain with code of the project) or a `RawCall` (the bare qrexec client, which
says whatever the test wants). A backup can be `held`: the location is a command of the GUI domain that stands
at a byte of the backup until it is released, so that a test finds the restore exactly where it wants it.
"""

import functools
import json
import os
import select
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.messages import Log
from qubes_restore_svc.wire.qrexec_call import LIST, START, VERIFY
from qubes_restore_svc.wire.report import Report, RestoreProgress
from tests.dom0_service.support import frame, open_message
from tests.emulation.dom0 import Dom0, wait_until
from tests.emulation.domain import REPOSITORY
from tests.emulation.emulated import EmulatedQubes
from tests.emulation.snapshot import Snapshot
from tests.support.backup_writer import PASSPHRASE, BackupWriter, ImagePlan, QubePlan
from tests.support.wire import from_dom0, parsed
from tests.system.support import offsets

__all__ = ["GUI", "LIST", "PASSPHRASE", "START", "VERIFY", "open_message"]

GUI = "sys-gui"
STORAGE = "sys-usb"
TEMPLATE = "debian-12-xfce"
LONG_S = 60.0
MEMORY = 1500  #: MiB of the worker
_OWN_FILES = (f"{GUI}/home/held/*", f"{GUI}/tmp/passphrase")

Json = dict[str, Any]
_Answer = TypeVar("_Answer", c.Plan, c.VolumeStarted, c.QubeFinished, c.Refused, Report)

_DATA = bytes(range(256)) * 1024
#: Five chunks of `CHUNK`, however it is compressed: it is not.
IMAGE = ImagePlan(1 << 20, ((4096, _DATA), ((1 << 19) + 512, b"more" * 100)))
CHUNK = 1 << 16


@dataclass(frozen=True)
class SampleBackup:
    """A backup, written once for all tests; `places` are where its members begin and end."""

    data: bytes
    places: dict[str, tuple[int, int]]

    def write(self, path: Path) -> None:
        """Write it to a file."""
        path.write_bytes(self.data)

    def beginning_of(self, member: str) -> int:
        """The offset of a member."""
        return self.places[member][0]

    def middle_of(self, member: str) -> int:
        """An offset in the middle of it."""
        return sum(self.places[member]) // 2


@functools.cache
def two_qubes() -> SampleBackup:
    """`first` and `second`, which need nothing but what is there; several chunks each."""
    qubes = [QubePlan(name, template=TEMPLATE, volumes={"private": IMAGE}) for name in ("first", "second")]
    writer = BackupWriter(qubes, log_n=4, chunk_size=CHUNK, compression="none")
    return SampleBackup(writer.to_bytes(), offsets(writer))


class RemoteBench:
    """The system; `folder` gets dom0's own files."""

    def __init__(self, qubes: EmulatedQubes, folder: Path) -> None:
        self.qubes = qubes
        self.dom0 = Dom0(qubes, folder)
        self.configure("")
        qubes.add_gui_domain(GUI)
        for service in (START, VERIFY, LIST):
            command = [sys.executable, "-m", "tests.emulation.service_driver", str(folder), service]
            qubes.install_dom0_service(service, command)

    # --- What is set up ----------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """dom0's files: configuration, locks, reports."""
        return self.dom0.folder

    @property
    def home(self) -> Path:
        """Of the GUI domain."""
        return self.qubes.root / GUI / "home"

    @property
    def journal(self) -> str:
        """Of dom0: what services say on standard error."""
        path = self.qubes.root / "dom0" / "journal"
        return path.read_text(errors="replace") if path.exists() else ""

    def configure(self, grants: str) -> None:
        """Write dom0's configuration; `grants` are the rights of the GUI domain, as YAML on one line."""
        config = self.folder / "config.yaml"
        text = f"report: {{directory: {self.folder / 'reports'}}}\nworker: {{memory: {MEMORY}}}\n"
        config.write_text(text + (f"grants: {{{GUI}: {{{grants}}}}}\n" if grants else ""))
        config.chmod(0o644)

    def grant(self, *services: str, source: str = GUI) -> None:
        """Let the policy allow these calls."""
        for service in services:
            self.qubes.grant(service, source)

    def put(self, backup: Path, qube: str = GUI) -> str:
        """Copy a backup into a qube's home; the path there."""
        return str(self.qubes.put_backup(qube, backup))

    def held(self, backup: SampleBackup, offset: int, from_pass: int = 1) -> "HeldBackup":
        """A backup in the GUI domain of which no more than `offset` bytes come before it is released."""
        return HeldBackup(self.home / "held", backup, offset, from_pass)

    # --- Who asks ----------------------------------------------------------------------------------

    def program(self, name: str, *words: str) -> "Program":
        """Start a program of `remote_programs` in the GUI domain."""
        command = [sys.executable, "-m", "tests.emulation.remote_programs", name, *words]
        return Program(
            subprocess.Popen(
                command,
                env=self.qubes.domain_environment(GUI),
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        )

    def client(self, request: Json) -> "Program":
        """Start the program over the client library, with this request."""
        program = self.program("client")
        program.say(json.dumps(request))
        return program

    def command(
        self, *words: str, passphrase: str = PASSPHRASE, stdin: str = ""
    ) -> "subprocess.CompletedProcess[str]":
        """Run `qvm-backup-restore --mgmt-vm` in the GUI domain to its end."""
        command = self.start_command(*words, passphrase=passphrase)
        stdout, stderr = command.communicate(stdin, timeout=LONG_S)
        return subprocess.CompletedProcess(command.args, command.returncode, stdout, stderr)

    def start_command(self, *words: str, passphrase: str = PASSPHRASE) -> "subprocess.Popen[str]":
        """Start it, in a session of its own, as from a terminal that the test has."""
        secret = self.home.parent / "tmp" / "passphrase"
        secret.write_text(f"{passphrase}\n")
        start = [sys.executable, "-m", "tests.emulation.remote_programs", "command", "--mgmt-vm"]
        return subprocess.Popen(
            [*start, *words, "-p", str(secret)],
            env=self.qubes.domain_environment(GUI),
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def call(self, service: str = START, source: str = GUI) -> "RawCall":
        """Call a service with nothing but the qrexec client."""
        return RawCall(
            subprocess.Popen(
                [str(self.qubes.client_program(source)), "dom0", service],
                env=self.qubes.domain_environment(source),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
            )
        )

    # --- What is there -----------------------------------------------------------------------------

    def new_qubes(self, before: Snapshot) -> set[str]:
        """The qubes that were not there then."""
        there = before["qubes"]
        assert isinstance(there, dict)
        return set(self.qubes.qubesd.names()) - set(there)

    def remove(self, *names: str) -> None:
        """Remove restored qubes."""
        app = self.qubes.app()
        for name in names:
            del app.domains[name]

    def service_runs(self) -> bool:
        """Does a service of dom0 run, or its guard?"""
        wanted = str(self.folder).encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"tests.emulation.service_driver" in words and wanted in words:
                    return True
        return False

    def wait_service_ended(self) -> None:
        """Return when dom0 has nothing more to do."""
        wait_until(lambda: not self.service_runs(), "the end of the service")

    def snapshot(self) -> Snapshot:
        """The complete state, without what the test itself puts into the GUI domain."""
        return self.qubes.snapshot(_OWN_FILES)

    def check_as_before(self, before: Snapshot) -> None:
        """Nothing may be left: the state becomes the one of then, and all locks are free."""
        self.wait_service_ended()
        self.dom0.check_as_before(before, _OWN_FILES)

    def check_nothing_leaked(self) -> None:
        """No service may have failed unforeseen, nor said or kept a passphrase."""
        assert "Traceback" not in self.journal, self.journal
        for path in self.folder.rglob("*"):
            if path.is_file() and path.name != "passphrase":
                assert PASSPHRASE not in path.read_text(errors="replace"), path
        assert PASSPHRASE not in self.journal


@contextmanager
def open_remote(folder: Path) -> Iterator[RemoteBench]:
    """A system below `folder`, alive while the `with` lasts, and checked for leaks at its end."""
    with EmulatedQubes(folder / "system") as qubes:
        bench = RemoteBench(qubes, folder / "dom0-files")
        yield bench
        bench.check_nothing_leaked()


class HeldBackup:
    """A backup that comes from a command. `location` is that command, a line."""

    def __init__(self, folder: Path, backup: SampleBackup, offset: int, from_pass: int) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._stands = folder / "stands"
        self._hold = folder / "hold"
        self._hold.touch()
        backup.write(folder / "backup")
        script = folder / "bring"
        script.write_text(
            f"#!/bin/sh\ncd {shlex.quote(str(folder))}\necho >>passes\n"
            f'test "$(wc -l <passes)" -ge {from_pass} || exec cat backup\n'
            f"head -c {offset} backup; touch stands\nwhile test -e hold; do sleep 0.02; done\n"
            f"exec tail -c +{offset + 1} backup\n"
        )
        script.chmod(0o755)
        self.location = f"sh {shlex.quote(str(script))}"

    @property
    def passes(self) -> list[str]:
        """A line for each time that it was read."""
        return (self._folder / "passes").read_text().splitlines()

    def wait(self) -> None:
        """Return when it stands there."""
        wait_until(self._stands.exists, "the backup to be read so far")

    def release(self) -> None:
        """Let the rest come, or end whoever would bring it."""
        self._hold.unlink(missing_ok=True)

    def remove(self) -> None:
        """Release it and take it away, with all files."""
        self.release()
        shutil.rmtree(self._folder)


@dataclass
class Program:
    """A process of the GUI domain that tells events, and is told lines. `events` are those that have come."""

    process: "subprocess.Popen[bytes]"
    events: list[Json] = field(default_factory=list)
    _unread: bytes = b""

    def say(self, line: str) -> None:
        """Tell it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def until(self, *kinds: str) -> Json:
        """The next event of one of these kinds."""
        while (event := self._next()) is not None:
            if event["event"] in kinds:
                return event
        raise AssertionError(f"it ended without {kinds}: {self.events}\n{self._errors()}")

    def rest(self) -> list[Json]:
        """Let it run to its end; everything that it told."""
        while self._next() is not None:
            pass
        assert self.end() == 0, self._errors()
        return self.events

    def kill(self) -> None:
        """SIGKILL for it, and for nothing that it has started."""
        self.process.kill()

    def end(self) -> int:
        """Wait for its end: the exit status."""
        with self.process:
            if self.process.stdin is not None:
                with suppress(BrokenPipeError):
                    self.process.stdin.close()
            return self.process.wait(LONG_S)

    def _next(self) -> Json | None:
        while b"\n" not in self._unread:
            piece = _read_some(self.process.stdout, 1 << 16, self.events)
            if not piece:
                return None
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        self.events.append(json.loads(line))
        return self.events[-1]

    def _errors(self) -> str:
        assert self.process.stderr is not None
        return "" if self.process.stderr.closed else self.process.stderr.read().decode()


@dataclass
class RawCall:
    """A call by the bare qrexec client. `heard` is everything that dom0 has said."""

    process: "subprocess.Popen[bytes]"
    heard: list[c.BrokerAnswer] = field(default_factory=list)

    def say(self, *messages: Json | bytes) -> None:
        """Say all of it at once; nobody may listen any more."""
        self.raw(b"".join(frame(message) for message in messages))

    def raw(self, data: bytes) -> None:
        """Write these bytes."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            while data:
                data = data[self.process.stdin.write(data) :]

    def hang_up(self) -> None:
        """Close what goes to dom0, which closes the call."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def kill(self) -> None:
        """SIGKILL for the client."""
        self.process.kill()

    def plan(self) -> c.Plan:
        """Wait for the next plan."""
        return self._until(c.Plan)

    def refused(self) -> c.Refused:
        """Wait for the end, which must be this."""
        refused = self._until(c.Refused)
        assert self.hear() is None
        self.end()
        return refused

    def report(self) -> Report:
        """The same."""
        report = self._until(Report)
        assert self.hear() is None
        self.end()
        return report

    def end(self) -> int:
        """Wait for its end: the exit code of the call."""
        with self.process:
            if self.process.stdin is not None:
                with suppress(BrokenPipeError):
                    self.process.stdin.close()
            return self.process.wait(LONG_S)

    def hear(self) -> c.BrokerAnswer | None:
        """The next message; None at the end."""
        head = self._read(4)
        if not head:
            return None
        message = parsed(from_dom0(), self._read(int.from_bytes(head, "big")))
        self.heard.append(message)
        return message

    def _until(self, kind: type[_Answer]) -> _Answer:
        while (message := self.hear()) is not None:
            if isinstance(message, kind):
                return message
            assert isinstance(message, (Log, RestoreProgress, c.VolumeStarted, c.QubeFinished)), message
        raise AssertionError(f"the call ended without a {kind.__name__}: {self.heard}")

    def _read(self, size: int) -> bytes:
        """`size` bytes, or none at the end."""
        data = b""
        while len(data) < size:
            piece = _read_some(self.process.stdout, size - len(data), self.heard)
            if not piece:
                assert not data, "it ends in the middle of a message"
                return b""
            data += piece
        return data


def _read_some(stream: IO[bytes] | None, size: int, heard: object) -> bytes:
    """At most `size` bytes, none at the end; fails if nothing comes for too long."""
    assert stream is not None
    assert select.select([stream], [], [], LONG_S)[0], f"silence after {heard}"
    return os.read(stream.fileno(), size)
