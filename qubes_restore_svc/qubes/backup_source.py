"""The place of the backup, and the three ways from there to the worker.

Strategy: a file in dom0 is read by another program into a call of the worker. A service of a qube is called,
and joined to a call of the worker by two pipes. A path in a qube is fetched by the worker itself. For this,
the qube is told the location through a stock service, which answers with an id. The id is good for as long as
that call stays open, and the policy lets the worker use it for as long as the qube carries the tag. So access
is granted by two things, and both are taken back on leaving, the tag first.

A file in dom0 is read by `cat`, which stands between the file and the call that brings it. (The call's own
program, given the file itself, would wait for ever where reading fails: qrexec-client takes an error of its
input for a pause.) Where a place of a file or a disk cannot be read (EIO), `cat` ends; it has written all
that it has read, and the position that it shares with us is that place. `head` then writes zeros for the
place, and another `cat` reads on behind it. A program is started for every step, so steps grow with the gap,
and are counted.
"""

import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass
from typing import ClassVar

from qubes_restore_svc.errors import ArchiveUnreadable, HostFailed, exhausted
from qubes_restore_svc.hardening import close_read
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
from qubes_restore_svc.waiting import ask, in_thread, to_the_end
from qubes_restore_svc.wire.messages import Storage
from qubes_restore_svc.wire.qrexec_call import ARCHIVE, BROKEN_PIPE, NO_SERVICE, QFILE_ARGUMENT
from qubes_restore_svc.wire.restore_call import QubePath, QubeService

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
    """The way of the archive to the worker. Leaving it takes back the access that it gave."""

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


_CAT = "/bin/cat"
_HEAD = "/bin/head"
_ZEROS = "/dev/zero"
#: What `cat` says of a place that cannot be read.
_EIO = "Input/output error"

#: A place that cannot be read is stepped over in pages of the system's memory, bytes, as it reads them; …
_PAGE = 4096
#: … in a long gap, by this part of what has been stepped over.
_GROWTH = 64
#: With so much that cannot be read in one place, it is the medium that has gone, bytes.
_MAX_GAP = 16 << 20
#: So many steps are a medium that has gone, too.
_MAX_STEPS = 10_000


class FileReader(Undoable):
    """Reads descriptor `fd` from where it stands; leaving this ends the reading."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._process: asyncio.subprocess.Process | None = None
        self._work: asyncio.Task[None] | None = None
        self._left = False
        self._fault: str | None = None
        self._steps = 0
        self._gaps: list[tuple[int, int]] = []  # where each begins and ends, bytes

    async def take_down(self, error: BaseException | None) -> list[str]:
        """End the reading."""
        self._left = True
        self._kill()
        if self._work is not None:
            await self._work
        return []

    async def open(self) -> int:
        """Begin; the descriptor to read from, which is the caller's. Raises HostFailed."""
        return await to_the_end(self._open())

    async def fault(self, timeout_s: float) -> str | None:
        """A clause, if reading has failed; waits for at most `timeout_s` seconds until that is known."""
        if self._work is not None:
            await asyncio.wait([self._work], timeout=timeout_s)
        return self._fault

    @property
    def gaps(self) -> str | None:
        """A clause, if places of the file could not be read so far; zeros were given for them."""
        if not self._gaps:
            return None
        others = f" and in {len(self._gaps) - 1} other places" if len(self._gaps) > 1 else ""
        size = sum(end - start for start, end in self._gaps)
        return (
            f"the file could not be read at byte {self._gaps[0][0]}{others} ({_EIO}), and {size} bytes of it"
            " were taken for zeros"
        )

    async def _open(self) -> int:
        try:
            reader, writer = os.pipe()
        except OSError as error:
            raise HostFailed(f"the backup cannot be read: {error.strerror}") from error
        try:
            await self._start(_CAT, self._fd, writer)
        except OSError as error:
            close_read(reader)
            close_read(writer)
            raise HostFailed(f"the backup cannot be read: {_CAT}: {error.strerror}") from error
        self._work = asyncio.create_task(self._follow(writer))
        return reader

    async def _follow(self, writer: int) -> None:
        """Go on until the file, or what can be read of it, has been written."""
        try:
            failure = await self._failure()
            while failure == _EIO and (size := self._step()):
                with open(_ZEROS, "rb") as zeros:
                    await self._start(_HEAD, zeros.fileno(), writer, f"--bytes={size}")
                failure = await self._failure()
                if failure is None:
                    await self._start(_CAT, self._fd, writer)
                    failure = await self._failure()
        except (OSError, MemoryError, RuntimeError) as error:  # no program can be started
            found = exhausted(error)
            failure = str(error) if found is None else found.reason
        finally:
            close_read(writer)
        if failure and not self._left:
            self._fault = f"the file could not be read ({failure})"

    def _step(self) -> int:
        """Pass over bytes that cannot be read. Returns how many; 0 if that is of no use."""
        try:
            here, end = os.lseek(self._fd, 0, os.SEEK_CUR), _end_of(self._fd)
        except OSError:  # it is neither a file nor a disk
            return 0
        start = self._gaps[-1][0] if self._gaps and self._gaps[-1][1] == here else here
        growth = (here - start) // _GROWTH // _PAGE * _PAGE
        size = min(_PAGE - here % _PAGE + growth, end - here)
        self._steps += 1
        if size <= 0 or here + size - start > _MAX_GAP or self._steps > _MAX_STEPS:
            return 0
        if start != here:
            self._gaps.pop()
        self._gaps.append((start, here + size))
        os.lseek(self._fd, size, os.SEEK_CUR)
        return size

    async def _start(self, program: str, stdin: int, stdout: int, *options: str) -> None:
        self._process = await asyncio.create_subprocess_exec(
            program,
            *options,
            stdin=stdin,
            stdout=stdout,
            stderr=asyncio.subprocess.PIPE,
            env={"LC_ALL": "C"},
            start_new_session=True,
        )
        if self._left:
            self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _failure(self) -> str | None:
        """Wait for the program; the reason, if it has failed by itself. "" if it was ended."""
        assert self._process is not None
        _, said = await self._process.communicate()
        if self._process.returncode:
            return said.decode("ascii", "replace").strip().rpartition(": ")[2]
        return None


def _end_of(fd: int) -> int:
    """Where a file or a disk ends, bytes. It stands where it stood. Raises OSError if it is neither."""
    here = os.lseek(fd, 0, os.SEEK_CUR)
    end = os.lseek(fd, 0, os.SEEK_END)
    os.lseek(fd, here, os.SEEK_SET)
    return end
