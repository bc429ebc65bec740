"""How calls reach the daemon: as connected sockets, one a call, each beginning with a service descriptor.

Strategy: there are two ways. A local link holds the other end of one socket and passes a descriptor for every
call, so nobody else can reach the worker; when that end is closed the broker is gone, however it went, and so
is every reason to stay. In a Qubes VM the qrexec agent connects to a socket with a name, which systemd has
made, for root alone, and passes on (sd_listen_fds(3)); who calls is said in the service descriptor.
"""

import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping

from qubes_restore_svc.errors import UsageError
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.wire.service import READY

_NOTE_SIZE = 16  #: bytes of the message that comes with a descriptor; its content means nothing

_FIRST_PASSED = 3  #: SD_LISTEN_FDS_START
_LISTEN_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")

#: What a connection can fail with while the socket that it came to is sound (accept(2)).
_PASSING = frozenset(
    {errno.ECONNABORTED, errno.EPROTO, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPERM}
)
#: Seconds before the next try, if there are no descriptors or no memory just now.
_PAUSE_S = 0.1

#: Waits for the next call; None when there will be no more.
Accept = Callable[[], Awaitable[socket.socket | None]]


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
