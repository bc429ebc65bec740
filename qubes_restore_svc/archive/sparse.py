"""Sparse maps: which parts of an image an inner archive stores, in the two forms that Qubes backups have.

Strategy: `SparseMap` takes (offset, length) pairs in order, checks each against the one before it and
against the image size, and keeps them packed. Two readers feed it: `OldGnuReader`, whose input is the
GNU header and its 512-byte extension blocks, and `PaxReader` (sparse format 1.0), whose input is the
decimal text at the start of the data. Both are sans-I/O; the caller hands them bytes until `complete`.

A map stands before all the data it describes, so it must be held whole. An image with millions of small files
on it has millions of entries, and Python objects for them would take too much memory: pairs are kept as
differences in the narrowest array that holds them, 4 to 8 bytes an entry.

Refused, because no writer makes it and readers differ about it: an entry that begins before
the one before it ends or reaches past the image, an empty entry other than a last one at the very end,
and an odd length (no multiple of 512) that is followed by more data, since GNU tar pads it and others do not.
"""

from array import array
from collections.abc import Iterator, Sequence

from qubes_restore_svc.archive.members import Buffer
from qubes_restore_svc.archive.tar_header import BLOCK, BadTarHeader, TarHeader, parse_number
from qubes_restore_svc.errors import BadSparseMap, size_text

#: Most entries that a map may have. A qube with 16 million small files comes near it; the map then takes
#: 64 MiB, and 128 MiB at worst.
MAX_ENTRIES = 1 << 24

# Pairs are packed when so many have come together: little enough to be cheap unpacked, and so much that
# the overhead of an array (about 80 bytes) is none.
_PACK_ENTRIES = 4096


class SparseMap:
    """The stored parts of an image of `image_size` bytes: first `add`, then `close`, then iterate.

    Iterating gives (offset, length) in bytes, lengths above 0, in order.
    """

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        #: Bytes of data that all entries so far cover.
        self.data_size = 0
        self._entries = 0
        self._end = 0  # where the last entry ends
        self._odd = False  # an entry's length was no multiple of 512
        self._finished = False  # the entry for the end of the image has come
        self._loose = array("Q")  # hole before an entry, its length; not packed yet
        self._packed: list[tuple[int, array[int]]] = []  # unit in bytes, values in that unit

    def add(self, untrusted_numbers: Sequence[int]) -> None:
        """Take entries: offset, length, offset, length, … (none negative). Raises BadSparseMap."""
        self._entries += len(untrusted_numbers) // 2
        if self._entries > MAX_ENTRIES:
            raise BadSparseMap(f"the sparse map has more than {MAX_ENTRIES} entries")
        numbers = iter(untrusted_numbers)
        end = self._end
        loose = self._loose
        for offset, length in zip(numbers, numbers, strict=True):
            if offset < end:
                raise BadSparseMap(f"the sparse map runs backwards or overlaps itself at offset {offset}")
            if offset + length > self.image_size:
                raise BadSparseMap(
                    f"the sparse map reaches past {size_text(self.image_size)} of image at offset {offset}"
                )
            if self._finished:
                raise BadSparseMap("the sparse map goes on after the end of the image")
            if length == 0:
                if offset != self.image_size:
                    raise BadSparseMap(f"the sparse map has an empty entry at offset {offset}")
                self._finished = True
                continue
            if self._odd:
                raise BadSparseMap(f"the sparse map has an odd length before offset {offset}")
            if length % BLOCK:
                self._odd = True
            loose.append(offset - end)
            loose.append(length)
            self.data_size += length
            end = offset + length
        self._end = end
        if len(loose) >= 2 * _PACK_ENTRIES:
            self._pack()

    def close(self, stored_size: int) -> "SparseMap":
        """Nothing is missing: raises BadSparseMap unless the entries cover `stored_size` bytes together."""
        self._pack()
        if self.data_size != stored_size:
            raise BadSparseMap(
                f"the sparse map covers {self.data_size} bytes, but {stored_size} bytes are stored"
            )
        return self

    def __iter__(self) -> Iterator[tuple[int, int]]:
        offset = 0
        for unit, values in self._packed:
            numbers = iter(values)
            for hole, length in zip(numbers, numbers, strict=True):
                offset += hole * unit
                yield offset, length * unit
                offset += length * unit

    def _pack(self) -> None:
        if not self._loose:
            return
        unit = 1 if any(value % BLOCK for value in self._loose) else BLOCK
        values = [value // unit for value in self._loose]
        widest = max(values)
        code = "H" if widest < 1 << 16 else "I" if widest < 1 << 32 else "Q"
        self._packed.append((unit, array(code, values)))
        del self._loose[:]


class OldGnuReader:
    """The map of GNU tar's type S: 4 entries in the header, 21 in each extension block that follows.

    Layout (GNU tar's tar.h): header bytes 386 to 481 hold 4 entries, byte 482 says whether an extension
    block follows, bytes 483 to 494 hold the image size. An extension block has 21 entries and the same
    flag at byte 504. An entry is two numbers of 12 bytes, offset and length; unused ones are zero bytes.
    """

    def __init__(self, header: TarHeader, image_size: int) -> None:
        """Read the entries in `header`, whose image size the caller has found to be allowed."""
        self._map = SparseMap(image_size)
        self._stored_size = header.size
        self._ended = False
        #: True when no extension block follows.
        self.complete = False
        self._entries(header.raw[386:482], header.raw[482:483])

    def feed(self, untrusted_block: Buffer) -> None:
        """Take the next extension block of 512 bytes. Raises BadSparseMap."""
        block = bytes(untrusted_block)
        if self._ended:
            raise BadSparseMap("the sparse map goes on after its end")
        self._entries(block[:504], block[504:505])

    def result(self) -> SparseMap:
        """The whole map, once `complete`. Raises BadSparseMap if it does not fit the stored data."""
        return self._map.close(self._stored_size)

    @staticmethod
    def image_size(header: TarHeader) -> int:
        """The image size in bytes that a header of type S gives. Raises BadSparseMap."""
        if not header.is_gnu:
            raise BadSparseMap("a sparse header is not in GNU format")
        try:
            return parse_number(header.raw[483:495])
        except BadTarHeader as error:
            raise BadSparseMap(f"the image size is malformed: {error}") from error

    def _entries(self, untrusted_fields: bytes, untrusted_flag: bytes) -> None:
        if untrusted_flag not in (b"\x00", b"\x01"):
            raise BadSparseMap("the flag for an extension of the sparse map is malformed")
        numbers: list[int] = []
        for start in range(0, len(untrusted_fields), 24):
            if untrusted_fields[start + 12] == 0:
                self._ended = True
                if any(untrusted_fields[start:]):
                    raise BadSparseMap("the sparse map has entries after its end")
                break
            try:
                numbers.append(parse_number(untrusted_fields[start : start + 12]))
                numbers.append(parse_number(untrusted_fields[start + 12 : start + 24]))
            except BadTarHeader as error:
                raise BadSparseMap(f"an entry of the sparse map is malformed: {error}") from error
        self._map.add(numbers)
        self.complete = untrusted_flag == b"\x00"


class PaxReader:
    """The map of pax sparse format 1.0: decimal numbers, each followed by a newline, before the data.

    First the number of entries, then offset and length of each; zero bytes up to a whole block.
    """

    # Longest number that is taken; 2**64 has 20 digits.
    _DIGITS = 20

    def __init__(self, image_size: int, member_size: int) -> None:
        """`member_size` is the size of map (padded) and data together, in bytes. Raises BadSparseMap."""
        if member_size < BLOCK:
            raise BadSparseMap("the member is too small to hold a sparse map")
        self._map = SparseMap(image_size)
        self._member_size = member_size
        self._text_size = 0  # bytes of text so far
        self._padding = 0  # bytes of padding still to come
        self._expected: int | None = None  # numbers still to come; None: not even their count is known
        self._begun = b""  # digits of a number whose end has not come
        self._odd_number: list[int] = []  # an offset whose length has not come
        #: True when the map and its padding have been read.
        self.complete = False

    @property
    def wanted(self) -> int:
        """Most bytes that the next `feed` may get: what is left of the member, and 64 KiB at most."""
        return min(self._padding or self._member_size - self._text_size, 1 << 16)

    def feed(self, untrusted_data: Buffer) -> int:
        """Take 1 to `wanted` bytes, and say how many of them belong to the map. Raises BadSparseMap."""
        if self._padding:
            return self._feed_padding(bytes(untrusted_data))
        return self._feed_text(bytes(untrusted_data))

    def result(self) -> SparseMap:
        """The whole map, once `complete`. Raises BadSparseMap if it does not fit the stored data."""
        return self._map.close(self._member_size - self._text_size)

    def _feed_text(self, data: bytes) -> int:
        wanted = 1 if self._expected is None else self._expected
        fields = data.split(b"\n", wanted)
        # What follows the last wanted newline is padding or data; what follows another one is a begun number.
        rest = fields.pop()
        used = len(data) - (len(rest) if len(fields) == wanted else 0)
        if fields:
            fields[0] = self._begun + fields[0]
            self._begun = b""
        if len(fields) < wanted:
            self._begun += rest
        self._numbers([self._number(field) for field in fields])
        if len(self._begun) > self._DIGITS or (self._begun and not self._begun.isdigit()):
            raise BadSparseMap("a number in the sparse map is malformed")
        self._text_size += used
        if self._expected == 0:
            self._padding = -self._text_size % BLOCK
            self.complete = not self._padding
        if self._text_size + self._padding > self._member_size or (
            self._text_size == self._member_size and not self.complete
        ):
            raise BadSparseMap("the sparse map does not end inside its member")
        return used

    def _numbers(self, numbers: list[int]) -> None:
        if not numbers:
            return
        if self._expected is None:
            if not 1 <= numbers[0] <= MAX_ENTRIES:
                raise BadSparseMap(f"the sparse map has {numbers[0]} entries; 1 to {MAX_ENTRIES} are taken")
            self._expected = 2 * numbers[0]
            return
        self._expected -= len(numbers)
        numbers = self._odd_number + numbers
        even = len(numbers) & ~1
        self._odd_number = numbers[even:]
        self._map.add(numbers[:even])

    def _number(self, untrusted_field: bytes) -> int:
        if not untrusted_field.isdigit() or len(untrusted_field) > self._DIGITS:
            raise BadSparseMap("a number in the sparse map is malformed")
        return int(untrusted_field)

    def _feed_padding(self, data: bytes) -> int:
        used = min(len(data), self._padding)
        if any(data[:used]):
            raise BadSparseMap("the padding of the sparse map is not zero")
        self._text_size += used
        self._padding -= used
        self.complete = not self._padding
        return used
