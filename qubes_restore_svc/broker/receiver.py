"""Takes a volume from the worker and puts it where it belongs: the one loop that sees the data.

Strategy: headers go through the decoder; the data of an extent is received into one buffer of 1 MiB and
written from there. Nothing else happens to it. The loop runs in a thread; hanging up ends it. What the worker
says of the volume is compared with what came.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Protocol

from qubes_restore_svc.broker.interfaces import Comparison, VolumeSink
from qubes_restore_svc.errors import ProtocolViolation, RestoreError, WorkerLost, exhausted
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.waiting import in_thread, started, to_the_end
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.volume import MAX_RECORD, VolumeDecoder


class Writer(Protocol):
    """What takes the data: a host's VolumeSink."""

    def write(self, offset: int, data: memoryview) -> None:
        """Put `data` at `offset`, in bytes; offsets rise from call to call."""


class VolumeCopy:
    """A volume on its way; owns its connection and its sink until `finish` or `end` is through.

    `end_session` is called at once with an error that must not wait for the worker's next message: a stream
    that breaks the protocol, or a mistake of ours.
    """

    def __init__(
        self,
        ready: m.VolumeReady,
        connection: socket.socket,
        sink: VolumeSink,
        end_session: Callable[[Exception], None],
    ) -> None:
        self.ready = ready
        self.comparison: Comparison | None = None  #: what was found, if it was compared; after `finish`
        self._connection = connection
        self._sink = sink
        self._end_session = end_session
        self._given_up = False  #: it was ended on its way; an error of the sink after that is no failure
        self._task = asyncio.create_task(self._copied())

    @property
    def failure(self) -> RestoreError | None:
        """The error so far, except that the stream ended early: the session will say why."""
        if self._given_up or not self._task.done() or self._task.exception() is not None:
            return None
        result = self._task.result()
        return result if isinstance(result, RestoreError) and not isinstance(result, WorkerLost) else None

    async def finish(self, done: m.VolumeDone, tail_timeout_s: float) -> RestoreError | None:
        """Bring the copy to its end; what went wrong on this side, if something did.

        Without an error the volume is complete and in the sink, if `done` says so. The rest of a volume that
        is said to be complete may take `tail_timeout_s` seconds to arrive. Raises ProtocolViolation if what
        came is not what the worker says.
        """
        try:
            if done.outcome == "ok":
                await asyncio.wait([self._task], timeout=tail_timeout_s)
            late = not self._task.done()
            # What has arrived can still be read: a slow disk is not the worker's fault.
            _hang_up(self._connection)
            result = await to_the_end(self._task, self._give_up)
            if isinstance(result, ProtocolViolation):
                raise result
            if isinstance(result, WorkerLost) and done.outcome == "ok":
                what = "does not end" if late else "is not"
                raise ProtocolViolation(f"a volume that is said to be complete and {what}")
            if isinstance(result, RestoreError):
                return self.failure
            if done.outcome == "ok":
                expected = result if done.volume == "home" else self.ready.image_size
                if (done.data_bytes, done.image_size) != (result, expected):
                    raise ProtocolViolation("a volume whose size is not what was announced and sent")
                self.comparison = await in_thread(self._sink.finish, done.image_size, on_cancel=self._give_up)
            return None
        except ProtocolViolation:
            raise
        except RestoreError as error:
            return error
        finally:
            await self.end()

    async def end(self) -> None:
        """End it, wherever it is, and give back what it holds. A cancel counts afterwards."""
        if not self._task.done():
            self._give_up()
        try:
            await to_the_end(asyncio.wait([self._task]))
        finally:
            close_read(self._connection)
            self._sink.abandon()

    def _give_up(self) -> None:
        """Make every wait for the worker or for the host end soon. Harmless after the volume is complete."""
        self._given_up = self._given_up or not self._task.done()
        _hang_up(self._connection)
        self._sink.abandon()

    async def _copied(self) -> int | RestoreError:
        """The number of data bytes, or what stopped it."""
        try:
            return await started(receive_volume, self._connection, self._sink, self.ready.image_size)
        except RestoreError as error:
            _hang_up(self._connection)  # the worker need not send the rest
            if isinstance(error, ProtocolViolation):
                self._end_session(error)
            return error
        except Exception as mistake:
            _hang_up(self._connection)
            if (found := exhausted(mistake)) is not None:
                return found
            self._end_session(mistake)
            raise


def receive_volume(connection: socket.socket, writer: Writer, image_size: int) -> int:
    """Copy one volume of `image_size` bytes from `connection` to `writer`; blocks.

    Returns the number of data bytes after the end record and the end of the stream. Raises
    ProtocolViolation for a stream that is malformed, of another size, or goes on after its end, WorkerLost if
    it ends early, and what `writer` raises.
    """
    decoder = VolumeDecoder(image_size)
    buffer = memoryview(bytearray(MAX_RECORD))
    while decoder.wanted:
        header = buffer[: decoder.wanted]
        _receive_exactly(connection, header)
        if (extent := decoder.feed(header)) is not None:
            data = buffer[: extent.length]
            _receive_exactly(connection, data)
            writer.write(extent.offset, data)
    if _receive(connection, buffer):
        raise ProtocolViolation("a volume stream that goes on after its end")
    return decoder.data_bytes


def _receive_exactly(connection: socket.socket, target: memoryview) -> None:
    while target:
        count = _receive(connection, target)
        if not count:
            raise WorkerLost("the volume's stream ended before the volume was complete")
        target = target[count:]


def _receive(connection: socket.socket, target: memoryview) -> int:
    """How many bytes have come; 0 when no more will, in whichever way the stream ended."""
    try:
        return connection.recv_into(target)
    except OSError as error:
        if (found := exhausted(error)) is not None:
            raise found from error
        return 0


def _hang_up(connection: socket.socket) -> None:
    """End every wait on the connection."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
