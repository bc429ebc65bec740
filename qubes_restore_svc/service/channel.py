"""The two descriptors of a call: frames in, frames out, and never a wait for the other side.

Strategy: both descriptors are watched by the event loop, nothing else reads or writes them. Each way has its
bound: a frame in may be as long as the listener allows just then, and what is not yet read by the other side
is kept up to a limit, beyond which everything that can be spared is dropped. Of progress, which is soon out
of date, the newest alone is kept.
"""

import asyncio
import contextlib
import os
from types import TracebackType
from typing import Protocol, Self

from qubes_restore_svc.errors import HostFailed, ProtocolViolation
from qubes_restore_svc.wire.framing import MAX_FRAME, FrameDecoder, encode_frame
from qubes_restore_svc.wire.messages import Progress
from qubes_restore_svc.wire.models import Message, encode_message

#: Bytes that wait for the other side to read them, beyond which it is told less.
MAX_WAITING = 2 * MAX_FRAME

_READ_SIZE = 64 << 10
_WRITE_SIZE = 256 << 10
#: Reads of what nobody will look at, before the call is left.
_LAST_READS = 64


class Listener(Protocol):
    """Who is told what comes in."""

    @property
    def frame_limit(self) -> int:
        """Bytes that the next frame may have."""
        ...

    def received(self, untrusted_payload: bytes) -> None:
        """A whole frame has come; raises ProtocolViolation."""
        ...

    def broken(self, violation: ProtocolViolation) -> None:
        """What came is none of the protocol. Nothing more is listened to."""
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
        self._decoder = FrameDecoder(0)
        self._reading = False
        self._listening = True
        self._writing = False
        self._writable = True
        self._waiting = bytearray()
        self._progress: Progress | None = None
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

    def send(self, message: Message, *, spare: bool = False) -> bool:
        """Send it as soon as the other side reads; False if it could be spared and too much waits already.

        Raises ProtocolViolation if it is too large for its kind.
        """
        frame = encode_frame(encode_message(message))
        if spare and len(self._waiting) + len(frame) > MAX_WAITING:
            return False
        self._put(frame)
        return True

    def send_progress(self, progress: Progress) -> None:
        """Send it, unless something newer comes before the other side has read what there was."""
        if self._waiting:
            self._progress = progress
        else:
            self._put(encode_frame(encode_message(progress)))

    @property
    def waiting(self) -> int:
        """Bytes that the other side has not taken yet."""
        return len(self._waiting)

    async def finish(self, message: Message, timeout_s: float) -> bool:
        """Send the last message; has it, and all before it, been taken within `timeout_s` seconds?"""
        self._progress = None
        self.send(message)
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
        elif self._listening:
            self._decode(untrusted_data)

    def _decode(self, untrusted_data: bytes) -> None:
        self._decoder.limit = self._listener.frame_limit
        try:
            for untrusted_payload in self._decoder.feed(untrusted_data):
                self._listener.received(untrusted_payload)
                # A frame is looked at under the limit of the phase that the ones before it have led to.
                self._decoder.limit = self._listener.frame_limit
        except ProtocolViolation as violation:
            self._listening = False  # it is still read: who is still writing could not hear why otherwise
            self._decoder = FrameDecoder(0)
            self._listener.broken(violation)

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
            if not self._waiting and self._progress is not None:
                self._waiting += encode_frame(encode_message(self._progress))
                self._progress = None
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
