"""Inner archives: built by hand, by tarfile and by GNU tar; damaged, cut, and made to attack."""

import contextlib
import hashlib
import io
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_restore_svc.archive.inner_tar import (
    IMAGE_BLOCK,
    MAX_EXTENT,
    MAX_IMAGE_SIZE,
    Extent,
    read_directory,
    read_image,
    read_small_file,
    without_zeros,
)
from qubes_restore_svc.errors import BadImage, BadMetadata, BadSparseMap, ImageTooLarge, RestoreError

NAME = "vm10/private.img"
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
CLOSING = bytes(1024)
Entries = Sequence[tuple[int, int]]


# --- Writing archives --------------------------------------------------------------------------------


def pattern(size: int, start: int = 0) -> bytes:
    """`size` bytes in which no place looks like another, and none is zero."""
    return bytes((start + number) % 251 + 1 for number in range(size))


def number_field(value: int) -> bytes:
    return b"%011o\x00" % value if value < 8**11 else b"\x80" + value.to_bytes(11, "big")


def with_checksum(block: bytes) -> bytes:
    return block[:148] + b"%06o\x00 " % (sum(block) - sum(block[148:156]) + 256) + block[156:]


def header(name: str = NAME, size: int = 0, type_flag: bytes = b"0", *, gnu_part: bytes = b"") -> bytes:
    block = name.encode().ljust(100, b"\x00") + b"0000600\x00" + b"0000000\x00" * 2
    block += number_field(size) + number_field(1) + bytes(8) + type_flag + bytes(100)
    block += (b"ustar  \x00" if gnu_part else b"ustar\x0000") + bytes(80)
    block += bytes(41) + gnu_part if gnu_part else b""
    return with_checksum(block.ljust(512, b"\x00"))


def pax_header(records: dict[str, str]) -> bytes:
    data = b""
    for key, value in records.items():
        body = f" {key}={value}\n".encode()
        length = len(body) + len(str(len(body)))
        length = len(body) + len(str(length))
        data += str(length).encode() + body
    return header("./PaxHeaders/x", len(data), b"x") + data + bytes(-len(data) % 512)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def plain_tar(data: bytes, name: str = NAME) -> bytes:
    return header(name, len(data)) + padded(data) + CLOSING


def gnu_tar(image_size: int, entries: Entries, data: bytes, name: str = NAME) -> bytes:
    fields = [number_field(offset) + number_field(length) for offset, length in entries]
    more = len(fields) > 4
    gnu_part = b"".join(fields[:4]).ljust(96, b"\x00") + bytes([more]) + number_field(image_size)
    archive = header(name, sum(length for _, length in entries), b"S", gnu_part=gnu_part)
    for start in range(4, len(fields), 21):
        block = b"".join(fields[start : start + 21]).ljust(504, b"\x00")
        archive += (block + bytes([start + 21 < len(fields)])).ljust(512, b"\x00")
    return archive + padded(data) + CLOSING


def sparse_records(image_size: int, name: str = NAME) -> dict[str, str]:
    return {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": name,
        "GNU.sparse.realsize": str(image_size),
    }


def pax_tar(
    image_size: int,
    entries: Entries,
    data: bytes,
    records: dict[str, str] | None = None,
    *,
    pad: bool = False,
) -> bytes:
    text = f"{len(entries)}\n" + "".join(f"{offset}\n{length}\n" for offset, length in entries)
    content = padded(text.encode()) + data
    archive = pax_header(sparse_records(image_size) if records is None else records)
    archive += header("vm10/GNUSparseFile.4242/private.img", len(content))
    return archive + (padded(content) if pad else content) + CLOSING


# --- Reading them ------------------------------------------------------------------------------------


def cut(data: bytes, size: int = MIB) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def content(blocks: Iterable[bytes], max_size: int = 64 * MIB, name: str = NAME) -> bytes:
    """The whole image, while the promises about extents are checked."""
    image = read_image(blocks, name, max_size)
    whole = bytearray(image.size)
    end = 0
    for extent in image.extents:
        assert 1 <= len(extent.data) <= MAX_EXTENT
        assert end <= extent.offset
        end = extent.offset + len(extent.data)
        assert end <= image.size
        whole[extent.offset : end] = extent.data
    return bytes(whole)


def expected(image_size: int, entries: Entries, data: bytes) -> bytes:
    whole = bytearray(image_size)
    for offset, length in entries:
        whole[offset : offset + length], data = data[:length], data[length:]
    return bytes(whole)


ENTRIES = [(0, 512), (4096, 1024), (100 * KIB, 5120), (200 * KIB, 512), (250 * KIB, 2048), (300 * KIB, 0)]
DATA = pattern(512 + 1024 + 5120 + 512 + 2048)
SIZE = 300 * KIB
IMAGE = expected(SIZE, ENTRIES, DATA)
ARCHIVES = {
    "plain": plain_tar(IMAGE[:5000]),
    "gnu": gnu_tar(SIZE, ENTRIES, DATA),
    "pax": pax_tar(SIZE, ENTRIES, DATA),
}
IMAGES = {"plain": IMAGE[:5000], "gnu": IMAGE, "pax": IMAGE}


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("block_size", [1, 7, 511, 512, 513, 10_000, MIB])
def test_every_kind_of_archive_gives_its_image_however_it_is_cut(kind: str, block_size: int) -> None:
    assert content(cut(ARCHIVES[kind], block_size)) == IMAGES[kind]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 3 * MIB + 5])
def test_what_tarfile_writes_is_read(form: int, size: int) -> None:
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        info = tarfile.TarInfo(NAME)
        info.size = size
        info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1
        archive.addfile(info, io.BytesIO(data))
    assert content(cut(stream.getvalue())) == data


def test_the_old_spelling_of_a_regular_file_is_read() -> None:
    assert content([header(size=3, type_flag=b"\x00") + padded(b"abc") + CLOSING]) == b"abc"


@pytest.mark.parametrize(
    ("image_size", "entries"),
    [
        (0, [(0, 0)]),
        (5 * KIB, [(5 * KIB, 0)]),
        (700, [(0, 700)]),
        (5 * KIB + 3, [(0, 512), (5 * KIB, 3)]),
        (5 * KIB + 3, [(0, 512), (5 * KIB, 3), (5 * KIB + 3, 0)]),
        (KIB * 1024, [(number * 2048, 512) for number in range(500)] + [(MIB, 0)]),
    ],
)
def test_sparse_images_of_many_shapes_are_read(image_size: int, entries: Entries) -> None:
    data = pattern(sum(length for _, length in entries))
    whole = expected(image_size, entries, data)
    assert content(cut(gnu_tar(image_size, entries, data), 1000)) == whole
    assert content(cut(pax_tar(image_size, entries, data), 1000)) == whole
    assert content(cut(pax_tar(image_size, entries, data, pad=True), 1000)) == whole


def test_data_is_not_copied() -> None:
    archive = plain_tar(pattern(100 * KIB) * 30)
    blocks = list(cut(archive))
    extents = list(read_image(blocks, NAME, 64 * MIB).extents)
    # One extent for each block: none is joined, none is cut without need.
    assert [len(extent.data) for extent in extents] == [MIB - 512, MIB, 3000 * KIB + 512 - 2 * MIB]
    assert [extent.data.obj for extent in extents] == blocks


def test_extents_are_1_mib_at_most_whatever_the_blocks() -> None:
    data = pattern(1000) * 5000
    assert content([plain_tar(data)]) == data


@pytest.mark.parametrize("size", [9 * GIB, 3 * TIB, MAX_IMAGE_SIZE])
def test_sizes_past_8_gib_are_read(size: int) -> None:
    entries = [(0, 512), (size - 1024, 512), (size, 0)]
    data = pattern(1024)
    for archive in (gnu_tar(size, entries, data), pax_tar(size, entries, data)):
        image = read_image([archive], NAME, size)
        assert image.size == size
        assert [(extent.offset, bytes(extent.data)) for extent in image.extents] == [
            (0, data[:512]),
            (size - 1024, data[512:]),
        ]


def test_stored_sizes_past_8_gib_are_read() -> None:
    for head in (header(size=9 * GIB), pax_header({"size": str(9 * GIB)}) + header(size=0)):
        blocks = iter([head, *[pattern(MIB)] * 3])
        image = read_image(blocks, NAME, TIB)
        assert image.size == 9 * GIB
        with pytest.raises(BadImage, match="ends early"):
            list(image.extents)


def test_a_pax_path_counts_more_than_the_header_name() -> None:
    archive = pax_header({"path": NAME, "mtime": "1.5"}) + header("x", 3) + padded(b"abc") + CLOSING
    assert content([archive]) == b"abc"
    archive = pax_header({"path": "vm10/root.img"}) + header(NAME, 3) + padded(b"abc") + CLOSING
    with pytest.raises(BadImage, match=r"root\.img"):
        content([archive])


def test_zeros_up_to_the_record_size_of_gnu_tar_may_close_the_archive() -> None:
    assert content([ARCHIVES["gnu"] + bytes(9 * KIB)]) == IMAGE
    assert content([ARCHIVES["gnu"], *[bytes(64 * KIB)] * 16]) == IMAGE


# --- Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["vm10/root.img", "vm10/private.img2", "/vm10/private.img", "private.img", "x\x1b[2J"]
)
def test_another_name_is_refused(name: str) -> None:
    records = sparse_records(SIZE, name)
    for archive in (
        plain_tar(b"", name),
        gnu_tar(SIZE, ENTRIES, DATA, name),
        pax_tar(SIZE, ENTRIES, DATA, records),
    ):
        with pytest.raises(BadImage, match="instead of") as caught:
            content([archive])
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("type_flag", [bytes([flag]) for flag in b"123456789ABDKLMNVXg \xffs"])
def test_everything_but_a_file_is_refused(type_flag: bytes) -> None:
    with pytest.raises(BadImage):
        content([header(type_flag=type_flag) + CLOSING])


def test_a_second_pax_header_is_refused() -> None:
    with pytest.raises(BadImage, match="other than a file"):
        content([pax_header({"path": NAME}) + ARCHIVES["pax"]])


def test_a_gnu_sparse_file_after_pax_records_is_refused() -> None:
    with pytest.raises(BadImage, match="other than a file"):
        content([pax_header({"mtime": "1"}) + ARCHIVES["gnu"]])


def test_a_gnu_sparse_file_in_a_posix_header_is_refused() -> None:
    archive = bytearray(ARCHIVES["gnu"])
    archive[257:265] = b"ustar\x0000"
    archive[345:386] = bytes(41)
    archive[386:500] = bytes(114)
    archive[:512] = with_checksum(bytes(archive[:512]))
    with pytest.raises(BadSparseMap, match="GNU format"):
        content([bytes(archive)])


@pytest.mark.parametrize(
    "change",
    [
        {"GNU.sparse.major": "0"},
        {"GNU.sparse.major": "2"},
        {"GNU.sparse.minor": "1"},
        {"GNU.sparse.minor": ""},
        {"GNU.sparse.map": "0,512"},
        {"GNU.sparse.numblocks": "1"},
        {"GNU.sparse.size": "307200"},
        {"GNU.sparse.realsize": "-1"},
        {"GNU.sparse.realsize": "0x10"},
        {"GNU.sparse.realsize": "1" * 20},
        {"GNU.sparse.realsize": ""},
        {"GNU.sparse.realsize": "1e9"},
        {"size": "-512"},
        {"size": "9" * 30},
        {"size": "5 "},
    ],
)
def test_sparse_records_of_another_kind_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(BadImage):
        content([pax_tar(SIZE, ENTRIES, DATA, sparse_records(SIZE) | change)])


@pytest.mark.parametrize("missing", sparse_records(0))
def test_incomplete_sparse_records_are_refused(missing: str) -> None:
    records = sparse_records(SIZE)
    del records[missing]
    with pytest.raises(BadImage):
        content([pax_tar(SIZE, ENTRIES, DATA, records)])


def test_a_pax_header_of_excessive_size_is_refused_before_it_is_read() -> None:
    def blocks() -> Iterator[bytes]:
        yield header("x", 65 * KIB, b"x")
        raise AssertionError("read on")

    with pytest.raises(BadImage, match="66560"):
        read_image(blocks(), NAME, MIB)


@pytest.mark.parametrize("size", [SIZE - 1, 0])
def test_an_image_larger_than_allowed_is_refused(size: int) -> None:
    for kind in ("gnu", "pax"):
        with pytest.raises(ImageTooLarge, match="300 KiB"):
            read_image([ARCHIVES[kind]], NAME, size)
    with pytest.raises(ImageTooLarge):
        read_image([ARCHIVES["plain"]], NAME, min(size, 4999))


@pytest.mark.parametrize("size", [MAX_IMAGE_SIZE + 1, 1 << 62, (1 << 63) - 1])
def test_no_image_passes_the_ceiling_whatever_is_allowed(size: int) -> None:
    for archive in (header(size=size), gnu_tar(size, ENTRIES, DATA), pax_tar(size, ENTRIES, DATA)):
        with pytest.raises(ImageTooLarge, match="any volume") as caught:
            read_image([archive], NAME, 1 << 70)
        assert "--ignore-size-limit" not in str(caught.value)


@pytest.mark.parametrize(
    "entries",
    [
        [(0, 1024), (512, 512)],
        [(4096, 512), (0, 512)],
        [(SIZE - 512, 1024)],
        [(SIZE, 512)],
        [(1 << 62, 512)],
        [(0, 700), (1024, 512)],
        [(0, 512), (512, 0)],
    ],
)
def test_a_map_that_makes_no_sense_is_refused_before_any_data(entries: Entries) -> None:
    data = pattern(sum(length for _, length in entries))
    for archive in (gnu_tar(SIZE, entries, data), pax_tar(SIZE, entries, data)):
        with pytest.raises(BadSparseMap):
            read_image([archive], NAME, MIB)


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("block_size", [512, 1 << 20])
def test_every_truncation_is_refused(kind: str, block_size: int) -> None:
    archive = ARCHIVES[kind]
    for size in [
        *range(0, 1500, 13),
        *range(1500, len(archive) - 1024, 113),
        *range(len(archive) - 1024, len(archive)),
    ]:
        with pytest.raises((BadImage, BadSparseMap)):
            content(cut(archive[:size], block_size))


@pytest.mark.parametrize("lost", [1, 300, 323, 324, 1023, 1024, 1348])
def test_padding_does_not_count_as_a_closing_block(lost: int) -> None:
    for archive in (plain_tar(pattern(700)), gnu_tar(700, [(0, 700)], pattern(700))):
        with pytest.raises(BadImage, match="closing blocks are missing"):
            content([archive[:-lost]])


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize(
    "rest",
    [b"\x01", b"\x00\x01", bytes(512) + b"x", plain_tar(b"second", "vm10/root.img"), ARCHIVES["plain"]],
)
def test_anything_after_the_file_is_refused(kind: str, rest: bytes) -> None:
    with pytest.raises(BadImage, match="after its file"):
        content([ARCHIVES[kind], rest])
    with pytest.raises(BadImage, match="after its file"):
        content(cut(ARCHIVES[kind] + rest, 100))


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_second_member_in_place_of_the_closing_blocks_is_refused(kind: str) -> None:
    with pytest.raises(BadImage, match="after its file"):
        content([ARCHIVES[kind][:-1024] + ARCHIVES["plain"]])


def test_zeros_without_end_are_refused() -> None:
    def blocks() -> Iterator[bytes]:
        yield ARCHIVES["gnu"]
        for _ in range(3):
            yield bytes(MIB)
        raise AssertionError("read on")

    with pytest.raises(BadImage, match="does not end"):
        content(blocks())


def test_padding_that_is_not_zero_is_refused() -> None:
    archive = bytearray(plain_tar(b"abc"))
    archive[512 + 3] = 1
    with pytest.raises(BadImage):
        content([bytes(archive)])
    archive = bytearray(ARCHIVES["pax"])
    archive[1023] = 1
    with pytest.raises(BadImage, match="padding"):
        content([bytes(archive)])


def test_an_archive_of_zeros_is_empty() -> None:
    with pytest.raises(BadImage, match="empty"):
        content([bytes(10 * KIB)])


def test_what_the_source_raises_passes_through() -> None:
    def blocks() -> Iterator[bytes]:
        yield ARCHIVES["plain"][:2000]
        raise ValueError("of the source")

    image = read_image(blocks(), NAME, MIB)
    with pytest.raises(ValueError, match="of the source"):
        list(image.extents)


def test_nothing_is_read_before_it_is_asked_for() -> None:
    taken: list[int] = []

    def blocks() -> Iterator[bytes]:
        for number, block in enumerate(cut(plain_tar(bytes(10 * MIB)))):
            taken.append(number)
            yield block

    image = read_image(blocks(), NAME, TIB)
    assert taken == [0]
    next(image.extents)
    next(image.extents)
    assert taken == [0, 1]


def test_memory_does_not_grow_with_the_image() -> None:
    block = bytes(MIB)
    tracemalloc.start()
    try:
        image = read_image(iter([header(size=4 * GIB), *[block] * 4096, CLOSING]), NAME, TIB)
        assert sum(len(extent.data) for extent in image.extents) == 4 * GIB
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MIB


# --- Small files -------------------------------------------------------------------------------------


def test_a_small_file_is_read_from_every_kind_of_archive() -> None:
    for kind, archive in ARCHIVES.items():
        assert read_small_file(cut(archive, 999), NAME, SIZE) == IMAGES[kind]


def test_a_small_file_past_its_limit_is_refused_when_its_header_has_been_read() -> None:
    def blocks() -> Iterator[bytes]:
        yield header("qubes.xml", 4097)
        raise AssertionError("read on")

    with pytest.raises(BadMetadata, match=r"4\.0 KiB are allowed"):
        read_small_file(blocks(), "qubes.xml", 4096)
    assert read_small_file([plain_tar(b"x" * 4096, "qubes.xml")], "qubes.xml", 4096) == b"x" * 4096


@pytest.mark.parametrize(
    "archive", [b"", CLOSING, ARCHIVES["gnu"][:-1], plain_tar(b"", "other"), gnu_tar(5, [(3, 9)], b"x" * 9)]
)
def test_a_malformed_small_file_is_bad_metadata(archive: bytes) -> None:
    with pytest.raises(BadMetadata, match="cannot be read"):
        read_small_file([archive], NAME, MIB)


# --- Real writers ------------------------------------------------------------------------------------


@pytest.fixture
def sparse_file(tmp_path: Path) -> Path:
    """A file of 9 GiB and 777 bytes with 300 pieces of data in it."""
    path = tmp_path / NAME
    path.parent.mkdir()
    with path.open("wb") as stream:
        for number in range(300):
            stream.seek(number * 30 * MIB)
            stream.write(pattern(4096 * (number % 3 + 1), number))
        stream.truncate(9 * GIB + 777)
        stream.seek(9 * GIB + 700)
        stream.write(b"the end")
    return path


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_what_gnu_tar_writes_is_read(form: str, sparse_file: Path) -> None:
    tar = shutil.which("tar")
    if tar is None or b"GNU tar" not in subprocess.run([tar, "--version"], capture_output=True).stdout:
        pytest.skip("GNU tar is not installed")
    command = [tar, "-Pc", "--sparse", f"--format={form}", "-C", str(sparse_file.parents[1]), NAME]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    if len(archive) > GIB:
        pytest.skip("this file system has no sparse files")
    image = read_image(cut(archive), NAME, TIB)
    assert image.size == 9 * GIB + 777
    covered = 0
    with sparse_file.open("rb") as stream:
        for extent in image.extents:
            stream.seek(extent.offset)
            assert stream.read(len(extent.data)) == extent.data
            covered += len(extent.data)
    # No less than what was written; tar found the rest to be holes.
    assert sum(4096 * (number % 3 + 1) for number in range(300)) + 7 <= covered < 100 * MIB


def test_a_dense_file_from_gnu_tar_is_read(tmp_path: Path) -> None:
    tar = shutil.which("tar")
    if tar is None:
        pytest.skip("tar is not installed")
    (tmp_path / "vm10").mkdir()
    data = pattern(251) * 9001
    (tmp_path / NAME).write_bytes(data)
    archive = subprocess.run(
        [tar, "-Pc", "--sparse", "-C", str(tmp_path), NAME], capture_output=True, check=True
    ).stdout
    assert hashlib.sha256(content(cut(archive))).digest() == hashlib.sha256(data).digest()


# --- Damage ------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(ARCHIVES)), st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_archive_gives_an_image_or_one_of_our_errors(kind: str, data: st.DataObject) -> None:
    archive = bytearray(ARCHIVES[kind])
    start_of_data = {"plain": 512, "gnu": 1024, "pax": 2048}[kind]
    first = data.draw(st.integers(0, start_of_data - 1))
    noise = data.draw(st.binary(min_size=1, max_size=30))
    archive[first : first + len(noise)] = noise
    if data.draw(st.booleans()):
        for start in {"plain": [0], "gnu": [0], "pax": [0, 1024]}[kind]:
            archive[start : start + 512] = with_checksum(bytes(archive[start : start + 512]))
    with contextlib.suppress(RestoreError):
        content(cut(bytes(archive), 600))


@pytest.mark.parametrize("kind", ARCHIVES)
def test_no_changed_byte_of_a_header_changes_the_image(kind: str) -> None:
    headers = {"plain": [0], "gnu": [0], "pax": [0, 1024]}[kind]
    for start in headers:
        for position in range(start, start + 512):
            archive = bytearray(ARCHIVES[kind])
            archive[position] ^= 0x11
            try:
                assert content([bytes(archive)]) == IMAGES[kind]
            except RestoreError:
                continue


@given(st.binary(max_size=1200))
@settings(deadline=None)
def test_random_bytes_raise_nothing_but_our_errors(noise: bytes) -> None:
    for start in (b"", header(size=100), pax_header(sparse_records(SIZE)) + header("x", 700)):
        with pytest.raises(RestoreError):
            content([start + noise])


# --- A whole directory, in backups of format 3 ---------------------------------------------------------

DIRECTORY = "vm-templates/fedora-23"


def directory_tar(tmp_path: Path, files: dict[str, bytes]) -> bytes:
    """What Qubes R3 wrote: GNU tar over the directory, with its names changed."""
    folder = tmp_path / "template"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "icon.png").symlink_to("/usr/share/icons/template.png")
    with open(folder / "root.img", "r+b") as image:
        image.truncate(3 * MIB)
    command = ["tar", "-Pc", "--sparse", "-C", str(folder), f"--xform=s:^\\.:{DIRECTORY}/.:", "."]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout


def read_all(archive: bytes, piece: int = 1000) -> dict[str, bytes]:
    found = {}
    pieces = (archive[start : start + piece] for start in range(0, len(archive), piece))
    for name, image in read_directory(pieces, DIRECTORY):
        content = bytearray(image.size)
        for extent in image.extents:
            content[extent.offset : extent.offset + len(extent.data)] = extent.data
        found[name] = bytes(content)
    return found


FILES = {
    "root.img": bytes(MIB) + pattern(5000) + bytes(MIB),
    "private.img": pattern(700),
    "firewall.xml": b"<x/>",
    "empty": b"",
    "apps.templates/" + "a" * 120 + ".desktop": b"[Desktop Entry]",
}


def test_the_files_right_in_a_directory_come_back(tmp_path: Path) -> None:
    found = read_all(directory_tar(tmp_path, FILES))
    expected = {name: content for name, content in FILES.items() if "/" not in name}
    expected["root.img"] = expected["root.img"].ljust(3 * MIB, b"\0")
    assert found == expected


def test_files_of_a_directory_that_nobody_reads_are_passed_over(tmp_path: Path) -> None:
    archive = directory_tar(tmp_path, FILES)
    assert {name for name, _ in read_directory([archive], DIRECTORY)} == {
        name for name in FILES if "/" not in name
    }


@pytest.mark.parametrize("kept", range(0, 10240, 512))
def test_a_directory_that_was_cut_is_an_error(kept: int) -> None:
    archive = header(f"{DIRECTORY}/./", 0, b"5") + header(f"{DIRECTORY}/./root.img", 8192)
    archive += pattern(8192) + CLOSING
    assert len(archive) == 10240
    with pytest.raises(BadImage):
        read_all(archive[:kept])


@pytest.mark.parametrize(
    "members",
    [
        header("vm-templates/other/./root.img"),
        header(f"{DIRECTORY}/root.img"),
        header("../root.img"),
        header("/etc/passwd"),
        header(f"{DIRECTORY}/./root.img") * 2,
        header(f"{DIRECTORY}/./sda", 0, b"4"),
        header(f"{DIRECTORY}/./tty", 0, b"3"),
        header(f"{DIRECTORY}/./more", 0, b"M"),
        header("././@LongLink", 5000, b"L") + f"{DIRECTORY}/./x".encode().ljust(5120, b"\0") + header("x"),
        b"".join(header(f"{DIRECTORY}/./{number}") for number in range(1001)),
        header("././@LongLink", 5, b"L") + padded(b"abcd\0"),
        header(f"{DIRECTORY}/./root.img", 1 << 50),
        header(f"{DIRECTORY}/./root.img", 100) + pattern(512),
        pattern(512),
        header("./PaxHeaders/x", 10, b"x") + padded(b"10 path=x\n"),
    ],
)
def test_a_directory_with_what_no_template_holds_is_refused(members: bytes) -> None:
    archive = header(f"{DIRECTORY}/./", 0, b"5") + members + CLOSING
    with pytest.raises(RestoreError):
        read_all(archive)


def test_links_of_a_directory_are_no_files_of_it() -> None:
    archive = b"".join(
        header(f"{DIRECTORY}/./root.img", 0, type_flag) for type_flag in (b"1", b"2", b"5", b"6")
    )
    assert read_all(archive + CLOSING) == {}


def test_what_follows_the_end_of_a_directory_is_refused() -> None:
    with pytest.raises(BadImage, match="after its file"):
        read_all(CLOSING + header(f"{DIRECTORY}/./root.img"))


#: Pieces of which images are made: zeros and data, whole blocks and parts of them.
_PIECES = st.tuples(
    st.booleans(),
    st.sampled_from([1, 511, 512, IMAGE_BLOCK - 1, IMAGE_BLOCK, IMAGE_BLOCK + 1, 3 * IMAGE_BLOCK]),
)


def image_of(extents: list[Extent], size: int) -> bytes:
    image = bytearray(size)
    for extent in extents:
        image[extent.offset : extent.offset + len(extent.data)] = extent.data
    return bytes(image)


@given(
    st.lists(_PIECES, min_size=1, max_size=12),
    st.sampled_from([0, 1, 512, IMAGE_BLOCK - 1, IMAGE_BLOCK, 7 * IMAGE_BLOCK + 3]),
)
def test_the_image_stays_what_it_was_and_no_block_of_zeros_is_left(
    pieces: list[tuple[bool, int]], offset: int
) -> None:
    data = b"".join(bytes(length) if zero else b"x" * length for zero, length in pieces)
    kept = list(without_zeros([Extent(offset, memoryview(data))]))
    assert image_of(kept, offset + len(data)) == bytes(offset) + data
    position = offset
    for extent in kept:
        assert extent.offset >= position
        assert len(extent.data) > 0
        position = extent.offset + len(extent.data)
        first = -extent.offset % IMAGE_BLOCK
        blocks = range(first, len(extent.data) - IMAGE_BLOCK + 1, IMAGE_BLOCK)
        assert all(any(extent.data[block : block + IMAGE_BLOCK]) for block in blocks)


def test_data_without_zeros_is_passed_on_as_it_is_and_uncopied() -> None:
    extent = Extent(5, memoryview(b"data" * IMAGE_BLOCK))
    (kept,) = without_zeros([extent])
    assert (kept.offset, kept.data.obj) == (5, extent.data.obj)
    assert kept.data == extent.data


def test_zeros_that_fill_no_whole_block_stay() -> None:
    data = b"x" + bytes(2 * IMAGE_BLOCK - 2) + b"x"
    (kept,) = without_zeros([Extent(0, memoryview(data))])
    assert kept.data == data


def test_zeros_are_seen_at_the_places_of_the_image_and_not_of_the_extent() -> None:
    data = b"x" * 100 + bytes(IMAGE_BLOCK) + b"y" * 100
    offsets = [extent.offset for extent in without_zeros([Extent(IMAGE_BLOCK - 100, memoryview(data))])]
    assert offsets == [IMAGE_BLOCK - 100, 2 * IMAGE_BLOCK]
    assert [extent.offset for extent in without_zeros([Extent(IMAGE_BLOCK - 99, memoryview(data))])] == [
        IMAGE_BLOCK - 99
    ]


@pytest.mark.parametrize("cut", [100, 512, IMAGE_BLOCK, IMAGE_BLOCK + 1, (64 << 10) - 512, 1 << 20])
def test_zeros_have_no_extents_wherever_the_image_is_cut(cut: int) -> None:
    zeros, data = bytes(1 << 18), b"x" * 100
    image = zeros + data + zeros
    pieces = [Extent(at, memoryview(image)[at : at + cut]) for at in range(0, len(image), cut)]
    kept = list(without_zeros(pieces))
    assert image_of(kept, len(image)) == image
    assert sum(len(extent.data) for extent in kept) <= IMAGE_BLOCK
    assert list(without_zeros(Extent(at, memoryview(bytes(cut))) for at in range(0, 1 << 20, cut))) == []
