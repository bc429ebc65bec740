"""The wire without its rules: frames of any bytes, and ends at which every message may come at any time."""

import enum
import struct
from typing import TypeAlias, TypeVar, get_args

from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.connection import Connection
from qubes_restore_svc.wire.models import Message, encode_message

_M = TypeVar("_M", bound=Message)
_State = TypeVar("_State", bound=enum.Enum)


class Time(enum.Enum):
    """The one state of these ends."""

    ANY = "any"


End: TypeAlias = Connection[Time, _M]


def _end(kinds: tuple[type[_M], ...]) -> End[_M]:
    return Connection("test", {(Time.ANY, kind): Time.ANY for kind in kinds}, Time.ANY, kinds)


def from_worker() -> End[m.WorkerMessage]:
    return _end(get_args(m.WorkerMessage))


def from_broker() -> End[m.BrokerMessage]:
    return _end(get_args(m.BrokerMessage))


def from_client() -> End[c.ClientMessage]:
    return _end(get_args(c.ClientMessage))


def from_dom0() -> End[c.BrokerAnswer]:
    return _end(get_args(c.BrokerAnswer))


def heard(end: Connection[_State, _M], data: bytes) -> list[_M]:
    """The messages that `data` completes."""
    end.receive(data)
    return list(iter(end.next_message, None))


def parsed(end: Connection[_State, _M], payload: bytes) -> _M:
    """The message in a frame; raises ProtocolViolation."""
    (message,) = heard(end, frame(payload))
    return message


def frame(payload: bytes) -> bytes:
    """The frame of `payload`, whatever it is."""
    return struct.pack("!I", len(payload)) + payload


def framed(message: Message) -> bytes:
    """The frame of `message`, whether it may come now or not."""
    return frame(encode_message(message))
