"""Reads the outer archive as a storage VM sends it: a qfile stream, the format of Qubes' file copy.

Strategy: header, name, content, in turn, until the header without a name. Every byte counts for a CRC-32
that is sent back as the answer, so nothing can be passed over unseen. The CRC guards the transport only;
only the MACs inside tell whether the content is authentic.

A header is 32 bytes, little-endian: name length (with its NUL) u32, mode u32, content length u64, then
access and modification time as four u32 (qubes-linux-utils, qrexec-lib, `struct file_header`).
"""

import stat
import struct
from enum import Enum, auto

from isal import isal_zlib

from qubes_restore_svc.archive.members import (
    MAX_MEMBER_SIZE,
    MAX_NAME_SIZE,
    Buffer,
    Damage,
    Member,
    check_member_name,
    shown,
)
from qubes_restore_svc.errors import ArchiveTruncated, BadArchive, EmptyInput, size_text

HEADER = struct.Struct("<IIQ16x")

#: What the receiver sends at the end: error code u32, padding u32, CRC-32 u64, length of the last name u32
#: (`struct result_header` and `struct result_header_ext`, packed).
ANSWER = struct.Struct("<IIQI")


class _State(Enum):
    HEADER = auto()
    NAME = auto()
    CONTENT = auto()
    ENDED = auto()


class QfileReader:
    """A MemberReader for the stream of `qubes.RestoreById`. Entries for directories are read and dropped."""

    def __init__(self) -> None:
        self._state = _State.HEADER
        self._wanted = HEADER.size
        self._offset = 0
        self._crc = 0
        self._mode = 0
        self._size = 0
        self._content_left = 0
        self._last_name: str | None = None

    @property
    def wanted(self) -> int:
        return self._wanted

    @property
    def content_left(self) -> int:
        return self._content_left

    def feed(self, untrusted_data: Buffer) -> Member | None:
        if self._state in (_State.CONTENT, _State.ENDED) or len(untrusted_data) != self._wanted:
            raise RuntimeError("feed() got bytes that were not asked for")
        self._crc = isal_zlib.crc32(untrusted_data, self._crc)
        if self._state is _State.HEADER:
            self._take_header(untrusted_data)
            member = None
        else:
            member = self._take_name(bytes(untrusted_data))
        self._offset += len(untrusted_data)
        return member

    def take_damage(self) -> Damage | None:
        return None  # every byte counts for the checksum, so nothing can be read after damage

    def content(self, data: Buffer) -> None:
        if len(data) > self._content_left:
            raise RuntimeError("more content than the member has")
        self._crc = isal_zlib.crc32(data, self._crc)
        self._offset += len(data)
        self._content_left -= len(data)
        if self._state is _State.CONTENT and self._content_left == 0:
            self._want(_State.HEADER, HEADER.size)

    def skip(self, size: int) -> bool:
        return False

    def eof(self, untrusted_rest: Buffer = b"") -> None:
        if self._state is _State.ENDED:
            return
        if self._offset == 0 and not untrusted_rest:
            raise EmptyInput("the storage qube sent nothing")
        end = self._offset + len(untrusted_rest)
        if self._state is _State.CONTENT and self._last_name is not None:
            raise ArchiveTruncated(
                f"the stream ends in the middle of {shown(self._last_name)}, at byte {end}"
            )
        raise ArchiveTruncated(f"the stream ends without its end mark, at byte {end}")

    def answer(self) -> bytes:
        """The 20 bytes to send back once `wanted` is 0: "received, with this checksum". The sender exits with
        an error when its own checksum differs."""
        if self._state is not _State.ENDED:
            raise RuntimeError("the stream has not ended")
        return ANSWER.pack(0, 0, self._crc, 0)

    def _take_header(self, untrusted_header: Buffer) -> None:
        name_size, mode, size = HEADER.unpack(untrusted_header)
        if name_size == 0:
            if size or mode:
                raise BadArchive(f"its end mark has content, at byte {self._offset}")
            self._want(_State.ENDED, 0)
            return
        if not 2 <= name_size <= MAX_NAME_SIZE + 1:
            raise BadArchive(f"it holds a name of {name_size} bytes, at byte {self._offset}")
        self._mode, self._size = mode, size
        self._want(_State.NAME, name_size)

    def _take_name(self, untrusted_name: bytes) -> Member | None:
        if untrusted_name[-1] != 0:
            raise BadArchive(f"it holds a name that does not end, {shown(untrusted_name)}")
        name = check_member_name(untrusted_name[:-1])
        is_directory = stat.S_ISDIR(self._mode)
        if not (is_directory or stat.S_ISREG(self._mode)):
            raise BadArchive(
                f"it holds {shown(name)} with mode {self._mode:o}; a Qubes backup holds regular files only"
            )
        if self._size > (0 if is_directory else MAX_MEMBER_SIZE):
            what = "directory" if is_directory else "file"
            raise BadArchive(
                f"it holds the {what} {shown(name)} which claims to have {size_text(self._size)}"
            )
        self._want(_State.HEADER, HEADER.size)
        if is_directory:
            return None
        self._last_name = name
        self._content_left = self._size
        if self._size:
            self._state = _State.CONTENT
        return Member(name, self._size)

    def _want(self, state: _State, size: int) -> None:
        self._state, self._wanted = state, size
