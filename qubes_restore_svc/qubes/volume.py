"""One volume on its way into a Qubes system: extents come in, a stream without holes goes to the import.

Strategy: the import reads a pipe in a thread of its own; the writer fills the holes with zeros on the way, so
that no more than the pipe and one record are ever in memory. The proof that a volume is complete is the
success of the import, and nothing else. The image's last byte is held back until `finish`, so that an import
which is abandoned always ends short and leaves the volume as it was. A thread that waits for the import looks
again and again whether the volume has been abandoned, and does not wait for ever.
"""

import errno
import fcntl
import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO

from qubes_restore_svc.broker.filesystem import Room
from qubes_restore_svc.errors import HostFailed, RestoreError
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.qubes.system import said_by
from qubes_restore_svc.wire.names import MAX_NUMBER, VolumeName

#: Seconds that the import may take no data, or may need for the disk once it has all of it.
STALL_TIMEOUT_S = 600.0
#: Bytes that the pipe should hold: a record, so that the next one can be received meanwhile.
PIPE_SIZE = 1 << 20

#: Bytes that are written at the most before qubesd is asked again for the free space of the pool.
ROOM_STEP = 256 << 20

#: Seconds until a thread that waits sees that the volume was abandoned.
_LOOK_S = 0.1

_ZEROS = memoryview(bytes(PIPE_SIZE))

#: Fills the volume with exactly so many bytes from the stream, and closes it; raises RestoreError.
Import = Callable[[BinaryIO, int], None]


class VolumeImport:
    """A `VolumeSink` over `run_import`, which runs in a thread from the first byte on."""

    def __init__(
        self, run_import: Import, qube: str, volume: VolumeName, image_size: int, room: Room | None = None
    ) -> None:
        self._run_import = run_import
        self._qube = qube
        self._volume: VolumeName = volume
        self._image_size = image_size
        self._room = room
        self._sent = 0  #: bytes that are in the pipe or were
        self._held_back: bytes | None = None  #: the image's last byte, if it has come as data
        self._mutex = threading.Lock()  #: the sender holds it while the pipe takes data
        self._pipe: int | None = None
        self._thread: threading.Thread | None = None
        self._closed = False  #: no more data is taken
        self._size: int | None = None
        self._abandoned = False
        self._ended = threading.Event()  #: the import has, with `failure` or without
        self._failure: RestoreError | None = None
        if not 0 <= image_size <= MAX_NUMBER:
            raise self._error(f"{image_size} bytes is not the size of an image")

    @property
    def size(self) -> int | None:
        """Bytes of the finished volume; None before that."""
        return self._size

    def write(self, offset: int, data: memoryview) -> None:
        """Put `data` at `offset`, in bytes; raises HostFailed or NoSpace, and then takes no more."""
        with self._mutex:
            self._check_open()
            try:
                if not self._position <= offset <= self._image_size - len(data):
                    raise self._error(
                        f"{len(data)} bytes at {offset}, outside of the {self._position} to"
                        f" {self._image_size} left"
                    )
                if self._room is not None:
                    self._room.take(len(data))
                self._fill(offset)
                if offset + len(data) == self._image_size and len(data):
                    self._send(data[:-1])
                    self._held_back = bytes(data[-1:])
                else:
                    self._send(data)
            except BaseException:
                self._close()
                raise

    def finish(self, size: int) -> None:
        """Fill up to `size`, which must be the image's, and wait until the import has succeeded."""
        with self._mutex:
            self._check_open()
            try:
                if size != self._image_size:
                    raise self._error(f"a size of {size} bytes, of an image of {self._image_size}")
                if size:
                    self._fill(size - 1)
                    self._send(memoryview(self._held_back or b"\0"))
                else:
                    self._start()
            finally:
                self._close()
        self._wait_imported()
        with self._mutex:
            if self._abandoned:
                raise self._error("the volume was abandoned")
            self._size = size

    def abandon(self) -> None:
        """Take no more data and let the import end short. Does not wait for it. Harmless after `finish`."""
        self._abandoned = True
        with self._mutex:  # its holder sees that soon
            self._close()

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait until the import has ended, in whichever way; False if it has not after `timeout_s`."""
        return self._thread is None or self._ended.wait(timeout_s)

    # --- The writer's side -----------------------------------------------------------------------

    @property
    def _position(self) -> int:
        return self._sent + (self._held_back is not None)

    def _check_open(self) -> None:
        if self._closed:
            raise self._error("the volume takes no more data")

    def _fill(self, end: int) -> None:
        """Zeros up to `end`, but not for the image's last byte."""
        while self._sent < min(end, self._image_size - 1):
            self._send(_ZEROS[: min(end, self._image_size - 1) - self._sent])

    def _send(self, data: memoryview) -> None:
        pipe = self._start()
        while data:
            if self._abandoned:
                raise self._error("the volume was abandoned")
            try:
                count = os.write(pipe, data)
            except BlockingIOError:
                self._wait_writable(pipe)
                continue
            except OSError as error:
                if error.errno != errno.EPIPE:
                    raise self._error(f"passing data to the import failed: {error.strerror}") from error
                self._wait_imported()
                raise self._error("the import ended before it had all data") from None
            self._sent += count
            data = data[count:]

    def _wait_writable(self, pipe: int) -> None:
        poll = select.poll()
        poll.register(pipe, select.POLLOUT)
        self._wait(lambda look_s: bool(poll.poll(look_s * 1000)), "the import took no data for")

    def _wait_imported(self) -> None:
        """Return when the import has succeeded, or is no longer waited for; raise what it failed with."""
        self._wait(self._ended.wait, "the import did not end within")
        if self._failure is not None:
            raise self._failure

    def _wait(self, is_over: Callable[[float], bool], complaint: str) -> None:
        """Return when `is_over` says so (it waits for the seconds that it gets), or when this is
        abandoned."""
        deadline = time.monotonic() + STALL_TIMEOUT_S
        while not self._abandoned and not is_over(_LOOK_S):
            if time.monotonic() > deadline:
                raise self._error(f"{complaint} {STALL_TIMEOUT_S:.0f} seconds")

    def _close(self) -> None:
        """Take no more data, and let the import see the end of it. Under the mutex."""
        if self._closed:
            return
        self._closed = True
        if self._pipe is not None:
            os.close(self._pipe)

    # --- The import's side -----------------------------------------------------------------------

    def _start(self) -> int:
        """The pipe to the import, which runs from now on."""
        if self._pipe is not None:
            return self._pipe
        try:
            reader, writer = os.pipe()
        except OSError as error:
            raise self._error(f"starting the import failed: {error.strerror}") from error
        with suppress(OSError):  # a limit of the system; it works with a smaller one
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        os.set_blocking(writer, False)
        self._pipe = writer
        # A daemon: should an import hang, nobody can end it, and this program must end nevertheless.
        thread = threading.Thread(
            target=self._import, args=(reader,), name=f"import {self._qube}/{self._volume}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:
            close_read(reader)
            raise self._error(f"starting the import failed: {said_by(error)}") from error
        self._thread = thread
        return writer

    def _import(self, reader: int) -> None:
        try:
            with open(reader, "rb", buffering=0) as stream:
                self._run_import(stream, self._image_size)
        except RestoreError as error:
            self._failure = error
        except BaseException as error:  # noqa: BLE001 - the writer raises it; here nobody would see it
            self._failure = self._error(f"importing the volume failed: {said_by(error)}")
        self._ended.set()

    def _error(self, reason: str) -> HostFailed:
        return HostFailed(reason, qube=self._qube, volume=self._volume)
