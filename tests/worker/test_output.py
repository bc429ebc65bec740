"""Where extents go: the hash of the whole image with its holes, the stream to the broker, and its offer."""

import errno
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_restore_svc.archive.members import Buffer
from qubes_restore_svc.errors import Cancelled, ResourcesExhausted, SkippedOnRequest
from qubes_restore_svc.wire.names import DigestKind
from qubes_restore_svc.wire.volume import MAX_RECORD
from qubes_restore_svc.worker.output import FsVerityDigest, ImageHash, PlainDigest, VolumeOffers, VolumeStream

from .support import MIB, in_thread, join, receive


def nothing() -> None:
    pass


DIGESTS: dict[DigestKind, Callable[[], FsVerityDigest | PlainDigest]] = {
    "fsverity": FsVerityDigest,
    "sha256": PlainDigest,
}
EITHER = pytest.mark.parametrize("kind", DIGESTS)


def digest_of(kind: DigestKind, image: bytes) -> str:
    digest = DIGESTS[kind]()
    digest.update(image)
    return digest.hexdigest()


@EITHER
@given(runs=st.lists(st.tuples(st.integers(0, 3000), st.binary(min_size=1, max_size=3000)), max_size=8))
def test_the_hash_is_that_of_the_whole_image(kind: DigestKind, runs: list[tuple[int, bytes]]) -> None:
    image = b""
    with ImageHash(kind, nothing) as digest:
        for hole, data in runs:
            image += bytes(hole)
            digest.write(len(image), memoryview(data))
            image += data
            assert digest.position == len(image)
        assert digest.data_bytes == sum(len(data) for _, data in runs)
        image += bytes(5000)
        assert digest.finish(len(image)) == digest_of(kind, image)
    assert digest.hashed == len(image)


@EITHER
def test_a_hole_of_many_mebibytes_is_hashed_as_zeros(kind: DigestKind) -> None:
    with ImageHash(kind, nothing) as digest:
        digest.write(3 * MIB + 1, memoryview(b"x"))
        image = bytes(3 * MIB + 1) + b"x" + bytes(2 * MIB - 2)
        assert digest.finish(5 * MIB) == digest_of(kind, image)


def test_a_hole_of_a_tebibyte_costs_the_fs_verity_digest_nothing() -> None:
    with ImageHash("fsverity", nothing) as digest:
        digest.write(1 << 40, memoryview(b"x"))
        began = time.process_time()
        digest.finish(1 << 44)
        assert time.process_time() - began < 1
    assert digest.hashed == 1 << 44


@pytest.mark.parametrize("place", ["before data", "at the end"])
def test_the_hashing_of_a_hole_of_a_tebibyte_can_be_stopped(place: str) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Cancelled("enough")

    with pytest.raises(Cancelled), ImageHash("sha256", check) as digest:
        if place == "before data":
            digest.write(1 << 40, memoryview(b"x"))
        digest.finish((1 << 40) + 1)
    assert digest.hashed < 1 << 38
    assert not [thread for thread in threading.enumerate() if thread.name == "hash"]


def test_data_that_comes_faster_than_it_is_hashed_waits_and_can_be_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped = threading.Event()
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > 200:
            raise Cancelled("enough")

    def hash_nothing(self: ImageHash) -> None:
        stopped.wait(20)

    monkeypatch.setattr(ImageHash, "_hash", hash_nothing)
    monkeypatch.setattr("qubes_restore_svc.worker.output._PATIENCE_S", 0.001)
    written = 0
    with pytest.raises(Cancelled), ImageHash("fsverity", check) as digest:
        try:
            while True:
                digest.write(written, memoryview(b"x"))
                written += 1
        finally:
            stopped.set()
    assert written == 16


@pytest.mark.parametrize("after", [0, 30], ids=["at the end", "while data comes"])
def test_hashing_that_fails_gives_no_digest_and_holds_up_nobody(
    after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(self: FsVerityDigest, data: bytes | memoryview) -> None:
        raise MemoryError

    monkeypatch.setattr(FsVerityDigest, "update", out_of_memory)
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1
        assert checks < 100, "it is waited for a thread that has ended"

    with pytest.raises(MemoryError), ImageHash("fsverity", check) as digest:
        for position in range(after + 1):
            digest.write(position, memoryview(b"x"))
        digest.finish(after + 1)


@pytest.mark.parametrize("length", [1, 1000, MAX_RECORD, MAX_RECORD + 1, 3 * MAX_RECORD + 7])
def test_an_extent_of_any_length_arrives_whole_through_a_narrow_socket(length: int) -> None:
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    data = bytes(range(256)) * (length // 256 + 1)
    received: list[str | None] = []
    reader = in_thread(lambda: received.append(receive(ours)))
    stream = VolumeStream(theirs, 10 * MIB)
    stream.begin()
    stream.write(12345, memoryview(data)[:length])
    stream.finish(length)
    stream.close()
    join(reader)
    image = bytes(12345) + data[:length] + bytes(10 * MIB - 12345 - length)
    assert received == [hashlib.sha256(image).hexdigest()]


class Stingy(socket.socket):
    """A socket that takes but a few bytes of a message at once, as one may that is interrupted."""

    portion = 0

    def sendmsg(self, buffers: Iterable[Buffer], *_: object) -> int:  # type: ignore[override] # all that is used
        return self.send(b"".join(buffers)[: self.portion])


@pytest.mark.parametrize("portion", [1, 11, 12, 13, 500])
def test_what_a_socket_does_not_take_at_once_is_sent_after_it(portion: int) -> None:
    ours, theirs = socket.socketpair()
    stingy = Stingy(fileno=theirs.detach())
    stingy.portion = portion
    stream = VolumeStream(stingy, 1000)
    stream.begin()
    stream.write(10, memoryview(bytes(range(200)) * 4))
    stream.finish(800)
    stream.close()
    assert receive(ours) == hashlib.sha256(bytes(10) + bytes(range(200)) * 4 + bytes(190)).hexdigest()


def test_a_stream_that_is_closed_without_its_end_is_seen_to_be_incomplete() -> None:
    ours, theirs = socket.socketpair()
    stream = VolumeStream(theirs, 10)
    stream.begin()
    stream.write(0, memoryview(b"abc"))
    stream.close()
    assert receive(ours) is None


def test_a_broker_that_has_hung_up_is_no_failure_of_the_volume() -> None:
    ours, theirs = socket.socketpair()
    stream = VolumeStream(theirs, 10)
    ours.close()
    with pytest.raises(SkippedOnRequest):
        stream.begin()
    with pytest.raises(SkippedOnRequest):
        stream.write(0, memoryview(b"abc"))
    with pytest.raises(SkippedOnRequest):
        stream.finish(3)


def test_who_waits_for_a_broker_that_does_not_read_can_be_freed_from_another_thread() -> None:
    _ours, theirs = socket.socketpair()
    stream = VolumeStream(theirs, 100 * MIB)
    ended: list[str] = []

    def write() -> None:
        with pytest.raises(SkippedOnRequest):
            stream.write(0, memoryview(bytes(50 * MIB)))
        ended.append("freed")

    writer = in_thread(write)
    writer.join(0.1)
    assert writer.is_alive()
    stream.abort()
    join(writer)
    assert ended == ["freed"]
    stream.close()
    stream.abort()  # too late, and harmless


class Exhausted:
    """A connection that the system has no memory for."""

    def sendmsg(self, _: object) -> int:
        raise OSError(errno.ENOBUFS, "No buffer space available")


def test_want_of_memory_in_a_send_is_not_the_broker_that_has_hung_up() -> None:
    stream = VolumeStream(Exhausted(), 10)  # type: ignore[arg-type] # as much of one as it takes
    with pytest.raises(ResourcesExhausted, match="there is no memory left in the worker"):
        stream.begin()


@pytest.fixture
def connection() -> socket.socket:
    return socket.socketpair()[0]


def test_the_call_that_names_the_volume_on_offer_gets_it(connection: socket.socket) -> None:
    offers = VolumeOffers()
    taker = offers.offer("vm1", "private")
    assert offers.take("vm1.private", connection)
    assert taker.result(0) is connection


def test_a_volume_is_given_out_once(connection: socket.socket) -> None:
    offers = VolumeOffers()
    offers.offer("vm1", "private")
    offers.take("vm1.private", connection)
    assert not offers.take("vm1.private", connection)


@pytest.mark.parametrize("argument", ["", "vm1", "vm1.root", "vm2.private", "vm1.private ", "."])
def test_a_call_that_names_anything_else_is_refused(argument: str, connection: socket.socket) -> None:
    offers = VolumeOffers()
    assert not offers.take(argument, connection)
    taker = offers.offer("vm1", "private")
    assert not offers.take(argument, connection)
    assert not taker.done()


def test_an_offer_that_is_cancelled_is_taken_by_nobody(connection: socket.socket) -> None:
    offers = VolumeOffers()
    taker = offers.offer("vm1", "root")
    taker.cancel()
    assert not offers.take("vm1.root", connection)
    following = offers.offer("vm1", "private")
    assert offers.take("vm1.private", connection)
    assert following.result(0) is connection
