"""What the storage qube's `tar2qfile` makes of a backup: the wanted members of a tar, as a qfile stream.

Strategy: as the original (qubes-core-agent-linux, qubes-rpc/tar2qfile.c, with qubes-linux-utils' qrexec-
lib), block by block, with its ways of not seeing things: extended headers are skipped unread, only plain
files are sent, and once a block is no header, nothing after it is looked at. The arguments are the file and
the beginnings of the names that are wanted. Exits 0 when the receiver's answer has the right checksum, 2
when the file cannot be opened, 1 otherwise.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Sequence
from enum import Enum, auto

BLOCK = 512
_COPY = 4096  #: bytes that the original copies at a time

_QFILE_HEADER = struct.Struct("<IIQIIII")
_RESULT = struct.Struct("<IIQ")  #: error code, padding, CRC-32
_RESULT_NAME = struct.Struct("<I")  #: length of the last name, which follows
_EDQUOT = 122

_S_IFDIR, _S_IFREG = 0o040000, 0o100000


class _Next(Enum):
    READ = auto()
    SYNC = auto()  # zeros are passed over, then a header is expected
    INVALID = auto()  # everything is passed over


class _Exit(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run(file: str | int, wanted: Sequence[bytes]) -> int:
    """Send what is `wanted` (everything, if nothing is) of a file, or of a descriptor; returns the exit code.

    The stream goes to fd 1, the answer comes on fd 0.
    """
    try:
        descriptor = file if isinstance(file, int) else os.open(file, os.O_RDONLY)
    except OSError:
        say(f"Error opening file {file!s}")
        return 2
    try:
        _Sender(descriptor, wanted).run()
    except _Exit as ended:
        return ended.code
    return 0


def say(words: str, end: str = "\n") -> None:
    """Say it on stderr, at once; where nobody listens any more, that changes nothing."""
    with contextlib.suppress(OSError):
        os.write(2, os.fsencode(words + end))


class _Sender:
    def __init__(self, descriptor: int, wanted: Sequence[bytes]) -> None:
        self.descriptor = descriptor
        self.wanted = list(wanted)
        self.matched = [False] * len(wanted)
        self.directories: set[bytes] = set()
        self.crc = 0
        self.can_seek = True

    def run(self) -> None:
        self.send_members()
        self.write(bytes(_QFILE_HEADER.size))
        self.wait_for_result()

    def send_members(self) -> None:
        state = _Next.READ
        while (block := _read_all(self.descriptor, BLOCK)) is not None:
            if state is _Next.INVALID or (state is _Next.SYNC and not any(block)):
                continue
            if not _is_header(block):
                state = _Next.INVALID
                continue
            state = _Next.SYNC
            size = _octal(block[124:136])
            if block[156:157] != b"0":
                self.skip(size)
            elif self.is_wanted(_name(block)):
                self.send(block, size)
            elif self.wanted and all(self.matched):
                return
            else:
                self.skip(size)

    def is_wanted(self, name: bytes) -> bool:
        """Only the first beginning that fits counts as matched."""
        for number, beginning in enumerate(self.wanted):
            if name.startswith(beginning):
                self.matched[number] = True
                return True
        return not self.wanted

    def send(self, block: bytes, size: int) -> None:
        name = _name(block)
        mode, mtime = _octal(block[100:108]) & 0xFFF, _octal(block[136:148]) & 0xFFFFFFFF
        parts = [part for part in name.split(b"/") if part]
        for depth in range(1, len(parts)):
            directory = b"/".join(parts[:depth])
            if directory not in self.directories:
                self.directories.add(directory)
                self.write_header(directory, mode | _S_IFDIR, 0, mtime)
        self.write_header(name, mode | _S_IFREG, size, mtime)
        left = size
        while left:
            data = os.read(self.descriptor, min(left, _COPY))
            if not data:
                shown = name.decode(errors="replace")
                say(f"Copying file {shown}: Unexpected end of data while reading")
                raise _Exit(1)
            self.write(data)
            left -= len(data)
        if size % BLOCK and _read_all(self.descriptor, BLOCK - size % BLOCK) is None:
            self.wait_for_result()
            raise _Exit(1)

    def skip(self, size: int) -> None:
        """Pass over the data of a member: past the end of a file unnoticed, in a pipe not."""
        left = size + -size % BLOCK
        if self.can_seek:
            try:
                os.lseek(self.descriptor, left, os.SEEK_CUR)
                return
            except OSError:
                self.can_seek = False
        while left:
            if _read_all(self.descriptor, BLOCK) is None:
                raise _Exit(1)
            left -= BLOCK

    def write_header(self, name: bytes, mode: int, size: int, mtime: int) -> None:
        self.write(_QFILE_HEADER.pack(len(name) + 1, mode, size, mtime, 0, mtime, 0))
        self.write(name + b"\0")

    def write(self, data: bytes) -> None:
        self.crc = zlib.crc32(data, self.crc)
        try:
            while data:
                data = data[os.write(1, data) :]
        except OSError:
            self.wait_for_result()
            raise _Exit(1) from None

    def wait_for_result(self) -> None:
        """Read the receiver's answer; raises _Exit unless all has arrived (or it wanted no more: EDQUOT)."""
        answer = _read_all(0, _RESULT.size)
        if answer is None:
            raise _Exit(1)
        code, _, crc = _RESULT.unpack(answer)
        length = _read_all(0, _RESULT_NAME.size)
        last = b"" if length is None else _read_all(0, min(_RESULT_NAME.unpack(length)[0], 16384)) or b""
        if code == _EDQUOT:
            return
        if code:
            say(f'File copy: "{os.strerror(code)}; Last file: {last!r}"')
            raise _Exit(1)
        if crc != self.crc:
            say("File transfer failed: checksum mismatch", end="")
            raise _Exit(1)


def _is_header(block: bytes) -> bool:
    checksum = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    return block[0] != 0 and block[257:262] == b"ustar" and _octal(block[148:156]) == checksum


def _name(block: bytes) -> bytes:
    prefix, name = block[345:500].split(b"\0")[0], block[:100].split(b"\0")[0]
    return prefix + b"/" + name if prefix else name


def _octal(digits: bytes) -> int:
    value = 0
    for digit in digits.lstrip(b" 0"):
        if not ord("0") <= digit <= ord("7"):
            break
        value = value << 3 | digit - ord("0")
    return value


def _read_all(descriptor: int, size: int) -> bytes | None:
    """`size` bytes; None, with a word on stderr, if the input ends before."""
    data = b""
    while len(data) < size:
        try:
            piece = os.read(descriptor, size - len(data))
        except OSError as error:  # a caller that is gone, with something unread
            say(f"read: {error.strerror}")
            return None
        if not piece:
            say("EOF")
            return None
        data += piece
    return data
