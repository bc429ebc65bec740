"""Whole jobs of the broker against a scripted worker, and a search for all that must not be left of them.

Strategy: `run` looks, after every job, for descriptors, tasks, threads that still work, partial qubes, the
lock, errors that nobody saw, and the passphrase.
"""

import asyncio
import fcntl
import gc
import os
import stat
import sys
import time
import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from unittest import mock

from qubes_restore_svc.broker import client
from qubes_restore_svc.broker.allowlist import AllowList
from qubes_restore_svc.broker.client import SessionOptions
from qubes_restore_svc.broker.interfaces import Host
from qubes_restore_svc.broker.job import run_job
from qubes_restore_svc.local.comparison import ComparedDirectory
from qubes_restore_svc.wire.report import Observer, QubeReport, Report
from qubes_restore_svc.wire.restore_call import Choice
from tests.broker.fake_worker import BackupQube, FakeLink, Step
from tests.broker.troubled_host import TroubledHost

from ..support.descriptors import open_descriptors

PASSPHRASE = "correct horse"
#: Seconds in which a job ends that need not wait for a worker that says nothing.
LIMIT_S = 15.0

_T = TypeVar("_T")


@dataclass
class Recorder(Observer):
    """An observer that keeps what it is told."""

    lines: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)

    def log(self, level: str, text: str) -> None:
        self.lines.append(f"{level}: {text}")

    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        self.started.append(f"{qube}/{volume}")

    def qube_finished(self, report: QubeReport) -> None:
        self.finished.append(f"{report.name}: {report.outcome}")


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    report: Report
    observer: Recorder
    link: FakeLink
    seconds: float

    @property
    def status(self) -> int:
        return self.report.status

    @property
    def error(self) -> str:
        """Kind and reason of the error that ended it."""
        error = self.report.error
        return "" if error is None else f"{error.kind}: {error.reason}"

    def qube(self, name: str) -> QubeReport:
        return next(qube for qube in self.report.qubes if qube.name == name)

    @property
    def outcomes(self) -> dict[str, str]:
        return {qube.name: qube.outcome for qube in self.report.qubes}


def run(
    steps: Sequence[Step],
    target: Path | None,
    *,
    host: Callable[[FakeLink], Host] | None = None,
    options: SessionOptions | None = None,
    names: Sequence[str] = (),
    exclude: Sequence[str] = (),
    choice: Choice | None = None,
    allow: AllowList | None = None,
    stall_s: float = 20.0,
    heartbeat_s: float | None = None,
    deaf: bool = False,
    stubborn: bool = False,
    cancel_at: Sequence[int] = (),
    thorough: bool = True,
    compare: bool = False,
) -> Outcome:
    """Restore to the directory `target` (None: verify), and check that nothing is left. Or `compare` with it.

    `host` makes another host than a directory without trouble; `choice` is taken instead of `names` and
    `exclude`. `cancel_at`: numbers of the suspensions of the job at which it is cancelled. A job that takes
    longer than LIMIT_S is an error.
    """
    unseen: list[object] = []
    before = open_descriptors()
    patience = mock.patch.object(client, "_REASON_TIMEOUT_S", 0.1)
    hook, sys.unraisablehook = sys.unraisablehook, lambda args: unseen.append(args.exc_value)

    async def job() -> Outcome:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: unseen.append(context))
        link, observer = FakeLink(steps, heartbeat_s=heartbeat_s, deaf=deaf, stubborn=stubborn), Recorder()
        where = None if target is None else TroubledHost(target, {}) if host is None else host(link)
        if compare and target is not None:
            where = ComparedDirectory(target)
        work = run_job(
            link,
            where,
            options or SessionOptions(PASSPHRASE),
            choice or Choice(names=tuple(names), exclude=tuple(exclude)),
            observer,
            allow=allow,
            stall_s=stall_s,
            compare=compare,
        )
        begun = time.monotonic()
        link.job = asyncio.create_task(_cancelled_at(work, cancel_at))
        async with asyncio.timeout(LIMIT_S):
            report = await link.job
        seconds = time.monotonic() - begun
        assert asyncio.all_tasks() == {asyncio.current_task()}
        async with asyncio.timeout(LIMIT_S):
            await loop.shutdown_default_executor()
        assert link.left or not link.calls
        assert not link.failures
        return Outcome(report, observer, link, seconds)

    try:
        with patience:
            outcome = asyncio.run(job())
        if thorough:
            gc.collect()
    finally:
        sys.unraisablehook = hook
    assert not unseen
    assert not open_descriptors() - before
    if target is not None and target.exists():
        assert not [name for name in os.listdir(target) if name.startswith(".")]
        _check_not_locked(target)
    assert PASSPHRASE not in outcome.report.model_dump_json()
    return outcome


@types.coroutine
def _cancelled_at(
    work: Coroutine[object, None, _T], suspensions: Sequence[int]
) -> Generator[object, None, _T]:
    """Do `work`, and cancel the task when it has been suspended so many times."""
    error: BaseException | None = None
    count = 0
    while True:
        try:
            awaited = work.send(None) if error is None else work.throw(error)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]  # StopIteration is not generic
        count += 1
        if count in suspensions:
            task = asyncio.current_task()
            assert task is not None
            task.get_loop().call_soon(task.cancel)
        try:
            yield awaited
            error = None
        except BaseException as thrown:  # noqa: BLE001 - it is thrown into the work
            error = thrown


def listing(directory: Path) -> dict[str, tuple[str, bytes]]:
    """Everything below a directory, byte for byte; empty if it is not there."""
    found = {}
    for path in sorted(directory.rglob("*")) if directory.exists() else []:
        mode = path.lstat().st_mode
        content = path.read_bytes() if stat.S_ISREG(mode) else b""
        found[str(path.relative_to(directory))] = (stat.filemode(mode), content)
    return found


def check_restored(directory: Path, *qubes: BackupQube) -> None:
    """These qubes, and no others, are there, byte for byte, and nothing beside their files."""
    assert sorted(os.listdir(directory)) == sorted(qube.name for qube in qubes)
    for qube in qubes:
        files = {
            ("home.tar" if volume == "home" else f"{volume}.img"): image.content
            for volume, image in qube.volumes.items()
        }
        assert {path.name for path in (directory / qube.name).iterdir()} == {*files, "qube.json"}
        for name, content in files.items():
            assert (directory / qube.name / name).read_bytes() == content


def _check_not_locked(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)
