"""Decompression of an inner archive, in memory that does not grow with the size of the result.

Strategy: one function, `decompress`, a lazy generator from pieces of compressed data to blocks of plain data.
Every engine is asked for at most `BLOCK_SIZE` bytes at a time, so a bomb comes out block by block, and the
caller, who counts the blocks, can stop it; windows and dictionaries have fixed ceilings.

gzip, bzip2, xz and lzma engines share one interface (`max_length`, `eof`, `unused_data`) and one loop.
zstandard's reader bounds its output too, but takes the end of its input for the end of the stream
wherever that comes; `_FrameWalker` follows the frames beside it (RFC 8878) and knows better.

The parallel programs (pigz, pbzip2) may cut one stream into several that follow each other; that is
accepted. Anything else after the end of a stream, and an end that comes too early, is BadCompression.
"""

import bz2
import lzma
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Protocol, cast

import zstandard
from isal import igzip_lib

from qubes_restore_svc.archive.members import Buffer, shown
from qubes_restore_svc.errors import REST_IS_MISSING, BadCompression, UnknownFilter

#: Largest block, in bytes, that `decompress` yields: so small that the next one takes the same memory, and
#: that the next reader finds it in the processor's cache.
BLOCK_SIZE = 1 << 18

#: Most memory, in bytes, that a stream may ask for its window or dictionary: the limit of zstd itself
#: without --long; `xz -9`, the largest preset, needs half of it.
MAX_WINDOW = 1 << 27

# A new stream is first fed a little, then more and more. What was fed past the end of a stream is
# copied and fed again, so that feeding big pieces at once would let streams of 20 bytes each cost
# time that grows with the square of their number.
_FIRST_FEED = 1 << 12
_LARGEST_FEED = 1 << 18

#: The program names that a backup header may give, and the format that each of them writes.
_FORMATS = {
    "gzip": "gzip",
    "pigz": "gzip",
    "bzip2": "bzip2",
    "pbzip2": "bzip2",
    "xz": "xz",
    "lzma": "lzma",
    "zstd": "zstd",
    "zstdmt": "zstd",
    "none": "none",
}

#: Every name that `check_filter` knows.
FILTERS = tuple(_FORMATS)


def check_filter(untrusted_name: str) -> str:
    """The format (gzip, bzip2, xz, lzma, zstd, none) behind a compression program's name.

    Raises UnknownFilter, whose text lists the names that are known.
    """
    try:
        return _FORMATS[untrusted_name]
    except KeyError:
        known = ", ".join(FILTERS)
        raise UnknownFilter(
            f"the compression filter {shown(untrusted_name)} is not known (known are {known})"
        ) from None


def decompress(filter_name: str, pieces: Iterable[Buffer]) -> Iterator[bytes]:
    """The plain data of a compressed stream, in blocks of 1 to `BLOCK_SIZE` bytes.

    `filter_name` is any of `FILTERS`, else UnknownFilter is raised at once. `pieces` are the stream,
    cut anywhere; each is used up before the next is asked for, and what iterating over them raises
    passes through. The blocks raise BadCompression where the stream is malformed, asks for more than
    `MAX_WINDOW` bytes of window, ends early, or is followed by something else. Checksums are verified
    where the format has them, so only a reader that reaches the end has verified data. An empty input
    is an early end, except for `none`.
    """
    stored_as = check_filter(filter_name)
    if stored_as == "none":
        return _uncompressed(pieces)
    if stored_as == "zstd":
        return _zstd(pieces)
    return _streams(stored_as, pieces)


def _uncompressed(pieces: Iterable[Buffer]) -> Iterator[bytes]:
    for piece in pieces:
        if isinstance(piece, bytes) and 0 < len(piece) <= BLOCK_SIZE:
            yield piece
            continue
        view = memoryview(piece)
        for start in range(0, len(view), BLOCK_SIZE):
            yield bytes(view[start : start + BLOCK_SIZE])


# --- gzip, bzip2, xz, lzma ---------------------------------------------------------------------------


class _Engine(Protocol):
    """What the decompressor objects of bz2, lzma and igzip_lib have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: Buffer, max_length: int = -1) -> bytes: ...


# isal's decompressor takes half of the time that zlib takes, and checks CRC and length as zlib does.
_ENGINES: dict[str, Callable[[], _Engine]] = {
    "gzip": lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=MAX_WINDOW),
    "lzma": lambda: lzma.LZMADecompressor(format=lzma.FORMAT_ALONE, memlimit=MAX_WINDOW),
}

# bz2 raises OSError and ValueError for malformed data. isal's stubs call its class an instance.
_ISAL_ERROR = cast(type[Exception], igzip_lib.IsalError)
_ENGINE_ERRORS = (_ISAL_ERROR, lzma.LZMAError, OSError, ValueError, EOFError)


def _streams(stored_as: str, pieces: Iterable[Buffer]) -> Iterator[bytes]:
    """Blocks of one or more streams that follow each other directly."""
    engine: _Engine | None = None
    ended = 0
    feed = _FIRST_FEED
    for piece in pieces:
        view = memoryview(piece)
        position = 0
        while position < len(view):
            if engine is None:
                if ended and stored_as == "lzma":
                    raise BadCompression("something follows the end of the lzma stream")
                engine, feed = _ENGINES[stored_as](), _FIRST_FEED
            fed = view[position : position + feed]
            position += len(fed)
            feed = min(2 * feed, _LARGEST_FEED)
            while True:
                try:
                    block = engine.decompress(fed, BLOCK_SIZE)
                except _ENGINE_ERRORS as error:
                    raise _malformed(stored_as, ended, error) from error
                if block:
                    yield block
                if engine.eof or engine.needs_input:
                    break
                fed = memoryview(b"")
            if engine.eof:
                position -= len(engine.unused_data)
                engine = None
                ended += 1
    if engine is not None or not ended:
        raise BadCompression(f"the {stored_as} stream ends early", advice=REST_IS_MISSING)


def _malformed(stored_as: str, ended: int, error: Exception) -> BadCompression:
    if "memory" in str(error).lower():
        return BadCompression(
            f"the {stored_as} stream needs more than {MAX_WINDOW >> 20} MiB to be decompressed"
        )
    place = f", or something else follows its end (part {ended + 1})" if ended else ""
    return BadCompression(f"the {stored_as} stream is malformed{place} ({error})")


# --- zstd --------------------------------------------------------------------------------------------


def _zstd(pieces: Iterable[Buffer]) -> Iterator[bytes]:
    source = _FrameWalker(pieces)
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    # The reader calls read() and nothing else of a file.
    with decompressor.stream_reader(cast(IO[bytes], source), read_across_frames=True) as reader:
        while True:
            try:
                block = reader.read(BLOCK_SIZE)
            except zstandard.ZstdError as error:
                raise _malformed("zstd", 0, error) from error
            if not block:
                break
            yield block
    source.check_end()


class _FrameWalker:
    """The readable source of a zstd reader, which watches where frames begin and end.

    It parses no more than that: magic, size of the frame header, block headers (RFC 8878, section 3.1).
    Skippable frames are refused, like everything that is not a frame.
    """

    def __init__(self, pieces: Iterable[Buffer]) -> None:
        self._pieces = iter(pieces)
        self._skip = 0  # bytes to pass over before the next field
        self._field = b""  # what has come of the field that is being read
        self._field_size = 4
        self._read_field: Callable[[bytes], None] = self._magic
        self._has_checksum = False
        self._frames = 0

    def read(self, size: int = -1) -> Buffer:
        """The next piece, whatever its size; empty at the end of the input."""
        for piece in self._pieces:
            if len(piece):
                self._follow(memoryview(piece))
                return piece
        return b""

    def check_end(self) -> None:
        """Raise BadCompression unless the input ended where a frame ended."""
        between_frames = self._read_field == self._magic and not self._field and not self._skip
        if not self._frames or not between_frames:
            raise BadCompression("the zstd stream ends early", advice=REST_IS_MISSING)

    def _follow(self, view: memoryview) -> None:
        position = 0
        while position < len(view):
            if self._skip:
                passed = min(self._skip, len(view) - position)
                self._skip -= passed
                position += passed
                continue
            wanted = self._field_size - len(self._field)
            self._field += view[position : position + wanted]
            position += wanted
            if self._read_field == self._magic and not zstandard.FRAME_HEADER.startswith(self._field):
                raise BadCompression(
                    "something follows the end of the zstd stream"
                    if self._frames
                    else "this is not a zstd stream"
                )
            if len(self._field) == self._field_size:
                field, self._field = self._field, b""
                self._read_field(field)

    def _expect(self, size: int, read_field: Callable[[bytes], None], *, skip: int) -> None:
        self._field_size, self._read_field, self._skip = size, read_field, skip

    def _magic(self, _: bytes) -> None:
        self._frames += 1
        self._expect(1, self._descriptor, skip=0)

    def _descriptor(self, field: bytes) -> None:
        flags = field[0]
        one_segment = bool(flags & 0x20)
        self._has_checksum = bool(flags & 0x04)
        window_size = 0 if one_segment else 1
        dictionary_size = (0, 1, 2, 4)[flags & 3]
        content_size = (1 if one_segment else 0, 2, 4, 8)[flags >> 6]
        self._expect(3, self._block_header, skip=window_size + dictionary_size + content_size)

    def _block_header(self, field: bytes) -> None:
        header = int.from_bytes(field, "little")
        is_last, kind, size = header & 1, header >> 1 & 3, header >> 3
        stored = 1 if kind == 1 else size  # kind 1 is one byte, repeated
        if not is_last:
            self._expect(3, self._block_header, skip=stored)
        else:
            self._expect(4, self._magic, skip=stored + (4 if self._has_checksum else 0))
