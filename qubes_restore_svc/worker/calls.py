"""How calls reach the daemon: as connected sockets, one a call, each beginning with a service descriptor.

Strategy: the link holds the other end of one socket and passes a descriptor for every call, so nobody
else can reach the worker. When that end is closed the broker is gone, however it went, and so is
every reason to stay.
"""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable

#: Said once, when the worker can take calls; the kernel adds the process id for the link.
READY = b"ready"

_NOTE_SIZE = 16  #: bytes of the message that comes with a descriptor; its content means nothing

#: Waits for the next call; None when there will be no more.
Accept = Callable[[], Awaitable[socket.socket | None]]


class PassedCalls:
    """Calls that come as descriptors over `channel`, a SOCK_SEQPACKET socket, which it owns."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._channel.setblocking(False)
        self._channel.send(READY)

    async def accept(self) -> socket.socket | None:
        """The next call's connection, None when the link has gone."""
        while True:
            await self._readable()
            try:
                note, descriptors, _, _ = socket.recv_fds(
                    self._channel, _NOTE_SIZE, 1, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                continue
            except OSError:
                return None
            if descriptors:
                for surplus in descriptors[1:]:
                    os.close(surplus)
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
