"""A volume that comes against one that is here: every way in which they can differ, and what that costs."""

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from qubes_restore_svc.broker import comparison
from qubes_restore_svc.broker.comparison import BLOCK, ComparedVolume
from qubes_restore_svc.broker.interfaces import Comparison
from qubes_restore_svc.wire.report import MAX_PLACES

SIZE = 16 * BLOCK

#: Offset and data of what comes; data in the first two blocks and in the ninth, zeros as data in the third.
EXTENTS = ((0, b"a" * 2 * BLOCK), (2 * BLOCK, bytes(BLOCK)), (8 * BLOCK, b"b" * 100))

Edit = tuple[int, bytes]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file that is the same as what comes."""
    path = tmp_path / "private.img"
    path.touch()
    os.truncate(path, SIZE)
    edit(path, *((offset, data) for offset, data in EXTENTS if any(data)))
    return path


def edit(path: Path, *edits: Edit) -> None:
    with path.open("r+b") as file:
        for offset, data in edits:
            file.seek(offset)
            file.write(data)


def begun(path: Path, *, newer: bool = False) -> ComparedVolume:
    return ComparedVolume(os.open(path, os.O_RDONLY), path.name, "work", "private", newer=newer)


def compared(
    path: Path, extents: Sequence[Edit] = EXTENTS, *, size: int = SIZE, newer: bool = False
) -> Comparison:
    sink = begun(path, newer=newer)
    for offset, data in extents:
        sink.write(offset, memoryview(data))
    return sink.finish(size)


def places(found: Comparison) -> list[tuple[int, int]]:
    assert found.difference is not None
    return [(place.offset, place.length) for place in found.difference.places]


def test_what_is_the_same_is_the_same_wherever_the_holes_are(image: Path, tmp_path: Path) -> None:
    assert compared(image) == Comparison("same")
    dense = tmp_path / "dense"
    dense.write_bytes(image.read_bytes())
    assert compared(dense) == Comparison("same")


@pytest.mark.parametrize(
    ("edits", "size", "where"),
    [
        ([(0, b"x")], SIZE, [(0, BLOCK)]),
        ([(BLOCK - 1, b"x")], SIZE, [(0, BLOCK)]),
        ([(BLOCK - 1, b"xx")], SIZE, [(0, 2 * BLOCK)]),
        ([(0, bytes(BLOCK))], SIZE, [(0, BLOCK)]),
        ([(2 * BLOCK, b"x")], SIZE, [(2 * BLOCK, BLOCK)]),
        ([(5 * BLOCK, b"x")], SIZE, [(5 * BLOCK, BLOCK)]),
        ([(5 * BLOCK, bytes(BLOCK))], SIZE, []),
        ([(8 * BLOCK, b"x"), (8 * BLOCK + 200, b"x")], SIZE, [(8 * BLOCK, BLOCK)]),
        ([(SIZE - 1, b"x")], SIZE, [(SIZE - BLOCK, BLOCK)]),
        ([(0, b"x"), (4 * BLOCK, b"x"), (9 * BLOCK, b"x")], SIZE,
         [(0, BLOCK), (4 * BLOCK, BLOCK), (9 * BLOCK, BLOCK)]),
        ([], SIZE + BLOCK, []),
        ([], SIZE - BLOCK, []),
        ([(SIZE + 10, b"x")], SIZE + 11, [(SIZE, 11)]),
        ([], 8 * BLOCK + 50, [(8 * BLOCK, BLOCK)]),
        ([], 0, [(0, 2 * BLOCK), (8 * BLOCK, BLOCK)]),
    ],
    ids=[
        "first-byte", "last-byte-of-a-block", "two-blocks-in-a-row", "hole-for-data", "data-for-zeros",
        "data-for-a-hole", "zeros-for-a-hole", "twice-in-a-block", "last-byte", "three-places", "longer",
        "shorter", "longer-with-data", "cut-off-in-data", "empty",
    ],
)  # fmt: skip
def test_every_difference_is_found_with_its_place(
    image: Path, edits: list[Edit], size: int, where: list[tuple[int, int]]
) -> None:
    edit(image, *edits)
    os.truncate(image, size)
    found = compared(image)
    if size == SIZE and not where:
        assert found == Comparison("same")
        return
    assert found.outcome == "differs"
    assert found.difference is not None
    assert found.difference.size == size
    assert places(found) == where
    assert found.difference.different_bytes == sum(length for _, length in where)
    assert found.difference.more_places == 0


def test_in_a_long_hole_no_byte_is_passed_over(tmp_path: Path) -> None:
    path, length = tmp_path / "image", 1 << 20
    path.write_bytes(bytes(3 * length))
    for offset in (0, length - 1, length, 2 * length, 3 * length - 1):
        edit(path, (offset, b"x"))
        assert places(compared(path, [], size=3 * length)) == [(offset // BLOCK * BLOCK, BLOCK)]
        edit(path, (offset, b"\0"))


def test_extents_that_meet_within_a_block_count_it_once(image: Path) -> None:
    edit(image, (10, b"x"), (2000, b"x"), (5000, b"x"))
    found = compared(image, [(0, b"a" * 1000), (1000, b"a" * 6000), (7000, b"a" * 1192), *EXTENTS[1:]])
    assert places(found) == [(0, 2 * BLOCK)]


def test_a_size_that_is_known_at_the_end_bounds_the_last_place(tmp_path: Path) -> None:
    home = tmp_path / "home.tar"
    home.write_bytes(b"h" * 10)
    found = compared(home, [(0, b"h" * 9), (9, b"H")], size=10)
    assert places(found) == [(0, 10)]
    assert compared(home, [(0, b"h" * 10)], size=10) == Comparison("same")


def test_the_first_places_are_kept_and_the_others_counted(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.touch()
    count = MAX_PLACES + 3
    edit(path, *((2 * number * BLOCK, b"x" * (BLOCK + 1)) for number in range(count)))
    size = path.stat().st_size
    found = compared(path, [], size=size)
    assert found.difference is not None
    # Each of them reaches into the next block; so together they are one.
    assert places(found) == [(0, size)]
    for number in range(count):
        edit(path, ((2 * number + 1) * BLOCK, bytes(1)))
    found = compared(path, [], size=size)
    assert found.difference is not None
    assert places(found) == [(2 * number * BLOCK, BLOCK) for number in range(MAX_PLACES)]
    assert found.difference.more_places == 3
    assert found.difference.different_bytes == count * BLOCK


def test_a_difference_of_a_volume_that_was_used_since_is_newer(image: Path) -> None:
    assert compared(image, newer=True).outcome == "same"
    edit(image, (0, b"x"))
    assert compared(image, newer=True).outcome == "newer"


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many bytes each read asks for."""
    sizes: list[int] = []
    read = os.pread

    def pread(file: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return read(file, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    yield sizes


def test_holes_of_both_sides_are_not_read(image: Path, bytes_read: list[int]) -> None:
    os.truncate(image, 1 << 42)
    assert compared(image, size=1 << 42).outcome == "same"
    assert sum(bytes_read) < SIZE


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is like a block device, which does not tell where its holes are (seen on Linux 6.18)."""
    seek = os.lseek

    def lseek(file: int, offset: int, whence: int) -> int:
        if whence in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return seek(file, offset, whence)

    monkeypatch.setattr(os, "lseek", lseek)


@pytest.mark.usefixtures("device")
def test_a_block_device_is_compared_as_a_file_is(image: Path) -> None:
    assert compared(image) == Comparison("same")
    edit(image, (5 * BLOCK, b"x"), (SIZE - 1, b"x"))
    assert places(compared(image)) == [(5 * BLOCK, BLOCK), (SIZE - BLOCK, BLOCK)]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("size", [SIZE + BLOCK, 1 << 42])
def test_nothing_is_read_behind_the_end_of_a_block_device(
    image: Path, bytes_read: list[int], size: int
) -> None:
    found = compared(image, size=size)
    assert found.difference is not None
    assert (found.difference.size, found.difference.different_bytes) == (SIZE, 0)
    assert sum(bytes_read) == SIZE


@pytest.mark.usefixtures("device")
def test_data_far_behind_the_end_of_a_block_device_costs_no_more_than_its_size(
    image: Path, bytes_read: list[int]
) -> None:
    far = 1 << 42
    assert places(compared(image, [*EXTENTS, (far, b"x")], size=far + BLOCK)) == [(far, BLOCK)]
    assert sum(bytes_read) <= SIZE + 2 * BLOCK


def test_reads_that_bring_less_than_was_asked_for_go_on(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: read(file, min(size, 1000), offset))
    assert compared(image) == Comparison("same")


def test_a_fault_of_another_kind_is_no_hole(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seek = os.lseek

    def fail(file: int, offset: int, whence: int) -> int:
        if whence == os.SEEK_DATA:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return seek(file, offset, whence)

    monkeypatch.setattr(os, "lseek", fail)
    found = compared(image)
    assert found.outcome == "failed" and found.error is not None
    assert "Input/output error" in found.error.reason


def test_every_block_is_compared_whatever_was_found_before(
    image: Path, bytes_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: list[bytes] = []

    def taken(data: memoryview) -> bytes:
        blocks.append(bytes(data))
        return blocks[-1]

    monkeypatch.setattr(comparison, "bytes", taken, raising=False)
    costs = []
    for _ in ("the same", "different everywhere"):
        blocks.clear()
        bytes_read.clear()
        compared(image)
        costs.append((len(blocks), list(bytes_read)))
        edit(image, *((number * BLOCK, b"x") for number in (0, 1, 2, 8)))
    assert costs[0] == costs[1]
    assert len(blocks) == 5, "the rest of the ninth block is one of its own"


def test_it_is_closed_when_it_has_ended(image: Path) -> None:
    sink = begun(image)
    sink.finish(SIZE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(sink._file)


def test_closing_waits_for_the_end_of_a_step(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink, begun_reading, go_on = begun(image), threading.Event(), threading.Event()
    read = os.pread

    def pread(file: int, size: int, offset: int) -> bytes:
        begun_reading.set()
        assert go_on.wait(20)
        return read(file, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    writing = threading.Thread(target=sink.write, args=(0, memoryview(EXTENTS[0][1])))
    closing = threading.Thread(target=sink.close)
    writing.start()
    assert begun_reading.wait(20)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    os.fstat(sink._file)
    go_on.set()
    for thread in (writing, closing):
        thread.join(20)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(sink._file)


def test_a_place_that_cannot_be_read_is_the_finding_and_nothing_more_is_read(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def fail(file: int, size: int, offset: int) -> bytes:
        reads.append(offset)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    found = compared(image)
    assert found.outcome == "failed" and found.error is not None
    assert str(found.error) == (
        "work/private: reading private.img failed: Input/output error. Settle the cause and compare it again."
    )
    assert reads == [0]


def test_one_that_is_given_up_is_closed_and_never_the_same(image: Path) -> None:
    sink = begun(image)
    sink.write(0, memoryview(EXTENTS[0][1]))
    sink.abandon()
    again = os.open(image, os.O_RDONLY)  # gets the number that has become free
    sink.write(2 * BLOCK, memoryview(b"x"))
    found = sink.finish(SIZE)
    assert found.outcome == "failed" and found.error is not None and found.error.reason == "it was given up"
    os.close(again)


def test_one_that_is_given_up_touches_no_file_that_has_got_its_number(image: Path) -> None:
    sink = begun(image)
    sink.abandon()
    again = os.open(image, os.O_RDONLY)
    assert again == sink._file
    assert sink.finish(SIZE).outcome == "failed"
    assert os.lseek(again, 0, os.SEEK_CUR) == 0
    os.close(again)


def test_a_long_hole_over_data_ends_when_it_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x" * (4 << 20))
    sink = begun(path)
    read = os.pread

    def give_up(file: int, size: int, offset: int) -> bytes:
        sink.abandon()
        return read(file, size, offset)

    monkeypatch.setattr(os, "pread", give_up)
    found = sink.finish(4 << 20)
    assert found.outcome == "failed"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(sink._file)


def test_one_that_is_given_up_while_it_compares_is_closed_at_the_end_of_the_step(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, read = begun(image), os.pread

    def give_up(file: int, size: int, offset: int) -> bytes:
        sink.abandon()
        return read(file, size, offset)

    monkeypatch.setattr(os, "pread", give_up)
    sink.write(0, memoryview(EXTENTS[0][1]))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(sink._file)


def test_it_is_told_if_somebody_writes_meanwhile(image: Path) -> None:
    for touch in (False, True):
        sink = begun(image)
        if touch:
            os.utime(image, ns=(1, 1))
        sink.finish(SIZE)
        assert sink.was_changed == touch
