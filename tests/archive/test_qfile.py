"""The outer archive as a stream from a storage VM: what is read, refused, and answered."""

import io
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_restore_svc.archive.members import MAX_MEMBER_SIZE, MAX_NAME_SIZE, Member
from qubes_restore_svc.archive.outer_tar import OuterTarReader
from qubes_restore_svc.archive.qfile import QfileReader
from qubes_restore_svc.errors import ArchiveTruncated, BadArchive, EmptyInput, RestoreError
from tests.support.fixtures import shared_fixture

FILE, DIRECTORY, LINK = 0o100644, 0o040755, 0o120777
END = bytes(32)


def header(name_size: int, mode: int = FILE, size: int = 0) -> bytes:
    return struct.pack("<IIQIIII", name_size, mode, size, 1795417891, 0, 1795417891, 0)


def entry(name: bytes, content: bytes = b"", mode: int = FILE) -> bytes:
    return header(len(name) + 1, mode, len(content)) + name + b"\0" + content


def read_members(stream: bytes, piece: int = 1 << 16) -> tuple[list[tuple[str, bytes]], bytes]:
    """Every member and its content, read by the protocol; and the answer."""
    reader, source = QfileReader(), io.BytesIO(stream)
    members: list[tuple[str, bytes]] = []
    while reader.wanted:
        data = source.read(reader.wanted)
        if len(data) < reader.wanted:
            reader.eof(data)
            pytest.fail("an end in the middle was accepted")
        member = reader.feed(data)
        if member is None:
            continue
        content = source.read(member.size)
        for start in range(0, len(content), piece):
            reader.content(memoryview(content)[start : start + piece])
        members.append((member.name, content))
        if reader.content_left:
            reader.eof()
            pytest.fail("an end in the middle of a content was accepted")
    reader.eof()
    assert source.read() == b""
    return members, reader.answer()


STREAM = (
    entry(b"backup-header", b"version=4\n")
    + entry(b"vm10", mode=DIRECTORY)
    + entry(b"vm10/private.img.000.enc", b"x" * 1000)
    + entry(b"vm10/empty.000.enc")
    + END
)


@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
def test_members_come_in_order_and_directories_are_dropped(piece: int) -> None:
    members, _ = read_members(STREAM, piece)
    assert members == [
        ("backup-header", b"version=4\n"),
        ("vm10/private.img.000.enc", b"x" * 1000),
        ("vm10/empty.000.enc", b""),
    ]


def test_the_answer_is_the_checksum_of_every_byte() -> None:
    _, answer = read_members(STREAM)
    assert answer == struct.pack("<IIQI", 0, 0, zlib.crc32(STREAM), 0)
    assert len(answer) == 20


def test_there_is_no_answer_before_the_end() -> None:
    with pytest.raises(RuntimeError):
        QfileReader().answer()


def test_content_cannot_be_skipped_unseen() -> None:
    reader = QfileReader()
    reader.feed(header(2, size=5))
    assert reader.feed(b"a\0") == Member("a", 5)
    assert reader.skip(5) is False
    assert reader.content_left == 5


def test_a_reader_that_is_used_wrongly_says_so() -> None:
    reader = QfileReader()
    with pytest.raises(RuntimeError):
        reader.feed(END[:31])
    with pytest.raises(RuntimeError):
        reader.content(b"x")
    reader.feed(header(2, size=5))
    reader.feed(b"a\0")
    with pytest.raises(RuntimeError):
        reader.feed(END)
    with pytest.raises(RuntimeError):
        reader.content(b"123456")


@pytest.mark.parametrize("mode", [LINK, 0o020600, 0o060600, 0o010600, 0o140600, 0, 0o644, 0xFFFFFFFF])
def test_anything_but_files_and_directories_is_refused(mode: int) -> None:
    with pytest.raises(BadArchive, match="regular files only"):
        read_members(entry(b"x", b"target", mode) + END)


def test_a_directory_with_content_is_refused() -> None:
    with pytest.raises(BadArchive, match="directory 'vm10'"):
        read_members(entry(b"vm10", b"1", DIRECTORY) + END)


@pytest.mark.parametrize("size", [MAX_MEMBER_SIZE + 1, 1 << 63, (1 << 64) - 1])
def test_a_size_past_the_ceiling_is_refused(size: int) -> None:
    with pytest.raises(BadArchive, match="claims to have"):
        read_members(header(2, size=size) + b"a\0")


@pytest.mark.parametrize("name_size", [1, MAX_NAME_SIZE + 2, 0xFFFFFFFF])
def test_a_name_size_out_of_bounds_is_refused_before_the_name_is_read(name_size: int) -> None:
    with pytest.raises(BadArchive, match="name of"):
        QfileReader().feed(header(name_size))


@pytest.mark.parametrize(
    "name", [b"ab", b"a\0b\0", b"\0\0", b"../a\0", b"/a\0", b"a/\0", b"a\n\0", b"\xc3\xa9\0"]
)
def test_an_unclean_name_is_refused(name: bytes) -> None:
    reader = QfileReader()
    reader.feed(header(len(name)))
    with pytest.raises(BadArchive):
        reader.feed(name)


def test_the_name_of_a_directory_is_checked_too() -> None:
    with pytest.raises(BadArchive):
        read_members(entry(b"../vm10", mode=DIRECTORY) + END)


def test_the_longest_name_is_read() -> None:
    assert read_members(entry(b"a" * MAX_NAME_SIZE) + END)[0] == [("a" * MAX_NAME_SIZE, b"")]


@pytest.mark.parametrize("end", [header(0, 0, 1), header(0, FILE, 0)])
def test_an_end_mark_that_claims_to_be_something_is_refused(end: bytes) -> None:
    with pytest.raises(BadArchive, match="end mark"):
        read_members(entry(b"a") + end)


def test_a_stream_without_a_byte_is_empty() -> None:
    with pytest.raises(EmptyInput):
        read_members(b"")


def test_every_cut_of_a_stream_is_noticed() -> None:
    for cut in range(1, len(STREAM)):
        with pytest.raises(ArchiveTruncated):
            read_members(STREAM[:cut])


def test_a_truncation_names_the_member_and_the_place() -> None:
    with pytest.raises(ArchiveTruncated, match="in the middle of 'a', at byte 36"):
        read_members(entry(b"a", b"12345")[:36])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_refused_in_an_orderly_way(garbage: bytes, after_a_member: bool) -> None:
    reader, source = QfileReader(), io.BytesIO((entry(b"a", b"1") if after_a_member else b"") + garbage)
    try:
        while reader.wanted:
            data = source.read(reader.wanted)
            if len(data) < reader.wanted:
                reader.eof(data)
            elif (member := reader.feed(data)) is not None:
                content = source.read(member.size)
                reader.content(content)
                if len(content) < member.size:
                    reader.eof()
    except RestoreError as error:
        assert str(error).isprintable()


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 40),
    st.sampled_from([FILE, DIRECTORY, LINK]) | st.integers(0, 0xFFFFFFFF),
    st.integers(0, 40) | st.integers(0, (1 << 64) - 1),
    st.binary(max_size=80),
)
def test_random_fields_are_refused_in_an_orderly_way(
    name_size: int, mode: int, size: int, rest: bytes
) -> None:
    with pytest.raises(RestoreError) as caught:
        read_members(header(name_size, mode, size) + rest + b"\xff" * 40)
    assert str(caught.value).isprintable()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(STREAM) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_shows_in_the_answer(position: int, change: int) -> None:
    changed = bytearray(STREAM)
    changed[position] ^= change
    try:
        _, answer = read_members(bytes(changed))
    except RestoreError as error:
        assert str(error).isprintable()
    else:
        assert answer != struct.pack("<IIQI", 0, 0, zlib.crc32(STREAM), 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=500), max_size=4), st.integers(1, 600))
def test_any_contents_in_any_pieces_come_back(contents: list[bytes], piece: int) -> None:
    members = [(f"vm{number}/file", content) for number, content in enumerate(contents)]
    stream = b"".join(entry(name.encode(), content) for name, content in members) + END
    assert read_members(stream, piece) == (members, struct.pack("<IIQI", 0, 0, zlib.crc32(stream), 0))


@pytest.mark.parametrize("name", ["gzip.manifest.qfile", "gzip.vm11.qfile"])
def test_recorded_streams_hold_what_the_backup_in_a_file_holds(name: str) -> None:
    backup = shared_fixture("gzip.qbackup").read_bytes()
    in_file, position, reader = {}, 0, OuterTarReader()
    while position < len(backup):
        size = reader.wanted
        member = reader.feed(backup[position : position + size])
        position += size
        if member is not None:
            in_file[member.name] = backup[position : position + member.size]
            reader.skip(member.size)
            position += member.size
    recorded = shared_fixture(name).read_bytes()
    members, answer = read_members(recorded)
    assert len(members) == 3
    assert all(in_file[member] == content for member, content in members)
    assert answer[8:16] == struct.pack("<Q", zlib.crc32(recorded))
