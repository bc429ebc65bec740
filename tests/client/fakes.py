"""dom0 as the client sees it, played by a test: a coroutine at the other end of a socket.

Strategy: the script says and hears messages one after the other, so that a test knows in which state the call
is. It may say anything, also what dom0 never would.
"""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

from pydantic import SecretStr

from qubes_restore_svc.errors import RestoreError
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.models import ErrorInfo, Message
from qubes_restore_svc.wire.report import Observer, QubeReport, Report, RestoreProgress, VolumeReport
from tests.support.reports import NOON
from tests.support.wire import framed, from_client, heard

PASSPHRASE = "correct horse battery staple"
PATIENCE_S = 60.0

QUBE = c.PlanQube(key="vm1", name="work", klass="AppVM", label="red", decision="take", new_name="work")
OTHER = c.PlanQube(
    key="vm2", name="vault", klass="AppVM", label="black", decision="leave-out", new_name="vault",
    problem="not-selected", remark="not selected",
)  # fmt: skip
RESULT = QubeReport(
    name="work", klass="AppVM", outcome="restored",
    volumes=(VolumeReport(name="private", outcome="ok", size=5, data_bytes=4, fsverity="a" * 64),),
)  # fmt: skip


def request(mode: c.Mode = "restore", **more: object) -> c.OpenBackup:
    """What a client asks for."""
    return c.OpenBackup.model_validate(
        {
            "mode": mode,
            "location": c.BackupLocation(text="/home/user/backup"),
            "passphrase": SecretStr(PASSPHRASE),
            **more,
        }
    )


def plan(number: int = 1, mode: c.Mode = "restore", *qubes: c.PlanQube) -> c.Plan:
    """A plan."""
    return c.Plan(number=number, mode=mode, backup_id="backup-1", qubes=qubes or (QUBE, OTHER))


def report(mode: c.Mode = "restore", status: int = 0, error: RestoreError | None = None) -> Report:
    """What came of it."""
    assert mode != "list"
    return Report(
        mode=mode,
        tool_version="1",
        backup_id="backup-1",
        started=NOON,
        finished=NOON,
        status=status,
        error=None if error is None else ErrorInfo.of(error),
        qubes=(RESULT,),
    )


def refused(error: RestoreError) -> c.Refused:
    """Nothing was done."""
    return c.Refused(error=ErrorInfo.of(error))


class Peer:
    """dom0's end of the call."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, service: str) -> None:
        self.service = service
        self._reader = reader
        self._writer = writer
        self._end = from_client()
        self._heard: list[c.ClientMessage] = []

    async def hear(self, kind: type[Message]) -> c.ClientMessage:
        """The next message, which must be of this kind."""
        while not self._heard:
            data = await self._reader.read(1 << 16)
            assert data, f"the client hung up, where {kind.__name__} was to come"
            self._heard += heard(self._end, data)
        message = self._heard.pop(0)
        assert isinstance(message, kind), message
        return message

    async def hear_end(self) -> None:
        """The client hangs up, without another word."""
        assert not self._heard
        with contextlib.suppress(ConnectionResetError):
            assert await self._reader.read() == b""

    async def say(self, *messages: Message) -> None:
        """Messages, all at once."""
        await self.say_bytes(b"".join(framed(message) for message in messages))

    async def say_bytes(self, data: bytes) -> None:
        """Whatever."""
        self._writer.write(data)
        await self._writer.drain()

    def hang_up(self) -> None:
        """End the call."""
        self._writer.close()


Script = Callable[[Peer], Awaitable[None]]


class FakeConnection:
    """The client's end."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, why: RestoreError | None
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.closed = 0
        self._why = why

    async def fault(self) -> RestoreError | None:
        """As the test wants it."""
        return self._why

    async def close(self) -> None:
        """Counts."""
        self.closed += 1
        self.writer.transport.abort()


class FakeTransport:
    """Connects to a script; `check` then raises what went wrong in it."""

    def __init__(self, script: Script, why: RestoreError | None = None) -> None:
        self._script = script
        self._why = why
        self.connection: FakeConnection
        self._playing: asyncio.Task[None]

    async def connect(self, service: str) -> FakeConnection:
        """Starts the script."""
        ours, theirs = socket.socketpair()
        self.connection = FakeConnection(*await asyncio.open_connection(sock=ours), self._why)
        reader, writer = await asyncio.open_connection(sock=theirs)
        self._playing = asyncio.create_task(self._play(Peer(reader, writer, service)))
        return self.connection

    async def check(self) -> None:
        """The script has come to its end, and the client has closed the call."""
        async with asyncio.timeout(PATIENCE_S):
            await self._playing
        assert self.connection.closed == 1

    async def _play(self, peer: Peer) -> None:
        try:
            await self._script(peer)
        finally:
            peer.hang_up()


class Watching(Observer):
    """An observer that notes everything."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    def progress(self, progress: RestoreProgress) -> None:
        """Noted."""
        self.seen.append(("progress", progress.archive_bytes, progress.percent))

    def log(self, level: str, text: str) -> None:
        """Noted."""
        self.seen.append(("log", level, text))

    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        """Noted."""
        self.seen.append(("volume", qube, volume, image_size))

    def qube_finished(self, report: QubeReport) -> None:
        """Noted."""
        self.seen.append(("finished", report.name, report.outcome))
