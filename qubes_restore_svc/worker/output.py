"""Where a volume's extents go: into a hash, and to the broker if it fetches them.

Strategy: one object takes (offset, data) in rising order and sees to the holes itself: the hash is over
the whole image, so a hole is hashed as zeros; the stream to the broker leaves it out. Both can be ended from
outside, a hole of a tebibyte as well as a broker that has stopped reading.
"""

import contextlib
import hashlib
import socket
from collections.abc import Callable

from qubes_restore_svc.errors import SkippedOnRequest
from qubes_restore_svc.wire.volume import MAX_RECORD, encode_end, encode_header, encode_record

_ZEROS = memoryview(bytes(1 << 20))


class ImageHash:
    """SHA-256 of an image that comes as extents.

    `check` is called at least once for every MiB; what it raises ends the hashing of a hole, however long.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._digest = hashlib.sha256()
        self.position = 0  #: bytes of the image that have been hashed
        self.data_bytes = 0  #: bytes of them that came as data

    def write(self, offset: int, data: memoryview) -> None:
        """Hash the hole before `offset` and then `data`."""
        self._zeros_until(offset)
        self._check()
        self._digest.update(data)
        self.position += len(data)
        self.data_bytes += len(data)

    def finish(self, image_size: int) -> str:
        """Hash the hole at the end; the digest in hexadecimal."""
        self._zeros_until(image_size)
        return self._digest.hexdigest()

    def _zeros_until(self, offset: int) -> None:
        while self.position < offset:
            self._check()
            count = min(offset - self.position, len(_ZEROS))
            self._digest.update(_ZEROS[:count])
            self.position += count


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
        self._connection.close()

    def _send(self, header: bytes, data: memoryview | None = None) -> None:
        try:
            sent = self._connection.sendmsg([header] if data is None else [header, data])
            if sent < len(header):
                self._connection.sendall(header[sent:])
                sent = len(header)
            if data is not None:
                self._connection.sendall(data[sent - len(header) :])
        except OSError as error:
            raise SkippedOnRequest("the receiver stopped taking it") from error
