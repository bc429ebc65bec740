"""Header blocks and pax records, checked against Python's tarfile and against what an enemy would send."""

import contextlib
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_restore_svc.archive.tar_header import (
    BLOCK,
    MAX_NUMBER,
    MAX_PAX_SIZE,
    BadTarHeader,
    is_zero_block,
    padded,
    parse_number,
    parse_pax_records,
    parse_tar_header,
)


def header_block(name: str = "vm10/private.img", size: int = 5, *, gnu: bool = False) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT if gnu else tarfile.USTAR_FORMAT)[-BLOCK:]


def with_checksum(block: bytes) -> bytes:
    total = sum(block) - sum(block[148:156]) + 8 * 0x20
    return block[:148] + b"%06o\x00 " % total + block[156:]


def patched(offset: int, value: bytes) -> bytes:
    """A header with a right checksum in which `value` stands at `offset`."""
    block = header_block()
    return with_checksum(block[:offset] + value + block[offset + len(value) :])


@pytest.mark.parametrize("gnu", [False, True])
def test_a_header_that_tarfile_wrote_is_read(gnu: bool) -> None:
    header = parse_tar_header(memoryview(header_block(size=0o777, gnu=gnu)))
    assert (header.name, header.size, header.type_flag) == (b"vm10/private.img", 0o777, b"0")
    assert header.is_gnu is gnu
    assert header.raw == header_block(size=0o777, gnu=gnu)


def test_a_long_name_is_joined_with_its_prefix() -> None:
    name = "a" * 90 + "/" + "b" * 90
    assert parse_tar_header(header_block(name)).name == name.encode()


def test_the_last_bytes_of_a_gnu_header_are_no_prefix() -> None:
    block = header_block(gnu=True)
    assert parse_tar_header(with_checksum(block[:345] + b"12345" + block[350:])).name == b"vm10/private.img"


def test_a_name_may_fill_its_whole_field() -> None:
    assert parse_tar_header(header_block("n" * 100)).name == b"n" * 100


def test_a_size_past_8_gib_is_read_in_base_256() -> None:
    assert parse_tar_header(header_block(size=1 << 43, gnu=True)).size == 1 << 43


@pytest.mark.parametrize(
    ("field", "number"),
    [
        (b"0000017\x00", 0o17),
        (b"     17 ", 0o17),
        (b"77777777", 0o77777777),
        (b"17 \x00\x00\x00\x00\x00", 0o17),
        (b"\x80" + (1 << 40).to_bytes(11, "big"), 1 << 40),
        (b"\x80" + MAX_NUMBER.to_bytes(11, "big"), MAX_NUMBER),
    ],
)
def test_numbers_are_octal_or_base_256(field: bytes, number: int) -> None:
    assert parse_number(field) == number


@pytest.mark.parametrize(
    "field",
    [
        b"",
        bytes(12),
        b" " * 12,
        b"-0000000001\x00",
        b"+0000000001\x00",
        b"0000_000001\x00",
        b"00000000008\x00",
        b"0x000000001\x00",
        b"1 1 1 1 1 1 ",
        b"1\x001\x00\x00\x00\x00\x00\x00\x00\x00\x00",
        b"\t0000000001\x00",
        b"\xff" * 12,
        b"\xff" + b"\xff" * 10 + b"\x9c",
        b"\x81" + bytes(11),
        b"\x80" + (1 << 63).to_bytes(11, "big"),
        b"\x80" + b"\xff" * 11,
    ],
)
def test_a_malformed_or_negative_or_huge_number_is_refused(field: bytes) -> None:
    with pytest.raises(BadTarHeader):
        parse_number(field)


@pytest.mark.parametrize("position", range(BLOCK))
def test_a_single_changed_byte_is_noticed(position: int) -> None:
    block = bytearray(header_block())
    original = parse_tar_header(block)
    block[position] ^= 0x01
    try:
        changed = parse_tar_header(block)
    except BadTarHeader:
        return
    # Only the unused end of the checksum field may change unseen.
    assert 148 <= position < 156
    assert (changed.name, changed.size, changed.type_flag) == (
        original.name,
        original.size,
        original.type_flag,
    )


@pytest.mark.parametrize(
    "block",
    [
        b"",
        header_block()[:-1],
        header_block() + b"\x00",
        bytes(BLOCK),
        b"\xff" * BLOCK,
        patched(257, bytes(8)),
        patched(257, b"ustar\x0001"),
        patched(257, b"ustar \x00\x00"),
        patched(0, bytes(100)),
        patched(124, b"-0000000001\x00"),
        patched(124, b"\xff" * 12),
    ],
)
def test_what_is_no_header_is_refused(block: bytes) -> None:
    with pytest.raises(BadTarHeader):
        parse_tar_header(block)


def test_a_signed_checksum_is_refused() -> None:
    block = with_checksum(header_block("\xe4" * 4))
    assert parse_tar_header(block).size == 5
    signed = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + b" " * 8 + block[156:])
    with pytest.raises(BadTarHeader, match="checksum"):
        parse_tar_header(block[:148] + b"%06o\x00 " % signed + block[156:])


def test_pax_records_that_tarfile_wrote_are_read() -> None:
    info = tarfile.TarInfo("vm10/private.img")
    info.size = 1 << 40
    info.pax_headers = {"GNU.sparse.major": "1", "comment": "two\nlines = here ä"}
    written = info.tobuf(tarfile.PAX_FORMAT)
    header = parse_tar_header(written[:BLOCK])
    assert header.type_flag == b"x"
    records = parse_pax_records(written[BLOCK : BLOCK + header.size])
    assert records == {
        "size": b"%d" % (1 << 40),
        "GNU.sparse.major": b"1",
        "comment": "two\nlines = here ä".encode(),
    }


def test_no_pax_records_are_an_empty_dict() -> None:
    assert parse_pax_records(b"") == {}


@pytest.mark.parametrize(
    "data",
    [
        b"\n",
        b"6 a=b",
        b"6 a=b\x00",
        b"7 a=b\n",
        b"5 a=b\n",
        b"06 a=b\n",
        b"07 a=b\n",
        b"+6 a=b\n",
        b"6\ta=b\n",
        b" 6 a=b\n",
        b"6 a=b\n\x00",
        b"6 a=b\n6 a=c\n",
        b"5 ab\n",
        b"5 =b\n",
        b"2 \n",
        b"1 \n",
        b"7 \x00a=b\n",
        b"7 \xe4a=b\n",
        b"7 a a=\n",
        b"9999999999999999999 a=b\n",
    ],
)
def test_malformed_pax_records_are_refused(data: bytes) -> None:
    with pytest.raises(BadTarHeader):
        parse_pax_records(data)


def test_pax_records_are_bounded() -> None:
    value = b"v" * (MAX_PAX_SIZE - 9)
    assert parse_pax_records(b"65536 k=" + value + b"\n") == {"k": value}
    with pytest.raises(BadTarHeader, match="65537"):
        parse_pax_records(b"65537 k=" + value + b"v\n")


@given(
    st.dictionaries(st.from_regex(r"[a-zA-Z.]{1,20}", fullmatch=True), st.binary(max_size=200), max_size=8)
)
@settings(max_examples=50, deadline=None)
def test_any_records_come_back(records: dict[str, bytes]) -> None:
    data = b""
    for key, value in records.items():
        body = b" " + key.encode() + b"=" + value + b"\n"
        length = len(body) + 1
        while len(b"%d" % length) + len(body) != length:
            length += 1
        data += b"%d" % length + body
    assert parse_pax_records(data) == records


@given(st.binary(max_size=80))
@settings(deadline=None)
def test_random_bytes_are_refused_as_pax_records_and_nothing_else_happens(data: bytes) -> None:
    with contextlib.suppress(BadTarHeader):
        parse_pax_records(data)


@given(st.binary(max_size=60), st.integers(0, BLOCK - 1))
@settings(deadline=None)
def test_a_header_with_random_bytes_in_it_is_read_or_refused(noise: bytes, offset: int) -> None:
    block = header_block()
    block = with_checksum((block[:offset] + noise + block[offset + len(noise) :])[:BLOCK])
    try:
        header = parse_tar_header(block)
    except BadTarHeader:
        return
    assert header.name
    assert 0 <= header.size <= MAX_NUMBER


def test_zero_blocks_are_known_whatever_their_buffer() -> None:
    assert is_zero_block(bytes(BLOCK))
    assert is_zero_block(memoryview(bytearray(BLOCK)))
    assert not is_zero_block(bytes(BLOCK - 1))
    assert not is_zero_block(bytes(BLOCK - 1) + b"\x01")


@pytest.mark.parametrize(("size", "whole"), [(0, 0), (1, 512), (512, 512), (513, 1024), (1 << 44, 1 << 44)])
def test_content_takes_whole_blocks(size: int, whole: int) -> None:
    assert padded(size) == whole
