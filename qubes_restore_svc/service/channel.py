"""The two descriptors of a call: bytes in, frames out, and never a wait for the other side.

Strategy: both descriptors are watched by the event loop, nothing else reads or writes them. What the other
side has not read yet is kept up to a limit, beyond which everything that can be spared is dropped. Of
progress, which is soon out of date, the newest alone is kept.
"""

import asyncio
import contextlib
import os
from types import TracebackType
from typing import Protocol, Self

from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.wire.models import MAX_FRAME

#: Bytes that wait for the other side to read them, beyond which it is told less.
MAX_WAITING = 2 * MAX_FRAME

_READ_SIZE = 64 << 10
_WRITE_SIZE = 256 << 10
#: Reads of what nobody will look at, before the call is left.
_LAST_READS = 64


class Listener(Protocol):
    """Who is told what comes in."""

    def received(self, untrusted_data: bytes) -> None:
        """This has come."""
        ...

    def closed(self) -> None:
        """Nothing more will come, or nothing more is read on the other side. May be told twice."""
        ...


class Channel:
    """The call over `read_fd` and `write_fd`, which stay the caller's. A context manager; needs a loop."""

    def __init__(self, read_fd: int, write_fd: int, listener: Listener) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._listener = listener
        self._reading = False
        self._writing = False
        self._writable = True
        self._waiting = bytearray()
        self._progress = b""
        self._drained = asyncio.Event()
        self._drained.set()

    def __enter__(self) -> Self:
        """Begin to listen. Raises HostFailed if the descriptors are neither pipes nor sockets."""
        self._loop = asyncio.get_running_loop()
        try:
            self._loop.add_reader(self._read_fd, self._readable)
        except OSError:  # epoll takes no regular file
            raise HostFailed("standard input and output have to be a pipe or a socket each") from None
        self._reading = True
        for fd in (self._read_fd, self._write_fd):
            os.set_blocking(fd, False)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop to listen; what has come and was not read is forgotten."""
        self._stop_reading()
        self._stop_writing()
        # A socket that is closed with something unread in it resets the other side.
        with contextlib.suppress(OSError):
            for _ in range(_LAST_READS):
                if not os.read(self._read_fd, _READ_SIZE):
                    break
        for fd in (self._read_fd, self._write_fd):
            os.set_blocking(fd, True)

    def send(self, frame: bytes, *, spare: bool = False) -> bool:
        """Send it as soon as the other side reads; False if it could be spared and too much waits already."""
        if spare and len(self._waiting) + len(frame) > MAX_WAITING:
            return False
        self._put(frame)
        return True

    def send_progress(self, frame: bytes) -> None:
        """Send it, unless something newer comes before the other side has read what there was."""
        if self._waiting:
            self._progress = frame
        else:
            self._put(frame)

    @property
    def waiting(self) -> int:
        """Bytes that the other side has not taken yet."""
        return len(self._waiting)

    async def finish(self, frame: bytes, timeout_s: float) -> bool:
        """Send the last frame; has it, and all before it, been taken within `timeout_s` seconds?"""
        self._progress = b""
        self.send(frame)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._drained.wait()
        return self._writable and not self._waiting

    # --- In --------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            untrusted_data = os.read(self._read_fd, _READ_SIZE)
        except BlockingIOError:
            return
        except OSError:  # the other side is gone
            untrusted_data = b""
        if not untrusted_data:
            self._stop_reading()
            self._listener.closed()
        else:
            self._listener.received(untrusted_data)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._read_fd)

    # --- Out -------------------------------------------------------------------------------------

    def _put(self, frame: bytes) -> None:
        if not self._writable:
            return
        self._waiting += frame
        self._drained.clear()
        if not self._writing:
            self._write()

    def _write(self) -> None:
        """Write as much as is taken, and wait for the rest."""
        while self._waiting:
            try:
                written = os.write(self._write_fd, self._waiting[:_WRITE_SIZE])
            except BlockingIOError:
                self._start_writing()
                return
            except OSError:  # nobody will ever read it
                self._writable = False
                self._waiting.clear()
                self._loop.call_soon(self._listener.closed)
                break
            del self._waiting[:written]
            if not self._waiting:
                self._waiting += self._progress
                self._progress = b""
        self._stop_writing()
        self._drained.set()

    def _start_writing(self) -> None:
        if not self._writing:
            self._writing = True
            self._loop.add_writer(self._write_fd, self._write)

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._write_fd)
