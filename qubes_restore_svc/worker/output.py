"""Where a volume's extents go: into a hash, and to the broker if it fetches them.

Strategy: one volume is on offer at a time, and one call takes it. One object takes (offset, data) in rising
order and sees to the holes itself: the hash is over the whole image, holes as zeros; the stream to the broker
leaves them out. The fs-verity digest knows a hole for nothing, plain SHA-256 goes over every zero. Both hash
and stream can be ended from outside, a hole of a tebibyte as well as a broker that has stopped reading.
Hashing costs about as much as unpacking, and has a thread of its own.
"""

import contextlib
import hashlib
import queue
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Self

from qubes_restore_svc.errors import SkippedOnRequest, exhausted
from qubes_restore_svc.fs_verity import FsVerityDigest
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.wire import qrexec_call
from qubes_restore_svc.wire.names import DigestKind
from qubes_restore_svc.wire.volume import MAX_RECORD, encode_end, encode_header, encode_record

_ZEROS = memoryview(bytes(1 << 20))
#: Pieces, of a mebibyte at most, that may wait to be hashed.
_AHEAD = 16
#: Seconds after which a thread that waits for the other one looks whether it is still to go on.
_PATIENCE_S = 0.1


class ImageHash:
    """The digest of an image that comes as extents; to be used in a `with`, which ends its thread.

    `check` is called for every extent, and again and again while the hashing is waited for; what it raises
    passes through. So does what goes wrong with the hashing. The data of an extent must stay as it is until
    it has been hashed.
    """

    def __init__(self, kind: DigestKind, check: Callable[[], None]) -> None:
        self._wanted = check
        self._error: BaseException | None = None  # what has ended the thread
        self._digest = FsVerityDigest() if kind == "fsverity" else PlainDigest()
        self._pieces: queue.Queue[memoryview | int | None] = queue.Queue(_AHEAD)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="hash", daemon=True)
        self.position = 0  #: where the last extent ended, bytes
        self.data_bytes = 0  #: bytes that came as data
        self.hashed = 0  #: bytes of the image that have been hashed; rises in the thread

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with contextlib.suppress(queue.Full):
            self._pieces.put_nowait(None)  # it may be waiting for something to do
        self._thread.join()

    def write(self, offset: int, data: memoryview) -> None:
        """Hash the hole before `offset` and then `data`."""
        self._check()
        if offset > self.position:
            self._put(offset - self.position)
        self._put(data)
        self.position = offset + len(data)
        self.data_bytes += len(data)

    def finish(self, image_size: int) -> str:
        """Hash the hole at the end and wait for all of it; the digest in hexadecimal."""
        if image_size > self.position:
            self._put(image_size - self.position)
            self.position = image_size
        self._put(None)
        while self._thread.is_alive():
            self._check()
            self._thread.join(_PATIENCE_S)
        self._check()
        return self._digest.hexdigest()

    def _check(self) -> None:
        self._wanted()
        if self._error is not None:
            raise self._error

    def _put(self, piece: memoryview | int | None) -> None:
        while True:
            try:
                self._pieces.put(piece, timeout=_PATIENCE_S)
                return
            except queue.Full:
                self._check()

    def _work(self) -> None:
        try:
            self._hash()
        except BaseException as error:  # noqa: BLE001 - who waits for the digest is told
            self._error = error

    def _hash(self) -> None:
        while not self._ended.is_set():
            try:
                piece = self._pieces.get(timeout=_PATIENCE_S)
            except queue.Empty:
                continue
            if piece is None:
                return
            if isinstance(piece, int):
                self._skip(piece)
            else:
                self._digest.update(piece)
                self.hashed += len(piece)

    def _skip(self, size: int) -> None:
        while size and not self._ended.is_set():
            count = min(size, self._digest.longest_hole)
            self._digest.skip(count)
            self.hashed += count
            size -= count


class PlainDigest:
    """SHA-256 of an image; see `FsVerityDigest`."""

    longest_hole = len(_ZEROS)

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.update, self.hexdigest = self._digest.update, self._digest.hexdigest

    def skip(self, size: int) -> None:
        """A hole of `size` bytes, of `longest_hole` at the most."""
        self._digest.update(_ZEROS[:size])


class VolumeStream:
    """The answer to one `restore.Volume` call, over a connected blocking socket that it owns."""

    def __init__(self, connection: socket.socket, image_size: int) -> None:
        self._connection = connection
        self._image_size = image_size

    def begin(self) -> None:
        """Send the header."""
        self._send(encode_header(self._image_size))

    def write(self, offset: int, data: memoryview) -> None:
        """Send an extent. Raises SkippedOnRequest when the broker has hung up."""
        for start in range(0, len(data), MAX_RECORD):
            piece = data[start : start + MAX_RECORD]
            self._send(encode_record(offset + start, len(piece)), piece)

    def finish(self, data_bytes: int) -> None:
        """Say that the volume is complete."""
        self._send(encode_end(data_bytes))

    def abort(self) -> None:
        """End whatever waits for the broker to take more; from any thread."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up; without `finish` before, the broker knows that the volume is not complete."""
        close_read(self._connection)

    def _send(self, header: bytes, data: memoryview | None = None) -> None:
        try:
            sent = self._connection.sendmsg([header] if data is None else [header, data])
            if sent < len(header):
                self._connection.sendall(header[sent:])
                sent = len(header)
            if data is not None:
                self._connection.sendall(data[sent - len(header) :])
        except OSError as error:
            found = exhausted(error, "in the worker")
            raise found or SkippedOnRequest("the receiver stopped taking it") from error


class VolumeOffers:
    """The offer, shared between the pipeline's thread and the event loop."""

    def __init__(self) -> None:
        self._argument = ""
        self._offer: Future[socket.socket] | None = None

    def offer(self, key: str, volume: str) -> "Future[socket.socket]":
        """Put a volume on offer, in place of the one before.

        The future brings the connection of the call that takes it. Whoever cancels it withdraws the offer.
        """
        offer: Future[socket.socket] = Future()
        self._argument, self._offer = qrexec_call.volume_argument(key, volume), offer
        return offer

    def take(self, argument: str, connection: socket.socket) -> bool:
        """Hand `connection` to the offer that `argument` names; False if there is no such offer."""
        offer = self._offer
        if offer is None or offer.done() or argument != self._argument:
            return False
        if not offer.set_running_or_notify_cancel():
            return False
        offer.set_result(connection)
        return True
