"""One end of a connection, without input or output: bytes in, messages out; messages in, bytes out.

Strategy: what comes in is kept until a frame is complete. A frame is refused as soon as its length has come,
if nothing that may come now can be so long. Its JSON is read next, then its type is looked up in the table of
what may come now. Only then its fields are looked at. Every fault is a ProtocolViolation. It ends the
connection, which then raises the same again.

    frame   4 bytes of length, big-endian, then as many bytes of one JSON object

The two tables, and the rules that no table can hold, are in `messages.py` (a session) and `restore_call.py`
(a call).
"""

import enum
import itertools
import json
import struct
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

from qubes_restore_svc.errors import ProtocolViolation
from qubes_restore_svc.wire.models import Message, check_size, encode_message, validated

MAX_DEPTH = 8  #: JSON objects within each other
MAX_MEMBERS = 4096  #: keys of one JSON object, or values of one array
MAX_OBJECTS = 1 << 17  #: JSON objects in one message

_LENGTH = struct.Struct("!I")

_State = TypeVar("_State", bound=enum.Enum)
_Received = TypeVar("_Received", bound=Message)


class Connection(Generic[_State, _Received]):
    """One end, which receives messages of `kinds`. `state` is the result of all messages so far.

    `table` leads from a state and a message to the next state. Messages of the two ends can cross on the way.
    So what one end says never leads to a state that forbids what may be on its way already. A state from
    which nothing leads is the end; what comes then is not looked at.
    """

    def __init__(
        self,
        name: str,
        table: Mapping[tuple[_State, type[Message]], _State],
        first: _State,
        kinds: Iterable[type[_Received]],
    ) -> None:
        self.state = first
        self._name = name
        self._table = table
        self._kinds = {kind.word(): kind for kind in kinds}
        self._buffer = bytearray()

    def may_come(self, kind: type[Message]) -> bool:
        """May such a message be sent, or received, now?"""
        return (self.state, kind) in self._table

    def send(self, message: Message) -> bytes:
        """The frame of `message`; raises ProtocolViolation if it may not be sent now, or is too large."""
        self._check(type(message))
        payload = encode_message(message)
        self.advance(message)
        return _LENGTH.pack(len(payload)) + payload

    def receive(self, untrusted_data: bytes) -> None:
        """Take what has come. Call `next_message` then, until it returns None."""
        self._buffer += untrusted_data

    def next_message(self) -> _Received | None:
        """The next message, or None until more has come. Raises ProtocolViolation."""
        if all(state is not self.state for state, _ in self._table):
            self._buffer.clear()
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        limit = self.frame_limit
        if not 0 < length <= limit:
            raise ProtocolViolation(f"a frame of {length} bytes, where 1 to {limit} are allowed")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        message = self._message(bytes(self._buffer[_LENGTH.size : end]))
        self.advance(message)
        del self._buffer[:end]
        return message

    @property
    def frame_limit(self) -> int:
        """Size of the largest frame that may come now, bytes."""
        sizes = (kind.max_size for kind in self._kinds.values() if self.may_come(kind))
        return max(sizes, default=Message.max_size)

    def advance(self, message: Message) -> None:
        """Take note of `message`, sent or received; raises ProtocolViolation if it may not come now."""
        self._check(type(message))
        self.state = self._after(message, self._table[self.state, type(message)])

    def _after(self, message: Message, following: _State) -> _State:
        """The state after `message`; the table says `following`.

        Raises ProtocolViolation for what no table can tell: it contradicts what was said before.
        """
        return following

    def _check(self, kind: type[Message]) -> None:
        if not self.may_come(kind):
            raise ProtocolViolation(f"'{kind.word()}' while the {self._name} is {self.state.value}")

    def _message(self, untrusted_payload: bytes) -> _Received:
        untrusted_object = parse_object(untrusted_payload)
        untrusted_word = untrusted_object.get("type")
        kind = self._kinds.get(untrusted_word) if isinstance(untrusted_word, str) else None
        if kind is None:
            raise ProtocolViolation("a message that does not validate (it is of an unknown type)")
        self._check(kind)
        check_size(kind, len(untrusted_payload))
        return validated(kind, untrusted_object)


def parse_object(untrusted_payload: bytes) -> "_Object":
    """The JSON object in a frame, its arrays as tuples; raises ProtocolViolation.

    A key stands once in an object, arrays hold no arrays, and numbers are integers. How deep objects are, how
    wide and how many is bounded. The models ask for none of this. Of two equal keys they would never see the
    first, and they write down an error for every member that they refuse: 4 MiB of `{}` become gigabytes.
    """
    count = itertools.count(1)

    def counted(untrusted_members: list[tuple[str, object]]) -> _Object:
        if next(count) > MAX_OBJECTS:
            raise ProtocolViolation(f"a message with more than {MAX_OBJECTS} objects")
        return _object(untrusted_members)

    try:
        untrusted_value: object = json.loads(
            untrusted_payload.decode(),
            object_pairs_hook=counted,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except (ValueError, RecursionError):
        raise ProtocolViolation("a message that is not JSON, or nested too deeply") from None
    if not isinstance(untrusted_value, _Object):
        raise ProtocolViolation("a message that is not a JSON object")
    return untrusted_value


class _Object(dict[str, object]):
    """A JSON object; `depth` counts the objects within each other, itself included."""

    __slots__ = ("depth",)
    depth: int


def _object(untrusted_members: list[tuple[str, object]]) -> _Object:
    untrusted_object = _Object(untrusted_members)
    if len(untrusted_object) != len(untrusted_members):
        raise ProtocolViolation("a message in which a key stands twice")
    depth, width = 1, len(untrusted_members)
    for key, value in untrusted_members:
        if type(value) is list:
            width = max(width, len(value))
            untrusted_object[key] = tuple(value)
            for member in value:
                if type(member) is list:
                    raise ProtocolViolation("a message with an array in an array")
                if type(member) is _Object:
                    depth = max(depth, member.depth + 1)
        elif type(value) is _Object:
            depth = max(depth, value.depth + 1)
    if width > MAX_MEMBERS:
        raise ProtocolViolation(f"a message with more than {MAX_MEMBERS} members in one place")
    if depth > MAX_DEPTH:
        raise ProtocolViolation(f"a message with more than {MAX_DEPTH} objects within each other")
    untrusted_object.depth = depth
    return untrusted_object


def _refuse_number(_: str) -> object:
    raise ProtocolViolation("a message with a number that is not an integer")
