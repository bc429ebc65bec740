"""The channel alone: bounds, both ways, and the other side that does not read, or is gone."""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from qubes_restore_svc.dom0_service import conversation as module
from qubes_restore_svc.dom0_service.conversation import Channel
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.wire.messages import Cancel, Log
from qubes_restore_svc.wire.report import RestoreProgress
from tests.support.wire import framed

LINE = framed(Log(level="info", text="x" * 1000))
LAST = framed(Cancel())


def progress(number: int) -> bytes:
    return framed(RestoreProgress(archive_bytes=number))


@dataclass
class Heard:
    """A listener that keeps what it is told."""

    data: bytes = b""
    ends: int = 0

    def received(self, untrusted_data: bytes) -> None:
        self.data += untrusted_data

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
    with ours, theirs, Channel(ours.fileno(), ours.fileno(), heard.received, heard.closed) as channel:
        yield channel, theirs


async def read(theirs: socket.socket) -> bytes:
    """Everything that is there, and what comes when that was taken."""
    received = b""
    for _turn in range(3):
        try:
            while data := theirs.recv(1 << 20):
                received += data
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        except BlockingIOError:
            await asyncio.sleep(0.001)
    return received


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
            channel.send_progress(progress(number))
        assert channel.waiting <= 100_000
        assert channel.send(LAST)  # what must be said is said
        assert await read(theirs) == LINE * sent + LAST + progress(999)
        assert channel.waiting == 0
        channel.send_progress(progress(5))
        assert await read(theirs) == progress(5)


async def test_the_last_message_is_waited_for_until_it_is_taken_or_for_its_time(heard: Heard) -> None:
    with connected(heard) as (channel, theirs):
        channel.send(LINE)
        ended = asyncio.create_task(channel.finish(LAST, 15.0))
        assert await read(theirs) == LINE + LAST
        assert await ended is True
    with connected(heard) as (channel, theirs):
        for _ in range(1000):
            channel.send(LINE)
        assert await channel.finish(LAST, 0.01) is False


async def test_who_is_gone_is_told_nothing_and_nobody_waits_for_him(heard: Heard) -> None:
    with connected(heard) as (channel, theirs):
        theirs.shutdown(socket.SHUT_RD)
        for _ in range(10):
            channel.send(LINE)
        assert await channel.finish(LAST, 15.0) is False
        await asyncio.sleep(0)
        assert heard.ends


async def test_two_pipes_will_do_and_files_will_not(heard: Heard, tmp_path: os.PathLike[str]) -> None:
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    with Channel(in_read, out_write, heard.received, heard.closed) as channel:
        os.write(in_write, b"one")
        assert await channel.finish(LAST, 15.0)
        await asyncio.sleep(0.001)
    assert heard.data == b"one"
    assert os.get_blocking(in_read)
    assert os.read(out_read, 100) == LAST
    with open(os.devnull, "r+b") as nothing, pytest.raises(HostFailed, match="pipe or a socket"):
        Channel(nothing.fileno(), nothing.fileno(), heard.received, heard.closed).__enter__()
    for fd in (in_read, in_write, out_read, out_write):
        os.close(fd)
