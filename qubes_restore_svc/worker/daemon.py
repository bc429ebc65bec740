"""The worker's daemon: three services behind one socket, called as qrexec calls a socket service.

Strategy: read the service descriptor of a connection, check who calls, hand the connection to its
service. Only dom0 may call; there is one session in a worker's life, and when it ends the daemon ends.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable

from qubes_restore_svc.errors import ProtocolViolation
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.kdf.engine import KdfEngine
from qubes_restore_svc.wire import service
from qubes_restore_svc.worker.archive_access import ArchiveAccess
from qubes_restore_svc.worker.budget import BOUNDLESS
from qubes_restore_svc.worker.calls import Accept
from qubes_restore_svc.worker.fetches import Fetches
from qubes_restore_svc.worker.session import Session
from qubes_restore_svc.worker.work import Resources

#: Seconds within which a caller must have sent its descriptor.
_DESCRIPTOR_TIMEOUT_S = 10


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
        self._fetches = Fetches()
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
                call = service.parse_descriptor(await _read_descriptor(connection))
            taken = call.source == "dom0" and self._dispatch(call, connection)
        except (ProtocolViolation, OSError, TimeoutError):
            pass  # hung up, below
        finally:
            if not taken:
                close_read(connection)

    def _dispatch(self, call: service.ServiceCall, connection: socket.socket) -> bool:
        """Hand the connection over; False if nobody takes it."""
        if call.service == service.SESSION and call.argument == service.READY_ARGUMENT:
            # The socket's buffer is empty, so this does not wait; who has gone meanwhile need not know.
            with contextlib.suppress(OSError):
                connection.send(service.READY)
            return False
        if call.service == service.SESSION and not call.argument and self._session is None:
            self._session = asyncio.create_task(self._run_session(connection))
            self._session.add_done_callback(lambda _: self._over.set())
            return True
        if call.service == service.ARCHIVE:
            return self._archive.take(call.argument, connection)
        if call.service == service.VOLUME:
            connection.setblocking(True)
            return self._fetches.take(call.argument, connection)
        return False

    async def _run_session(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        await Session(reader, writer, self._resources, self._fetches).run()


async def _read_descriptor(connection: socket.socket) -> bytes:
    """The bytes up to the first NUL, one by one: what follows belongs to the service."""
    loop = asyncio.get_running_loop()
    descriptor = b""
    while not descriptor.endswith(b"\0") and len(descriptor) < service.MAX_DESCRIPTOR:
        byte = await loop.sock_recv(connection, 1)
        if not byte:
            raise ProtocolViolation("a call without a descriptor")
        descriptor += byte
    return descriptor
