"""A worker in a DisposableVM, called over qrexec. dom0 calls; it listens on nothing and offers nothing.

Strategy: a restore takes the lock, the qube, its calls and the access to the backup in this order, and gives
them back in the reverse order, however it ends, so that the worker loses the backup before anything else.
Every call is a process with one half of a socket pair as its input and output; the other half is the
broker's. The archive never passes through this process; `backup_source` says how it comes to the worker.
"""

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from qubes_restore_svc.errors import ArchiveUnreadable, UsageError, WorkerLost
from qubes_restore_svc.qubes.backup_source import Location, Source, source_of, start_storage
from qubes_restore_svc.qubes.locks import WORKER, WORKER_LOCK, Activity, GuardedLock
from qubes_restore_svc.qubes.qrexec import QrexecCall, QrexecCalls, worker_called
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.qubes.worker_vm import (
    WorkerVm,
    ask_ready,
    choose_template,
    clear_up_after_kill,
    clear_worker_left,
)
from qubes_restore_svc.waiting import ask, when_cleared
from qubes_restore_svc.wire.messages import Storage
from qubes_restore_svc.wire.qrexec_call import CONNECTION_BROKE, SESSION, ServiceCall, encode_descriptor
from qubes_restore_svc.wire.restore_call import Auto

#: Seconds that a worker whose qube has started may take to answer: a Python's start on a busy machine.
READY_TIMEOUT_S = 60.0


class QrexecLink:
    """The link to a worker on a Qubes system; to be entered once. For `memory`, `vcpus` and `most` see
    `WorkerVm`.

    `location` is where the backup lies; `template` a disposable template, None for the system's own.
    `ready_timeout_s`: seconds that the worker may take to answer once its qube has started. `client` is the
    domain that it is for, and `activity` what it is for: the next process that wants a worker is told both.
    """

    def __init__(
        self,
        system: QubesSystem,
        location: Location,
        *,
        template: str | None,
        memory: int | Auto,
        vcpus: int | Auto,
        most: tuple[int | None, int | None] = (None, None),
        ready_timeout_s: float = READY_TIMEOUT_S,
        lock_path: Path = WORKER_LOCK,
        client: str = "dom0",
        activity: Activity = "restoring",
    ) -> None:
        self._system = system
        self._location = location
        self._template = template
        self._memory = memory
        self._vcpus = vcpus
        self._most = most
        self._ready_timeout_s = ready_timeout_s
        self._lock = GuardedLock(WORKER, lock_path, clear_up_after_kill, client, activity)
        self._held: contextlib.AsyncExitStack | None = None
        self._qube = ""  #: the worker's, while it may be called
        self.log: Callable[[str, str], None] = lambda level, text: None  #: gets a line for the person
        self._calls: QrexecCalls
        self._source: Source
        self._session: QrexecCall | None = None

    async def check(self) -> str:
        """What can be known before a passphrase is asked for; the disposable template that will be used.

        Raises WorkerMissing if the template says that it has no worker, UsageError if it is no template, or
        if the qube that holds the backup does not exist. Creates nothing.
        """
        template = await choose_template(self._system, self._template)
        qube = self._location.qube
        if qube is not None and not await ask(self._system.exists, qube):
            raise UsageError(
                f"there is no qube {qube}", advice="Name the qube that holds the backup with -d."
            )
        return template

    async def __aenter__(self) -> Self:
        """Start the worker, ask it whether it is ready, and give it access to the backup.

        Raises what `check` raises; RestoreInProgress; HostFailed if the qube cannot be had; WorkerLost if it
        has no worker that answers; ArchiveUnreadable if the backup's qube does not play its part.
        """
        async with contextlib.AsyncExitStack() as held:
            held.callback(self._lock.release)
            await when_cleared(self._lock.take)
            held.enter_context(self._system.watched_by(self._lock))
            template = await self.check()
            await clear_worker_left(self._system)
            if self._location.qube is not None:
                await start_storage(self._system, self._location.qube)
            vm = WorkerVm(self._system, template, self._memory, self._vcpus, self._most)
            await held.enter_async_context(vm)
            self._calls = await held.enter_async_context(QrexecCalls(self._system))
            await ask_ready(self._system, self._calls, vm.name, template, self._ready_timeout_s)
            source = source_of(self._system, self._calls, self._location)
            self._source = await held.enter_async_context(source)
            self._qube = vm.name
            self.log("info", vm.size)
            self._held = held.pop_all()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take back the access to the backup, then destroy the worker, even if cancelled meanwhile.

        What cannot be undone is told in the advice of `exc`, or raised: as HostFailed, as Cancelled for a
        cancel.
        """
        if self._held is None:
            return
        self._qube = ""
        await self._held.__aexit__(exc_type, exc, traceback)  # nothing of it can be interrupted

    async def call(self, service: str, argument: str = "") -> socket.socket:
        """Call a service of the worker; the socket is blocking, and the caller's. Raises WorkerLost.

        Its end is seen when the service has hung up altogether, not when it has shut down its half.
        """
        name = encode_descriptor(ServiceCall(service, argument, "dom0")).decode().split()[0]
        qube = self._running()
        with worker_called():
            connection, call = await self._calls.converse(qube, name)
        if name == SESSION:
            self._session = call
        return connection

    @property
    def source(self) -> str:
        """The qube that brings the archive, or dom0's file."""
        return self._location.qube or "the file of the backup in dom0"

    @property
    def storage(self) -> Storage | None:
        """Where the worker has to fetch the archive itself; None if it gets it."""
        return self._source.storage

    async def provide_archive(self) -> None:
        """Let the worker have the archive: once before `open`, once before `start`.

        A file of dom0 is given to it once; a service is called for every pass; a path it fetches itself.
        Raises WorkerLost, and ArchiveUnreadable if the service cannot be called.
        """
        worker = self._running()
        await self._source.provide(worker)

    async def archive_fault(self) -> ArchiveUnreadable | None:
        """Why the archive ends early, if the side that brings it has failed: the worker sees only its end.

        Waits a moment: a stream ends before it is known how its call did.
        """
        return await self._source.fault()

    @property
    def archive_gaps(self) -> str | None:
        """A clause, if places of dom0's file could not be read so far."""
        return self._source.gaps

    async def wait_gone(self) -> str:
        """Wait until the worker has ended. Returns the reason as far as it is known (printable, one line)."""
        if self._session is None:
            raise WorkerLost("the worker was not started")
        qube = self._qube
        await self._session.wait()
        if not self._qube:
            return "the worker was ended"
        if self._session.exit_code == CONNECTION_BROKE or not await ask(self._system.may_exist, qube):
            return "the worker's qube has shut down, perhaps for want of memory"
        return self._session.fault or "the worker ended the session"

    def _running(self) -> str:
        if not self._qube:
            raise WorkerLost("the worker is not running")
        return self._qube
