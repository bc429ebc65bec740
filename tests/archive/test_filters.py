"""Decompression, checked against the reference compressors and against bombs, cuts and garbage."""

import bz2
import contextlib
import gzip
import lzma
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_restore_svc.archive.filters import BLOCK_SIZE, FILTERS, MAX_WINDOW, check_filter, decompress
from qubes_restore_svc.archive.members import Buffer
from qubes_restore_svc.errors import REST_IS_MISSING, BadCompression, RestoreError, UnknownFilter

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lambda data: lzma.compress(data, lzma.FORMAT_XZ, preset=1),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE, preset=1),
    "zstd": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
}
JOINABLE = [name for name in COMPRESSORS if name != "lzma"]

PLAIN = random.Random(4).randbytes(5000) * 40 + bytes(3 * BLOCK_SIZE) + random.Random(5).randbytes(70_000)


def cut(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def plain(filter_name: str, data: bytes, piece_size: int = 10_007) -> bytes:
    return b"".join(decompress(filter_name, cut(data, piece_size)))


def compressed(filter_name: str, data: bytes) -> bytes:
    return data if filter_name == "none" else COMPRESSORS[check_filter(filter_name)](data)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("piece_size", [997, 1 << 16, 1 << 30])
def test_every_filter_gives_back_what_was_compressed(name: str, piece_size: int) -> None:
    blocks = list(decompress(name, cut(compressed(name, PLAIN), piece_size)))
    assert b"".join(blocks) == PLAIN
    assert all(1 <= len(block) <= BLOCK_SIZE for block in blocks)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_stream_may_come_byte_by_byte_in_any_buffer_with_empty_pieces(name: str) -> None:
    data = compressed(name, b"a few words " * 50)
    pieces: list[Buffer] = [b"", *(memoryview(bytearray([byte])) for byte in data), bytearray(b"")]
    assert b"".join(decompress(name, pieces)) == b"a few words " * 50


@pytest.mark.parametrize("name", ["", "GZIP", "gzip ", "../../bin/sh", "cat", "none\x00", "Ä\x1b[2J" * 100])
def test_an_unknown_filter_is_refused_at_once_and_the_known_ones_are_named(name: str) -> None:
    with pytest.raises(UnknownFilter, match="zstdmt") as caught:
        decompress(name, [])
    assert str(caught.value).isascii() or "…" in str(caught.value)
    assert str(caught.value).isprintable()


def test_the_parallel_programs_write_the_same_formats() -> None:
    assert [check_filter(name) for name in ("pigz", "pbzip2", "zstdmt", "none")] == [
        "gzip",
        "bzip2",
        "zstd",
        "none",
    ]


@pytest.mark.parametrize("name", JOINABLE)
def test_streams_that_follow_each_other_are_one(name: str) -> None:
    data = b"".join(compressed(name, part) for part in (b"one", b"", PLAIN, b"two", b"", b"three"))
    assert plain(name, data) == b"one" + PLAIN + b"twothree"
    assert plain(name, data, 1 << 30) == b"one" + PLAIN + b"twothree"
    assert plain(name, data, 3) == b"one" + PLAIN + b"twothree"


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("rest", [b"\x00", b"x", bytes(512), b"PK\x03\x04" * 9])
@pytest.mark.parametrize("piece_size", [1, 1 << 20])
def test_what_follows_the_end_is_refused(name: str, rest: bytes, piece_size: int) -> None:
    with pytest.raises(BadCompression, match="end"):
        plain(name, compressed(name, b"data") + rest, piece_size)


def test_a_second_lzma_stream_is_refused_as_the_lzma_program_does() -> None:
    with pytest.raises(BadCompression, match="follows"):
        plain("lzma", compressed("lzma", b"one") * 2)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_no_input_is_an_early_end(name: str) -> None:
    for pieces in ([], [b"", b""]):
        with pytest.raises(BadCompression, match="ends early"):
            list(decompress(name, pieces))


def test_no_input_is_no_data_when_nothing_is_compressed() -> None:
    assert list(decompress("none", [b"", memoryview(b"")])) == []


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_truncation_is_noticed(name: str) -> None:
    data = compressed(name, b"some text that is not long, " * 4 + os.urandom(40))
    for size in range(len(data)):
        with pytest.raises(BadCompression, match="ends early") as caught:
            plain(name, data[:size])
        assert caught.value.advice == REST_IS_MISSING


@pytest.mark.parametrize("name", JOINABLE)
def test_a_truncated_second_stream_is_noticed(name: str) -> None:
    data = compressed(name, b"text " * 30)
    for size in range(1, len(data)):
        with pytest.raises(BadCompression, match="end"):
            plain(name, data + data[:size])


@pytest.mark.parametrize("level", [-5, 1, 19])
@pytest.mark.parametrize("size", [0, 100, 300, 70_000, 400_000])
@pytest.mark.parametrize("checksum", [False, True])
def test_zstd_frames_of_every_shape_are_followed_to_their_end(level: int, size: int, checksum: bool) -> None:
    text = random.Random(size).randbytes(size // 2) + bytes(size - size // 2)
    for content_size in (False, True):
        compressor = zstandard.ZstdCompressor(level, write_checksum=checksum, write_content_size=content_size)
        data = compressor.compress(text)
        assert plain("zstd", data + data, 1000) == text * 2
        for lost in (1, 2, 3, 4, 5):
            with pytest.raises(BadCompression, match="ends early"):
                plain("zstd", (data + data)[:-lost], 1000)


def test_a_skippable_zstd_frame_is_refused() -> None:
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    with pytest.raises(BadCompression, match="not a zstd stream"):
        plain("zstd", skippable)
    with pytest.raises(BadCompression, match="follows"):
        plain("zstd", compressed("zstd", b"data") + skippable)


@pytest.mark.parametrize("position", [-8, -5, -4, -1])
def test_the_checksum_and_length_of_gzip_are_verified(position: int) -> None:
    data = bytearray(compressed("gzip", PLAIN))
    data[position] ^= 1
    with pytest.raises(BadCompression, match="malformed"):
        plain("gzip", bytes(data))


@pytest.mark.parametrize(("name", "position"), [("bzip2", 12), ("xz", -20), ("zstd", -1)])
def test_the_checksums_of_other_formats_are_verified(name: str, position: int) -> None:
    data = bytearray(compressed(name, PLAIN[:1000]))
    data[position] ^= 1
    with pytest.raises(BadCompression):
        plain(name, bytes(data))


def test_a_window_past_the_ceiling_is_refused_with_its_size() -> None:
    dictionary = lzma.compress(
        b"x", lzma.FORMAT_XZ, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2 * MAX_WINDOW}]
    )
    alone = bytearray(compressed("lzma", b"x"))
    alone[1:5] = (2 * MAX_WINDOW).to_bytes(4, "little")
    # magic; one segment of 2**40 bytes; an empty last block
    one_segment = b"\x28\xb5\x2f\xfd" + b"\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00"
    # window descriptor for 2**31 bytes
    window = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([21 << 3]) + b"\x01\x00\x00"
    for name, data in (("xz", dictionary), ("lzma", bytes(alone)), ("zstd", one_segment), ("zstd", window)):
        with pytest.raises(BadCompression, match="more than 128 MiB"):
            plain(name, data)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_bomb_comes_out_block_by_block_in_bounded_memory(name: str) -> None:
    bomb = compressed(name, bytes(64 * BLOCK_SIZE))
    blocks = decompress(name, [bomb])
    tracemalloc.start()
    try:
        total = 0
        for block in blocks:
            assert len(block) <= BLOCK_SIZE
            total += len(block)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 64 * BLOCK_SIZE
    assert peak < 12 * BLOCK_SIZE


def test_a_zstd_bomb_of_repeated_bytes_is_bounded_for_the_whole_process() -> None:
    # 128 KiB out of every 4 bytes: 100,000 such blocks are 12 GiB. Measured from outside, since the
    # memory of libzstd is not Python's.
    program = """
import resource
from qubes_restore_svc.archive.filters import decompress
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
block = ((1 << 17) << 3 | 1 << 1).to_bytes(3, "little") + b"x"
bomb = b"\\x28\\xb5\\x2f\\xfd\\x00" + bytes([7 << 3]) + block * 100_000
blocks = decompress("zstd", [bomb])
total = sum(len(next(blocks)) for _ in range(2000))
print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    total, grown_kib = (int(word) for word in answer.stdout.split())
    assert total == 2000 * BLOCK_SIZE
    assert grown_kib < 32 * 1024


@pytest.mark.parametrize("name", JOINABLE)
def test_many_tiny_streams_do_not_cost_quadratic_memory_or_nested_calls(name: str) -> None:
    assert plain(name, compressed(name, b"a") * 3000, 1 << 30) == b"a" * 3000


def test_pieces_are_taken_one_by_one_and_their_errors_pass_through() -> None:
    taken = []

    def pieces() -> Iterator[bytes]:
        for number, piece in enumerate(
            cut(compressed("gzip", random.Random(1).randbytes(2_000_000)), 100_000)
        ):
            taken.append(number)
            yield piece
            if number == 3:
                raise OSError("the stick was pulled")

    blocks = decompress("gzip", pieces())
    assert taken == []
    next(blocks)
    assert taken == [0]
    with pytest.raises(OSError, match="pulled"):
        list(blocks)


def test_a_zstd_source_that_fails_is_not_taken_for_bad_compression() -> None:
    def pieces() -> Iterator[bytes]:
        yield compressed("zstd", b"data")[:5]
        raise OSError("the stick was pulled")

    with pytest.raises(OSError, match="pulled"):
        list(decompress("zstd", pieces()))


def test_blocks_of_uncompressed_data_survive_a_buffer_that_is_used_again() -> None:
    buffer = bytearray(b"first")

    def pieces() -> Iterator[memoryview]:
        yield memoryview(buffer)
        buffer[:] = b"again"
        yield memoryview(buffer)

    assert list(decompress("none", pieces())) == [b"first", b"again"]


@given(st.sampled_from(sorted(COMPRESSORS)), st.binary(max_size=300))
@settings(deadline=None)
def test_random_bytes_raise_nothing_but_our_errors(name: str, data: bytes) -> None:
    with contextlib.suppress(RestoreError):
        plain(name, data, 7)


SMALL = b"the quick brown fox " * 20 + bytes(range(256))
VALID = {name: compressed(name, SMALL) for name in COMPRESSORS}


@given(st.sampled_from(sorted(COMPRESSORS)), st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_stream_raises_nothing_but_our_errors(name: str, data: st.DataObject) -> None:
    stream = bytearray(VALID[name])
    for _ in range(data.draw(st.integers(1, 3))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    try:
        total = 0
        for block in decompress(name, cut(bytes(stream), data.draw(st.integers(1, 400)))):
            total += len(block)
            if total > 1 << 26:
                return
    except RestoreError:
        pass
