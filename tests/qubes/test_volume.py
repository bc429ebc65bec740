"""A volume on its way: a stream without holes, the import's word for the end, and a way out of everything."""

import errno
import os
import random
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import pytest

from qubes_restore_svc.errors import HostFailed, NoSpace
from qubes_restore_svc.qubes import volume as qubes_volume
from qubes_restore_svc.qubes.volume import PIPE_SIZE, VolumeImport

SOON_S = 30.0


class Importing:
    """An import that takes what comes, and can be made to fail, to stop reading, or to hang at the end."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.size: int | None = None
        self.succeeded = False
        self.fail_after: int | None = None
        self.reading = threading.Event()
        self.at_the_end = threading.Event()
        self.may_read = threading.Event()
        self.may_end = threading.Event()
        self.may_read.set()
        self.may_end.set()

    def __call__(self, stream: BinaryIO, size: int) -> None:
        self.size = size
        self.reading.set()
        assert self.may_read.wait(SOON_S)
        while part := stream.read(65536):
            self.received += part
            if self.fail_after is not None and len(self.received) > self.fail_after:
                stream.close()
                raise NoSpace("importing the volume failed: it is full", qube="work", volume="private")
        self.at_the_end.set()
        assert self.may_end.wait(SOON_S)
        if len(self.received) != size:
            raise HostFailed("importing the volume failed: not enough data")
        self.succeeded = True


def sink_of(importing: Callable[[BinaryIO, int], None], size: int) -> VolumeImport:
    return VolumeImport(importing, "work", "private", size)


@contextmanager
def in_thread(action: Callable[[], None]) -> Iterator[list[HostFailed]]:
    """Run it beside the block; brings what it raised, once the block has ended."""
    errors: list[HostFailed] = []

    def run() -> None:
        try:
            action()
        except HostFailed as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield errors
    thread.join(SOON_S)
    assert not thread.is_alive()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No descriptor and no thread of any of these tests outlives it."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("import "):
            thread.join(SOON_S)
            assert not thread.is_alive()
    assert set(os.listdir("/proc/self/fd")) == before


# --- Data ----------------------------------------------------------------------------------------


def test_holes_arrive_as_zeros() -> None:
    importing = Importing()
    sink = sink_of(importing, 10_000_000)
    sink.write(10, memoryview(b"abc"))
    sink.write(13, memoryview(b"def"))
    sink.write(5_000_000, memoryview(b"x" * (1 << 20)))
    sink.finish(10_000_000)
    expected = bytearray(10_000_000)
    expected[10:16] = b"abcdef"
    expected[5_000_000 : 5_000_000 + (1 << 20)] = b"x" * (1 << 20)
    assert importing.received == expected
    assert importing.size == 10_000_000 == sink.size
    assert importing.succeeded


@pytest.mark.parametrize("size", [1, 2, 4096, PIPE_SIZE, PIPE_SIZE + 1, 3 * PIPE_SIZE - 1])
@pytest.mark.parametrize("kind", ["all data", "all hole", "data at the end", "hole at the end"])
def test_every_edge_arrives(size: int, kind: str) -> None:
    importing = Importing()
    sink = sink_of(importing, size)
    expected = bytearray(size)
    extents = {
        "all data": [(start, min(start + (1 << 20), size)) for start in range(0, size, 1 << 20)],
        "all hole": [],
        "data at the end": [(size - 1, size)],
        "hole at the end": [(0, max(1, size // 2))],
    }[kind]
    for start, end in extents:
        data = random.Random(start).randbytes(end - start)
        expected[start:end] = data
        sink.write(start, memoryview(data))
    sink.finish(size)
    assert importing.received == expected
    assert importing.succeeded


def test_a_volume_of_no_size() -> None:
    importing = Importing()
    sink = sink_of(importing, 0)
    sink.finish(0)
    assert (importing.size, bytes(importing.received), sink.size) == (0, b"", 0)


def test_no_more_than_the_pipe_is_in_memory_when_the_import_is_slow() -> None:
    importing = Importing()
    importing.may_read.clear()
    sink = sink_of(importing, 1 << 40)
    with in_thread(lambda: sink.write((1 << 40) - 10, memoryview(b"end"))) as errors:
        assert importing.reading.wait(SOON_S)
        sink.abandon()
    assert len(errors) == 1
    importing.may_read.set()
    assert sink.wait_ended(SOON_S)
    assert len(importing.received) <= 2 * PIPE_SIZE


def test_the_import_is_not_begun_before_there_is_something_to_import() -> None:
    importing = Importing()
    sink = sink_of(importing, 100)
    sink.abandon()
    assert sink.wait_ended(0)
    assert importing.size is None


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [-1, 1 << 63])
def test_a_size_that_no_image_has_is_refused(size: int) -> None:
    with pytest.raises(HostFailed, match="not the size of an image"):
        sink_of(Importing(), size)


@pytest.mark.parametrize(("offset", "length"), [(9, 5), (0, 1), (95, 6), (100, 1), (1 << 70, 1), (-1, 1)])
def test_data_behind_the_last_or_past_the_end_is_refused_and_ends_it(offset: int, length: int) -> None:
    importing = Importing()
    sink = sink_of(importing, 100)
    sink.write(0, memoryview(b"x" * 10))
    with pytest.raises(HostFailed, match="outside of the 10 to 100 left") as caught:
        sink.write(offset, memoryview(b"y" * length))
    assert (caught.value.qube, caught.value.volume) == ("work", "private")
    with pytest.raises(HostFailed, match="no more data"):
        sink.write(50, memoryview(b"y"))
    with pytest.raises(HostFailed, match="no more data"):
        sink.finish(100)
    assert sink.wait_ended(SOON_S)
    assert not importing.succeeded
    assert bytes(importing.received) == b"x" * 10


def test_data_after_the_last_byte_is_refused() -> None:
    sink = sink_of(Importing(), 10)
    sink.write(0, memoryview(b"x" * 10))
    with pytest.raises(HostFailed, match="outside of the 10 to 10 left"):
        sink.write(9, memoryview(b"y"))


@pytest.mark.parametrize("size", [0, 99, 101])
def test_a_volume_does_not_finish_with_another_size(size: int) -> None:
    importing = Importing()
    sink = sink_of(importing, 100)
    sink.write(0, memoryview(b"x" * 100))
    with pytest.raises(HostFailed, match=f"a size of {size} bytes, of an image of 100"):
        sink.finish(size)
    assert sink.wait_ended(SOON_S)
    assert not importing.succeeded
    assert sink.size is None


def test_a_volume_is_finished_once() -> None:
    sink = sink_of(Importing(), 10)
    sink.finish(10)
    with pytest.raises(HostFailed, match="no more data"):
        sink.finish(10)
    assert sink.size == 10


# --- Giving up -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100, 5 << 20])
def test_a_volume_that_is_abandoned_is_never_imported_even_if_all_of_it_was_there(size: int) -> None:
    importing = Importing()
    sink = sink_of(importing, size)
    for start in range(0, size, 1 << 20):
        sink.write(start, memoryview(bytes([1]) * min(1 << 20, size - start)))
    sink.abandon()
    assert sink.wait_ended(SOON_S)
    assert not importing.succeeded
    assert len(importing.received) == size - 1 or size == 1
    sink.abandon()
    with pytest.raises(HostFailed, match="no more data"):
        sink.finish(size)


def test_abandoning_a_finished_volume_is_harmless() -> None:
    sink = sink_of(Importing(), 10)
    sink.finish(10)
    sink.abandon()
    assert sink.size == 10
    assert sink.wait_ended(SOON_S)


def test_a_writer_that_waits_for_the_import_is_let_go_when_the_volume_is_abandoned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting = threading.Event()

    class Poll:
        """Says when the writer really waits: that is what it is about, not the look before it."""

        def __init__(self) -> None:
            self._poll = real_poll()
            self.register = self._poll.register

        def poll(self, timeout_ms: float) -> list[tuple[int, int]]:
            waiting.set()
            return self._poll.poll(timeout_ms)

    real_poll = select.poll
    monkeypatch.setattr(select, "poll", Poll)
    importing = Importing()
    importing.may_read.clear()
    sink = sink_of(importing, 1 << 30)

    def write() -> None:
        for offset in range(0, 1 << 30, 1 << 20):
            sink.write(offset, memoryview(b"x" * (1 << 20)))

    with in_thread(write) as errors:
        assert waiting.wait(SOON_S)
        with in_thread(sink.abandon):
            pass
    assert [error.reason for error in errors] == ["the volume was abandoned"]
    importing.may_read.set()
    assert sink.wait_ended(SOON_S)


def test_a_finish_that_waits_for_the_disk_is_let_go_when_the_volume_is_abandoned() -> None:
    importing = Importing()
    importing.may_end.clear()
    sink = sink_of(importing, 100)
    with in_thread(lambda: sink.finish(100)) as errors:
        assert importing.at_the_end.wait(SOON_S)
        sink.abandon()
    assert [error.reason for error in errors] == ["the volume was abandoned"]
    assert sink.size is None
    importing.may_end.set()
    assert sink.wait_ended(SOON_S)


def test_abandoning_does_not_wait_for_an_import_that_hangs() -> None:
    importing = Importing()
    importing.may_end.clear()
    sink = sink_of(importing, 100)
    sink.write(0, memoryview(b"x"))
    sink.abandon()
    assert not sink.wait_ended(0.01)
    importing.may_end.set()
    assert sink.wait_ended(SOON_S)


# --- An import that fails ------------------------------------------------------------------------


def test_what_the_import_fails_with_is_what_the_writer_gets() -> None:
    importing = Importing()
    importing.fail_after = 100_000
    sink = sink_of(importing, 1 << 30)
    with pytest.raises(NoSpace, match="it is full"):
        for offset in range(0, 1 << 30, 1 << 20):
            sink.write(offset, memoryview(b"x" * (1 << 20)))
    with pytest.raises(HostFailed, match="no more data"):
        sink.finish(1 << 30)


def test_an_import_that_fails_in_the_end_fails_the_finish() -> None:
    def importing(stream: BinaryIO, _size: int) -> None:
        stream.read()
        raise HostFailed("importing the volume failed: error copying data")

    sink = sink_of(importing, 100)
    with pytest.raises(HostFailed, match="error copying data"):
        sink.finish(100)
    assert sink.size is None


def test_an_import_that_ends_early_and_content_is_no_success() -> None:
    sink = sink_of(lambda stream, _size: stream.close(), 1 << 30)
    with pytest.raises(HostFailed, match="ended before it had all data"):
        sink.write((1 << 30) - 10, memoryview(b"x"))


def test_an_import_that_stumbles_is_a_failure_and_not_silence() -> None:
    def importing(_stream: BinaryIO, _size: int) -> None:
        raise ZeroDivisionError("oh")

    sink = sink_of(importing, 100)
    with pytest.raises(HostFailed, match="importing the volume failed: oh"):
        sink.finish(100)


def test_an_import_that_takes_nothing_for_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qubes_volume, "STALL_TIMEOUT_S", 0.02)
    importing = Importing()
    importing.may_read.clear()
    sink = sink_of(importing, 1 << 30)
    with pytest.raises(HostFailed, match="took no data"):
        sink.write(5 << 20, memoryview(b"x"))
    importing.may_read.set()
    assert sink.wait_ended(SOON_S)


def test_an_import_that_does_not_end_for_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qubes_volume, "STALL_TIMEOUT_S", 0.02)
    importing = Importing()
    importing.may_end.clear()
    sink = sink_of(importing, 100)
    with pytest.raises(HostFailed, match="did not end"):
        sink.finish(100)
    assert sink.size is None
    importing.may_end.set()
    assert sink.wait_ended(SOON_S)


def test_without_descriptors_nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    sink = sink_of(Importing(), 100)
    monkeypatch.setattr(os, "pipe", refuse)
    with pytest.raises(HostFailed, match="Too many open files"):
        sink.write(0, memoryview(b"x"))
    assert sink.wait_ended(0)


def test_without_a_thread_nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    sink = sink_of(Importing(), 100)
    with monkeypatch.context() as patch, pytest.raises(HostFailed, match="can't start new thread"):
        patch.setattr(threading.Thread, "start", refuse)
        sink.write(0, memoryview(b"x"))
    assert sink.wait_ended(0)
