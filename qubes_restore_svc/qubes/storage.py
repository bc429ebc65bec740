"""Where the backup lies, and the worker's permission to fetch it from there.

Strategy: the qube that holds the backup is told its location through a stock service, which answers with an
id. The id is good for as long as that call stays open, and the policy lets the worker use it for as long as
the qube carries the tag. So access is granted by two things, and both are taken back on leaving, the tag
first.
"""

import asyncio
import contextlib
import re
import socket
import unicodedata
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from qubes_restore_svc.errors import ArchiveUnreadable, HostFailed, UsageError
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.qubes.qrexec import NOT_FOUND, QrexecCall, QrexecCalls, tell_what_is_left, undo
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.qubes.tags import STORAGE_TAG
from qubes_restore_svc.waiting import ask, in_thread, to_the_end
from qubes_restore_svc.wire.messages import Storage

REGISTER_SERVICE = "qubes.RegisterBackupLocation"
#: Seconds that a running qube may take to answer with an id.
REGISTER_TIMEOUT_S = 60.0
#: Longest location, bytes; a path has 4096 at the most, and this is written without waiting for a reader.
MAX_LOCATION = 16 << 10

_MAX_ID = 64
_ID = re.compile(rb"[A-Za-z0-9]{1,64}")
_SERVICE = re.compile(r"[A-Za-z0-9_.-]+(\+[A-Za-z0-9_.+-]*)?")
_MAX_SERVICE = 200
_QUBE = re.compile(r"[a-zA-Z][a-zA-Z0-9_.-]{0,30}")
#: Seconds that the registration may take to end by itself when its input has ended.
_CLOSE_PATIENCE_S = 2.0
#: The same after a cancel, for which somebody waits.
_CANCEL_PATIENCE_S = 0.5


@dataclass(frozen=True, slots=True)
class Dom0File:
    """A file in dom0: `fd`, open for reading, the caller's. It is passed on, from where it stands."""

    fd: int


@dataclass(frozen=True, slots=True)
class QubePath:
    """A file in a qube, or a command to be run there: if it names no file, the qube takes it for a command.

    Raises UsageError for what cannot be either. Line ends in it are dropped, as the stock program does.
    """

    qube: str
    text: str

    def __post_init__(self) -> None:
        _check_qube(self.qube)
        text = self._one_line()
        if not text.strip():
            raise UsageError("the location of the backup is empty")
        if any(unicodedata.category(char) == "Cc" for char in text):
            raise UsageError("the location of the backup contains a control character")
        try:
            size = len(self.line)
        except UnicodeEncodeError:
            raise UsageError("the location of the backup is not a text that UTF-8 can carry") from None
        if size > MAX_LOCATION:
            raise UsageError(f"the location of the backup is longer than {MAX_LOCATION} bytes")

    @property
    def line(self) -> bytes:
        """What is registered. What is not UTF-8 goes there byte for byte, as it came from the shell."""
        return self._one_line().encode("utf-8", "surrogateescape") + b"\n"

    def _one_line(self) -> str:
        return self.text.replace("\r", "").replace("\n", "")


@dataclass(frozen=True, slots=True)
class QubeService:
    """A service `NAME` or `NAME+ARG` of a qube that takes a line of paths and answers with a qfile stream."""

    qube: str
    service: str

    def __post_init__(self) -> None:
        _check_qube(self.qube)
        if not _SERVICE.fullmatch(self.service) or len(self.service) > _MAX_SERVICE:
            raise UsageError(
                "the location of the backup is not the name of a qrexec service",
                advice="Give NAME or NAME+ARGUMENT: letters, digits and -_.+; with --location-is-service.",
            )


Location = Dom0File | QubePath | QubeService


class StorageAccess:
    """The worker's access to a backup in a running qube. An async context manager; leaving it revokes it."""

    def __init__(self, system: QubesSystem, calls: QrexecCalls, location: QubePath) -> None:
        self._system = system
        self._calls = calls
        self._location = location
        self._connection: socket.socket | None = None
        self._registration: QrexecCall | None = None
        self._tagged = False
        self.storage: Storage  #: what the worker is told; set when this was entered

    @property
    def fault(self) -> str | None:
        """A clause, if the qube has withdrawn the registration by itself."""
        call = self._registration
        if call is None or call.exit_code is None or self._connection is None:
            return None
        return call.fault or f"{call.name} has ended, and with it the access to the backup"

    async def __aenter__(self) -> Self:
        """Register the location and let the worker fetch it. Raises ArchiveUnreadable or HostFailed."""
        try:
            location_id = await self._register()
            self._tagged = True
            await in_thread(self._system.add_tag, self._location.qube, STORAGE_TAG)
        except BaseException as error:
            await to_the_end(self._revoke(error))
            raise
        self.storage = Storage(qube=self._location.qube, location_id=location_id)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await to_the_end(self._revoke(exc))

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
                untrusted_line = await _read_line(connection)
        except TimeoutError:
            raise self._unreadable(f"no answer for {REGISTER_TIMEOUT_S:.0f} seconds") from None
        untrusted_id = untrusted_line.strip()
        if untrusted_line.endswith(b"\n") and _ID.fullmatch(untrusted_id):
            return untrusted_id.decode("ascii")
        if untrusted_line:
            raise self._unreadable("its answer is not an id")
        if await call.wait(_CLOSE_PATIENCE_S) == NOT_FOUND:
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

    async def _revoke(self, error: BaseException | None) -> None:
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
        tell_what_is_left(left, error)


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


async def _read_line(connection: socket.socket) -> bytes:
    """The bytes up to a line feed, or the end, or more than an id can have."""
    loop = asyncio.get_running_loop()
    line = b""
    while not line.endswith(b"\n") and len(line) <= _MAX_ID:
        try:
            byte = await loop.sock_recv(connection, 1)
        except OSError:
            byte = b""
        if not byte:
            break
        line += byte
    return line


def _check_qube(qube: str) -> None:
    if qube == "dom0":
        raise UsageError("dom0 is not a qube that a backup is fetched from", advice="Leave out -d.")
    if not _QUBE.fullmatch(qube):
        raise UsageError("the name of the qube that holds the backup is not the name of a qube")
