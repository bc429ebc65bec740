"""The worker's daemon: three services behind one socket, called as qrexec calls a socket service.

Strategy: take a call, read its service descriptor, check who calls, hand the connection to its service. Only
dom0 may call. There is one session in a worker's life, and when it ends the daemon ends.

Calls come as connected sockets in one of two ways. A local link holds the other end of one socket and passes
a descriptor for every call, so nobody else can reach the worker; when that end is closed, the broker is gone,
and the daemon ends. In a Qubes VM the qrexec agent connects to a socket with a name, which systemd has made,
for root alone, and passes on (sd_listen_fds(3)); who calls is said in the service descriptor.
"""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping

from qubes_restore_svc.errors import ProtocolViolation, UsageError
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.kdf.engine import KdfEngine
from qubes_restore_svc.wire import qrexec_call
from qubes_restore_svc.wire.qrexec_call import READY
from qubes_restore_svc.worker.archive_access import ArchiveAccess
from qubes_restore_svc.worker.memory import BOUNDLESS
from qubes_restore_svc.worker.output import VolumeOffers
from qubes_restore_svc.worker.session import Session
from qubes_restore_svc.worker.work import Resources

#: Seconds within which a caller must have sent its descriptor.
_DESCRIPTOR_TIMEOUT_S = 10


#: Waits for the next call; None when there will be no more.
Accept = Callable[[], Awaitable[socket.socket | None]]


class Daemon:
    """Serves the calls of `accept` until its one session is over, or no more calls can come.

    `archive_fd` is the backup, if there is one yet; `memory` in bytes; for `advice` see `Budget`.
    """

    def __init__(
        self,
        accept: Accept,
        engine: KdfEngine,
        *,
        memory: int,
        jobs: int,
        archive_fd: int | None,
        advice: Callable[[int], str] = BOUNDLESS.advice,
    ) -> None:
        self._accept = accept
        self._offers = VolumeOffers()
        self._archive = ArchiveAccess(archive_fd)
        self._resources = Resources(engine, memory, jobs, self._archive, advice)
        self._session: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        self._calls: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Serve; what the session raises is a mistake of ours, and raised. OSError: no calls can be taken."""
        accepting = asyncio.create_task(self._accept_calls())
        accepting.add_done_callback(lambda _: self._over.set())
        await self._over.wait()
        ended = (accepting, *self._calls)
        for task in ended:
            task.cancel()
        accepted, *_ = await asyncio.gather(*ended, return_exceptions=True)
        self._archive.close()
        if isinstance(accepted, OSError):  # why no more calls can come; the link tells it as the last words
            raise accepted
        if self._session is not None and self._session.done():
            self._session.result()

    async def _accept_calls(self) -> None:
        while (connection := await self._accept()) is not None:
            call = asyncio.create_task(self._serve_call(connection))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _serve_call(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        taken = False
        try:
            async with asyncio.timeout(_DESCRIPTOR_TIMEOUT_S):
                call = qrexec_call.parse_descriptor(await _read_descriptor(connection))
            taken = call.source == "dom0" and self._dispatch(call, connection)
        except (ProtocolViolation, OSError, TimeoutError):
            pass  # hung up, below
        finally:
            if not taken:
                close_read(connection)

    def _dispatch(self, call: qrexec_call.ServiceCall, connection: socket.socket) -> bool:
        """Hand the connection over; False if nobody takes it."""
        if call.service == qrexec_call.SESSION and call.argument == qrexec_call.READY_ARGUMENT:
            # The socket's buffer is empty, so this does not wait; who has gone meanwhile need not know.
            with contextlib.suppress(OSError):
                connection.send(qrexec_call.READY)
            return False
        if call.service == qrexec_call.SESSION and not call.argument and self._session is None:
            self._session = asyncio.create_task(self._run_session(connection))
            self._session.add_done_callback(lambda _: self._over.set())
            return True
        if call.service == qrexec_call.ARCHIVE:
            return self._archive.take(call.argument, connection)
        if call.service == qrexec_call.VOLUME:
            connection.setblocking(True)
            return self._offers.take(call.argument, connection)
        return False

    async def _run_session(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        await Session(reader, writer, self._resources, self._offers).run()


async def _read_descriptor(connection: socket.socket) -> bytes:
    """The bytes up to the first NUL, one by one: what follows belongs to the service."""
    loop = asyncio.get_running_loop()
    descriptor = b""
    while not descriptor.endswith(b"\0") and len(descriptor) < qrexec_call.MAX_DESCRIPTOR:
        byte = await loop.sock_recv(connection, 1)
        if not byte:
            raise ProtocolViolation("a call without a descriptor")
        descriptor += byte
    return descriptor


_NOTE_SIZE = 16  #: bytes of the message that comes with a descriptor; its content means nothing

_FIRST_PASSED = 3  #: SD_LISTEN_FDS_START
_LISTEN_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")

#: What a connection can fail with while the socket that it came to is sound (accept(2)).
_PASSING = frozenset(
    {errno.ECONNABORTED, errno.EPROTO, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPERM}
)
#: Seconds before the next try, if there are no descriptors or no memory just now.
_PAUSE_S = 0.1


class PassedCalls:
    """Calls that come as descriptors over `channel`, a SOCK_SEQPACKET socket, which it owns."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._channel.setblocking(False)
        # Said once; the kernel adds the process id for the link.
        self._channel.send(READY)

    async def accept(self) -> socket.socket | None:
        """The next call's connection, None when the link has gone. Raises OSError for what else fails."""
        while True:
            await self._readable()
            try:
                note, descriptors, _, _ = socket.recv_fds(
                    self._channel, _NOTE_SIZE, 1, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                continue
            except ConnectionError:
                return None
            if descriptors:
                for surplus in descriptors[1:]:
                    close_read(surplus)
                return socket.socket(fileno=descriptors[0])
            if not note:
                return None

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._channel.fileno(), ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._channel.fileno())


class ListeningCalls:
    """Calls that come as connections to `listener`, a listening Unix socket, which it owns."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._listener.setblocking(False)

    async def accept(self) -> socket.socket | None:
        """The next call's connection, None if there can be no more."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno not in _PASSING:
                    return None
                await asyncio.sleep(_PAUSE_S)
            else:
                return connection


def inherited_listener(environment: MutableMapping[str, str] = os.environ) -> socket.socket:
    """The listening socket that systemd has passed. No process that is started from here inherits it.

    Raises UsageError if there is none, or not one of that kind.
    """
    told = {name: environment.pop(name, "") for name in _LISTEN_VARIABLES}
    if told["LISTEN_PID"] != str(os.getpid()) or told["LISTEN_FDS"] != "1":
        raise UsageError("systemd has passed no socket, or more than one")
    try:
        os.set_inheritable(_FIRST_PASSED, False)
        listener = socket.socket(fileno=_FIRST_PASSED)
        listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise UsageError(f"what systemd has passed is no socket ({error.strerror})") from error
    if (listener.family, listener.type, listening) != (socket.AF_UNIX, socket.SOCK_STREAM, 1):
        listener.detach()
        raise UsageError("what systemd has passed is not a listening Unix stream socket")
    return listener
