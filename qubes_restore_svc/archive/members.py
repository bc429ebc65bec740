"""What the readers of the archive have in common: buffers, foreign text in messages, members, and the
protocol of a reader of the outer archive.

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
from typing import Protocol, TypeAlias

from qubes_restore_svc.errors import BadArchive

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
