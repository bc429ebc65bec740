"""The target of a volume's extents: a hash, and the broker if it fetches them.

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
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Self

from qubes_restore_svc.errors import SkippedOnRequest, exhausted
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

        The future brings the connection of the call that takes it. To cancel it withdraws the offer.
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


# --- The fs-verity digest ------------------------------------------------------------------------
#
# What `fsverity digest FILE` prints for an image that comes as data and holes. Linux defines it
# (Documentation/filesystems/fsverity.rst); here with SHA-256, blocks of 4 KiB and no salt. The image is cut
# into blocks, and the hashes of 128 blocks make a block of the level above, up to a level of one hash. Of
# each level, only the block that is not full yet is kept. The hash of a whole subtree of zeros follows from
# that of the subtree below it, so a hole costs a few steps for each level, however long it is. At last, a
# descriptor with the size and the hash at the top is hashed.

_BLOCK = 4096
_ZERO_BLOCK = bytes(_BLOCK)
_HASH_SIZE = 32

#: Levels of an image of 2**64 bytes, from the hashes of its blocks to the one at the top.
_LEVELS = 9

#: Version 1, SHA-256, log2 of the block size, no salt; the size in bytes; the root hash, and zeros.
_DESCRIPTOR = struct.Struct("<BBBBIQ64s176x")


class FsVerityDigest:
    """The digest of what `update` and `skip` were told, in the order of the image."""

    #: Bytes of a hole that `skip` takes in next to no time.
    longest_hole = 1 << 63

    def __init__(self) -> None:
        self._size = 0
        self._begun = bytearray()  # data of a block that is not whole yet
        # The hashes that do not fill a block yet, those of the blocks of the image first.
        self._levels = [bytearray() for _ in range(_LEVELS)]

    def update(self, data: bytes | memoryview) -> None:
        """`data` follows."""
        self._size += len(data)
        view = memoryview(data)
        if self._begun:
            missing = _BLOCK - len(self._begun)
            self._begun += view[:missing]
            view = view[missing:]
            if len(self._begun) < _BLOCK:
                return
            self._put(0, _hash(self._begun))
            self._begun.clear()
        start, end = 0, len(view) // _BLOCK * _BLOCK
        while start < end:
            stop = min(end, start + self._room(0) * _BLOCK)
            self._put(0, b"".join([_hash(view[at : at + _BLOCK]) for at in range(start, stop, _BLOCK)]))
            start = stop
        self._begun += view[end:]

    def skip(self, size: int) -> None:
        """A hole of `size` bytes follows, which reads as zeros."""
        if self._begun:
            filling = min(size, _BLOCK - len(self._begun))
            self.update(_ZERO_BLOCK[:filling])
            size -= filling
        self._skip(0, size // _BLOCK, _hash(_ZERO_BLOCK))
        self._begun += _ZERO_BLOCK[: size % _BLOCK]
        self._size += size

    def hexdigest(self) -> str:
        """The digest in hexadecimal; nothing may follow."""
        if self._begun:
            self._put(0, _hash(self._begun.ljust(_BLOCK, b"\0")))
        level, hashes = 0, -(-self._size // _BLOCK)
        while hashes > 1:
            if begun := self._levels[level]:
                self._put(level + 1, _hash(begun.ljust(_BLOCK, b"\0")))
            level, hashes = level + 1, -(-hashes * _HASH_SIZE // _BLOCK)
        # An empty image has no hash at the top, and zeros in its place.
        root = bytes(self._levels[level])
        log_block_size = _BLOCK.bit_length() - 1
        return hashlib.sha256(_DESCRIPTOR.pack(1, 1, log_block_size, 0, 0, self._size, root)).hexdigest()

    def _room(self, level: int) -> int:
        """How many hashes the begun block of a level still takes; at least one."""
        return (_BLOCK - len(self._levels[level])) // _HASH_SIZE

    def _put(self, level: int, hashes: bytes) -> None:
        """Add hashes to a level that has room for them. A block that they fill goes to the level above."""
        begun = self._levels[level]
        begun += hashes
        if len(begun) == _BLOCK:
            full = _hash(begun)
            begun.clear()
            self._put(level + 1, full)

    def _skip(self, level: int, count: int, zero: bytes) -> None:
        """Add `count` hashes to a level, each of them `zero`, the one of a subtree of zeros there."""
        filling = min(count, self._room(level))
        self._put(level, zero * filling)
        blocks, rest = divmod(count - filling, _BLOCK // _HASH_SIZE)
        if blocks:
            self._skip(level + 1, blocks, _hash(zero * (_BLOCK // _HASH_SIZE)))
        self._put(level, zero * rest)


def _hash(block: bytes | bytearray | memoryview) -> bytes:
    return hashlib.sha256(block).digest()
