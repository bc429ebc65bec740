"""Invariant 7, measured on a real process: the worker's peak memory stays within its budget."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.qrexec_call import READY
from qubes_restore_svc.worker.__main__ import _advice_in_qube
from tests.support.wire import framed, from_worker, heard

from ..support.backup_writer import PASSPHRASE, BackupWriter, QubePlan, sample_image
from ..support.fixtures import REPOSITORY
from .support import MIB

CHUNK = 32 * MIB
#: 128 MiB for each derivation; seven at once, with a chunk, would take 928 MiB, and the worker itself.
LOG_N = 17
JOBS = 2
#: The least memory that a worker may be given.
LEAST_MIB = 144


@pytest.fixture(scope="module")
def backup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One volume of seven large chunks, whose keys are dear."""
    path = tmp_path_factory.mktemp("memory") / "backup"
    image = sample_image(6 * CHUNK + MIB, 1, 1)
    work = QubePlan("work", volumes={"private": image})
    costs: Callable[[int], int] = lambda number: 10 if number < 2 else LOG_N  # noqa: E731 - a table of two
    BackupWriter([work], compression="none", chunk_size=CHUNK, log_n=costs).write(path)
    yield path
    path.unlink()


class Worker:
    """A worker process; the broker's end of its session."""

    def __init__(self, backup: Path) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, backup.open("rb") as archive:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "qubes_restore_svc.worker"),
                    *("--calls-fd", str(theirs.fileno())),
                    *("--archive-fd", str(archive.fileno())),
                ],
                pass_fds=[theirs.fileno(), archive.fileno()],
                cwd=REPOSITORY,
            )
        assert self._channel.recv(100) == READY
        self._session, theirs = socket.socketpair()
        with theirs:
            self._session.sendall(b"restore.Session dom0\0")
            socket.send_fds(self._channel, [b"call"], [theirs.fileno()])

    def say(self, message: m.Message) -> None:
        self._session.sendall(framed(message))

    def listen(self) -> Iterator[m.WorkerMessage]:
        end = from_worker()
        while data := self._session.recv(1 << 16):
            yield from heard(end, data)

    def peak_memory(self) -> int:
        """VmHWM of the process, bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
        assert found is not None
        return int(found[1]) << 10

    def end(self) -> int:
        """Hang up; the status with which the process ends by itself."""
        self._session.close()
        self._channel.close()
        try:
            return self.process.wait(5)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.mark.parametrize("budget_mib", [300, 600])
def test_the_peak_memory_of_a_worker_stays_within_its_budget(backup: Path, budget_mib: int) -> None:
    worker = Worker(backup)
    try:
        worker.say(m.Open(passphrase=SecretStr(PASSPHRASE), memory=budget_mib * MIB, jobs=JOBS))
        done: list[m.WorkerMessage] = []
        for message in worker.listen():
            if isinstance(message, m.Manifest):
                worker.say(m.Start(mode="verify", keys=("vm10",)))
            elif not isinstance(message, m.Progress):
                done.append(message)
        assert [type(message).__name__ for message in done] == [
            *("VolumeReady", "VolumeDone", "QubeSettings", "Finished")
        ]
        peak = worker.peak_memory()
    finally:
        status = worker.end()
    assert status == 0
    assert peak <= budget_mib * MIB
    assert peak >= 0.6 * budget_mib * MIB, "what could have been used was not: the test proves nothing"


def test_what_a_worker_keeps_of_each_qube_stays_within_the_budget(tmp_path: Path) -> None:
    """The settings of these qubes, all together, would be far more than it may use."""
    menus = [f"{'x' * 200}-{number}.desktop" for number in range(4000)]
    qubes = [QubePlan(f"qube{number}", appmenus=menus) for number in range(100)]
    BackupWriter(qubes, log_n=1).write(tmp_path / "backup")
    worker = Worker(tmp_path / "backup")
    try:
        worker.say(m.Open(passphrase=SecretStr(PASSPHRASE), memory=LEAST_MIB * MIB, jobs=1))
        closed = 0
        for message in worker.listen():
            if isinstance(message, m.Manifest):
                worker.say(m.Start(mode="verify", keys=tuple(qube.key for qube in message.qubes)))
            elif isinstance(message, m.QubeSettings):
                closed += message.appmenus is not None
        assert closed == len(qubes)
        peak = worker.peak_memory()
    finally:
        worker.end()
    assert peak <= LEAST_MIB * MIB


def test_on_qubes_the_memory_that_is_advised_is_that_of_the_whole_qube(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The qube has 1000 MiB that its kernel tells of, the worker may use 700 of them, and needs 900."""
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 256_000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert "at least 1275 MiB: --memory, or worker.memory" in _advice_in_qube(700 * MIB)(900 * MIB)


def test_a_worker_opens_no_file_for_writing(backup: Path) -> None:
    """Invariant 6: after its start it could not even write one, and tries nothing of the kind."""
    worker = Worker(backup)
    try:
        limits = Path(f"/proc/{worker.process.pid}/limits").read_text(encoding="utf-8")
        assert re.search(r"^Max file size +0 +0 ", limits, re.MULTILINE)
        assert re.search(r"^Max core file size +[01] +[01] ", limits, re.MULTILINE)
        worker.say(m.Open(passphrase=SecretStr(PASSPHRASE), jobs=1))
        for message in worker.listen():
            if isinstance(message, m.Manifest):
                worker.say(m.Start(mode="verify", keys=("vm10",)))
            if isinstance(message, m.VolumeReady):
                break
        process = Path(f"/proc/{worker.process.pid}")
        for descriptor in (process / "fd").iterdir():
            if descriptor.is_file() and int(descriptor.name) > 2:
                described = (process / "fdinfo" / descriptor.name).read_text(encoding="utf-8")
                flags = re.search(r"^flags:\s+([0-7]+)$", described, re.MULTILINE)
                assert flags is not None and int(flags[1], 8) & os.O_ACCMODE == os.O_RDONLY
    finally:
        worker.end()
