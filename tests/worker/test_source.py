"""The archive as a stream: files are skipped by seeking, pipes by reading, and both give the same bytes."""

import os
import socket
from contextlib import AbstractContextManager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_restore_svc.errors import ArchiveUnreadable
from qubes_restore_svc.worker.source import ArchiveSource, LateSource

from .support import Hanging, file_with, in_thread, pipe_with

CONTENT = bytes(range(251)) * 400
STEPS = st.lists(
    st.tuples(st.sampled_from(["read", "read_into", "skip"]), st.integers(0, 40_000)), max_size=12
)


def opened(kind: str, content: bytes) -> AbstractContextManager[int]:
    return file_with(content) if kind == "file" else pipe_with(content)


@pytest.mark.parametrize("kind", ["file", "pipe"])
@given(steps=STEPS)
def test_reads_and_skips_of_any_size_see_the_bytes_in_order(kind: str, steps: list[tuple[str, int]]) -> None:
    with opened(kind, CONTENT) as descriptor:
        source = ArchiveSource(descriptor)
        position = 0
        for step, size in steps:
            expected = CONTENT[position : position + size]
            position += len(expected)
            if step == "read":
                assert source.read(size) == expected
            elif step == "read_into":
                target = bytearray(size)
                assert source.read_into(memoryview(target)) == len(expected)
                assert target[: len(expected)] == expected
            else:
                assert source.skip(size) == len(expected)
            assert source.position == position


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_the_end_shows_as_a_short_read_and_a_short_skip(kind: str) -> None:
    with opened(kind, b"abc") as descriptor:
        source = ArchiveSource(descriptor)
        assert source.read(1) == b"a"
        assert source.read(1 << 20) == b"bc"
        assert source.skip(1 << 50) == 0
        assert source.read(1) == b""


def test_reading_begins_where_the_descriptor_stands() -> None:
    with file_with(b"0123456789") as descriptor:
        os.lseek(descriptor, 4, os.SEEK_SET)
        source = ArchiveSource(descriptor)
        assert source.skip(2) == 2
        assert source.read(100) == b"6789"
        assert source.position == 6


def test_a_file_is_skipped_without_being_read() -> None:
    with file_with(b"") as descriptor:
        os.truncate(descriptor, 1 << 42)  # reading that much would take an hour
        source = ArchiveSource(descriptor)
        assert source.read(1) == b"\0"
        assert source.skip(1 << 41) == 1 << 41
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == (1 << 41) + 1
        assert source.skip(1 << 50) == (1 << 42) - (1 << 41) - 1


def test_a_pipe_that_was_left_non_blocking_is_waited_for() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    source = ArchiveSource(reader)
    read: list[bytes] = []
    thread = in_thread(lambda: read.append(source.read(3)))
    thread.join(0.05)
    os.write(writer, b"abc")
    thread.join(5)
    if thread.is_alive():
        raise Hanging("the read does not end")
    assert read == [b"abc"]
    os.close(reader)
    os.close(writer)


def test_what_the_system_cannot_read_is_an_error_with_its_place_and_cause() -> None:
    descriptor = os.open("/", os.O_RDONLY)
    try:
        source = ArchiveSource(descriptor)
        with pytest.raises(ArchiveUnreadable, match="at byte 0: Is a directory"):
            source.read(1)
        with pytest.raises(ArchiveUnreadable, match="Is a directory"):
            source.skip(1)
        with pytest.raises(ArchiveUnreadable, match="Is a directory"):
            source.read_into(memoryview(bytearray(1 << 20)))
    finally:
        os.close(descriptor)
    with pytest.raises(ArchiveUnreadable, match="Bad file descriptor"):
        ArchiveSource(descriptor)


def test_a_seek_that_fails_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> int:
        raise OSError(5, "Input/output error")

    with file_with(CONTENT) as descriptor:
        source = ArchiveSource(descriptor)
        monkeypatch.setattr(os, "lseek", fail)
        with pytest.raises(ArchiveUnreadable, match="Input/output error"):
            source.skip(90_000)


# --- A connection that comes late -------------------------------------------------------------------


def test_a_late_source_connects_at_the_first_read_and_counts_from_where_it_is_told() -> None:
    ours, theirs = socket.socketpair()
    connected: list[int] = []

    def connect() -> int:
        connected.append(ours.fileno())
        return ours.fileno()

    with ours, theirs:
        source = LateSource(connect, position=1000)
        assert (source.position, source.seekable, connected) == (1000, False, [])
        theirs.sendall(b"x" * 20_000 + b"yz")
        theirs.shutdown(socket.SHUT_WR)
        target = bytearray(20_000)
        assert source.read_into(memoryview(target)) == 20_000
        assert source.position == 21_000 and len(connected) == 1
        assert source.read(1) == b"y" and source.surplus == 1
        assert source.skip(5) == 1 and source.surplus == 0
        assert source.read(1) == b""
        assert len(connected) == 1


def test_what_goes_wrong_with_the_connection_is_raised_to_who_reads() -> None:
    def connect() -> int:
        raise ArchiveUnreadable("nobody is there")

    with pytest.raises(ArchiveUnreadable, match="nobody is there"):
        LateSource(connect).read(1)


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_peer_that_goes_without_reading_is_an_end_after_what_it_has_sent(size: int) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(b"a request that nobody reads")
        theirs.sendall(b"abc")
        theirs.close()
        source = LateSource(ours.fileno)
        assert source.read(3) == b"abc"
        assert source.read(size) == b""


def test_any_other_error_of_a_connection_is_an_error() -> None:
    with socket.socket() as unconnected, pytest.raises(ArchiveUnreadable, match="not connected"):
        LateSource(unconnected.fileno).read(1)
