"""dom0's side of a daemon that runs in the test's own event loop: it calls services as the link does."""

import asyncio
import contextlib
import os
import socket
import threading
from types import TracebackType
from typing import Self, TypeVar

from pydantic import SecretStr

from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.qrexec_call import READY
from qubes_restore_svc.worker.daemon import Daemon, PassedCalls
from qubes_restore_svc.worker.memory import OWN_MEMORY
from tests.support.wire import framed, from_worker, heard

from ..support.backup_writer import PASSPHRASE
from .support import MIB, PATIENCE_S, Engine, wait_until

_Message = TypeVar("_Message", bound=m.Message)


class Caller:
    """A daemon over `archive_fd`, and the means to call it. An async context manager."""

    def __init__(
        self,
        archive_fd: int | None,
        *,
        engine: Engine | None = None,
        memory: int = 64 * MIB,
        jobs: int = 2,
        silent: bool = False,
    ) -> None:
        """`silent`: the archive's descriptor says nothing more, so that a thread may still wait for it."""
        self._silent = silent
        self._threads_before = set(threading.enumerate())
        self.engine = engine or Engine()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        calls = PassedCalls(theirs)
        self.daemon = Daemon(
            calls.accept, self.engine, memory=memory + OWN_MEMORY, jobs=jobs, archive_fd=archive_fd
        )
        self.serving: asyncio.Task[None]
        self._connections: list[socket.socket] = []
        self._peers: list[Peer] = []

    async def __aenter__(self) -> Self:
        self.serving = asyncio.create_task(self.daemon.serve())
        assert self._channel.recv(100) == READY
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()
        for connection in self._connections:
            connection.close()
        for peer in self._peers:
            peer.writer.transport.abort()
        await self.ended()
        if not self._silent:
            await self.threads_ended()

    async def ended(self) -> None:
        """Wait for the end of the daemon."""
        async with asyncio.timeout(PATIENCE_S):
            await self.serving

    async def threads_ended(self) -> None:
        """Wait for the end of all threads of the session: they read from a descriptor that is not theirs."""

        def ended() -> bool:
            return not any(
                thread.name in ("work", "intake", "hash") or thread.name.startswith("kdf-")
                for thread in set(threading.enumerate()) - self._threads_before
            )

        await asyncio.to_thread(wait_until, ended, "the end of all threads")

    def connect(self) -> socket.socket:
        """A connection on which nothing has been said yet; not blocking."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._channel, [b"call"], [theirs.fileno()])
        ours.setblocking(False)
        self._connections.append(ours)
        return ours

    def call(self, descriptor: bytes) -> socket.socket:
        """A connection that begins with `descriptor`."""
        connection = self.connect()
        connection.sendall(descriptor)
        return connection

    async def session(self, descriptor: bytes = b"restore.Session dom0\0") -> "Peer":
        """Call restore.Session."""
        connection = self.call(descriptor)
        self._connections.remove(connection)  # the streams own it now
        peer = Peer(*await asyncio.open_connection(sock=connection))
        self._peers.append(peer)
        return peer

    async def opened(self) -> "Peer":
        """A session whose backup is open, and whose manifest has come."""
        peer = await self.session()
        peer.open()
        await peer.expect(m.Manifest)
        return peer


class Peer:
    """The broker's end of one session. `progress` counts the signs of life passed over."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.progress = 0
        self._end = from_worker()
        self._messages: list[m.WorkerMessage] = []

    def open(
        self,
        passphrase: str = PASSPHRASE,
        *,
        memory: int | None = None,
        jobs: int | None = None,
        storage: m.Storage | None = None,
        retry: bool = False,
    ) -> None:
        """Say open. `memory` is for chunks and keys, besides what the worker takes itself."""
        if memory is not None:
            memory += OWN_MEMORY
        secret = SecretStr(passphrase)
        self.say(m.Open(passphrase=secret, memory=memory, jobs=jobs, storage=storage, retry=retry))

    def say(self, message: m.Message) -> None:
        """Send a message, whether it may come now or not."""
        self.writer.write(framed(message))

    async def next(self) -> m.WorkerMessage | None:
        """The next message that is not progress; None at the end of the session."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                while self._messages:
                    message = self._messages.pop(0)
                    if not isinstance(message, m.Progress):
                        return message
                    self.progress += 1
                if not await self._read():
                    return None

    async def next_progress(self) -> m.Progress:
        """The next sign of life; nothing else may come before it."""
        async with asyncio.timeout(PATIENCE_S):
            while not self._messages:
                assert await self._read(), "the session has ended"
        message = self._messages.pop(0)
        assert isinstance(message, m.Progress), message
        return message

    async def passing(self, kind: type[_Message]) -> _Message:
        """The next message of that type, which must come; what comes before it is passed over."""
        while not isinstance(message := await self.next(), kind):
            assert message is not None, f"the session ended without {kind.__name__}"
        return message

    async def expect(self, kind: type[_Message]) -> _Message:
        """The next message, which must be of that type."""
        message = await self.next()
        assert isinstance(message, kind), message
        return message

    async def rest(self) -> list[m.WorkerMessage]:
        """Everything up to the end of the session."""
        messages = []
        while (message := await self.next()) is not None:
            messages.append(message)
        return messages

    async def _read(self) -> bool:
        with contextlib.suppress(ConnectionError):
            data = await self.reader.read(1 << 16)
            self._messages += heard(self._end, data)
            return bool(data)
        return False


async def hung_up(connection: socket.socket, within_s: float = PATIENCE_S) -> bool:
    """Does the other side hang up, without having said anything?"""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(within_s):
            return await loop.sock_recv(connection, 1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))
