"""The channel alone: bounds, both ways, and the other side that does not read, or is gone."""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from qubes_restore_svc.errors import HostFailed, ProtocolViolation
from qubes_restore_svc.service import channel as module
from qubes_restore_svc.service.channel import Channel
from qubes_restore_svc.wire.framing import MAX_FRAME, FrameDecoder, encode_frame
from qubes_restore_svc.wire.messages import Cancel, Log, Progress

LINE = Log(level="info", text="x" * 1000)


@dataclass
class Heard:
    """A listener that keeps what it is told."""

    frame_limit: int = 1000
    payloads: list[bytes] = field(default_factory=list)
    violations: list[ProtocolViolation] = field(default_factory=list)
    ends: int = 0

    def received(self, untrusted_payload: bytes) -> None:
        self.payloads.append(untrusted_payload)
        if untrusted_payload == b"bad":
            raise ProtocolViolation("bad")

    def broken(self, violation: ProtocolViolation) -> None:
        self.violations.append(violation)

    def closed(self) -> None:
        self.ends += 1


@pytest.fixture
def heard() -> Heard:
    return Heard()


@contextmanager
def connected(heard: Heard) -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    theirs.setblocking(False)
    with ours, theirs, Channel(ours.fileno(), ours.fileno(), heard) as channel:
        yield channel, theirs


async def read(theirs: socket.socket, decoder: FrameDecoder) -> list[bytes]:
    """Everything that is there, and what comes when that was taken."""
    payloads: list[bytes] = []
    for _turn in range(3):
        try:
            while data := theirs.recv(1 << 20):
                payloads += decoder.feed(data)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        except BlockingIOError:
            await asyncio.sleep(0.001)
    return payloads


async def test_frames_come_in_one_by_one_under_the_limit_of_the_moment(heard: Heard) -> None:
    with connected(heard) as (_, theirs):
        theirs.sendall(encode_frame(b"one") + encode_frame(b"two") + encode_frame(b"y" * 1001))
        await asyncio.sleep(0.001)
    assert heard.payloads == [b"one", b"two"]
    assert len(heard.violations) == 1


async def test_after_a_violation_nothing_is_heard_but_all_of_it_is_read(heard: Heard) -> None:
    with connected(heard) as (_, theirs):
        theirs.sendall(encode_frame(b"bad") + encode_frame(b"good"))
        for _ in range(100):
            await asyncio.get_running_loop().sock_sendall(theirs, b"x" * 100_000)
    assert heard.payloads == [b"bad"]
    assert len(heard.violations) == 1


async def test_the_end_is_told_and_a_reset_is_an_end(heard: Heard) -> None:
    with connected(heard) as (_, theirs):
        theirs.close()
        await asyncio.sleep(0.001)
        await asyncio.sleep(0.001)
    assert heard.ends == 1


async def test_what_nobody_reads_is_kept_up_to_a_limit_and_of_progress_the_newest(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 100_000)
    with connected(heard) as (channel, theirs):
        sent = 0
        while channel.send(LINE, spare=True):
            sent += 1
        assert 100_000 - 2000 < channel.waiting <= 100_000
        for number in range(1000):
            channel.send_progress(Progress(archive_bytes=number))
        assert channel.waiting <= 100_000
        assert channel.send(Cancel())  # what must be said is said
        payloads = await read(theirs, FrameDecoder(MAX_FRAME))
        assert len(payloads) == sent + 2
        assert b'"archive_bytes":999' in payloads[-1]
        assert channel.waiting == 0
        channel.send_progress(Progress(archive_bytes=5))
        assert b'"archive_bytes":5' in (await read(theirs, FrameDecoder(MAX_FRAME)))[0]


async def test_the_last_message_is_waited_for_until_it_is_taken_or_for_its_time(heard: Heard) -> None:
    with connected(heard) as (channel, theirs):
        channel.send(LINE)
        ended = asyncio.create_task(channel.finish(Cancel(), 15.0))
        payloads = await read(theirs, FrameDecoder(MAX_FRAME))
        assert await ended is True
        assert len(payloads) == 2
    with connected(heard) as (channel, theirs):
        for _ in range(1000):
            channel.send(LINE)
        assert await channel.finish(Cancel(), 0.01) is False


async def test_who_is_gone_is_told_nothing_and_nobody_waits_for_him(heard: Heard) -> None:
    with connected(heard) as (channel, theirs):
        theirs.shutdown(socket.SHUT_RD)
        for _ in range(10):
            channel.send(LINE)
        assert await channel.finish(Cancel(), 15.0) is False
        await asyncio.sleep(0)
        assert heard.ends


async def test_two_pipes_will_do_and_files_will_not(heard: Heard, tmp_path: os.PathLike[str]) -> None:
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    with Channel(in_read, out_write, heard) as channel:
        os.write(in_write, encode_frame(b"one"))
        assert await channel.finish(Cancel(), 15.0)
        await asyncio.sleep(0.001)
    assert heard.payloads == [b"one"]
    assert os.get_blocking(in_read)
    assert list(FrameDecoder(100).feed(os.read(out_read, 100))) == [b'{"type":"cancel"}']
    with open(os.devnull, "r+b") as nothing, pytest.raises(HostFailed, match="pipe or a socket"):
        Channel(nothing.fileno(), nothing.fileno(), heard).__enter__()
    for fd in (in_read, in_write, out_read, out_write):
        os.close(fd)
