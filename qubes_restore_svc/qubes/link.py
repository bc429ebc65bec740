"""A worker in a DisposableVM, called over qrexec. dom0 calls; it listens on nothing and offers nothing.

Strategy: what a restore takes (the lock, the qube, its calls, the access to the backup) is entered in order
and left in the reverse one, whatever ended it, so that the worker loses the backup before anything else.
Every call is a process with one half of a socket pair as its input and output; the other half is the
broker's. The archive never passes through this process: dom0's file is read by a `cat` into a call, a qube's
is fetched by the worker, and a storage service is joined to the worker by two pipes.
"""

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from qubes_restore_svc.errors import (
    ArchiveUnreadable,
    HostFailed,
    RestoreError,
    UsageError,
    WorkerLost,
)
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.qubes.dom0_file import FileReader
from qubes_restore_svc.qubes.locks import WORKER, WORKER_LOCK, Activity, GuardedLock
from qubes_restore_svc.qubes.qrexec import BROKEN, NOT_FOUND, QrexecCall, QrexecCalls
from qubes_restore_svc.qubes.storage import (
    Dom0File,
    Location,
    QubePath,
    QubeService,
    StorageAccess,
    start_storage,
)
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.qubes.worker_vm import (
    WorkerVm,
    choose_template,
    clear_up_after_kill,
    clear_worker_left,
    worker_missing,
)
from qubes_restore_svc.waiting import ask, when_cleared
from qubes_restore_svc.wire.messages import Storage
from qubes_restore_svc.wire.service import (
    ARCHIVE,
    QFILE_ARGUMENT,
    READY,
    READY_ARGUMENT,
    SESSION,
    ServiceCall,
    encode_descriptor,
)

#: Seconds that a worker whose qube has started may take to answer: a Python's start on a busy machine.
READY_TIMEOUT_S = 60.0
#: Seconds that the calls of one pass over the archive may take to end by themselves before the next pass.
_PASS_PATIENCE_S = 2.0
#: Seconds until a process whose stream has ended has ended as well.
_SHORTLY_S = 1.0


#: What a program dies of whose reader stops early, as a shell tells it: 128 + SIGPIPE.
_BROKEN_PIPE = 141
_CHECK_QUBE = "Check that the qube {} still runs and that its disks answer, and try again."


class QrexecLink:
    """The link to a worker on a Qubes system; to be entered once. `memory` in MiB, all of it from the start.

    `location` is where the backup lies; `template` a disposable template, None for the system's own.
    `ready_timeout_s`: seconds that the worker may take to answer once its qube has started. `client` is the
    domain that it is for, and `activity` what it is for: who wants a worker meanwhile is told.
    """

    def __init__(
        self,
        system: QubesSystem,
        location: Location,
        *,
        template: str | None,
        memory: int,
        vcpus: int,
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
        self._ready_timeout_s = ready_timeout_s
        self._lock = GuardedLock(WORKER, lock_path, clear_up_after_kill, client, activity)
        self._held: contextlib.AsyncExitStack | None = None
        self._qube = ""  #: the worker's, while it may be called
        self._calls: QrexecCalls
        self._access: StorageAccess | None = None
        self._reader: FileReader | None = None
        self._session: QrexecCall | None = None
        self._archive: list[QrexecCall] = []  #: those that bring it: storage's first, if that is one

    async def check(self) -> str:
        """What can be known before a passphrase is asked for; the disposable template that will be used.

        Raises WorkerMissing if the template says that it has no worker, UsageError if it is no template, or
        if the qube that holds the backup does not exist. Creates nothing.
        """
        template = await choose_template(self._system, self._template)
        if not isinstance(self._location, Dom0File) and not await ask(
            self._system.exists, self._location.qube
        ):
            raise UsageError(
                f"there is no qube {self._location.qube}",
                advice="Name the qube that holds the backup with -d.",
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
            if not isinstance(self._location, Dom0File):
                await start_storage(self._system, self._location.qube)
            vm = await held.enter_async_context(WorkerVm(self._system, template, self._memory, self._vcpus))
            self._calls = await held.enter_async_context(QrexecCalls(self._system))
            await self._ask_ready(vm.name, template)
            if isinstance(self._location, Dom0File):
                self._reader = await held.enter_async_context(FileReader(self._location.fd))
            elif isinstance(self._location, QubePath):
                self._access = await held.enter_async_context(
                    StorageAccess(self._system, self._calls, self._location)
                )
            self._qube = vm.name
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
        try:
            connection, call = await self._calls.converse(qube, name)
        except HostFailed as error:
            raise WorkerLost(f"the worker cannot be called: {error.reason}") from error
        if name == SESSION:
            self._session = call
        return connection

    @property
    def source(self) -> str:
        """The qube that brings the archive, or dom0's file."""
        if isinstance(self._location, Dom0File):
            return "the file of the backup in dom0"
        return self._location.qube

    @property
    def storage(self) -> Storage | None:
        """Where the worker has to fetch the archive itself; None if it gets it."""
        return None if self._access is None else self._access.storage

    async def provide_archive(self) -> None:
        """Let the worker have the archive: once before `open`, once before `start`.

        A file of dom0 is given to it once; a service is called for every pass; a path it fetches itself.
        Raises WorkerLost, and ArchiveUnreadable if the service cannot be called.
        """
        qube = self._running()
        if self._reader is not None and not self._archive:
            with open(await self._reader.open(), "rb") as file, open(os.devnull, "wb") as nowhere:
                self._archive = [await self._give(qube, ARCHIVE, file.fileno(), nowhere.fileno())]
        elif isinstance(self._location, QubeService):
            await asyncio.gather(*(call.end(_PASS_PATIENCE_S) for call in self._archive))
            self._archive = []
            await self._join(qube, self._location)

    async def archive_fault(self) -> ArchiveUnreadable | None:
        """Why the archive ends early, if the side that brings it has failed: the worker sees only its end.

        Waits a moment: a stream ends before it is known how its call did.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SHORTLY_S):
                await asyncio.gather(*(call.wait() for call in self._archive))
        if self._reader is not None and (fault := await self._reader.fault(_SHORTLY_S)):
            return ArchiveUnreadable(fault)
        if self._access is not None and (fault := self._access.fault):
            return ArchiveUnreadable(fault, advice=_CHECK_QUBE.format(self._access.storage.qube))
        for call in self._archive:
            if call.exit_code == _BROKEN_PIPE:  # what comes after the last wanted file was not read
                continue
            if call.fault and isinstance(self._location, QubeService) and call is self._archive[0]:
                return ArchiveUnreadable(
                    call.fault,
                    advice=f"Look for the error of {self._location.service} in the journal of"
                    f" {self._location.qube}, settle it, and try again.",
                )
            if call.fault:
                return ArchiveUnreadable(call.fault, advice="Try again.")
        return None

    @property
    def archive_gaps(self) -> str | None:
        """A clause, if places of dom0's file could not be read so far."""
        return None if self._reader is None else self._reader.gaps

    async def wait_gone(self) -> str:
        """Return when the worker has ended, with what is known of why (printable, one line)."""
        if self._session is None:
            raise WorkerLost("the worker was not started")
        qube = self._qube
        await self._session.wait()
        if not self._qube:
            return "the worker was ended"
        if self._session.exit_code == BROKEN or not await self._exists(qube):
            return "the worker's qube has shut down, perhaps for want of memory"
        return self._session.fault or "the worker ended the session"

    # --- Starting --------------------------------------------------------------------------------

    async def _ask_ready(self, qube: str, template: str) -> None:
        """Ask the worker for a sign of life; raises WorkerMissing or WorkerLost if there is none."""
        try:
            connection, call = await self._calls.converse(qube, f"{SESSION}+{READY_ARGUMENT}")
        except HostFailed as error:
            raise WorkerLost(f"the worker cannot be called: {error.reason}") from error
        with connection:
            connection.setblocking(False)
            try:
                async with asyncio.timeout(self._ready_timeout_s):
                    untrusted_answer = await _read(connection, len(READY))
            except TimeoutError:
                raise WorkerLost(
                    f"the worker was not ready after {self._ready_timeout_s:.0f} seconds"
                ) from None
            if untrusted_answer == READY:
                return
            code = await call.wait(_SHORTLY_S)
        if code == NOT_FOUND:
            raise await worker_missing(self._system, template)
        raise WorkerLost(
            "the worker did not say that it is ready" + (f": {call.fault}" if call.fault else ""),
            advice=f"Check that {template} has the newest version of the worker's package, and try again.",
        )

    # --- The archive -----------------------------------------------------------------------------

    async def _give(self, qube: str, service: str, stdin: int, stdout: int) -> QrexecCall:
        try:
            return await self._calls.open(qube, service, stdin=stdin, stdout=stdout)
        except HostFailed as error:
            raise WorkerLost(f"the worker cannot be called: {error.reason}") from error

    async def _join(self, qube: str, location: QubeService) -> None:
        """Call the storage service and the worker, each one's output being the other's input."""
        with contextlib.ExitStack() as ends:
            try:
                to_worker, from_storage = _pipe(ends)
                to_storage, from_worker = _pipe(ends)
            except OSError as error:
                raise HostFailed(f"the storage service cannot be called: {error.strerror}") from error
            try:
                storage = await self._calls.open(
                    location.qube, location.service, stdin=to_storage, stdout=from_storage
                )
            except HostFailed as error:
                raise ArchiveUnreadable(
                    f"the service {location.service} in {location.qube} cannot be called: {error.reason}",
                    advice=f"Check that {location.qube} runs, and try again.",
                ) from error
            self._archive = [storage]
            service = f"{ARCHIVE}+{QFILE_ARGUMENT}"
            self._archive.append(await self._give(qube, service, to_worker, from_worker))

    # --- State -----------------------------------------------------------------------------------

    def _running(self) -> str:
        if not self._qube:
            raise WorkerLost("the worker is not running")
        return self._qube

    async def _exists(self, qube: str) -> bool:
        try:
            return await ask(self._system.exists, qube)
        except RestoreError:
            return True


async def _read(connection: socket.socket, size: int) -> bytes:
    """`size` bytes, fewer at the end of the stream."""
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size:
        try:
            piece = await loop.sock_recv(connection, size - len(data))
        except OSError:
            piece = b""
        if not piece:
            break
        data += piece
    return data


def _pipe(ends: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe, reader and writer, both closed by `ends`."""
    reader, writer = os.pipe()
    ends.callback(close_read, reader)
    ends.callback(close_read, writer)
    return reader, writer
