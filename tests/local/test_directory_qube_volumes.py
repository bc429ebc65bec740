"""One volume in a directory: sparse, within its limits, on disk when it is finished, and failed for good."""

import errno
import os
import resource
import tracemalloc
from pathlib import Path

import pytest

from qubes_restore_svc.broker import image_directory
from qubes_restore_svc.errors import HostFailed, NoSpace, RestoreError
from qubes_restore_svc.local.directory import DirectoryQube
from qubes_restore_svc.wire.names import MAX_NUMBER
from tests.local.conftest import failing
from tests.local.sample_qubes import settings

MIB = 1 << 20


def fail_with(monkeypatch: pytest.MonkeyPatch, function: str, number: int) -> None:
    monkeypatch.setattr(os, function, failing(number))


def assert_place(error: RestoreError) -> None:
    assert (error.qube, error.volume) == ("work", "private")


def test_holes_stay_holes(tmp_path: Path, qube: DirectoryQube) -> None:
    sink = qube.create_volume("private", 3 << 30)
    sink.write(1 << 30, memoryview(b"d" * 4096))
    sink.write(2 << 30, memoryview(b"e" * 4096))
    sink.finish(3 << 30)
    status = (tmp_path / ".work.partial/private.img").stat()
    assert status.st_size == 3 << 30
    assert 0 < status.st_blocks * 512 < MIB


def test_an_image_may_end_in_zeros_or_consist_of_them(tmp_path: Path, qube: DirectoryQube) -> None:
    qube.create_volume("private", 5000).finish(5000)
    assert (tmp_path / ".work.partial/private.img").read_bytes() == bytes(5000)


def test_writing_takes_no_memory_of_its_own(qube: DirectoryQube, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_directory, "WRITEBACK_STEP", MIB)
    data = memoryview(bytes(8 * MIB))
    sink = qube.create_volume("private", 80 * MIB)
    tracemalloc.start()
    try:
        for number in range(10):
            sink.write(number * len(data), data)
        sink.finish(80 * MIB)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_writing_out_begins_on_the_way_and_covers_all_that_was_written(
    qube: DirectoryQube, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(image_directory, "WRITEBACK_STEP", 3 * MIB)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _file, start, length, _: asked.append((start, start + length))
    )
    sink = qube.create_volume("private", 10 * MIB)
    for number in range(10):
        sink.write(number * MIB, memoryview(bytes(MIB)))
    assert asked == [(0, 3 * MIB), (0, 6 * MIB), (3 * MIB, 9 * MIB)]


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (19, 1), (100, 1), (96, 5), (MAX_NUMBER, 1), (-1, 1)])
def test_data_outside_of_its_place_is_refused(
    tmp_path: Path, qube: DirectoryQube, offset: int, length: int
) -> None:
    sink = qube.create_volume("private", 100)
    sink.write(10, memoryview(b"0123456789"))
    with pytest.raises(HostFailed) as caught:
        sink.write(offset, memoryview(b"x" * length))
    assert_place(caught.value)
    assert (tmp_path / ".work.partial/private.img").read_bytes() == bytes(10) + b"0123456789"


def test_data_may_touch_what_is_before_it_and_the_end(qube: DirectoryQube) -> None:
    sink = qube.create_volume("private", 4)
    sink.write(0, memoryview(b"ab"))
    sink.write(2, memoryview(b"cd"))
    sink.finish(4)


@pytest.mark.parametrize("size", [9, 101, -1, MAX_NUMBER])
def test_a_size_that_cuts_data_or_passes_the_limit_is_refused(qube: DirectoryQube, size: int) -> None:
    sink = qube.create_volume("private", 100)
    sink.write(0, memoryview(b"0123456789"))
    with pytest.raises(HostFailed) as caught:
        sink.finish(size)
    assert_place(caught.value)


@pytest.mark.parametrize("size", [-1, MAX_NUMBER + 1, 1 << 80])
def test_an_image_size_that_is_none_is_refused(qube: DirectoryQube, size: int) -> None:
    with pytest.raises(HostFailed) as caught:
        qube.create_volume("private", size)
    assert_place(caught.value)


def test_an_image_larger_than_the_file_system_can_hold_is_refused_at_once(
    tmp_path: Path, qube: DirectoryQube
) -> None:
    with (tmp_path / "probe").open("wb") as probe:
        try:
            os.truncate(probe.fileno(), 1 << 62)
            pytest.skip("the file system of the temporary directory holds files of 2^62 bytes")
        except OSError as error:
            assert error.errno == errno.EFBIG
    with pytest.raises(HostFailed, match="more than one file can hold here") as caught:
        qube.create_volume("private", 1 << 62)
    assert_place(caught.value)
    qube.rollback()
    assert os.listdir(tmp_path) == ["probe"]


@pytest.mark.parametrize("step", ["write", "finish"])
def test_a_limit_on_file_sizes_is_a_clear_error(tmp_path: Path, qube: DirectoryQube, step: str) -> None:
    sink = qube.create_volume("private", 10 * MIB)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB + 100, hard))
    try:
        with pytest.raises(HostFailed, match="larger than a file may be") as caught:
            if step == "write":
                sink.write(0, memoryview(bytes(2 * MIB)))
            else:
                sink.finish(2 * MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not isinstance(caught.value, NoSpace)
    assert_place(caught.value)
    qube.rollback()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(
    ("function", "step"), [("pwrite", "write"), ("ftruncate", "finish"), ("fsync", "finish")]
)
def test_no_room_for_a_volume_is_no_space(
    qube: DirectoryQube, monkeypatch: pytest.MonkeyPatch, function: str, step: str, number: int
) -> None:
    sink = qube.create_volume("private", 100)
    with monkeypatch.context() as patch:
        fail_with(patch, function, number)
        with pytest.raises(NoSpace) as caught:
            sink.write(0, memoryview(b"x")) if step == "write" else sink.finish(100)
    assert_place(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("function", "step"), [("pwrite", "write"), ("ftruncate", "finish"), ("fsync", "finish")]
)
def test_a_volume_that_failed_once_never_succeeds(
    qube: DirectoryQube, monkeypatch: pytest.MonkeyPatch, function: str, step: str
) -> None:
    sink = qube.create_volume("private", 100)
    with monkeypatch.context() as patch:
        fail_with(patch, function, errno.EIO)
        with pytest.raises(HostFailed, match="Input/output error") as caught:
            sink.write(0, memoryview(b"x")) if step == "write" else sink.finish(100)
    assert_place(caught.value)
    with pytest.raises(HostFailed):
        sink.write(0, memoryview(b"x"))
    with pytest.raises(HostFailed):
        sink.finish(100)
    with pytest.raises(HostFailed):
        qube.commit(settings())


def test_a_file_that_is_not_as_long_as_it_should_be_is_not_finished(
    qube: DirectoryQube, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = qube.create_volume("private", 100)
    monkeypatch.setattr(os, "ftruncate", lambda *_: None)
    with pytest.raises(HostFailed, match="has 0 bytes instead of 100"):
        sink.finish(100)


def test_a_finished_volume_takes_no_more(qube: DirectoryQube) -> None:
    sink = qube.create_volume("private", 100)
    sink.finish(50)
    with pytest.raises(HostFailed):
        sink.write(60, memoryview(b"x"))
    with pytest.raises(HostFailed):
        sink.finish(100)
    sink.abandon()
    assert sink.size == 50
    qube.commit(settings())


def test_a_volume_can_be_created_once(qube: DirectoryQube) -> None:
    sink = qube.create_volume("private", 100)
    sink.write(0, memoryview(b"first"))
    with pytest.raises(HostFailed, match="exists") as caught:
        qube.create_volume("private", 100)
    assert_place(caught.value)
    sink.finish(100)
