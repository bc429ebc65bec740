"""Frames: a 4-byte big-endian length, then that many bytes of one JSON object.

Strategy: the decoder is given bytes as they come and yields the payload of each whole frame. A frame that
announces more than `limit` is refused when its length has arrived, before a byte of it is kept. What
a payload may hold is for the models to say; here only its shape is checked, so that they cannot be flooded.
"""

import json
import struct
from collections.abc import Iterator

from qubes_restore_svc.errors import ProtocolViolation

MAX_FRAME = 4 << 20  #: the largest frame of all, a manifest; bytes

MAX_MEMBERS = 4096  #: keys of one JSON object, or values of one array

_LENGTH = struct.Struct("!I")
_OBJECT = object()


def encode_frame(payload: bytes) -> bytes:
    """The frame that carries `payload` (1 byte to MAX_FRAME)."""
    if not 0 < len(payload) <= MAX_FRAME:
        raise ProtocolViolation(f"a frame of {len(payload)} bytes, where 1 to {MAX_FRAME} are allowed")
    return _LENGTH.pack(len(payload)) + payload


class FrameDecoder:
    """Bytes in, payloads out. `limit`, in bytes, may be changed between frames."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, untrusted_data: bytes) -> Iterator[bytes]:
        """Yield the payload of every frame that `untrusted_data` completes; raises ProtocolViolation.

        The iterator must be exhausted before the next call.
        """
        self._buffer += untrusted_data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if not 0 < length <= self.limit:
                raise ProtocolViolation(f"a frame of {length} bytes, where 1 to {self.limit} are allowed")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield payload

    @property
    def idle(self) -> bool:
        """True between frames: the stream may end here."""
        return not self._buffer


def check_json(untrusted_payload: bytes) -> None:
    """Refuse a payload that is not one JSON object of a modest shape; raises ProtocolViolation.

    A key stands once in an object, objects and arrays have at most MAX_MEMBERS members, arrays hold no
    arrays, and numbers are integers. pydantic asks for none of this by itself: it takes the last of two equal
    keys, and it writes down an error for every member it refuses, which turns 4 MiB of `{}` into gigabytes.
    """
    try:
        untrusted_value: object = json.loads(
            untrusted_payload.decode(),
            object_pairs_hook=_check_object,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except (ValueError, RecursionError):
        raise ProtocolViolation("a message that is not JSON, or nested too deeply") from None
    if untrusted_value is not _OBJECT:
        raise ProtocolViolation("a message that is not a JSON object")


def _check_object(untrusted_members: list[tuple[str, object]]) -> object:
    if len({key for key, _ in untrusted_members}) != len(untrusted_members):
        raise ProtocolViolation("a message in which a key stands twice")
    lists = [value for _, value in untrusted_members if isinstance(value, list)]
    if len(untrusted_members) > MAX_MEMBERS or any(len(values) > MAX_MEMBERS for values in lists):
        raise ProtocolViolation(f"a message with more than {MAX_MEMBERS} members in one place")
    if any(isinstance(value, list) for values in lists for value in values):
        raise ProtocolViolation("a message with an array in an array")
    return _OBJECT


def _refuse_number(_: str) -> object:
    raise ProtocolViolation("a message with a number that is not an integer")
