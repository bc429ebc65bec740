"""Reads the outer archive as it lies in a file: POSIX tar archives of one file each, one after the other.

Strategy: three kinds of bytes are wanted in turn: a header block, the body of a pax header, the padding
behind a content. A header block is either zero (the filling between two archives, without meaning), a
pax header (`x`) for the file that must follow at once, or a regular file. Everything else that a tar
archive may hold (links, devices, directories, GNU's extensions) is refused: a Qubes backup has none.

A fault before the first member means that the file is no backup. A fault before the first chunk means that it
is a bad one. A fault behind the first chunk is damage, and only what it hit is lost: the reader goes on block
by block to the next header that is valid and names a chunk. Nothing false can come in that way, because the
MAC of a chunk binds its name and place. Each block is looked at once, so a search costs no more than reading.
"""

import contextlib
import re
from dataclasses import replace
from enum import Enum, auto
from typing import NoReturn

from qubes_restore_svc.archive.container import OVERHEAD
from qubes_restore_svc.archive.members import (
    MAX_MEMBER_SIZE,
    Buffer,
    Damage,
    Member,
    check_member_name,
    names_a_chunk,
    shown,
)
from qubes_restore_svc.archive.tar_header import (
    BLOCK,
    MAX_PAX_SIZE,
    POSIX_MAGIC,
    BadTarHeader,
    TarHeader,
    is_zero_block,
    padded,
    parse_pax_records,
    parse_tar_header,
)
from qubes_restore_svc.errors import ArchiveTruncated, BadArchive, EmptyInput, NotABackup, size_text

_REGULAR_TYPES = (b"0", b"\0")
_PAX_TYPE = b"x"
_CHUNK_SUFFIX = ".enc"
_REFUSED_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a directory",
    b"6": "a named pipe",
    b"g": "a global pax header",
    b"K": "a GNU long link",
    b"L": "a GNU long name",
    b"M": "the continuation of another volume",
    b"S": "a GNU sparse file",
    b"V": "a GNU volume label",
}

#: A size in a pax record: decimal, one spelling for each number.
_PAX_NUMBER = re.compile(rb"0|[1-9][0-9]{0,14}")

#: The stock writer fills each of its archives up to a multiple of so many bytes.
_RECORD = 10240

#: Most zeros between two members, bytes: two closing blocks, and what fills up a record.
_MAX_FILLING = 2 * BLOCK + _RECORD - BLOCK

#: Other bytes in a block that still count as filling: a bit has changed, and no header was there.
_MAX_NOISE = 4

#: Longest pax header with its one block of records, and the header behind it: what can be lost without
#: losing a file, bytes.
_MAX_HARMLESS = 3 * BLOCK


class _State(Enum):
    HEADER = auto()  # a header block comes next, or the input ends
    PAX_BODY = auto()  # the records of a pax header come next, filled up to whole blocks
    FILE_HEADER = auto()  # the header block of the file that the pax header belongs to
    CONTENT = auto()  # the caller reads content
    PADDING = auto()  # the rest of a content's last block


class OuterTarReader:
    """A MemberReader for a file. It never says that the stream has ended: only the end of the input does.

    `skip` always agrees, so a caller with a seekable file need not read contents that nobody wants.
    """

    def __init__(self) -> None:
        self._state = _State.HEADER
        self._wanted = BLOCK
        self._offset = 0
        self._pax_size = 0
        self._pax_path: bytes | None = None
        self._pax_file_size: int | None = None
        self._content_left = 0
        self._padding = 0
        self._last_name: str | None = None
        self._found_chunk = False
        self._record_start = 0  # of the header block, or of the pax header before it
        self._in_records = True  # every member so far was filled up
        self._filling = 0  # bytes of it since the last member
        self._searching: Damage | None = None  # its end is not known yet
        self._zeros_passed = False  # in the search
        self._damage: Damage | None = None

    @property
    def wanted(self) -> int:
        return self._wanted

    @property
    def content_left(self) -> int:
        return self._content_left

    def feed(self, untrusted_data: Buffer) -> Member | None:
        if self._state is _State.CONTENT or len(untrusted_data) != self._wanted:
            raise RuntimeError("feed() got bytes that were not asked for")
        member = None
        if self._state is _State.PADDING:
            self._want(_State.HEADER)
        else:
            try:
                member = self._feed_header(untrusted_data)
            except BadArchive as error:
                if not self._found_chunk:
                    raise
                self._search_from(untrusted_data, error)
        self._offset += len(untrusted_data)
        return member

    def take_damage(self) -> Damage | None:
        damage, self._damage = self._damage, None
        return damage

    def content(self, data: Buffer) -> None:
        self._count(len(data))

    def skip(self, size: int) -> bool:
        self._count(size)
        return True

    def eof(self, untrusted_rest: Buffer = b"") -> None:
        end = self._offset + len(untrusted_rest)
        if end == 0:
            raise EmptyInput("the file is empty")
        if self._offset == 0:
            raise NotABackup(f"it has only {end} bytes, less than the first block of a backup")
        if self._searching is not None:
            self._damage = replace(self._searching, end=end)
            raise BadArchive(
                f"it is damaged at byte {self._searching.start}, after {self._last_shown()}"
                f" ({self._searching.reason}), and no more files can be found behind that"
            )
        if self._state in (_State.CONTENT, _State.PADDING):
            raise ArchiveTruncated(f"it ends in the middle of {self._last_shown()}, at byte {end}")
        if self._state is not _State.HEADER or untrusted_rest:
            raise ArchiveTruncated(f"it ends in the middle of a header, at byte {end}")
        if self._filling > _MAX_FILLING:
            self._note_zeros(end)
        elif self._found_chunk and self._in_records and end % _RECORD:
            raise ArchiveTruncated(f"it ends in the filling behind {self._last_shown()}, at byte {end}")

    def _feed_header(self, untrusted_data: Buffer) -> Member | None:
        """Take the next part of a header, or filling."""
        if self._state is _State.PAX_BODY:
            self._take_pax_body(bytes(untrusted_data[: self._pax_size]))
            return None
        if self._state is _State.HEADER:
            if self._is_filling(untrusted_data):
                return None
            self._record_start = self._offset
        return self._take_header(untrusted_data)

    def _is_filling(self, untrusted_block: Buffer) -> bool:
        """A zero block where one may stand: not at the very beginning, not after a pax header."""
        if self._last_name is None:
            return False
        if is_zero_block(untrusted_block):
            self._zeros_passed = True
            self._filling += BLOCK
            return True
        if not self._found_chunk or self._searching is not None:
            return False
        if len(untrusted_block) - bytes(untrusted_block).count(0) > _MAX_NOISE:
            return False
        reason = "in the filling between two files"
        self._damage = Damage(self._offset, self._offset + BLOCK, reason, harmless=True)
        self._filling += BLOCK
        return True

    def _search_from(self, untrusted_data: Buffer, error: BadArchive) -> None:
        """What was just fed is no part of an archive: go on with the next block."""
        state, start = self._state, self._record_start
        self._pax_path = self._pax_file_size = None
        self._want(_State.HEADER)
        if self._searching is None:
            self._zeros_passed = False
            untrusted_name = (
                b"" if state is _State.PAX_BODY else bytes(untrusted_data[:100]).partition(b"\0")[0]
            )
            self._searching = Damage(start, start, error.reason, untrusted_name)
        if state is _State.FILE_HEADER:  # no file for a pax header; it may be the next one
            self._record_start = self._offset
            with contextlib.suppress(BadArchive):
                self._take_header(untrusted_data)

    def _end_search(self) -> None:
        """A member was found: what was passed over on the way to it?"""
        if self._searching is not None:
            short = self._record_start - self._searching.start <= _MAX_HARMLESS
            self._damage = replace(
                self._searching, end=self._record_start, harmless=short and not self._zeros_passed
            )
            self._searching = None
        elif self._filling > _MAX_FILLING and self._found_chunk:
            self._note_zeros(self._record_start)
        elif self._record_start % _RECORD:
            self._in_records = False
        self._filling = 0

    def _note_zeros(self, end: int) -> None:
        reason = f"{self._filling} bytes of zeros, more than stand between two files"
        self._damage = Damage(end - self._filling, end, reason)

    def _take_header(self, untrusted_block: Buffer) -> Member | None:
        """Read a header block that is not mere filling, and set what comes after it."""
        if self._searching is not None and untrusted_block[257:265] != POSIX_MAGIC:
            raise BadArchive("no header")  # said quickly: there may be millions of blocks
        try:
            header = parse_tar_header(untrusted_block)
        except BadTarHeader as error:
            self._refuse(f"{error}")
        if header.is_gnu:
            self._refuse(f"{shown(header.name)} is stored in GNU's tar format, not in the POSIX format")
        if header.type_flag == _PAX_TYPE and self._state is _State.HEADER:
            self._expect_pax_body(header.size)
            return None
        if header.type_flag not in _REGULAR_TYPES:
            self._refuse_type(header)
        return self._take_file(header)

    def _expect_pax_body(self, size: int) -> None:
        if not 0 < size <= MAX_PAX_SIZE:
            self._refuse(f"a pax header of {size_text(size)}")
        self._pax_size = size
        self._want(_State.PAX_BODY, padded(size))

    def _take_pax_body(self, untrusted_body: bytes) -> None:
        """Keep the path and the size, the two records that change what follows; the others (times) do not
        matter. A sparse map would change it too, but no writer of backups makes one here."""
        try:
            records = parse_pax_records(untrusted_body)
        except BadTarHeader as error:
            self._refuse(f"{error}")
        if any(key.startswith("GNU.sparse.") for key in records):
            self._refuse("a pax header for a sparse file")
        self._pax_path = records.get("path")
        untrusted_size = records.get("size")
        if untrusted_size is not None:
            if _PAX_NUMBER.fullmatch(untrusted_size) is None:
                self._refuse(f"a pax header with the impossible size {shown(untrusted_size)}")
            self._pax_file_size = int(untrusted_size)
        self._want(_State.FILE_HEADER)

    def _take_file(self, header: TarHeader) -> Member:
        try:
            name = check_member_name(header.name if self._pax_path is None else self._pax_path)
        except BadArchive as error:
            self._refuse(error.reason)
        size = header.size if self._pax_file_size is None else self._pax_file_size
        if size > MAX_MEMBER_SIZE:
            self._refuse(f"{shown(name)} claims to have {size_text(size)}")
        if self._searching is not None:
            if not names_a_chunk(name):
                self._refuse("a file that is no part of a backup")
            if name.endswith(_CHUNK_SUFFIX) and size < OVERHEAD:
                self._refuse("a chunk that is too small")
        self._end_search()
        self._pax_path = self._pax_file_size = None
        self._last_name = name
        self._found_chunk = self._found_chunk or names_a_chunk(name)
        self._content_left = size
        self._padding = padded(size) - size
        self._want(_State.CONTENT, self._padding or BLOCK)
        self._end_content_if_complete()
        return Member(name, size)

    def _count(self, size: int) -> None:
        if not 0 <= size <= self._content_left:
            raise RuntimeError("more content than the member has")
        self._content_left -= size
        self._offset += size
        if self._state is _State.CONTENT:
            self._end_content_if_complete()

    def _end_content_if_complete(self) -> None:
        if self._content_left == 0:
            self._state = _State.PADDING if self._padding else _State.HEADER

    def _want(self, state: _State, size: int = BLOCK) -> None:
        self._state, self._wanted = state, size

    def _refuse_type(self, header: TarHeader) -> NoReturn:
        if self._state is _State.FILE_HEADER and header.type_flag == _PAX_TYPE:
            self._refuse("a pax header that is not followed by its file")
        what = _REFUSED_TYPES.get(header.type_flag, f"an entry of type {shown(header.type_flag)}")
        self._refuse(f"it holds {what}, {shown(header.name)}; a Qubes backup holds regular files only")

    def _refuse(self, what: str) -> NoReturn:
        if self._last_name is None:
            raise NotABackup(f"this is not a Qubes backup ({what})")
        where = "" if self._found_chunk else f"at byte {self._offset}, after {self._last_shown()}: "
        raise BadArchive(f"{where}{what}")

    def _last_shown(self) -> str:
        return shown(self._last_name or "")
