"""The 512-byte blocks that every kind of tar archive is made of.

Strategy: pure functions from bytes to a frozen value, or `BadTarHeader`. Nothing here knows which
members a backup may hold; the outer and the inner reader decide that, and turn `BadTarHeader` into
the error of their own place.

Accepted are the headers that GNU tar, Python's tarfile and Qubes' own tar writer make: POSIX ustar
headers (POSIX.1-1988) with pax records (POSIX.1-2001), and GNU headers (magic "ustar  "). Pre-POSIX
headers without a magic, signed checksums and negative numbers are refused.
"""

import re
from dataclasses import dataclass, field

from qubes_restore_svc.archive.members import Buffer

#: Tar archives are counted in blocks of this many bytes.
BLOCK = 512

#: Longest pax record data, in bytes, that is taken. GNU tar and Qubes write less than 200.
MAX_PAX_SIZE = 1 << 16

#: Largest number a field may hold. Everything in a tar file is a signed 64-bit offset at most.
MAX_NUMBER = (1 << 63) - 1

POSIX_MAGIC = b"ustar\x0000"
GNU_MAGIC = b"ustar  \x00"

_ZERO_BLOCK = bytes(BLOCK)
_OCTAL = re.compile(rb" *([0-7]+)[ \x00]*")
_BASE_256 = b"\x80"
_PAX_LENGTH = re.compile(rb"([1-9][0-9]{0,5}) ")


class BadTarHeader(ValueError):
    """A block is not a tar header, or pax records are malformed; the text is a clause that says how."""


@dataclass(frozen=True, slots=True)
class TarHeader:
    """One header block whose checksum was right.

    `name` is the stored path (prefix joined), any bytes without NUL, never empty. `size` is the
    header's size field in bytes, 0 to 2**63 - 1. `type_flag` is one byte; the old spelling NUL of a
    regular file stays NUL. `raw` is the whole block.
    """

    name: bytes
    size: int
    type_flag: bytes
    raw: bytes = field(repr=False)

    @property
    def is_gnu(self) -> bool:
        """True for GNU's own format, whose last 167 bytes are not a path prefix."""
        return self.raw[257:265] == GNU_MAGIC


def parse_tar_header(untrusted_block: Buffer) -> TarHeader:
    """Parse one header block of exactly `BLOCK` bytes; BadTarHeader if it is not one."""
    raw = bytes(untrusted_block)
    if len(raw) != BLOCK:
        raise BadTarHeader(f"a tar header has {BLOCK} bytes, not {len(raw)}")
    magic = raw[257:265]
    if magic not in (POSIX_MAGIC, GNU_MAGIC):
        raise BadTarHeader("this is no tar header (magic bytes)")
    # The checksum counts its own field as eight spaces.
    if parse_number(raw[148:156]) != sum(raw) - sum(raw[148:156]) + 8 * 0x20:
        raise BadTarHeader("the checksum of a tar header is wrong")
    name = _text(raw[0:100])
    if magic == POSIX_MAGIC and (prefix := _text(raw[345:500])):
        name = prefix + b"/" + name
    if not name:
        raise BadTarHeader("a tar header has no name")
    return TarHeader(name=name, size=parse_number(raw[124:136]), type_flag=raw[156:157], raw=raw)


def parse_number(untrusted_field: bytes) -> int:
    """The number in a header field, octal digits or GNU's base-256, from 0 to `MAX_NUMBER`.

    Base-256 (first byte 0x80, the rest big-endian) is how GNU tar and Python write what the octal
    digits cannot hold. An empty field is not a number. Raises BadTarHeader.
    """
    if untrusted_field.startswith(_BASE_256):
        number = int.from_bytes(untrusted_field[1:], "big")
    elif (octal := _OCTAL.fullmatch(untrusted_field)) is not None:
        number = int(octal[1], 8)
    else:
        raise BadTarHeader("a number in a tar header is malformed or negative")
    if number > MAX_NUMBER:
        raise BadTarHeader("a number in a tar header is out of range")
    return number


def parse_pax_records(untrusted_data: bytes) -> dict[str, bytes]:
    """The records of a pax header, each `LENGTH KEY=VALUE\\n`, as key and value.

    `untrusted_data` is the header's content without padding, at most `MAX_PAX_SIZE` bytes. Values are
    any bytes. Lengths must match to the byte; a key that stands twice is refused, because readers
    disagree about which of the two counts. Raises BadTarHeader.
    """
    if len(untrusted_data) > MAX_PAX_SIZE:
        raise BadTarHeader(
            f"a pax header has {len(untrusted_data)} bytes; more than {MAX_PAX_SIZE} are refused"
        )
    records: dict[str, bytes] = {}
    position = 0
    while position < len(untrusted_data):
        prefix = _PAX_LENGTH.match(untrusted_data, position)
        if prefix is None:
            raise BadTarHeader("a pax record does not begin with its length")
        end = position + int(prefix[1])
        if not prefix.end() < end <= len(untrusted_data) or untrusted_data[end - 1 : end] != b"\n":
            raise BadTarHeader("the length of a pax record is wrong")
        untrusted_key, equals, value = untrusted_data[prefix.end() : end - 1].partition(b"=")
        if not equals or not untrusted_key or not (untrusted_key.isascii() and _is_printable(untrusted_key)):
            raise BadTarHeader("a pax record has no proper key")
        key = untrusted_key.decode("ascii")
        if key in records:
            raise BadTarHeader("a pax header has the same key twice")
        records[key] = value
        position = end
    return records


def is_zero_block(block: Buffer) -> bool:
    """True if `block` is `BLOCK` zero bytes: the sign for "nothing more" at the end of an archive."""
    return block == _ZERO_BLOCK


def padded(size: int) -> int:
    """`size` rounded up to a whole number of blocks: the bytes that content of `size` bytes takes."""
    return -(-size // BLOCK) * BLOCK


def _text(untrusted_field: bytes) -> bytes:
    """A text field up to its first NUL, or all of it."""
    return untrusted_field.partition(b"\x00")[0]


def _is_printable(key: bytes) -> bool:
    return all(0x20 < byte < 0x7F for byte in key)
