"""The stream of `restore.Volume`: one volume as a header, extents in rising order, and an end.

Strategy: the decoder is given exactly the `wanted` bytes of the next header and says whether data follows.
The data never passes through it: after a `RecordHeader` the caller takes `length` bytes from the stream
itself, straight to where they belong. All integers are big-endian.

    header  8 bytes "QRSVOLUM", u32 version (1), u64 image size
    record  u64 offset, u32 length (1 to 1 MiB), then `length` bytes of data
    end     u64 2^64-1, u32 0, then u64: the number of data bytes in all records

Where there is no record, the image is zero.
"""

import struct
from dataclasses import dataclass

from qubes_restore_svc.errors import ProtocolViolation

MAGIC = b"QRSVOLUM"
VERSION = 1
MAX_RECORD = 1 << 20  #: bytes of data in one record
MAX_IMAGE_SIZE = 1 << 44  #: bytes; 16 TiB, the largest file of ext4

_HEADER = struct.Struct("!8sIQ")
_RECORD = struct.Struct("!QI")
_TOTAL = struct.Struct("!Q")
_END_OFFSET = (1 << 64) - 1


def encode_header(image_size: int) -> bytes:
    """The beginning of the stream of an image of `image_size` bytes."""
    return _HEADER.pack(MAGIC, VERSION, image_size)


def encode_record(offset: int, length: int) -> bytes:
    """What stands before `length` bytes of data that belong at `offset`."""
    return _RECORD.pack(offset, length)


def encode_end(data_bytes: int) -> bytes:
    """The end of a stream whose records carried `data_bytes` bytes in all."""
    return _RECORD.pack(_END_OFFSET, 0) + _TOTAL.pack(data_bytes)


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """`length` bytes of data follow in the stream; they belong at `offset`."""

    offset: int
    length: int


class VolumeDecoder:
    """Headers of an image of `image_size` bytes in, extents out.

    `wanted` is the size of the next header in bytes; 0 when the volume is complete. `data_bytes` is the sum
    of all extents' lengths.
    """

    def __init__(self, image_size: int) -> None:
        self.wanted = _HEADER.size
        self._image_size = image_size
        self._position = 0
        self.data_bytes = 0

    def feed(self, untrusted_header: bytes | memoryview) -> RecordHeader | None:
        """The extent whose data follows these `wanted` bytes, if any does; raises ProtocolViolation."""
        if not self.wanted or len(untrusted_header) != self.wanted:
            raise ProtocolViolation("a volume stream that ends early, or goes on after its end")
        if self.wanted == _RECORD.size:
            return self._record(*_RECORD.unpack(untrusted_header))
        if self.wanted == _HEADER.size:
            if untrusted_header != encode_header(self._image_size):
                raise ProtocolViolation(
                    f"a volume stream that does not begin like one of {self._image_size} bytes"
                )
            self.wanted = _RECORD.size
        else:
            if untrusted_header != _TOTAL.pack(self.data_bytes):
                raise ProtocolViolation(f"a volume whose end is not that of {self.data_bytes} data bytes")
            self.wanted = 0
        return None

    def _record(self, untrusted_offset: int, untrusted_length: int) -> RecordHeader | None:
        if (untrusted_offset, untrusted_length) == (_END_OFFSET, 0):
            self.wanted = _TOTAL.size
            return None
        if not 0 < untrusted_length <= MAX_RECORD:
            raise ProtocolViolation(f"a volume record of {untrusted_length} bytes")
        if untrusted_offset < self._position:
            raise ProtocolViolation("a volume record that goes back")
        if untrusted_offset + untrusted_length > self._image_size:
            raise ProtocolViolation("a volume record that reaches past the end of the image")
        self._position = untrusted_offset + untrusted_length
        self.data_bytes += untrusted_length
        return RecordHeader(untrusted_offset, untrusted_length)
