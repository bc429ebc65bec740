"""What the readers of the archive have in common: buffers, foreign text in messages, members, the protocol
of a reader of the outer archive, and the names and the order of chunks.

Strategy: text from the archive reaches a message only through `shown`, which lets printable ASCII pass and
nothing else, and cuts it; so no error can carry a terminal sequence or a page of garbage.

A reader is a state machine without I/O. It says how many bytes it wants next, is fed exactly
those, and answers with a member or with None for "go on". The content of a member does not pass
through the reader: the caller reads it into its own buffer, once, and only tells the reader about it.

    while reader.wanted:
        data = read_exactly(reader.wanted)          # short: reader.eof(data), and stop
        member = reader.feed(data)
        if member is not None:
            ...                                     # read member.size bytes; reader.content(them)

The protocol and the check of names are the same for a file (outer tar) and for a stream from a
storage VM (qfile), so that nothing behind them has to know which it was.
"""

import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol, TypeAlias

from qubes_restore_svc.errors import BadArchive, ChunkOutOfOrder

#: Contiguous bytes, of any owner.
Buffer: TypeAlias = bytes | bytearray | memoryview

#: How much of a foreign text a message repeats, in bytes.
SHOWN_LIMIT = 80


def shown(untrusted_text: Buffer | str) -> str:
    """The text in single quotes, for a message: all but printable ASCII is escaped, a long end is cut off."""
    if isinstance(untrusted_text, str):
        untrusted_bytes = untrusted_text[: SHOWN_LIMIT + 1].encode("utf-8", "backslashreplace")
    else:
        untrusted_bytes = bytes(untrusted_text[: SHOWN_LIMIT + 1])
    text = "".join(_shown_byte(byte) for byte in untrusted_bytes[:SHOWN_LIMIT])
    return f"'{text}…'" if len(untrusted_bytes) > SHOWN_LIMIT else f"'{text}'"


def _shown_byte(byte: int) -> str:
    if byte in (0x27, 0x5C):
        return "\\" + chr(byte)
    return chr(byte) if 0x20 <= byte <= 0x7E else f"\\x{byte:02x}"


#: Longest name of a member, in bytes. The longest that a stock writer makes is below 100.
MAX_NAME_SIZE = 1024

#: Largest content of a member, in bytes: 1 TiB. Chunks have 100 MiB; nothing is allocated by this number.
MAX_MEMBER_SIZE = 1 << 40

# Printable ASCII, but for the backslash.
_USUAL_CHARACTERS = re.compile(rb"[\x20-\x5b\x5d-\x7e]+")


@dataclass(frozen=True, slots=True)
class Member:
    """One file of the outer archive: `name` is validated (see `check_member_name`), `size` counts the bytes
    of its content, 0 to MAX_MEMBER_SIZE."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes `start` to `end` of the archive that are not as a writer made them, and were passed over.

    `untrusted_name` is what the header there seems to name, in its damaged state. `harmless`: there is no
    room in it for a file that might be lost.
    """

    start: int
    end: int
    reason: str
    untrusted_name: bytes = b""
    harmless: bool = False

    def __str__(self) -> str:
        return f"the archive is damaged from byte {self.start} to {self.end} ({self.reason})"


class MemberReader(Protocol):
    """Reads the outer archive. After a RestoreError the reader is of no further use.

    Calls in the wrong order, or with the wrong number of bytes, are mistakes of the caller: RuntimeError.
    """

    @property
    def wanted(self) -> int:
        """How many bytes the next `feed` must get, exactly; 0: the stream has ended, nothing may follow."""

    @property
    def content_left(self) -> int:
        """How many bytes of the current member's content are still due, before the next `feed`."""

    def feed(self, untrusted_data: Buffer) -> Member | None:
        """Take `wanted` bytes. A member: its `size` bytes of content come next. None: feed again.

        Raises BadArchive, NotABackup.
        """

    def take_damage(self) -> Damage | None:
        """What was passed over before the last member, or the end, that was found; once."""

    def content(self, data: Buffer) -> None:
        """Take note of bytes of the current member's content, in order, in pieces of any size."""

    def skip(self, size: int) -> bool:
        """May the next `size` bytes of content be passed over unseen? True: they count as delivered.
        False: they have to be read, and shown to `content`."""

    def eof(self, untrusted_rest: Buffer = b"") -> None:
        """The input has ended; `untrusted_rest` are the bytes read for the next `feed`, fewer than `wanted`.

        Returns if the archive may end here. Raises EmptyInput, NotABackup, ArchiveTruncated.
        """


def check_member_name(untrusted_name: Buffer) -> str:
    """The name as text: 1 to MAX_NAME_SIZE bytes of printable ASCII without backslash, a relative path
    in which no component is empty, `.` or `..`. Raises BadArchive."""
    name = bytes(untrusted_name[: MAX_NAME_SIZE + 1])
    if not name:
        raise BadArchive("it holds a member without a name")
    if len(name) > MAX_NAME_SIZE:
        raise BadArchive(f"it holds a member whose name is longer than {MAX_NAME_SIZE} bytes: {shown(name)}")
    if _USUAL_CHARACTERS.fullmatch(name) is None:
        raise BadArchive(f"it holds a member whose name has unusual characters: {shown(name)}")
    if any(component in (b"", b".", b"..") for component in name.split(b"/")):
        raise BadArchive(f"it holds a member whose name is not a plain relative path: {shown(name)}")
    return name.decode("ascii")


# --- The order of chunks -------------------------------------------------------------------------
#
# Which member is which piece of which file, and that no piece is missing or comes twice. A MAC binds a
# chunk to its name, so a name can be trusted once its chunk has been verified. But anybody who holds the
# archive can leave out chunks, or change their order. `ChunkSequence` accepts one order only: the chunks 0,
# 1, 2, … of one file, then those of the next. A file that breaks it stays broken, and the files after it
# are not concerned. A missing last chunk shows later, at the end of the inner archive.

#: Most files that one archive may hold; only their digests are kept, about 100 bytes each.
MAX_FILES = 100_000

# Numbers have three digits, or more from 1000 on: `%03d`. Seven are a thousand terabytes.
_NAME = re.compile(r"(.+)\.([0-9]{3}|[1-9][0-9]{3,6})\.enc")

_PIECE_NAME = re.compile(r"(.+)\.([0-9]{3}|[1-9][0-9]{3,6})(\.hmac)?")


@dataclass(frozen=True, slots=True)
class ChunkName:
    """The name of a chunk, taken apart: `file` as in `vm10/private.img`, `number` from 0, `member` the name
    without .enc, which is part of the passphrase in format 4."""

    file: str
    number: int
    member: str


def parse_chunk_name(untrusted_name: str) -> ChunkName:
    """Take apart `vm10/private.img.000.enc`. Raises BadArchive for every other kind of name."""
    match = _NAME.fullmatch(untrusted_name)
    if match is None:
        raise BadArchive(f"it holds {shown(untrusted_name)}, which is not named like a piece of a backup")
    file = check_member_name(match[1].encode("utf-8", "backslashreplace"))
    return ChunkName(file, int(match[2]), untrusted_name.removesuffix(".enc"))


def parse_piece_name(untrusted_name: str) -> ChunkName | None:
    """Take apart `appvms/work/private.img.000`, a piece of a backup of format 3; None for a piece's MAC.

    The archive of a whole directory is called `vm-templates/fedora-23/.`. Raises BadArchive for every other
    kind of name.
    """
    match = _PIECE_NAME.fullmatch(untrusted_name)
    if match is None:
        raise BadArchive(f"it holds {shown(untrusted_name)}, which is not named like a piece of a backup")
    directory = match[1].removesuffix("/.")
    file = check_member_name(directory.encode("utf-8", "backslashreplace"))
    if match[3]:
        return None
    return ChunkName(file + match[1][len(directory) :], int(match[2]), untrusted_name)


def names_a_chunk(name: str) -> bool:
    """Is this a chunk's name, or that of a piece or of its MAC?"""
    return _NAME.fullmatch(name) is not None or _PIECE_NAME.fullmatch(name) is not None


class ChunkSequence:
    """Watches the chunks of one archive go by, each of them, wanted or not."""

    def __init__(self) -> None:
        self._file: str | None = None
        self._next_number = 0
        self._seen: set[bytes] = set()
        self._broken: set[bytes] = set()

    def is_broken(self, file: str) -> bool:
        """Has `expect` raised ChunkOutOfOrder for this file? Then it will for each of its later chunks,
        too."""
        return _digest(file) in self._broken

    def expect(self, name: ChunkName) -> None:
        """Take note of the next chunk of the archive.

        Raises ChunkOutOfOrder if it does not belong here: its file is broken, and the caller goes on with
        the chunks of other files. Raises BadArchive if there are more than MAX_FILES files.
        """
        if self.is_broken(name.file):
            raise self._out_of_order(name, f"{_label(name)} follows a chunk that was out of order")
        if name.file != self._file:
            self._begin(name)
        if name.number != self._next_number:
            raise self._out_of_order(name, self._why(name))
        self._next_number += 1

    def _begin(self, name: ChunkName) -> None:
        digest = _digest(name.file)
        if digest in self._seen:
            raise self._out_of_order(name, f"{_label(name)} comes again after other files")
        if len(self._seen) >= MAX_FILES:
            raise BadArchive(f"it holds more than {MAX_FILES} files")
        self._seen.add(digest)
        self._file, self._next_number = name.file, 0

    def _why(self, name: ChunkName) -> str:
        if self._next_number == 0:
            return f"{_label(name)} is the first of its file"
        last = self._next_number - 1
        if name.number == last:
            return f"{_label(name)} stands twice"
        return f"{_label(name)} follows chunk {last:03d}"

    def _out_of_order(self, name: ChunkName, reason: str) -> ChunkOutOfOrder:
        self._broken.add(_digest(name.file))
        return ChunkOutOfOrder(reason, chunk=name.number)


def _label(name: ChunkName) -> str:
    return f"chunk {name.number:03d} of {shown(name.file)}"


def _digest(file: str) -> bytes:
    return blake2b(file.encode("utf-8"), digest_size=16).digest()
