"""Sparse maps: what is accepted, what is refused, and what a map of millions of entries costs."""

import contextlib
import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_restore_svc.archive.sparse import MAX_ENTRIES, OldGnuReader, PaxReader, SparseMap
from qubes_restore_svc.archive.tar_header import BLOCK, TarHeader
from qubes_restore_svc.errors import BadSparseMap

MIB = 1 << 20
Entries = Sequence[tuple[int, int]]


def flat(entries: Entries) -> list[int]:
    return [number for entry in entries for number in entry]


def sparse_map(image_size: int, entries: Entries) -> list[tuple[int, int]]:
    made = SparseMap(image_size)
    made.add(flat(entries))
    return list(made.close(sum(length for _, length in entries)))


# --- The map itself --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_size", "entries"),
    [
        (0, []),
        (0, [(0, 0)]),
        (MIB, []),
        (MIB, [(MIB, 0)]),
        (MIB, [(0, MIB)]),
        (MIB, [(0, 512), (512, 512), (4096, 512)]),
        (MIB, [(0, 512), (MIB - 512, 512), (MIB, 0)]),
        (MIB + 7, [(0, 512), (MIB, 7)]),
        (MIB + 7, [(0, 512), (MIB, 7), (MIB + 7, 0)]),
        (MIB, [(1000, 1024), (2025, 512)]),
        (1 << 44, [((1 << 16) * 512, 512)]),
        (1 << 44, [((1 << 32) * 512, 512)]),
        (1 << 44, [(0, 512), ((1 << 44) - 512, 512)]),
        (1 << 44, [(0, 1 << 43), (1 << 43, 1 << 43)]),
    ],
)
def test_a_proper_map_comes_back(image_size: int, entries: Entries) -> None:
    assert sparse_map(image_size, entries) == [entry for entry in entries if entry[1]]


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([(0, 1024), (512, 512)], "overlaps"),
        ([(0, 1024), (1023, 512)], "overlaps"),
        ([(4096, 512), (0, 512)], "backwards"),
        ([(4096, 512), (4096, 512)], "overlaps"),
        ([(0, MIB + 1)], "past"),
        ([(MIB, 1)], "past"),
        ([(MIB + 1, 0)], "past"),
        ([(1 << 62, 512)], "past"),
        ([(0, 1 << 62)], "past"),
        ([((1 << 64) - 512, 1024)], "past"),
        ([(0, 0), (0, 512)], "empty"),
        ([(0, 512), (512, 0)], "empty"),
        ([(MIB, 0), (MIB, 0)], "goes on"),
        ([(0, 513), (4096, 512)], "odd"),
        ([(0, 513), (4096, 1)], "odd"),
    ],
)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_map_that_makes_no_sense_is_refused(entries: Entries, reason: str, one_by_one: bool) -> None:
    made = SparseMap(MIB)
    with pytest.raises(BadSparseMap, match=reason):
        for part in ([[entry] for entry in entries]) if one_by_one else [entries]:
            made.add(flat(part))


@pytest.mark.parametrize("stored_size", [0, 511, 1535, 1537, 1 << 62])
def test_a_map_that_does_not_cover_what_is_stored_is_refused(stored_size: int) -> None:
    made = SparseMap(MIB)
    made.add([0, 512, 4096, 1024])
    with pytest.raises(BadSparseMap, match=f"covers 1536 bytes, but {stored_size}"):
        made.close(stored_size)


@given(
    st.lists(st.tuples(st.integers(0, 1 << 36), st.integers(1, 1 << 34)), max_size=60),
    st.sampled_from([1, 512]),
    st.integers(1, 7),
)
@settings(max_examples=60, deadline=None)
def test_packing_loses_nothing(gaps: Entries, unit: int, batch: int) -> None:
    entries, end = [], 0
    for hole, blocks in gaps:
        entries.append((end + hole * unit, blocks * 512))
        end += hole * unit + blocks * 512
    made = SparseMap(end)
    for start in range(0, len(entries), batch):
        made.add(flat(entries[start : start + batch]))
        made._pack()
    assert list(made.close(made.data_size)) == entries


def test_a_fragmented_map_takes_8_bytes_an_entry_at_most() -> None:
    count = 50_000
    tracemalloc.start()
    try:
        made = SparseMap(1 << 44)
        for start in range(0, count, 1000):
            # Differences too wide for 16 bits.
            made.add(flat([(number << 26, 512) for number in range(start, start + 1000)]))
        made.close(512 * count)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 9 * count + 50_000


def test_the_number_of_entries_is_bounded() -> None:
    made = SparseMap(1 << 44)
    made._entries = MAX_ENTRIES
    with pytest.raises(BadSparseMap, match="more than 16777216"):
        made.add([0, 512])


# --- Old GNU ---------------------------------------------------------------------------------------


def octal(number: int) -> bytes:
    return b"%011o\x00" % number if number < 8**11 else b"\x80" + number.to_bytes(11, "big")


def gnu_entries(entries: Entries, places: int) -> bytes:
    return b"".join(octal(offset) + octal(length) for offset, length in entries).ljust(24 * places, b"\x00")


def gnu_map(image_size: int, entries: Entries) -> tuple[TarHeader, list[bytes]]:
    """The header, not more of it than the reader looks at, and the extension blocks."""
    parts = [entries[start : start + 21] for start in range(4, len(entries), 21)]
    raw = (
        bytes(257)
        + b"ustar  \x00".ljust(129, b"\x00")
        + gnu_entries(entries[:4], 4)
        + bytes([bool(parts)])
        + octal(image_size)
    ).ljust(BLOCK, b"\x00")
    blocks = [
        (gnu_entries(part, 21) + bytes([number < len(parts)])).ljust(BLOCK, b"\x00")
        for number, part in enumerate(parts, 1)
    ]
    return TarHeader(b"vm1/private.img", sum(length for _, length in entries), b"S", raw), blocks


def read_gnu(header: TarHeader, blocks: list[bytes]) -> SparseMap:
    reader = OldGnuReader(header, OldGnuReader.image_size(header))
    for block in blocks:
        assert not reader.complete
        reader.feed(block)
    assert reader.complete
    return reader.result()


def spread(count: int, step: int = 1 << 30) -> list[tuple[int, int]]:
    return [(number * step, 512) for number in range(count)]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 24, 25, 26, 46, 47, 500])
def test_a_gnu_map_of_any_length_is_read(count: int) -> None:
    read = read_gnu(*gnu_map(1 << 40, spread(count)))
    assert list(read) == spread(count)
    assert read.image_size == 1 << 40


def edited(header: TarHeader, offset: int, value: bytes) -> TarHeader:
    raw = header.raw[:offset] + value + header.raw[offset + len(value) :]
    return TarHeader(header.name, header.size, header.type_flag, raw)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (257, b"ustar\x0000"),
        (386, b"8" * 12),
        (386, b"\xff" * 12),
        (386, bytes(12)),
        (398, b"x"),
        (410, bytes(24)),
        (482, b"\x02"),
        (482, b"1"),
        (482, b" "),
        (483, bytes(12)),
        (483, b"\xff" * 12),
        (483, b"\x80" + b"\xff" * 11),
    ],
)
def test_a_damaged_gnu_header_is_refused(offset: int, value: bytes) -> None:
    header, blocks = gnu_map(1 << 40, spread(3))
    with pytest.raises(BadSparseMap):
        read_gnu(edited(header, offset, value), blocks)


def test_a_gnu_map_that_goes_on_after_its_end_is_refused() -> None:
    header, _ = gnu_map(1 << 40, spread(2))
    reader = OldGnuReader(edited(header, 482, b"\x01"), 1 << 40)
    assert not reader.complete
    with pytest.raises(BadSparseMap, match="after its end"):
        reader.feed(bytes(BLOCK))


def test_a_gap_in_a_gnu_map_is_refused() -> None:
    header, blocks = gnu_map(1 << 40, spread(1))
    assert list(read_gnu(header, blocks)) == spread(1)
    for offset in (410, 434, 458, 481):
        with pytest.raises(BadSparseMap, match="entries after its end"):
            read_gnu(edited(header, offset, b"1"), blocks)


@pytest.mark.parametrize("difference", [-512, -1, 1, 512])
def test_a_gnu_map_that_disagrees_with_the_stored_size_is_refused(difference: int) -> None:
    header, blocks = gnu_map(1 << 40, spread(30))
    header = TarHeader(header.name, header.size + difference, header.type_flag, header.raw)
    with pytest.raises(BadSparseMap, match="covers"):
        read_gnu(header, blocks)


@given(st.binary(min_size=BLOCK, max_size=BLOCK), st.binary(min_size=96, max_size=110))
@settings(deadline=None)
def test_random_gnu_blocks_raise_nothing_but_our_error(block: bytes, fields: bytes) -> None:
    header, _ = gnu_map(1 << 40, spread(4))
    for noisy in (header, edited(header, 386, fields)):
        try:
            reader = OldGnuReader(edited(noisy, 482, b"\x01"), OldGnuReader.image_size(noisy))
            reader.feed(block)
            reader.result()
        except BadSparseMap:
            pass


# --- Pax 1.0 ---------------------------------------------------------------------------------------


def pax_text(entries: Entries, count: int | None = None) -> bytes:
    text = b"%d\n" % (len(entries) if count is None else count)
    text += b"".join(b"%d\n%d\n" % entry for entry in entries)
    return text + bytes(-len(text) % BLOCK)


def read_pax(image_size: int, data: bytes, member_size: int | None = None, step: int = 1 << 16) -> SparseMap:
    """Read a map from `data`, `step` bytes at a time; the data that follows it is left alone."""
    reader = PaxReader(image_size, len(data) if member_size is None else member_size)
    position = 0
    while not reader.complete:
        window = data[position : position + min(step, reader.wanted)]
        assert window, "the reader wants more than there is"
        used = reader.feed(memoryview(window))
        assert 1 <= used <= len(window)
        position += used
    assert position % BLOCK == 0
    return reader.result()


@pytest.mark.parametrize("step", [1, 2, 7, 511, 512, 513, 1 << 16])
@pytest.mark.parametrize("count", [1, 2, 30, 400])
def test_a_pax_map_is_read_however_it_is_cut(count: int, step: int) -> None:
    entries = [*spread(count - 1), (1 << 40, 0)]
    data = pax_text(entries) + b"1\n2\n3\n" * 256
    stored = sum(length for _, length in entries)
    member_size = len(pax_text(entries)) + stored
    read = read_pax(1 << 40, data.ljust(member_size, b"d"), member_size, step)
    assert list(read) == entries[:-1]


def test_a_pax_map_that_fills_its_block_exactly_has_no_padding() -> None:
    entries = [(100_000_000_000 + number * 1_000_000_000, 10_000_384) for number in range(23)]
    # Numbers may be written longer than they need be; here that fills the block.
    text = b"00023\n" + b"".join(b"%d\n%d\n" % entry for entry in entries)
    assert len(text) == BLOCK
    read = read_pax(1 << 44, text, BLOCK + 23 * 10_000_384)
    assert list(read) == entries


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"0\n",
        b"-1\n",
        b"+1\n0\n0\n",
        b" 1\n0\n0\n",
        b"1 \n0\n0\n",
        b"1\r\n0\r\n0\r\n",
        b"1_0\n",
        b"0x1\n",
        b"1\n\n0\n",
        b"1\n0\n",
        b"2\n0\n512\n",
        b"1\n0.0\n0\n",
        b"1\n0\n-512\n",
        "1\n0\n٥\n".encode(),
        b"1\n0\n" + b"9" * 21 + b"\n",
        b"9" * 21,
        b"9" * 5000,
        b"16777217\n",
        b"18446744073709551616\n",
    ],
)
@pytest.mark.parametrize("step", [1, 1 << 16])
def test_a_malformed_pax_map_is_refused(text: bytes, step: int) -> None:
    data = text + bytes(-len(text) % BLOCK) or bytes(BLOCK)
    with pytest.raises(BadSparseMap):
        read_pax(MIB, data, step=step)


@pytest.mark.parametrize("step", [1, 1 << 16])
@pytest.mark.parametrize("ending", [b"", b"1", b"1000000", b"1000000\n", b"1000000\n51"])
def test_a_pax_map_that_does_not_end_in_its_member_is_refused(ending: bytes, step: int) -> None:
    text = b"3000\n" + b"".join(b"%d\n512\n" % (number * 1024) for number in range(60)) + ending
    with pytest.raises(BadSparseMap, match="does not end inside"):
        read_pax(MIB, text, step=step)


def test_a_number_of_any_value_is_bounded_in_its_digits() -> None:
    last = b"1048576".zfill(20)
    assert list(read_pax(MIB, (b"1\n" + last + b"\n0\n").ljust(BLOCK, b"\x00"))) == []
    with pytest.raises(BadSparseMap, match="malformed"):
        read_pax(MIB, (b"1\n0" + last + b"\n0\n").ljust(BLOCK, b"\x00"))


def test_digits_without_end_are_refused_before_they_are_collected() -> None:
    reader = PaxReader(MIB, 1 << 40)
    with pytest.raises(BadSparseMap, match="malformed"):
        for _ in range(21):
            reader.feed(b"1")


def test_a_pax_map_whose_padding_would_leave_the_member_is_refused() -> None:
    with pytest.raises(BadSparseMap, match="does not end inside"):
        read_pax(MIB, pax_text([(number * 1024, 512) for number in range(60)]), 700)


@pytest.mark.parametrize("member_size", [0, 1, 511])
def test_a_member_too_small_for_a_pax_map_is_refused(member_size: int) -> None:
    with pytest.raises(BadSparseMap, match="too small"):
        PaxReader(MIB, member_size)


def test_padding_of_a_pax_map_that_is_not_zero_is_refused() -> None:
    text = bytearray(pax_text([(MIB, 0)]))
    text[-1] = 1
    for step in (1, 1 << 16):
        with pytest.raises(BadSparseMap, match="padding"):
            read_pax(MIB, bytes(text), step=step)


@pytest.mark.parametrize("difference", [-1, 1, 512])
def test_a_pax_map_that_disagrees_with_the_stored_size_is_refused(difference: int) -> None:
    data = pax_text([(0, 4096)])
    with pytest.raises(BadSparseMap, match="covers"):
        read_pax(MIB, data, len(data) + 4096 + difference)


def test_reading_a_long_pax_map_takes_little_more_memory_than_the_packed_map() -> None:
    count = 40_000
    data = pax_text([(number * 8192, 4096) for number in range(count)])
    tracemalloc.start()
    try:
        read_pax(8192 * count, data, len(data) + 4096 * count)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * count + 2 * MIB


@given(st.binary(max_size=200), st.sampled_from([b"", b"1\n", b"2\n0\n512\n", b"3\n0\n"]), st.integers(1, 20))
@settings(deadline=None)
def test_random_pax_maps_raise_nothing_but_our_error(noise: bytes, start: bytes, step: int) -> None:
    data = (start + noise).ljust(BLOCK, b"\x00")
    with contextlib.suppress(BadSparseMap):
        read_pax(MIB, data, step=step)
