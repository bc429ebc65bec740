"""A volume's stream becomes writes; nothing that is not one does."""

import asyncio
import errno
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_restore_svc.broker.receiver import VolumeCopy, receive_volume
from qubes_restore_svc.errors import NoSpace, ProtocolViolation, ResourcesExhausted, RestoreError, WorkerLost
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.volume import MAX_RECORD, encode_end, encode_header, encode_record
from tests.broker.fake_worker import Image

IMAGE = Image(5000, ((10, b"a" * 100), (110, b"b"), (4000, b"c" * 1000)))


@dataclass
class Sink:
    """Keeps what is written; can fail, or take its time."""

    content: bytearray = field(default_factory=lambda: bytearray(IMAGE.size))
    error: RestoreError | None = None
    wait: threading.Event | None = None
    calls: list[str] = field(default_factory=list)

    def write(self, offset: int, data: memoryview) -> None:
        if self.wait is not None:
            self.wait.wait(5)
        if self.error is not None:
            raise self.error
        self.calls.append(f"write {offset} {len(data)}")
        self.content[offset : offset + len(data)] = data

    def finish(self, size: int) -> None:
        self.calls.append(f"finish {size}")

    def abandon(self) -> None:
        self.calls.append("abandon")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def received(data: bytes, image: Image = IMAGE) -> tuple[int, bytes]:
    ours, theirs = socket.socketpair()
    sink = Sink(bytearray(image.size))
    with ours:
        sender = threading.Thread(target=_send, args=(theirs, data))
        sender.start()
        try:
            return receive_volume(ours, sink, image.size), bytes(sink.content)
        finally:
            ours.close()
            sender.join()


def _send(connection: socket.socket, data: bytes) -> None:
    with connection:
        try:
            connection.sendall(data)
        except OSError:
            return


@st.composite
def images(draw: st.DrawFn) -> Image:
    position, extents = 0, []
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300)), max_size=20)):
        extents.append((position + gap, draw(st.binary(min_size=length, max_size=length))))
        position += gap + length
    return Image(position + draw(st.integers(0, 300)), tuple(extents))


@settings(max_examples=50, deadline=None)
@given(image=images())
def test_what_was_sent_is_what_is_written(image: Image) -> None:
    assert received(image.stream, image) == (image.data_bytes, image.content)


def test_the_longest_record_is_written_in_one_piece() -> None:
    image = Image(2 * MAX_RECORD, ((0, b"x" * MAX_RECORD), (MAX_RECORD, b"y" * MAX_RECORD)))
    assert received(image.stream, image) == (2 * MAX_RECORD, image.content)


@pytest.mark.parametrize("length", range(0, len(IMAGE.stream), 37))
def test_a_stream_that_ends_early_is_a_lost_worker(length: int) -> None:
    with pytest.raises(WorkerLost, match="before the volume was complete"):
        received(IMAGE.stream[:length])


def test_nothing_may_follow_the_end() -> None:
    with pytest.raises(ProtocolViolation, match="goes on after its end"):
        received(IMAGE.stream + b"\0")


def test_nothing_of_a_record_is_written_before_all_of_it_is_there(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    sink = Sink()
    theirs.sendall(encode_header(IMAGE.size) + encode_record(0, 10) + b"123456789")
    theirs.close()
    with pytest.raises(WorkerLost):
        receive_volume(ours, sink, IMAGE.size)
    assert sink.calls == []


class Exhausted:
    """A connection for whose next bytes there is no memory."""

    def recv_into(self, _: memoryview) -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")


def test_want_of_memory_in_a_receive_is_not_blamed_on_the_worker() -> None:
    with pytest.raises(ResourcesExhausted, match="there is no memory left on this machine"):
        receive_volume(Exhausted(), Sink(), IMAGE.size)  # type: ignore[arg-type] # as much of one as it takes


def test_a_broken_connection_is_a_lost_worker(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.sendall(b"never read, so that closing resets the connection")
    theirs.close()
    with pytest.raises(WorkerLost):
        receive_volume(ours, Sink(), IMAGE.size)


# --- As a task, and against what the worker says of it -----------------------------------------------

READY = m.VolumeReady(key="a", volume="private", image_size=IMAGE.size)


def unexpected(error: Exception) -> None:
    pytest.fail(f"{error}")


def done(outcome: str = "ok", /, **fields: object) -> m.VolumeDone:
    said: dict[str, object] = {"key": "a", "volume": "private", "outcome": outcome}
    if outcome == "ok":
        said |= {"image_size": IMAGE.size, "data_bytes": IMAGE.data_bytes, "sha256": "0" * 64}
    else:
        said["error"] = m.ErrorInfo(kind="error", reason="no")
    return m.VolumeDone.model_validate({**said, **fields})


async def test_a_complete_volume_is_finished_and_everything_given_back(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    sink = Sink()
    copy = VolumeCopy(READY, ours, sink, unexpected)
    theirs.sendall(IMAGE.stream)
    theirs.close()
    assert await copy.finish(done(), 5) is None
    assert sink.calls[-2:] == ["finish 5000", "abandon"]
    assert bytes(sink.content) == IMAGE.content
    assert ours.fileno() == -1
    await copy.end()  # once more does no harm


@pytest.mark.parametrize("outcome", ["failed", "skipped"])
async def test_a_complete_volume_that_the_worker_takes_back_is_not_finished(
    pair: tuple[socket.socket, socket.socket], outcome: str
) -> None:
    ours, theirs = pair
    sink = Sink()
    copy = VolumeCopy(READY, ours, sink, unexpected)
    theirs.sendall(IMAGE.stream)
    theirs.close()
    assert await copy.finish(done(outcome), 5) is None
    assert sink.calls[-1] == "abandon"
    assert "finish 5000" not in sink.calls


async def test_a_slow_disk_is_not_the_workers_fault(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    sink = Sink(wait=threading.Event())
    copy = VolumeCopy(READY, ours, sink, unexpected)
    theirs.sendall(IMAGE.stream)
    theirs.close()
    assert sink.wait is not None
    asyncio.get_running_loop().call_later(0.3, sink.wait.set)
    assert await copy.finish(done(), 0.05) is None
    assert bytes(sink.content) == IMAGE.content


async def test_a_violation_is_told_at_once(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    told: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
    copy = VolumeCopy(READY, ours, Sink(), told.set_result)
    theirs.sendall(encode_header(IMAGE.size + 1))
    error = await asyncio.wait_for(told, 30)
    assert copy.failure is None or copy.failure is error
    with pytest.raises(ProtocolViolation):
        await copy.finish(done(), 5)
    assert copy.failure is error


async def test_a_failure_of_the_host_ends_the_stream_for_the_worker(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    copy = VolumeCopy(READY, ours, Sink(error=NoSpace("full")), unexpected)
    theirs.sendall(IMAGE.stream[:300])
    assert await asyncio.to_thread(theirs.recv, 1) == b""
    error = await copy.finish(done("skipped"), 5)
    assert isinstance(error, NoSpace)
    assert copy.failure is error


@pytest.mark.parametrize(
    "fields", [{"data_bytes": 1100}, {"data_bytes": 1102}, {"image_size": 4999}, {"image_size": 5001}]
)
async def test_an_answer_that_is_not_what_came_is_refused(
    pair: tuple[socket.socket, socket.socket], fields: dict[str, object]
) -> None:
    ours, theirs = pair
    sink = Sink()
    copy = VolumeCopy(READY, ours, sink, unexpected)
    theirs.sendall(IMAGE.stream)
    theirs.close()
    with pytest.raises(ProtocolViolation, match="not what was announced and sent"):
        await copy.finish(done(**fields), 5)
    assert sink.calls[-1] == "abandon"
    assert not any(call.startswith("finish") for call in sink.calls)


async def test_a_home_is_as_long_as_its_data(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    sink = Sink()
    ready = m.VolumeReady(key="a", volume="home", image_size=IMAGE.size)
    copy = VolumeCopy(ready, ours, sink, unexpected)
    theirs.sendall(encode_header(IMAGE.size) + encode_record(0, 3) + b"tar" + encode_end(3))
    theirs.close()
    assert await copy.finish(done(volume="home", image_size=3, data_bytes=3), 5) is None
    assert sink.calls[-2] == "finish 3"


@pytest.mark.parametrize("cancels", [1, 3])
async def test_a_cancel_waits_for_the_thread_and_gives_everything_back(
    pair: tuple[socket.socket, socket.socket], cancels: int
) -> None:
    ours, theirs = pair
    sink = Sink(wait=threading.Event())
    copy = VolumeCopy(READY, ours, sink, unexpected)
    theirs.sendall(IMAGE.stream[:300])
    finishing = asyncio.create_task(copy.finish(done(), 5))
    for _ in range(cancels):
        await asyncio.sleep(0.03)
        finishing.cancel()
    await asyncio.sleep(0.03)
    assert not finishing.done()
    assert set(sink.calls) == {"abandon"}  # first, so that what the thread waits for ends
    assert sink.wait is not None
    sink.wait.set()
    with pytest.raises(asyncio.CancelledError):
        await finishing
    assert sink.calls[-1] == "abandon"
    assert ours.fileno() == -1
