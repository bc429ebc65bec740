"""The volume stream: what the encoder writes is read back, and nothing else is read at all."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_restore_svc.errors import ProtocolViolation
from qubes_restore_svc.wire.volume import (
    MAGIC,
    MAX_IMAGE_SIZE,
    MAX_RECORD,
    VERSION,
    RecordHeader,
    VolumeDecoder,
    encode_end,
    encode_header,
    encode_record,
)

U64 = (1 << 64) - 1


def decode(stream: bytes, image_size: int | None = None) -> tuple[list[RecordHeader], bytes]:
    """All extents of a stream whose data is left out, and what follows the end.

    Without an `image_size` it is announced with that of its header.
    """
    decoder = VolumeDecoder(int.from_bytes(stream[12:20], "big") if image_size is None else image_size)
    extents = []
    while decoder.wanted:
        head, stream = stream[: decoder.wanted], stream[decoder.wanted :]
        extent = decoder.feed(head)
        if extent is not None:
            extents.append(extent)
    assert decoder.data_bytes == sum(extent.length for extent in extents)
    return extents, stream


def model(stream: bytes, announced: int) -> list[RecordHeader] | None:
    """What `stream`, without its data, means by the format's description; None when it is not valid."""
    if len(stream) < 20 or stream[:12] != b"QRSVOLUM\0\0\0\1":
        return None
    size = int.from_bytes(stream[12:20], "big")
    if size != announced:
        return None
    events: list[RecordHeader] = []
    covered = 0
    at = 20
    while at + 12 <= len(stream):
        offset, length = (
            int.from_bytes(stream[at : at + 8], "big"),
            int.from_bytes(stream[at + 8 : at + 12], "big"),
        )
        at += 12
        if offset == U64 and length == 0:
            total = stream[at : at + 8]
            sent = sum(event.length for event in events)
            if len(total) < 8 or int.from_bytes(total, "big") != sent:
                return None
            return events
        if not 1 <= length <= 1048576 or offset < covered or offset + length > size:
            return None
        covered = offset + length
        events.append(RecordHeader(offset, length))
    return None


@st.composite
def volumes(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """An image size and extents that fit in it."""
    position, extents = 0, []
    for hole, length in draw(
        st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, MAX_RECORD)), max_size=6)
    ):
        extents.append((position + hole, length))
        position += hole + length
    return position + draw(st.integers(0, 1 << 40)), extents


def encoded(size: int, extents: list[tuple[int, int]]) -> bytes:
    records = b"".join(encode_record(offset, length) for offset, length in extents)
    return encode_header(size) + records + encode_end(sum(length for _, length in extents))


def test_the_bytes_are_those_of_the_format() -> None:
    assert encode_header(5) == b"QRSVOLUM" + b"\0\0\0\x01" + b"\0\0\0\0\0\0\0\x05"
    assert encode_record(1, 2) == b"\0\0\0\0\0\0\0\x01" + b"\0\0\0\x02"
    assert encode_end(3) == b"\xff" * 8 + b"\0\0\0\0" + b"\0\0\0\0\0\0\0\x03"
    assert (MAGIC, VERSION, MAX_RECORD) == (b"QRSVOLUM", 1, 1048576)


@given(volumes())
def test_what_was_encoded_is_decoded(volume: tuple[int, list[tuple[int, int]]]) -> None:
    size, extents = volume
    assert decode(encoded(size, extents)) == ([RecordHeader(*extent) for extent in extents], b"")


@given(
    volumes(),
    st.lists(
        st.tuples(st.integers(0, 120), st.integers(0, 16), st.binary(max_size=16)), min_size=1, max_size=3
    ),
    st.one_of(st.none(), st.integers(0, 1 << 44)),
)
def test_a_mutated_stream_means_what_the_format_says_or_is_refused(
    volume: tuple[int, list[tuple[int, int]]], edits: list[tuple[int, int, bytes]], announced: int | None
) -> None:
    stream = encoded(*volume)
    for at, removed, inserted in edits:
        stream = stream[:at] + inserted + stream[at + removed :]
    size = volume[0] if announced is None else announced
    expected = model(stream, size)
    try:
        events, _ = decode(stream, size)
    except ProtocolViolation:
        assert expected is None
    else:
        assert events == expected


INTERESTING = [0, 1, 9, 10, 11, MAX_RECORD, MAX_RECORD + 1, 2**32 - 1]


@given(
    st.lists(
        st.tuples(st.sampled_from([*INTERESTING, U64 - 1, U64]), st.sampled_from(INTERESTING)), max_size=4
    )
)
def test_any_records_mean_what_the_format_says_or_are_refused(records: list[tuple[int, int]]) -> None:
    total = sum(length for _, length in records)
    stream = encode_header(MAX_RECORD + 11) + b"".join(struct.pack("!QI", *record) for record in records)
    for end in (encode_end(total), encode_end(total + 1)):
        expected = model(stream + end, MAX_RECORD + 11)
        try:
            events, _ = decode(stream + end)
        except ProtocolViolation:
            assert expected is None
        else:
            assert events == expected


def test_an_image_without_data_is_a_volume() -> None:
    assert decode(encode_header(0) + encode_end(0)) == ([], b"")
    assert decode(encode_header(1 << 44) + encode_end(0)) == ([], b"")


def test_extents_may_touch_and_may_end_with_the_image() -> None:
    events, _ = decode(encoded(MAX_RECORD + 1, [(0, MAX_RECORD), (MAX_RECORD, 1)]))
    assert events == [
        RecordHeader(0, MAX_RECORD),
        RecordHeader(MAX_RECORD, 1),
    ]


@pytest.mark.parametrize(
    "head",
    [
        b"QRSVOLUN" + b"\0\0\0\x01" + bytes(8),
        b"qrsvolum" + b"\0\0\0\x01" + bytes(8),
        b"QRSVOLUM" + b"\0\0\0\x00" + bytes(8),
        b"QRSVOLUM" + b"\0\0\0\x02" + bytes(8),
        b"QRSVOLUM" + b"\x01\0\0\0" + bytes(8),
        bytes(20),
    ],
)
def test_another_magic_or_version_is_refused(head: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="does not begin like one"):
        VolumeDecoder(0).feed(head)


@pytest.mark.parametrize(
    ("size", "announced"), [(11, 10), (9, 10), ((1 << 44) + 1, MAX_IMAGE_SIZE), (U64, MAX_IMAGE_SIZE)]
)
def test_an_image_of_another_size_than_was_announced_is_refused(size: int, announced: int) -> None:
    assert VolumeDecoder(announced).feed(encode_header(announced)) is None
    with pytest.raises(ProtocolViolation, match=f"does not begin like one of {announced} bytes"):
        VolumeDecoder(announced).feed(encode_header(size))


def test_no_image_is_larger_than_16_tib() -> None:
    assert MAX_IMAGE_SIZE == 16 << 40


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([(0, 0)], "a volume record of 0 bytes"),
        ([(U64 - 1, 0)], "a volume record of 0 bytes"),
        ([(0, MAX_RECORD + 1)], "a volume record of 1048577 bytes"),
        ([(0, (1 << 32) - 1)], "a volume record of 4294967295 bytes"),
        ([(10, 10), (10, 10)], "goes back"),
        ([(10, 10), (19, 1)], "goes back"),
        ([(10, 10), (0, 1)], "goes back"),
        ([((1 << 30) - 1, 2)], "reaches past"),
        ([(1 << 30, 1)], "reaches past"),
        ([(U64, 1)], "reaches past"),
        ([(U64 - 1, 2)], "reaches past"),
        ([(U64 - MAX_RECORD + 1, MAX_RECORD)], "reaches past"),
    ],
)
def test_records_that_make_no_image_are_refused(records: list[tuple[int, int]], why: str) -> None:
    decoder = VolumeDecoder(1 << 30)
    decoder.feed(encode_header(1 << 30))
    for record in records[:-1]:
        decoder.feed(encode_record(*record))
    with pytest.raises(ProtocolViolation, match=why):
        decoder.feed(encode_record(*records[-1]))


@pytest.mark.parametrize("claimed", [0, 4, 6, U64])
def test_an_end_that_counts_wrongly_is_refused(claimed: int) -> None:
    stream = encode_header(100) + encode_record(0, 2) + encode_record(50, 3)
    with pytest.raises(ProtocolViolation, match="is not that of 5 data bytes"):
        decode(stream + encode_end(claimed))
    assert decode(stream + encode_end(5)) == ([RecordHeader(0, 2), RecordHeader(50, 3)], b"")


@pytest.mark.parametrize("cut", range(1, 53))
def test_a_stream_that_ends_early_never_comes_to_its_end(cut: int) -> None:
    stream = encoded(100, [(7, 9)])
    assert len(stream) == 52
    with pytest.raises(ProtocolViolation, match="ends early"):
        decode(stream[:-cut])


@pytest.mark.parametrize("more", [b"", b"x", encode_end(0)[-8:], encode_record(0, 1), encode_header(1)])
def test_nothing_is_taken_after_the_end(more: bytes) -> None:
    decoder = VolumeDecoder(100)
    decoder.feed(encode_header(100))
    assert decoder.feed(encode_end(0)[:12]) is None
    assert decoder.feed(encode_end(0)[12:]) is None
    assert decoder.wanted == 0
    with pytest.raises(ProtocolViolation, match="goes on after its end"):
        decoder.feed(more)


def test_the_decoder_says_how_much_it_needs_next() -> None:
    decoder = VolumeDecoder(9)
    wanted = [decoder.wanted]
    for part in (encode_header(9), encode_record(0, 9), encode_end(9)[:12], encode_end(9)[12:]):
        decoder.feed(memoryview(part))
        wanted.append(decoder.wanted)
    assert wanted == [20, 12, 12, 8, 0]
