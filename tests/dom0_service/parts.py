"""What a service is made of in tests: the worker is a thread, and the host a directory, with the real locks.

Strategy: a folder holds everything: `config.yaml`, the locks, `restored`, and `reports`. A backup in a qube
is a file of that path here. A test can hold up the two places where a real system takes its time.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from qubes_restore_svc.broker.interfaces import NewQube
from qubes_restore_svc.errors import ArchiveUnreadable, HostFailed, UsageError, WorkerMissing
from qubes_restore_svc.local.directory import DirectoryHost, DirectoryQube
from qubes_restore_svc.qubes.backup_source import Dom0File, Location
from qubes_restore_svc.qubes.config import Config
from qubes_restore_svc.qubes.dom0_restore import ACTIVITIES, Dom0Restore, Places
from qubes_restore_svc.qubes.grants import check_options
from qubes_restore_svc.qubes.locks import RESTORE, WORKER, Activity, GuardedLock
from qubes_restore_svc.wire.restore_call import OpenBackup, QubePath
from tests.support.thread_link import ThreadLink

#: All qubes that there are, and the only storage pool.
CALLER, STORAGE, POOL = "sys-gui", "sys-usb", "vm-pool"
#: With a file of this name in the folder, no template has the worker.
NO_WORKER = "no-worker"


def places(folder: Path) -> Places:
    """Where all of it is, whichever the parts are."""
    return Places(
        config=folder / "config.yaml",
        restore_lock=folder / "restore.lock",
        worker_lock=folder / "worker.lock",
        stock_lock=folder / "stock.lock",
        home=folder / "home",
    )


@dataclass
class Parts:
    """Makes restores as `dom0_restore` does. `check` and `begin` are waited for; both are set at first."""

    folder: Path
    check: asyncio.Event = field(default_factory=asyncio.Event)
    begin: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)  #: a qube was about to begin
    made: list[tuple[Location, OpenBackup, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.check.set()
        self.begin.set()

    @property
    def target(self) -> Path:
        return self.folder / "restored"

    def __call__(
        self,
        location: Location,
        request: OpenBackup,
        where: Places,
        config: Config,
        client: str,
        note: Callable[[str], None],
    ) -> Dom0Restore:
        check_options(config.limits, ignore_size_limit=request.ignore_size_limit)
        self.made.append((location, request, client))
        link = _Link(self, location, where, client, ACTIVITIES[request.mode])
        return Dom0Restore(link, _Host(self, where, client), config, client, note)


class _Link(ThreadLink):
    def __init__(
        self, parts: Parts, location: Location, where: Places, client: str, activity: Activity
    ) -> None:
        super().__init__(-1)
        self._parts = parts
        self._location = location
        self._lock = GuardedLock(WORKER, where.worker_lock, lambda names: None, client, activity)
        self._held = ExitStack()
        self.log: Callable[[str, str], None] = lambda level, text: None

    async def check(self) -> None:
        await self._parts.check.wait()
        if (self._parts.folder / NO_WORKER).exists():
            raise WorkerMissing("the template fedora-41 has no worker", advice="Install it there.")
        if not isinstance(self._location, Dom0File) and self._location.qube not in (CALLER, STORAGE):
            raise UsageError(f"there is no qube {self._location.qube}")

    async def __aenter__(self) -> Self:
        with ExitStack() as held:
            held.enter_context(self._lock)
            self._archive_fd = self._opened()
            held.callback(os.close, self._archive_fd)
            await super().__aenter__()
            self._held = held.pop_all()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._held:
            await super().__aexit__(exc_type, exc, traceback)

    def _opened(self) -> int:
        if isinstance(self._location, Dom0File):
            return os.dup(self._location.fd)
        text = self._location.text if isinstance(self._location, QubePath) else self._location.service
        try:
            return os.open(text, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ArchiveUnreadable("there is nothing of that name") from error


class _Host(DirectoryHost):
    def __init__(self, parts: Parts, where: Places, client: str) -> None:
        super().__init__(parts.target)
        self._parts = parts
        self._where = where
        self._client = client

    def free_space(self, pool: str | None = None) -> int | None:
        if pool not in (None, POOL):
            raise HostFailed(f"there is no storage pool '{pool}'")
        return super().free_space(pool)

    @contextmanager
    def lock(self) -> Iterator[tuple[str, ...]]:
        lock = GuardedLock(RESTORE, self._where.restore_lock, lambda names: None, self._client)
        with lock, super().lock() as remarks:
            yield remarks

    def begin(self, qube: NewQube) -> DirectoryQube:
        self._parts.begun.set()
        assert self._parts.begin.wait(60)
        return super().begin(qube)
