"""The outer archive in a file: what is read, what is refused, and where it may end."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_restore_svc.archive.members import MAX_MEMBER_SIZE, Member
from qubes_restore_svc.archive.outer_tar import OuterTarReader
from qubes_restore_svc.errors import ArchiveTruncated, BadArchive, EmptyInput, NotABackup, RestoreError
from tests.support.fixtures import shared_fixture

BLOCK = 512
FILLING = bytes(BLOCK)


def read_members(stream: bytes, piece: int = 1 << 16, skip: bool = False) -> list[tuple[str, bytes]]:
    """Every member and its content, read by the protocol; the content in pieces, or passed over."""
    reader, source = OuterTarReader(), io.BytesIO(stream)
    members: list[tuple[str, bytes]] = []
    while True:
        data = source.read(reader.wanted)
        if len(data) < reader.wanted:
            reader.eof(data)
            return members
        member = reader.feed(data)
        if member is None:
            continue
        content = source.read(member.size)
        if skip:
            assert reader.skip(len(content))
        else:
            for start in range(0, len(content), piece):
                reader.content(content[start : start + piece])
        members.append((member.name, content))
        if reader.content_left:
            reader.eof()
            pytest.fail("an end in the middle of a content was accepted")


def block(
    name: bytes = b"backup-header", size: bytes = b"%011o\0" % 0, kind: bytes = b"0", **fields: bytes
) -> bytes:
    """One header block with a right checksum; `magic` and `prefix` may be given."""
    raw = bytearray(BLOCK)
    raw[0 : len(name)] = name
    raw[124 : 124 + len(size)] = size
    raw[148:156] = b" " * 8
    raw[156:157] = kind
    raw[257:265] = fields.get("magic", b"ustar\x0000")
    prefix = fields.get("prefix", b"")
    raw[345 : 345 + len(prefix)] = prefix
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def filled(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def entry(name: bytes, content: bytes) -> bytes:
    return block(name, b"%011o\0" % len(content)) + filled(content)


def pax(records: bytes) -> bytes:
    return block(b"PaxHeaders/x", b"%011o\0" % len(records), b"x") + filled(records)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


FIRST = entry(b"backup-header", b"version=4\n")


def stock_archive(members: list[tuple[str, bytes]]) -> bytes:
    """What the stock writer makes: an archive of its own for each file, with a pax header, filled to
    10,240."""
    stream = b""
    for name, content in members:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1767229323.5
            archive.addfile(info, io.BytesIO(content))
        stream += out.getvalue()
    return stream


STOCK_MEMBERS = [
    ("backup-header", b"version=4\n"),
    ("qubes.xml.000.enc", bytes(range(256)) * 2),
    ("vm10/empty.000.enc", b""),
    ("vm10/" + "long/" * 40 + "private.img.000.enc", b"x" * 1234),
]


# --- What is read -----------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 511, 1 << 16])
def test_members_come_in_order_with_their_content(piece: int) -> None:
    assert read_members(stock_archive(STOCK_MEMBERS), piece) == STOCK_MEMBERS


def test_content_can_be_skipped_unseen() -> None:
    assert read_members(stock_archive(STOCK_MEMBERS), skip=True) == STOCK_MEMBERS


def test_zero_blocks_between_members_mean_nothing() -> None:
    stream = FIRST + FILLING * 57 + entry(b"b", b"2") + FILLING + entry(b"c", b"3") + FILLING * 2
    assert [name for name, _ in read_members(stream)] == ["backup-header", "b", "c"]


def test_an_archive_without_final_zero_blocks_is_complete() -> None:
    assert len(read_members(FIRST)) == 1


def test_nul_is_the_old_type_of_a_regular_file() -> None:
    assert read_members(block(b"a", kind=b"\0")) == [("a", b"")]


def test_a_prefix_stands_before_the_name() -> None:
    assert read_members(block(b"private.img", prefix=b"vm10")) == [("vm10/private.img", b"")]


def test_a_pax_path_replaces_the_name_of_one_file_only() -> None:
    stream = pax(record(b"path", b"vm10/real")) + entry(b"short", b"1") + entry(b"next", b"2")
    assert read_members(stream) == [("vm10/real", b"1"), ("next", b"2")]


def test_a_pax_size_replaces_the_size_of_one_file_only() -> None:
    stream = pax(record(b"size", b"3")) + block(b"a") + filled(b"abc") + entry(b"b", b"2")
    assert read_members(stream) == [("a", b"abc"), ("b", b"2")]


def test_other_pax_records_are_ignored() -> None:
    records = record(b"mtime", b"1795417891.93616839") + record(b"comment", b"GNU.sparse.major=1\nsize=9")
    assert read_members(pax(records) + entry(b"a", b"1")) == [("a", b"1")]


@pytest.mark.parametrize(
    "size", [b"%011o\0" % 700, b"%012o" % 700, b"  1274 \0", b"\x80" + (700).to_bytes(11, "big")]
)
def test_sizes_are_octal_or_base_256(size: bytes) -> None:
    assert OuterTarReader().feed(block(b"a", size)) == Member("a", 700)


def test_a_size_past_eight_gib_is_read() -> None:
    size = (9 << 30) + 1
    reader = OuterTarReader()
    assert reader.feed(block(b"a", b"\x80" + size.to_bytes(11, "big"))) == Member("a", size)
    assert reader.skip(size - 5)
    assert reader.content_left == 5
    reader.content(b"12345")
    assert reader.wanted == 511


def test_the_largest_size_is_a_tebibyte() -> None:
    def claim(size: int) -> bytes:
        return block(b"a", b"\x80" + size.to_bytes(11, "big"))

    assert OuterTarReader().feed(claim(MAX_MEMBER_SIZE)) == Member("a", 1 << 40)
    with pytest.raises(BadArchive, match=r"'a' claims to have 1\.0 TiB"):
        read_members(FIRST + claim(MAX_MEMBER_SIZE + 1))
    with pytest.raises(BadArchive, match="claims to have"):
        read_members(FIRST + pax(record(b"size", b"%d" % (MAX_MEMBER_SIZE + 1))) + block(b"a"))


def test_a_reader_that_is_used_wrongly_says_so() -> None:
    reader = OuterTarReader()
    with pytest.raises(RuntimeError):
        reader.feed(FIRST[:100])
    with pytest.raises(RuntimeError):
        reader.content(b"x")
    reader.feed(FIRST[:BLOCK])
    with pytest.raises(RuntimeError):
        reader.feed(bytes(reader.wanted))
    with pytest.raises(RuntimeError):
        reader.skip(11)


# --- What is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (b"1", "a hard link"),
        (b"2", "a symbolic link"),
        (b"3", "a character device"),
        (b"4", "a block device"),
        (b"5", "a directory"),
        (b"6", "a named pipe"),
        (b"7", "type '7'"),
        (b"g", "a global pax header"),
        (b"K", "a GNU long link"),
        (b"L", "a GNU long name"),
        (b"M", "the continuation of another volume"),
        (b"S", "a GNU sparse file"),
        (b"V", "a GNU volume label"),
        (b"\xff", r"type '\\xff'"),
    ],
)
def test_anything_but_a_regular_file_is_refused(kind: bytes, what: str) -> None:
    with pytest.raises(BadArchive, match=f"{what}, 'x'; a Qubes backup holds regular files only") as caught:
        read_members(FIRST + block(b"x", kind=kind))
    assert "byte 1024" in caught.value.reason
    with pytest.raises(NotABackup, match=what):
        read_members(block(b"x", kind=kind))


@pytest.mark.parametrize(
    "garbage", [b"\x01" * BLOCK, b"%PDF-1.7" + bytes(504), block()[:300] + b"X" + block()[301:]]
)
def test_a_block_that_is_no_header_is_refused_with_its_place(garbage: bytes) -> None:
    with pytest.raises(BadArchive, match=r"at byte 1536, after 'backup-header'"):
        read_members(FIRST + FILLING + garbage)
    with pytest.raises(NotABackup):
        read_members(garbage)


def test_gnu_s_own_tar_format_is_refused() -> None:
    with pytest.raises(BadArchive, match="GNU"):
        read_members(FIRST + block(magic=b"ustar  \0"))


@pytest.mark.parametrize(
    "size", [b"-0000000001\0", b"\xff" * 12, b"\0" * 12, b"0000000008\0\0", b"1\0" + b"2" * 10]
)
def test_an_impossible_size_is_refused(size: bytes) -> None:
    with pytest.raises(BadArchive):
        read_members(FIRST + block(b"a", size))


@pytest.mark.parametrize(
    "after", [FILLING, pax(record(b"path", b"b")), block(b"b", kind=b"5"), b"\x01" * BLOCK], ids="0x5?"
)
def test_a_pax_header_must_be_followed_by_its_file(after: bytes) -> None:
    with pytest.raises(BadArchive):
        read_members(FIRST + pax(record(b"path", b"a")) + after + block(b"c"))


@pytest.mark.parametrize(
    "records",
    [
        b"path=x\n",
        b"99 path=x\n",
        b"8 path=x\n",
        b"11 path=x\n",
        b"010 path=x\n",
        b"+10 path=x\n",
        b"0 \n",
        b"3 =\n",
        b"5 =x\n",
        b"9 pathxx\n",
        b"10 path=xx",
        record(b"path", b"x") + b"\0",
        record(b"path", b"x") * 2,
        record(b"size", b"-1"),
        record(b"size", b""),
        record(b"size", b"01"),
        record(b"size", b"1_0"),
        record(b"size", b"9" * 400),
        record(b"size", b"\xd9\xa3"),
        record(b"GNU.sparse.major", b"1"),
        record(b"path", b"/etc/passwd"),
        record(b"path", b""),
        record(b"path", "vm10/\u00e9".encode()),
    ],
)
def test_a_malformed_pax_header_is_refused(records: bytes) -> None:
    with pytest.raises(BadArchive):
        read_members(FIRST + pax(records) + entry(b"a", b"1"))


def test_a_pax_header_is_bounded() -> None:
    fits = record(b"comment", b"x" * (65536 - 15))
    assert len(fits) == 65536
    assert len(read_members(FIRST + pax(fits) + block(b"a"))) == 2
    for size in (b"%011o\0" % 65537, b"%011o\0" % 0, b"\x80" + b"\x7f" * 11):
        reader = OuterTarReader()
        with pytest.raises(NotABackup, match=r"pax header|range"):
            reader.feed(block(b"p", size, b"x"))


def test_the_names_of_an_archive_are_checked() -> None:
    with pytest.raises(BadArchive, match="plain relative path"):
        read_members(FIRST + block(b"../x"))
    with pytest.raises(NotABackup):
        read_members(block(b"./x"))


# --- Where it may end --------------------------------------------------------------------------


def test_an_empty_file_and_a_short_file_are_told_apart() -> None:
    with pytest.raises(EmptyInput):
        read_members(b"")
    with pytest.raises(NotABackup):
        read_members(b"hello")


def test_a_file_of_zeros_is_no_backup() -> None:
    with pytest.raises(NotABackup):
        read_members(bytes(10240))


def test_every_cut_of_an_archive_is_noticed_unless_it_falls_between_members() -> None:
    stream = pax(record(b"path", b"a")) + entry(b"x", b"1" * 600) + FILLING * 2 + entry(b"b", b"2") + FILLING
    between = {
        2560,
        3072,
        3584,
        4608,
        5120,
    }  # after a's last block, and after each block from there but b's own
    for cut in range(len(stream) + 1):
        expected: type[RestoreError] | None = ArchiveTruncated
        if cut < BLOCK:
            expected = NotABackup if cut else EmptyInput
        elif cut in between:
            expected = None
        if expected is None:
            read_members(stream[:cut])
            continue
        with pytest.raises(expected):
            read_members(stream[:cut])


def test_a_truncation_names_the_member_and_the_place() -> None:
    with pytest.raises(ArchiveTruncated, match=r"in the middle of 'vm10/private.img', at byte 1636"):
        read_members(FIRST + entry(b"vm10/private.img", b"x" * 300)[:612])
    with pytest.raises(ArchiveTruncated, match=r"in the middle of 'vm10/private.img', at byte 2047"):
        read_members(FIRST + entry(b"vm10/private.img", b"x" * 300)[:1023])
    with pytest.raises(ArchiveTruncated, match=r"in the middle of a header, at byte 1124"):
        read_members(FIRST + FILLING[:100])


# --- Anything at all ---------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=2000), st.booleans())
def test_random_bytes_are_refused_in_an_orderly_way(garbage: bytes, after_a_member: bool) -> None:
    try:
        read_members((FIRST if after_a_member else b"") + garbage)
    except RestoreError as error:
        assert str(error).isprintable()


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=110).map(lambda name: name[:100]),
    st.binary(min_size=12, max_size=12) | st.sampled_from([b"%011o\0" % 30]),
    st.sampled_from([b"0", b"x", b"\0", b"g", b"S"]) | st.binary(min_size=1, max_size=1),
    st.binary(max_size=600),
)
def test_random_fields_under_a_right_checksum_are_refused_in_an_orderly_way(
    name: bytes, size: bytes, kind: bytes, rest: bytes
) -> None:
    try:
        read_members(FIRST + block(name, size, kind) + rest)
    except RestoreError as error:
        assert str(error).isprintable()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=1500), min_size=1, max_size=4), st.integers(1, 2000))
def test_any_contents_in_any_pieces_come_back(contents: list[bytes], piece: int) -> None:
    members = [(f"vm{number}/file", content) for number, content in enumerate(contents)]
    assert read_members(stock_archive(members), piece) == members


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=5))
def test_changed_bytes_are_refused_in_an_orderly_way_or_change_no_structure(
    changes: list[tuple[int, int]],
) -> None:
    stream = bytearray(stock_archive(STOCK_MEMBERS[:2]))
    for position, value in changes:
        stream[position % 4096] = value
    try:
        read_members(bytes(stream))
    except RestoreError as error:
        assert str(error).isprintable()


# --- Recorded backups --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gzip", "bzip2", "xz", "zstd", "none", "sparse-map"])
def test_recorded_backups_hold_what_another_reader_finds(name: str) -> None:
    path = shared_fixture(f"{name}.qbackup")
    with tarfile.open(path, ignore_zeros=True) as archive:
        expected = []
        for info in archive:
            content = archive.extractfile(info)
            assert content is not None
            expected.append((info.name, content.read()))
    assert read_members(path.read_bytes()) == expected
    assert len(expected) > 3
