"""Calls to a socket with a name: what systemd passes on is checked, and then every connection is a call."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from qubes_restore_svc.errors import UsageError
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.qrexec_call import READY
from qubes_restore_svc.worker import daemon
from qubes_restore_svc.worker.daemon import ListeningCalls, inherited_listener

from ..support.backup_writer import PASSPHRASE
from ..support.damage import sample_backup
from ..support.fixtures import REPOSITORY
from .caller import Peer, hung_up
from .storage import LOCATION, FakeStorage, fake_storage
from .support import wait_until

ARCHIVE = sample_backup(log_n=2).to_bytes()

#: What systemd does before it starts the worker: fd 3 is the socket, and the variables say for whom.
_ACTIVATE = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3, inheritable=True);"
    "os.environ.update(LISTEN_FDS='1', LISTEN_FDNAMES='calls', LISTEN_PID=str(os.getpid()));"
    "os.execv(sys.executable, [sys.executable, '-m', 'qubes_restore_svc.worker', *sys.argv[2:]])"
)


# --- The socket ---------------------------------------------------------------------------------------


def passed(descriptor: int, **changes: str | None) -> socket.socket:
    """`inherited_listener`, with `descriptor` as what was passed. Variables may be changed, or missing."""
    told = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "calls"} | changes
    environment = {"HOME": "/x"} | {name: value for name, value in told.items() if value is not None}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(daemon, "_FIRST_PASSED", descriptor)
            return inherited_listener(environment)
    finally:
        assert environment == {"HOME": "/x"}  # nobody who is started from here hears of it


@contextlib.contextmanager
def listening(folder: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, kind) as listener:
        listener.bind(str(folder / "calls.sock"))
        listener.listen()
        yield listener


def test_the_socket_is_taken_over_and_not_inherited_any_further(tmp_path: Path) -> None:
    with listening(tmp_path) as listener:
        os.set_inheritable(listener.fileno(), True)
        taken = passed(listener.fileno())
        assert not os.get_inheritable(taken.fileno())
        assert taken.getsockname() == str(tmp_path / "calls.sock")
        taken.detach()


@pytest.mark.parametrize(
    "changes",
    [
        {"LISTEN_PID": None},
        {"LISTEN_PID": "1"},
        {"LISTEN_PID": ""},
        {"LISTEN_FDS": None},
        {"LISTEN_FDS": "0"},
        {"LISTEN_FDS": "2"},
        {"LISTEN_FDS": "x"},
    ],
)
def test_what_was_passed_to_someone_else_or_is_more_than_one_is_refused(
    changes: dict[str, str | None], tmp_path: Path
) -> None:
    with listening(tmp_path) as listener, pytest.raises(UsageError, match="no socket"):
        passed(listener.fileno(), **changes)


def test_what_is_no_listening_unix_stream_socket_is_refused(tmp_path: Path) -> None:
    one, other = socket.socketpair()
    with (
        one,
        other,
        listening(tmp_path, socket.SOCK_SEQPACKET) as packets,
        socket.create_server(("127.0.0.1", 0)) as internet,
    ):
        for wrong in (one, packets, internet):
            with pytest.raises(UsageError, match="not a listening Unix stream socket"):
                passed(wrong.fileno())
    with open("/dev/null") as file, pytest.raises(UsageError, match="no socket"):
        passed(file.fileno())
    with pytest.raises(UsageError, match="no socket"):
        passed(1 << 20)


# --- Its calls ------------------------------------------------------------------------------------------


async def test_every_connection_is_a_call(tmp_path: Path) -> None:
    with listening(tmp_path) as listener:
        accept = ListeningCalls(listener).accept
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as caller:
                caller.connect(listener.getsockname())
                caller.sendall(b"x")
                connection = await accept()
                assert connection is not None
                with connection:
                    assert await asyncio.get_running_loop().sock_recv(connection, 1) == b"x"


async def test_want_of_descriptors_is_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "_PAUSE_S", 0.001)
    with listening(tmp_path) as listener, socket.socket(socket.AF_UNIX) as caller:
        caller.connect(listener.getsockname())
        troubled = _Troubled(listener, [errno.EMFILE, errno.ECONNABORTED, errno.ENOMEM])
        connection = await ListeningCalls(troubled).accept()
        assert connection is not None and not troubled.troubles
        connection.close()


async def test_a_socket_that_is_broken_brings_no_more_calls(tmp_path: Path) -> None:
    with listening(tmp_path) as listener:
        assert await ListeningCalls(_Troubled(listener, [errno.EINVAL])).accept() is None


class _Troubled(socket.socket):
    """A listening socket whose first accepts fail."""

    def __init__(self, listener: socket.socket, troubles: list[int]) -> None:
        super().__init__(fileno=os.dup(listener.fileno()))
        self.troubles = troubles

    def accept(self) -> tuple[socket.socket, object]:
        if self.troubles:
            raise OSError(self.troubles.pop(0), "trouble")
        return super().accept()


# --- The whole worker ---------------------------------------------------------------------------------


class Activated:
    """A worker that was started for the socket `path`, and calls to it as the qrexec agent makes them."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path, storage: FakeStorage) -> None:
        self.process = process
        self.path = path
        self.storage = storage
        self._peers: list[Peer] = []

    async def call(self, descriptor: bytes) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, str(self.path))
        connection.send(descriptor)
        return connection

    async def session(self) -> Peer:
        connection = await self.call(b"restore.Session dom0\0")
        peer = Peer(*await asyncio.open_connection(sock=connection))
        self._peers.append(peer)
        return peer

    async def ended(self) -> int:
        """Wait for the end of the process; its exit status."""
        return await asyncio.to_thread(self.process.wait, 20)


@pytest.fixture
async def activated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Activated]:
    with fake_storage(tmp_path, ARCHIVE, monkeypatch) as storage, listening(tmp_path) as listener:
        process = subprocess.Popen(
            [sys.executable, "-c", _ACTIVATE, str(listener.fileno()), "--listen"],
            pass_fds=[listener.fileno()],
            cwd=REPOSITORY,
        )
        listener.close()
        with process:
            worker = Activated(process, tmp_path / "calls.sock", storage)
            yield worker
            process.kill()
        for peer in worker._peers:
            peer.writer.transport.abort()


async def test_a_worker_that_systemd_started_answers_serves_once_and_ends(activated: Activated) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(2):  # as often as it is asked, before, …
        ready = await activated.call(b"restore.Session+ready dom0\0")
        assert await loop.sock_recv(ready, 100) == READY
        assert await loop.sock_recv(ready, 1) == b""
    assert activated.process.poll() is None
    assert await hung_up(await activated.call(b"restore.Session work\0"))
    peer = await activated.session()
    ready = await activated.call(b"restore.Session+ready dom0\0")  # … and in the session
    assert await loop.sock_recv(ready, 100) == READY
    assert await hung_up(await activated.call(b"restore.Session dom0\0"))
    peer.open(storage=LOCATION)
    await peer.expect(m.Manifest)
    peer.say(m.Start(mode="verify", keys=("vm10",)))
    assert isinstance((await peer.rest())[-1], m.Finished)
    assert activated.process.poll() is None or activated.process.returncode == 0
    peer.writer.close()
    assert await activated.ended() == 0
    assert [call["answer"] for call in activated.storage.calls] == ["right", "right"]
    assert activated.storage.processes() == []
    with pytest.raises(ConnectionRefusedError):
        await activated.call(b"restore.Session dom0\0")


async def test_a_caller_that_vanishes_ends_the_worker_and_what_it_has_started(activated: Activated) -> None:
    activated.storage.behave("stalls 100")
    peer = await activated.session()
    peer.open(storage=LOCATION)
    await activated.storage.wait_for(1, stalled=True)
    peer.writer.transport.abort()
    assert await activated.ended() == 0
    await asyncio.to_thread(wait_until, lambda: not activated.storage.processes(), "the end of the call")


async def test_what_is_started_from_the_worker_hears_nothing_of_its_socket(activated: Activated) -> None:
    activated.storage.behave("silent")
    peer = await activated.session()
    peer.open(storage=LOCATION)
    await activated.storage.wait_for(1)
    pid = int(activated.storage.calls[0]["pid"])
    process = Path(f"/proc/{pid}")
    try:
        assert b"LISTEN_" not in (process / "environ").read_bytes()
        told = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
        assert PASSPHRASE.encode() not in told
        # Its three streams, the first two of them one socket; the fake reads its files in between.
        streams = {os.readlink(link) for link in (process / "fd").iterdir()}
        assert sum(name.startswith("socket:") for name in streams) == 1
    finally:
        os.kill(pid, signal.SIGKILL)  # it says nothing, and would wait for ever


def test_a_worker_that_was_passed_no_socket_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qubes_restore_svc.worker", "--listen"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 2
    assert "systemd has passed no socket" in done.stderr


def test_the_two_ways_to_be_called_exclude_each_other() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qubes_restore_svc.worker", "--listen", "--calls-fd", "3"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 2 and "not allowed with" in done.stderr
