"""Where the backup lies, and how it comes from there to the worker: by one of three ways.

Strategy: a file in dom0 is read by another program into a call of the worker. A service of a qube is called,
and joined to a call of the worker by two pipes. A path in a qube is fetched by the worker itself. For this,
the qube is told the location through a stock service, which answers with an id. The id is good for as long as
that call stays open, and the policy lets the worker use it for as long as the qube carries the tag. So access
is granted by two things, and both are taken back on leaving, the tag first.
"""

import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass
from typing import ClassVar

from qubes_restore_svc.errors import ArchiveUnreadable, HostFailed
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.qubes.dom0_file import FileReader
from qubes_restore_svc.qubes.qrexec import (
    QrexecCall,
    QrexecCalls,
    Undoable,
    read_answer,
    undo,
    worker_called,
)
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.qubes.tags import STORAGE_TAG
from qubes_restore_svc.waiting import ask, in_thread
from qubes_restore_svc.wire.location import QubePath, QubeService
from qubes_restore_svc.wire.messages import Storage
from qubes_restore_svc.wire.service import ARCHIVE, BROKEN_PIPE, NO_SERVICE, QFILE_ARGUMENT

REGISTER_SERVICE = "qubes.RegisterBackupLocation"
#: Seconds that a running qube may take to answer with an id.
REGISTER_TIMEOUT_S = 60.0

#: Bytes of an id, and of the line feed after it.
_MAX_ID_LINE = 64 + 1
#: Seconds that the registration may take to end by itself when its input has ended.
_CLOSE_PATIENCE_S = 2.0
#: The same after a cancel, for which somebody waits.
_CANCEL_PATIENCE_S = 0.5
#: Seconds that the calls of one pass over the archive may take to end by themselves before the next pass.
_PASS_PATIENCE_S = 2.0
#: Seconds until a process whose stream has ended has ended as well.
_SHORTLY_S = 1.0


@dataclass(frozen=True, slots=True)
class Dom0File:
    """A file in dom0: `fd`, open for reading, the caller's. It is passed on, from where it stands."""

    fd: int
    qube: ClassVar[None] = None


Location = Dom0File | QubePath | QubeService


class Source(Undoable):
    """How the archive comes to the worker; leaving this takes back what was given."""

    storage: Storage | None = None  #: where the worker has to fetch the archive itself; None if it gets it

    def __init__(self, calls: QrexecCalls) -> None:
        self._calls = calls
        self._bringing: list[QrexecCall] = []  #: the calls that bring it: storage's first, if that is one

    @property
    def gaps(self) -> str | None:
        """A clause, if places of the archive could not be read so far."""
        return None

    async def provide(self, worker: str) -> None:
        """Let the qube `worker` have the archive for one more pass. Raises WorkerLost, ArchiveUnreadable."""

    async def fault(self) -> ArchiveUnreadable | None:
        """Why the archive ends early, if this side has failed. Waits a moment until that is known."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SHORTLY_S):
                await asyncio.gather(*(call.wait() for call in self._bringing))
        for call in self._bringing:
            # Of a broken pipe: what comes after the last wanted file was not read.
            if call.exit_code != BROKEN_PIPE and call.fault:
                return ArchiveUnreadable(call.fault, advice=self._advice(call))
        return None

    def _advice(self, call: QrexecCall) -> str:
        return "Try again."

    async def _bring(self, worker: str, service: str, stdin: int, stdout: int) -> None:
        with worker_called():
            self._bringing.append(await self._calls.open(worker, service, stdin=stdin, stdout=stdout))


class FileSource(Source):
    """A file of dom0, which the worker is given once."""

    def __init__(self, calls: QrexecCalls, location: Dom0File) -> None:
        super().__init__(calls)
        self._reader = FileReader(location.fd)

    @property
    def gaps(self) -> str | None:
        """A clause, if places of the file could not be read so far."""
        return self._reader.gaps

    async def take_down(self, error: BaseException | None) -> list[str]:
        """End the reading."""
        return await self._reader.take_down(error)

    async def provide(self, worker: str) -> None:
        """Begin to read it into a call of the worker; nothing the second time."""
        if not self._bringing:
            with open(await self._reader.open(), "rb") as file, open(os.devnull, "wb") as nowhere:
                await self._bring(worker, ARCHIVE, file.fileno(), nowhere.fileno())

    async def fault(self) -> ArchiveUnreadable | None:
        """What the reader says counts more than how the calls ended."""
        told = await super().fault()
        fault = await self._reader.fault(_SHORTLY_S)
        return told if fault is None else ArchiveUnreadable(fault)


class ServiceSource(Source):
    """A service of a qube, which is called for every pass."""

    def __init__(self, calls: QrexecCalls, location: QubeService) -> None:
        super().__init__(calls)
        self._location = location

    async def provide(self, worker: str) -> None:
        """Call the service and the worker, each one's output being the other's input."""
        await asyncio.gather(*(call.end(_PASS_PATIENCE_S) for call in self._bringing))
        self._bringing = []
        qube, service = self._location.qube, self._location.service
        with contextlib.ExitStack() as ends:
            try:
                to_worker, from_storage = _pipe(ends)
                to_storage, from_worker = _pipe(ends)
            except OSError as error:
                raise HostFailed(f"the storage service cannot be called: {error.strerror}") from error
            try:
                storage = await self._calls.open(qube, service, stdin=to_storage, stdout=from_storage)
            except HostFailed as error:
                raise ArchiveUnreadable(
                    f"the service {service} in {qube} cannot be called: {error.reason}",
                    advice=f"Check that {qube} runs, and try again.",
                ) from error
            self._bringing = [storage]
            await self._bring(worker, f"{ARCHIVE}+{QFILE_ARGUMENT}", to_worker, from_worker)

    def _advice(self, call: QrexecCall) -> str:
        if call is not self._bringing[0]:
            return super()._advice(call)
        return (
            f"Look for the error of {self._location.service} in the journal of {self._location.qube}, settle"
            " it, and try again."
        )


class PathSource(Source):
    """A path in a running qube, which the worker may fetch until this is left."""

    def __init__(self, system: QubesSystem, calls: QrexecCalls, location: QubePath) -> None:
        super().__init__(calls)
        self._system = system
        self._location = location
        self._connection: socket.socket | None = None
        self._registration: QrexecCall | None = None
        self._tagged = False

    async def fault(self) -> ArchiveUnreadable | None:
        """Only if the qube has withdrawn the registration by itself."""
        call = self._registration
        if call is None or call.exit_code is None or self._connection is None:
            return None
        qube = self._location.qube
        return ArchiveUnreadable(
            call.fault or f"{call.name} has ended, and with it the access to the backup",
            advice=f"Check that the qube {qube} still runs and that its disks answer, and try again.",
        )

    async def set_up(self) -> None:
        """Register the location and let the worker fetch it. Raises ArchiveUnreadable or HostFailed."""
        location_id = await self._register()
        self._tagged = True
        await in_thread(self._system.add_tag, self._location.qube, STORAGE_TAG)
        self.storage = Storage(qube=self._location.qube, location_id=location_id)

    async def take_down(self, error: BaseException | None) -> list[str]:
        """Take the tag away, and with it the access, and then the registration."""
        left = []
        if self._tagged:
            qube = self._location.qube
            left += await undo(
                lambda: self._system.discard_tag(qube, STORAGE_TAG),
                f"the tag {STORAGE_TAG} of the qube {qube}",
            )
            self._tagged = False
        if self._connection is not None:
            close_read(self._connection)
            self._connection = None
        cancelled = isinstance(error, asyncio.CancelledError)
        patience_s = _CANCEL_PATIENCE_S if cancelled else _CLOSE_PATIENCE_S
        if self._registration is not None and not await self._registration.end(patience_s):
            left.append(f"the process of {self._registration.name}")
        return left

    async def _register(self) -> str:
        """Tell the qube where its backup is; the id that it answers with."""
        try:
            connection, call = await self._calls.converse(self._location.qube, REGISTER_SERVICE)
        except HostFailed as error:
            raise self._unreadable(error.reason) from error
        self._connection, self._registration = connection, call
        # It fits into the socket's buffer, whether anybody reads or not. If nobody can, there is no answer.
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.sendall(self._location.line)
        try:
            async with asyncio.timeout(REGISTER_TIMEOUT_S):
                untrusted_line = await read_answer(connection, _MAX_ID_LINE, b"\n")
        except TimeoutError:
            raise self._unreadable(f"no answer for {REGISTER_TIMEOUT_S:.0f} seconds") from None
        untrusted_id = untrusted_line.strip()
        if untrusted_line.endswith(b"\n") and untrusted_id.isalnum():
            return untrusted_id.decode("ascii")
        if untrusted_line:
            raise self._unreadable("its answer is not an id")
        if await call.wait(_CLOSE_PATIENCE_S) == NO_SERVICE:
            qube = self._location.qube
            raise self._unreadable(
                f"it has no service {REGISTER_SERVICE}",
                f"Update the package qubes-core-agent in the template of {qube}, restart {qube}, try again.",
            )
        raise self._unreadable(call.fault or "it gave no answer")

    def _unreadable(self, why: str, advice: str | None = None) -> ArchiveUnreadable:
        qube = self._location.qube
        return ArchiveUnreadable(
            f"the qube {qube} did not register the location of the backup: {why}",
            advice=advice or f"Restart {qube}, check that the backup can be read there, and try again.",
        )


def source_of(system: QubesSystem, calls: QrexecCalls, location: Location) -> Source:
    """How an archive comes from there, over these calls."""
    if isinstance(location, Dom0File):
        return FileSource(calls, location)
    if isinstance(location, QubeService):
        return ServiceSource(calls, location)
    return PathSource(system, calls, location)


async def start_storage(system: QubesSystem, qube: str) -> None:
    """Start the qube that holds the backup, if it does not run; it is not stopped afterwards.

    A cancel does not wait for it: there is nothing to undo.
    """
    try:
        await ask(system.start, qube)
    except HostFailed as error:
        raise ArchiveUnreadable(
            f"the qube {qube}, which holds the backup, could not be started: {error.reason}",
            advice=f"Start it with qvm-start {qube}, and try again.",
        ) from error


def _pipe(ends: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe, reader and writer, both closed by `ends`."""
    reader, writer = os.pipe()
    ends.callback(close_read, reader)
    ends.callback(close_read, writer)
    return reader, writer
