"""The daemon: who may call what, how often, and what is hung up."""

import asyncio
import errno
import os
import resource
import socket
import subprocess
import sys

import pytest

from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.qrexec_call import READY
from qubes_restore_svc.worker import daemon

from ..support.damage import sample_backup
from ..support.fixtures import REPOSITORY
from .caller import Caller, hung_up, open_descriptors
from .support import Engine, file_with, receive

ARCHIVE = sample_backup(log_n=2).to_bytes()


@pytest.mark.parametrize(
    "descriptor",
    [
        b"restore.Session work\0",
        b"restore.Session dom0x\0",
        b"restore.Session Dom0\0",
        b"restore.Session+ sys-usb\0",
        b"restore.Volume+vm10.private work\0",
        b"restore.Archive work\0",
        b"restore.Session+argument dom0\0",
        b"restore.Session+ready work\0",
        b"restore.Session+READY dom0\0",
        b"restore.Session+ready+ dom0\0",
        b"restore.Session\0",
        b"restore.Nothing dom0\0",
        b"qubes.VMShell dom0\0",
        b"\0",
        b" dom0\0",
        b"restore.Session dom0 extra\0",
        b"restore.Session\xff dom0\0",
        b"restore.Volume dom0\0",
        b"restore.Volume+ dom0\0",
        b"restore.Volume+vm10.private dom0\0",
    ],
)
async def test_a_call_that_is_not_dom0s_or_not_for_what_is_served_is_hung_up(descriptor: bytes) -> None:
    with file_with(ARCHIVE) as archive:
        async with Caller(archive) as caller:
            assert await hung_up(caller.call(descriptor))
            await caller.opened()  # and nothing has come of it


@pytest.mark.parametrize("descriptor", [b"restore.Session dom0\0", b"restore.Session+ dom0\0"])
async def test_dom0_gets_its_session(descriptor: bytes) -> None:
    with file_with(ARCHIVE) as archive:
        async with Caller(archive) as caller:
            peer = await caller.session(descriptor)
            peer.open()
            await peer.expect(m.Manifest)


async def test_a_daemon_that_can_take_no_calls_says_why() -> None:
    async def accept() -> socket.socket | None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    serving = daemon.Daemon(accept, Engine(), memory=1 << 28, jobs=1, archive_fd=None).serve()
    with pytest.raises(OSError, match="Too many open files"):
        await asyncio.wait_for(serving, 20)


def test_a_worker_that_is_ready_can_dump_no_core_and_write_no_file() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "qubes_restore_svc.worker", "--calls-fd", str(theirs.fileno())]
    with ours, theirs:
        worker = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=REPOSITORY)
        try:
            assert ours.recv(16) == READY
            assert resource.prlimit(worker.pid, resource.RLIMIT_CORE)[1] <= 1
            assert resource.prlimit(worker.pid, resource.RLIMIT_FSIZE) == (0, 0)
        finally:
            worker.kill()
            worker.wait()


async def test_dom0_is_told_that_the_worker_is_there_and_that_is_no_session() -> None:
    with file_with(ARCHIVE) as archive:
        async with Caller(archive) as caller:
            for _ in range(3):
                connection = caller.call(b"restore.Session+ready dom0\0")
                loop = asyncio.get_running_loop()
                assert await loop.sock_recv(connection, 100) == READY
                assert await hung_up(connection)
            gone = caller.call(b"restore.Session+ready dom0\0")
            gone.close()  # before it was answered, perhaps
            await caller.opened()


async def test_a_descriptor_may_come_byte_by_byte_and_what_follows_it_is_the_services() -> None:
    with file_with(ARCHIVE) as archive:
        async with Caller(archive) as caller:
            connection = caller.connect()
            for byte in b"restore.Session dom0\0":
                connection.send(bytes([byte]))
                await asyncio.sleep(0)
            assert not await hung_up(connection, 0.05)


async def test_a_descriptor_without_an_end_is_hung_up() -> None:
    async with Caller(None) as caller:
        assert await hung_up(caller.call(b"a" * 256), within_s=2)
        assert await hung_up(caller.call(b"restore.Session dom0".ljust(300, b" ") + b"\0"), within_s=2)


async def test_a_caller_that_leaves_before_its_descriptor_is_whole_is_forgotten() -> None:
    async with Caller(None) as caller:
        connection = caller.call(b"restore.Session dom0")
        connection.shutdown(socket.SHUT_WR)
        assert await hung_up(connection)


async def test_a_caller_that_says_nothing_is_hung_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "_DESCRIPTOR_TIMEOUT_S", 0.1)
    async with Caller(None) as caller:
        silent = caller.connect()
        begun = caller.call(b"restore.Sess")
        assert await hung_up(silent) and await hung_up(begun)


async def test_callers_that_say_nothing_do_not_keep_others_waiting() -> None:
    with file_with(ARCHIVE) as archive:
        async with Caller(archive) as caller:
            for _ in range(20):
                caller.connect()
            await caller.opened()


async def test_a_second_session_is_refused_and_the_first_goes_on() -> None:
    with file_with(ARCHIVE) as archive:
        async with Caller(archive) as caller:
            peer = await caller.session()
            peer.open()
            assert await hung_up(caller.call(b"restore.Session dom0\0"))
            await peer.expect(m.Manifest)


async def test_a_volume_can_be_fetched_once_by_its_name_while_it_is_announced() -> None:
    with file_with(ARCHIVE) as archive:
        async with Caller(archive) as caller:
            peer = await caller.opened()
            peer.say(m.Start(mode="restore", keys=("vm11",), digest="sha256"))
            ready = await peer.expect(m.VolumeReady)
            assert (ready.key, ready.volume) == ("vm11", "private")
            for argument in (b"vm11.root", b"vm10.private", b"vm11", b"vm11.private.x", b"VM11.private"):
                assert await hung_up(caller.call(b"restore.Volume+" + argument + b" dom0\0"))
            assert await hung_up(caller.call(b"restore.Volume+vm11.private work\0"))
            connection = caller.call(b"restore.Volume+vm11.private dom0\0")
            connection.setblocking(True)
            receiving = asyncio.create_task(asyncio.to_thread(receive, connection))
            assert await hung_up(caller.call(b"restore.Volume+vm11.private dom0\0"))
            done = await peer.expect(m.VolumeDone)
            assert await receiving == done.sha256
            assert await hung_up(caller.call(b"restore.Volume+vm11.private dom0\0"))


async def test_the_archive_can_come_as_a_call_once() -> None:
    async with Caller(None) as caller:
        peer = await caller.session()
        peer.open()
        await peer.next_progress()
        archive = caller.call(b"restore.Archive dom0\0")
        archive.setblocking(True)
        feeding = asyncio.create_task(asyncio.to_thread(archive.sendall, ARCHIVE))
        await peer.expect(m.Manifest)
        assert await hung_up(caller.call(b"restore.Archive dom0\0"))
        peer.say(m.Start(mode="verify", keys=("vm10",)))
        await feeding
        archive.close()
        assert isinstance((await peer.rest())[-1], m.Finished)


async def test_an_archive_is_refused_when_there_is_one() -> None:
    with file_with(ARCHIVE) as archive:
        async with Caller(archive) as caller:
            assert await hung_up(caller.call(b"restore.Archive dom0\0"))


async def test_the_daemon_ends_when_its_session_does() -> None:
    with file_with(ARCHIVE) as archive:
        async with Caller(archive) as caller:
            peer = await caller.opened()
            peer.writer.close()
            await caller.ended()


async def test_the_daemon_ends_when_the_link_has_gone_whatever_it_is_doing() -> None:
    with file_with(ARCHIVE) as archive:
        caller = Caller(archive)
        async with caller:
            waiting = caller.connect()
        assert caller.serving.done()
        waiting.close()


async def test_hanging_up_before_the_archive_has_come_ends_the_daemon() -> None:
    async with Caller(None) as caller:
        peer = await caller.session()
        peer.open()
        await peer.next_progress()
        peer.writer.close()
        await caller.ended()


async def test_nothing_is_left_open_when_the_daemon_has_ended() -> None:
    with file_with(ARCHIVE) as archive:
        before = open_descriptors()
        async with Caller(archive, engine=Engine()) as caller:
            peer = await caller.opened()
            caller.connect()
            caller.call(b"restore.Volume+vm1.x dom0\0")
            peer.say(m.Start(mode="verify", keys=("vm10",)))
            await peer.rest()
            peer.writer.close()
        del caller, peer
        await asyncio.sleep(0.01)
        assert open_descriptors() <= before, os.listdir("/proc/self/fd")
