"""The inner archive: a tar file with one member, which is one file of one qube. In backups of format 3 a
template's whole directory may be one archive; `read_directory` reads that.

Strategy: a cursor walks over the decompressed blocks. The header, its pax records and the sparse map are
read and checked at once, before any data; then the image is a lazy stream of extents, each a view
into a decompressed block, so that data is never copied and never joined. The stream ends only when the
closing zero blocks and the end of the input have been seen: a cut archive cannot pass for a whole one.

Three kinds of member are known: a regular file, GNU tar's sparse file (type S), and pax sparse 1.0 (what
Qubes writes for block devices). Everything else that tar can hold is refused.

`without_zeros` drops blocks of zeros from the extents, whether or not the sparse map knew of them. Where
there is no extent, the image is zero anyway. So a block of zeros need not travel to the host, and need not be
written there.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qubes_restore_svc.archive import tar_header
from qubes_restore_svc.archive.members import shown
from qubes_restore_svc.archive.sparse import OldGnuReader, PaxReader
from qubes_restore_svc.archive.tar_header import BLOCK, BadTarHeader, TarHeader
from qubes_restore_svc.errors import (
    REST_IS_MISSING,
    BadImage,
    BadMetadata,
    BadSparseMap,
    ImageTooLarge,
    size_text,
)

#: Largest image, in bytes, whatever limit the caller gives: 16 TiB, which no qube comes near, and which is
#: the largest file of an ext4 file system that images might be restored to.
MAX_IMAGE_SIZE = 1 << 44

#: Longest data, in bytes, of one extent.
MAX_EXTENT = 1 << 20

# What closes a tar archive (two zero blocks), and how much of it is taken. GNU tar fills up to 10 KiB.
_CLOSING = 2 * BLOCK
_MAX_CLOSING = 1 << 20

_PAX_NUMBER_DIGITS = 19

#: Longest path, in bytes, that a file of a directory may have.
_MAX_LONG_NAME = 4097

#: Most files right in a template's directory; it has about ten.
_MAX_FILES = 1000

#: What may lie in a template's directory: files (S: sparse ones), links, directories, named pipes.
_DIRECTORY_TYPES = (b"0", b"\x00", b"S", b"1", b"2", b"5", b"6")


@dataclass(frozen=True, slots=True)
class Extent:
    """`data` (1 byte to 1 MiB) that stands at `offset` (bytes from the start of the image)."""

    offset: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class Image:
    """A file of `size` bytes; what no extent covers is zero.

    `extents` come in order of their offsets, do not overlap, and lie inside the image. The iterator raises
    BadImage if the archive is malformed further on: the image is whole only when it is exhausted.
    """

    size: int
    extents: Iterator[Extent]

    def content(self) -> bytes:
        """All of it at once, for small files. Raises what iterating over `extents` raises."""
        content = bytearray(self.size)
        for extent in self.extents:
            content[extent.offset : extent.offset + len(extent.data)] = extent.data
        return bytes(content)


def read_image(blocks: Iterable[bytes], expected_name: str, max_size: int) -> Image:
    """Read the inner archive in `blocks` (cut anywhere), whose one member must be named `expected_name`.

    `max_size` is the most bytes that the image may have; `MAX_IMAGE_SIZE` holds in any case. Raises
    ImageTooLarge, BadSparseMap, or BadImage for everything else that is wrong with it. What iterating over
    `blocks` raises passes through. Closing `blocks` is left to the caller.
    """
    source = _Cursor(blocks)
    try:
        header, records = _read_header(source)
        return _open_member(source, header, records, expected_name, max_size)
    except BadTarHeader as error:
        raise BadImage(f"the inner archive is malformed: {error}") from error


def read_small_file(blocks: Iterable[bytes], expected_name: str, limit: int) -> bytes:
    """The content of a small file, like qubes.xml, from its inner archive; BadMetadata for all that is wrong.

    A file of more than `limit` bytes is refused when its header has been read.
    """
    try:
        return read_image(blocks, expected_name, limit).content()
    except (BadImage, BadSparseMap, ImageTooLarge) as error:
        raise BadMetadata(f"{shown(expected_name)} cannot be read: {error.reason}") from error


def read_directory(blocks: Iterable[bytes], directory: str) -> Iterator[tuple[str, Image]]:
    """The regular files right in `directory`, from the archive of all of it: name and image, in order.

    Each image must be read before the next one is asked for; what is left of it is passed over. Everything
    else (directories, links, files further below) is passed over as well. The archive is whole only when the
    iterator is exhausted. Raises BadImage, BadSparseMap, ImageTooLarge. Closing `blocks` is left to the
    caller.
    """
    source = _Cursor(blocks)
    try:
        yield from _directory(source, f"{directory}/./".encode())
    except BadTarHeader as error:
        raise BadImage(f"the inner archive is malformed: {error}") from error


class _Cursor:
    """Walks over blocks and gives views into them."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = iter(blocks)
        self._rest = memoryview(b"")

    def peek(self, limit: int) -> memoryview:
        """The next 1 to `limit` bytes, without passing them; empty at the end of the input."""
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                break
            self._rest = memoryview(block)
        return self._rest[:limit]

    def advance(self, size: int) -> None:
        """Pass `size` bytes, no more than the last `peek` gave."""
        self._rest = self._rest[size:]

    def some(self, limit: int) -> memoryview:
        """The next 1 to `limit` bytes. Raises BadImage at the end of the input."""
        data = self.peek(limit)
        if not data:
            raise BadImage("the inner archive ends early", advice=REST_IS_MISSING)
        self.advance(len(data))
        return data

    def exactly(self, size: int) -> bytes:
        """The next `size` bytes, copied: for headers, not for data."""
        collected = bytearray()
        while len(collected) < size:
            collected += self.some(size - len(collected))
        return bytes(collected)


def _read_header(source: _Cursor) -> tuple[TarHeader, dict[str, bytes]]:
    """The member's header and the pax records before it."""
    block = source.exactly(BLOCK)
    if tar_header.is_zero_block(block):
        raise BadImage("the inner archive is empty")
    header = tar_header.parse_tar_header(block)
    if header.type_flag != b"x":
        return header, {}
    if header.size > tar_header.MAX_PAX_SIZE:
        raise BadImage(f"the pax header has {header.size} bytes; {tar_header.MAX_PAX_SIZE} are taken")
    records = tar_header.parse_pax_records(source.exactly(header.size))
    _read_padding(source, header.size)
    return tar_header.parse_tar_header(source.exactly(BLOCK)), records


def _open_member(
    source: _Cursor, header: TarHeader, records: dict[str, bytes], expected_name: str, max_size: int
) -> Image:
    name = records.get("path", header.name)
    stored_size = _pax_number(records, "size") if "size" in records else header.size
    sparse_keys = {key for key in records if key.startswith("GNU.sparse.")}
    if header.type_flag == b"S" and not records:
        _check_name(name, expected_name)
        return _old_gnu_image(source, header, max_size)
    if header.type_flag not in (b"0", b"\x00"):
        raise BadImage(
            f"the inner archive holds something other than a file (type {shown(header.type_flag)})"
        )
    if not sparse_keys:
        _check_name(name, expected_name)
        _check_size(stored_size, max_size)
        # A file is a sparse file with one part.
        parts = [(0, stored_size)]
        return Image(stored_size, _extents(source, parts, _padding(stored_size) + _CLOSING))
    if (
        sparse_keys != {f"GNU.sparse.{key}" for key in ("major", "minor", "name", "realsize")}
        or records["GNU.sparse.major"] != b"1"
        or records["GNU.sparse.minor"] != b"0"
    ):
        raise BadImage("the inner archive holds a sparse file in a format that Qubes does not write")
    # The name in the header is made up by the writer, and holds its process number.
    _check_name(records["GNU.sparse.name"], expected_name)
    return _pax_image(source, _pax_number(records, "GNU.sparse.realsize"), stored_size, max_size)


def _directory(source: _Cursor, prefix: bytes) -> Iterator[tuple[str, Image]]:
    names: set[bytes] = set()
    while (found := _next_in_directory(source)) is not None:
        header, stored_name, stored_size = found
        if not stored_name.startswith(prefix) and stored_name != prefix[:-1]:
            raise BadImage(f"the inner archive holds {shown(stored_name)}, which lies in another directory")
        name = stored_name.removeprefix(prefix)
        if header.type_flag == b"S":
            size = OldGnuReader.image_size(header)
            _check_size(size, MAX_IMAGE_SIZE)
            reader = OldGnuReader(header, size)
            while not reader.complete:
                reader.feed(source.exactly(BLOCK))
            extents = _parts(source, reader.result())
        else:
            _check_size(stored_size, MAX_IMAGE_SIZE)
            size, extents = stored_size, _parts(source, [(0, stored_size)])
        # Links and directories have only a header; what else has content is passed over.
        if header.type_flag in (b"0", b"\x00", b"S") and b"/" not in name and name:
            if name in names:
                raise BadImage(f"the inner archive holds {shown(name)} twice")
            names.add(name)
            if len(names) > _MAX_FILES:
                raise BadImage(f"the inner archive holds more than {_MAX_FILES} files in one directory")
            yield name.decode("utf-8", "backslashreplace"), Image(size, extents)
        for _ in extents:
            pass
        _read_padding(source, stored_size)
    _read_closing(source, BLOCK)


def _next_in_directory(source: _Cursor) -> tuple[TarHeader, bytes, int] | None:
    """The next member's header, name, and size in the archive; None at the first closing block."""
    long_name: bytes | None = None
    while not tar_header.is_zero_block(block := source.exactly(BLOCK)):
        header = tar_header.parse_tar_header(block)
        if header.type_flag in (b"L", b"K"):  # GNU tar: the next member's name, or the target of its link
            if header.size > _MAX_LONG_NAME:
                raise BadImage("the inner archive holds a name that is longer than any path")
            text = source.exactly(header.size).rstrip(b"\0")
            _read_padding(source, header.size)
            long_name = text if header.type_flag == b"L" else long_name
            continue
        if header.type_flag not in _DIRECTORY_TYPES:
            raise BadImage(f"the inner archive holds an entry of type {shown(header.type_flag)}")
        has_content = header.type_flag in (b"0", b"\x00", b"S")
        return header, header.name if long_name is None else long_name, header.size if has_content else 0
    if long_name is not None:
        raise BadImage("the inner archive ends early", advice=REST_IS_MISSING)
    return None


def _old_gnu_image(source: _Cursor, header: TarHeader, max_size: int) -> Image:
    image_size = OldGnuReader.image_size(header)
    _check_size(image_size, max_size)
    reader = OldGnuReader(header, image_size)
    while not reader.complete:
        reader.feed(source.exactly(BLOCK))
    return Image(image_size, _extents(source, reader.result(), _padding(header.size) + _CLOSING))


def _pax_image(source: _Cursor, image_size: int, member_size: int, max_size: int) -> Image:
    _check_size(image_size, max_size)
    reader = PaxReader(image_size, member_size)
    while not reader.complete:
        data = source.peek(reader.wanted)
        if not data:
            raise BadImage("the inner archive ends early", advice=REST_IS_MISSING)
        source.advance(reader.feed(data))
    # Qubes' writer does not pad the data to a whole block, GNU tar does.
    return Image(image_size, _extents(source, reader.result(), _CLOSING))


def _extents(source: _Cursor, parts: Iterable[tuple[int, int]], closing: int) -> Iterator[Extent]:
    yield from _parts(source, parts)
    _read_closing(source, closing)


def _parts(source: _Cursor, parts: Iterable[tuple[int, int]]) -> Iterator[Extent]:
    for offset, length in parts:
        position, end = offset, offset + length
        while position < end:
            data = source.some(min(end - position, MAX_EXTENT))
            yield Extent(position, data)
            position += len(data)


def _read_closing(source: _Cursor, least: int) -> None:
    """Read to the end of the input: at least `least` bytes, and nothing but zeros."""
    size = 0
    while data := source.peek(MAX_EXTENT):
        size += len(data)
        if bytes(data).count(0) != len(data):
            raise BadImage("the inner archive holds something after its file")
        if size > least + _MAX_CLOSING:
            raise BadImage("the inner archive does not end after its file")
        source.advance(len(data))
    if size < least:
        raise BadImage(
            "the inner archive ends early (its closing blocks are missing)", advice=REST_IS_MISSING
        )


def _check_name(untrusted_name: bytes, expected_name: str) -> None:
    if untrusted_name != expected_name.encode():
        raise BadImage(f"the inner archive holds {shown(untrusted_name)} instead of {shown(expected_name)}")


def _check_size(untrusted_size: int, max_size: int) -> None:
    if untrusted_size > MAX_IMAGE_SIZE:
        raise ImageTooLarge(
            f"the image has {size_text(untrusted_size)}, more than any volume of Qubes",
            advice="The file is damaged or was made to attack; do not trust it.",
        )
    if untrusted_size > max_size:
        raise ImageTooLarge(f"the image has {size_text(untrusted_size)}; {size_text(max_size)} are allowed")


def _pax_number(records: dict[str, bytes], key: str) -> int:
    digits = records[key]
    if not digits.isdigit() or len(digits) > _PAX_NUMBER_DIGITS:
        raise BadImage(f"the pax record {key} is not a number")
    return int(digits)


def _padding(size: int) -> int:
    return tar_header.padded(size) - size


def _read_padding(source: _Cursor, size: int) -> None:
    if any(source.exactly(_padding(size))):
        raise BadImage("the padding in the inner archive is not zero")


#: Bytes of a block of an image, the smallest hole that ext4, xfs, btrfs and thin pools keep. A shorter run of
#: zeros would cost more as an extent of its own than it saves.
IMAGE_BLOCK = 4096

_ZEROS = bytes(IMAGE_BLOCK)


def without_zeros(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same image in extents without blocks of zeros; what `extents` raises passes through.

    Of a block that an extent begins or ends, only what is in that extent is looked at: extents are cut where
    the decompressor cuts them, and a hole that was stored as zeros has no data, wherever that is.
    """
    for extent in extents:
        # Searching and comparing are fast in bytes, and slow in a view of them.
        data = extent.data.tobytes()
        for start, end in _runs(data, -extent.offset % IMAGE_BLOCK):
            yield Extent(extent.offset + start, extent.data[start:end])


def _runs(data: bytes, first_block: int) -> Iterator[tuple[int, int]]:
    """What of `data` is kept, as (start, end). The first whole block of it begins at `first_block`."""
    start = min(first_block, len(data)) if _ZEROS.startswith(data[:first_block]) else 0
    last_block = first_block + max(0, len(data) - first_block) // IMAGE_BLOCK * IMAGE_BLOCK
    end = min(last_block, len(data)) if _ZEROS.startswith(data[last_block:]) else len(data)
    while start < end:
        hole = _next_hole(data, start, first_block)
        if hole > start:
            yield start, min(hole, end)
        start = hole
        while data.startswith(_ZEROS, start):
            start += IMAGE_BLOCK


def _next_hole(data: bytes, start: int, first_block: int) -> int:
    """Where the next whole block of zeros begins, from `start` on; the end of `data` if there is none."""
    while (found := data.find(_ZEROS, start)) >= 0:
        block = found + (first_block - found) % IMAGE_BLOCK
        if data.startswith(_ZEROS, block):
            return block
        start = block
    return len(data)
