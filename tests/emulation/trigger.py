"""How the programs of the emulation reach the switchboard: a Unix socket per domain, one connection per call.

Strategy: the caller sends one request; the answer is a refusal with an exit code, or word that the connection
is from now on the data channel of the call. Who calls is known from the socket, never from what is said.
"""

import os
import socket
import struct
from contextlib import suppress
from enum import Enum

from .process_io import FRAME, MAX_DATA

#: Exit codes of qrexec itself (libqrexec/qrexec.h).
SERVICE_NOT_FOUND, REQUEST_REFUSED, PROBLEM = 127, 126, 125

_REQUEST, _CONNECTED, _REFUSED = 0x200, 0x202, 0x203


class Kind(Enum):
    """Which program asks."""

    FROM_VM = "qrexec-client-vm"
    FROM_DOM0 = "qrexec-client"


class Refused(Exception):
    """No connection; `code` is what the program exits with."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def request(switchboard: str | os.PathLike[str], kind: Kind, target: str, command: str) -> socket.socket:
    """Ask for a call: the data channel. `command` is `SERVICE+ARG` from a VM, `USER:QUBESRPC …` from dom0.

    Raises Refused; OSError where there is no switchboard.
    """
    channel = connect_unix(switchboard)
    words = b"\0".join(word.encode(errors="surrogateescape") for word in (kind.value, target, command))
    channel.sendall(FRAME.pack(_REQUEST, len(words)) + words)
    answer = _receive(channel, FRAME.size)
    if answer is None:
        raise Refused(REQUEST_REFUSED)
    verdict, size = FRAME.unpack(answer)
    if verdict != _CONNECTED:
        code = _receive(channel, size)
        channel.close()
        raise Refused(int.from_bytes(code or b"\x01", "little"))
    return channel


def read_request(channel: socket.socket) -> tuple[Kind, str, str] | None:
    """The switchboard's side: kind, target and command of a request; None for what is none."""
    header = _receive(channel, FRAME.size)
    if header is None:
        return None
    verdict, size = FRAME.unpack(header)
    words = _receive(channel, size) if verdict == _REQUEST and size <= MAX_DATA else None
    if words is None or words.count(b"\0") != 2:
        return None
    kind, target, command = (word.decode(errors="surrogateescape") for word in words.split(b"\0"))
    return Kind(kind), target, command


def accept(channel: socket.socket) -> None:
    """The switchboard's side: what follows are the data frames of the call."""
    channel.sendall(FRAME.pack(_CONNECTED, 0))


def refuse(channel: socket.socket, code: int) -> None:
    """The switchboard's side: there will be no call."""
    channel.sendall(FRAME.pack(_REFUSED, 4) + struct.pack("<i", code))


def connect_unix(path: str | os.PathLike[str]) -> socket.socket:
    """Connect to the socket at `path`, however long that is (108 bytes are the limit of an address)."""
    place = os.open(path, os.O_PATH)
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(f"/proc/self/fd/{place}")
        except OSError:
            connection.close()
            raise
        return connection
    finally:
        os.close(place)


def listen_unix(path: str | os.PathLike[str]) -> socket.socket:
    """Listen on a new socket at `path`, however long that is; what was there is removed."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    parent, name = os.path.split(path)
    folder = os.open(parent, os.O_PATH | os.O_DIRECTORY)
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"/proc/self/fd/{folder}/{name}")
        listener.listen(64)
        return listener
    finally:
        os.close(folder)


def _receive(channel: socket.socket, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        piece = channel.recv(size - len(data))
        if not piece:
            return None
        data += piece
    return data
