"""The conversation with a client: its messages in their order, within their time.

Strategy: everything that either side says passes the connection of `wire/restore_call.py`. What the client
asks is handed to the task that waits for it. If the client wants no more (a `cancel`, the end of the call,
nonsense), a callback is called, once, at any time. Only the first such end counts.

The event loop watches both descriptors, nothing else reads or writes them, and nobody waits for the other
side. Messages that the client has not read yet are kept up to a limit. Beyond it, everything is dropped that
is not needed. Of several progress messages only the newest is kept.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Literal, Self

from qubes_restore_svc.errors import Cancelled, HostFailed, ProtocolViolation, RestoreError
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.messages import Cancel, Log
from qubes_restore_svc.wire.models import MAX_FRAME, Message
from qubes_restore_svc.wire.names import MAX_TEXT, shortened
from qubes_restore_svc.wire.report import Observer, QubeReport, Report, RestoreProgress

#: Seconds within which the client has to say what it wants, …
OPEN_TIMEOUT_S = 60.0
#: … has to confirm a plan, however many others it asks for on the way, …
PLAN_TIMEOUT_S = 3600.0
#: … and has to read the last message.
LAST_WORD_TIMEOUT_S = 10.0

Final = c.Plan | Report | c.Refused

#: Bytes that wait for the other side to read them, beyond which it is told less.
MAX_WAITING = 2 * MAX_FRAME

_READ_SIZE = 64 << 10
_WRITE_SIZE = 256 << 10
#: Reads of what nobody will look at, before the call is left.
_LAST_READS = 64

_VIOLATION_ADVICE = "The call was ended. Use a client of the same version as dom0's package."


class Conversation(Observer):
    """One call over two descriptors, which stay the caller's. A context manager.

    `when_ended` is called once, when the client wants no more. `hurries`: has a plan to be answered in time?
    """

    def __init__(
        self, read_fd: int, write_fd: int, when_ended: Callable[[], object], *, hurries: bool = True
    ) -> None:
        self.ended: RestoreError | None = None  #: why the client, or a signal, ended it
        self._when_ended = when_ended
        self._hurries = hurries
        self._connection = c.service_end()
        self._channel = Channel(read_fd, write_fd, self.received, self.closed)
        self._answer: asyncio.Future[c.OpenBackup | c.Choose | c.Confirm] | None = None
        #: When the worker and the restore lock are let go, unless a plan was confirmed.
        self._confirm_by: float | None = None

    def __enter__(self) -> Self:
        """Begin to listen. Raises HostFailed if there is no such call."""
        self._answer = asyncio.get_running_loop().create_future()
        self._channel.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.__exit__()

    # --- What is asked -----------------------------------------------------------------------------

    async def opened(self) -> c.OpenBackup:
        """What the client wants. Raises Cancelled if it does not say so in time."""
        request = await self._answered(OPEN_TIMEOUT_S, "nobody said which backup to open", OPEN_TIMEOUT_S)
        assert isinstance(request, c.OpenBackup), "the table lets nothing else come first"
        return request

    async def ask(self, plan: c.Plan) -> c.Choose | c.Confirm:
        """Tell the plan; what the client makes of it. Raises Cancelled if it does not say so in time."""
        if self._channel.waiting + plan.max_size > 2 * MAX_WAITING:
            raise ProtocolViolation("the client asks for plans and reads none", advice=_VIOLATION_ADVICE)
        self._answer = asyncio.get_running_loop().create_future()
        self._channel.send(self._connection.send(plan))
        loop = asyncio.get_running_loop()
        if self._confirm_by is None:
            self._confirm_by = loop.time() + PLAN_TIMEOUT_S
        left_s = max(0.0, self._confirm_by - loop.time()) if self._hurries else None
        answer = await self._answered(left_s, "nobody confirmed a plan", PLAN_TIMEOUT_S)
        assert not isinstance(answer, c.OpenBackup), "the table lets it come once"
        return answer

    async def finish(self, final: Final) -> bool:
        """The last message; False if the client did not take it."""
        return await self._channel.finish(self._connection.send(final), LAST_WORD_TIMEOUT_S)

    async def _answered(
        self, timeout_s: float | None, otherwise: str, told_s: float
    ) -> c.OpenBackup | c.Choose | c.Confirm:
        assert self._answer is not None, "it was entered"
        try:
            async with asyncio.timeout(timeout_s):
                return await self._answer
        except TimeoutError:
            raise Cancelled(f"{otherwise} for {told_s:.0f} seconds", advice="") from None

    # --- What is told: an Observer ---------------------------------------------------------------------

    def progress(self, progress: RestoreProgress) -> None:
        """How far it is, if the client still listens."""
        if self._connection.may_come(RestoreProgress):
            self._channel.send_progress(self._connection.send(progress))

    def log(self, level: str, text: str) -> None:
        """A line, if the client reads."""
        known: Literal["info", "warning"] = "warning" if level == "warning" else "info"
        self._tell(Log(level=known, text=shortened(text, MAX_TEXT)))

    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        """A volume begins."""
        fields = {"qube": qube, "volume": volume, "image_size": image_size}
        self._tell(c.VolumeStarted.model_validate(fields))

    def qube_finished(self, report: QubeReport) -> None:
        """A qube is through."""
        self._tell(c.QubeFinished.of(report))

    def _tell(self, message: Message) -> None:
        if self._connection.may_come(type(message)):
            self._channel.send(self._connection.send(message), spare=True)

    # --- What comes in ----------------------------------------------------------------------------------

    def received(self, untrusted_data: bytes) -> None:
        """The client has said something. Once it has ended the call, nobody listens to it any more."""
        if self.ended is not None:
            return
        self._connection.receive(untrusted_data)
        try:
            while (message := self._connection.next_message()) is not None:
                if isinstance(message, Cancel):
                    self.end(Cancelled("it was cancelled", advice=""))
                elif self._answer is not None and not self._answer.done():
                    self._answer.set_result(message)
        except ProtocolViolation as violation:
            self.end(ProtocolViolation(violation.reason, advice=_VIOLATION_ADVICE))

    def closed(self) -> None:
        """The client has closed the call, or is gone."""
        self.end(Cancelled("the call was closed", advice=""))

    def end(self, reason: RestoreError) -> None:
        """The client wants no more, or is to get no more, for this reason; the first one counts."""
        if self.ended is None and self._connection.state is not c.CallPhase.CLOSED:
            self.ended = reason
            self._when_ended()


# --- The two descriptors ---------------------------------------------------------------------------


class Channel:
    """The call over `read_fd` and `write_fd`, which stay the caller's. A context manager; needs a loop.

    `received` gets what comes in. `closed` is called when nothing more will come, or when the other side
    reads nothing more; perhaps twice.
    """

    def __init__(
        self, read_fd: int, write_fd: int, received: Callable[[bytes], object], closed: Callable[[], object]
    ) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._received = received
        self._closed = closed
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

    def __exit__(self, *error: object) -> None:
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
            self._closed()
        else:
            self._received(untrusted_data)

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
                self._loop.call_soon(self._closed)
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
